"""What 38.9 % less state gives in speed: reading a prompt and decoding, whole and smaller models side by side.

    python -m benchmarks.prune [--store]

"heads" is Joint Rank-Norm Pruning, "channels" the reduction of key channels at the same bytes of state. Each batch size is
timed for all variants in turn, in one process; ratios of times are medians of the ratios within a round, so under 1 is
faster. The floor is what decoding could come down to if memory traffic were all: bytes of weights, read once a step, and of states
and convolution inputs, read and written once a step for each prompt, and of keys and values, read; over those of the whole model.
`--store` keeps the table for the book.
"""

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from benchmarks.limits import read, step_bytes
from benchmarks.timing import options, over_first, rounds, store
from staterank_utils import domain_prompts, load_model, load_tokenizer, prune_heads, select_heads
from staterank_utils.channels import keep_channels, order_channels
from staterank_utils.decoding import generate_greedily
from staterank_utils.markdown import markdown_table
from staterank_utils.selection import PAPER_SHARE, measure_saturation

READ_TOKENS = 256
PROMPT_TOKENS = 16
NEW_TOKENS = {"cpu": 32, "cuda": 256}  # on a GPU, enough that recording the graph of a step does not count
GOAL = "decoding without 38.9 % of the heads is faster at a large batch on a GPU"


def decode(model: PreTrainedModel, ids: torch.Tensor) -> None:
    n_new = NEW_TOKENS[model.device.type]
    generate_greedily(model, ids[:, :PROMPT_TOKENS].tolist(), max_new_tokens=[n_new] * len(ids))


def variants(model: PreTrainedModel, prompts: torch.Tensor) -> dict[str, PreTrainedModel]:
    scores = measure_saturation(model, prompts)
    return {
        "whole": model,
        "heads": prune_heads(model, select_heads(scores, model=model)),
        "channels": keep_channels(model, order_channels(model, prompts), share=PAPER_SHARE),
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options(__doc__, argv, repeats=5)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    smaller = variants(model, domain_prompts("code", tokenizer, n_prompts=4, n_tokens=512, seed=1000))
    batches = (1, 8, 64, 512) if model.device.type == "cuda" else (1, 8, 64)
    prompts = domain_prompts("prose", tokenizer, n_prompts=64, n_tokens=READ_TOKENS, seed=0).to(model.device)
    rows = []
    for batch in batches:
        ids = prompts.repeat(-(-batch // len(prompts)), 1)[:batch]
        times = {
            what: rounds({name: partial(way, each, ids) for name, each in smaller.items()}, arguments.repeats)
            for what, way in (("read", read), ("decode", decode))
        }
        ratios = {what: over_first(seconds) for what, seconds in times.items()}
        halfway = ids[:, : PROMPT_TOKENS + NEW_TOKENS[model.device.type] // 2]
        whole = step_bytes(model, halfway)
        for name, each in smaller.items():
            speed = {
                what: batch * n / statistics.median(times[what][name])
                for what, n in (("read", READ_TOKENS), ("decode", NEW_TOKENS[model.device.type]))
            }
            numbers = [text for what in times for text in (f"{speed[what]:,.0f}", f"{ratios[what][name]:.2f}")]
            rows.append((str(batch), name, *numbers, f"{step_bytes(each, halfway) / whole:.2f}"))
    head = ("batch", "model", "read, tokens/s", "time over whole", "decoded, tokens/s", "time over whole", "floor")
    table = markdown_table(head, rows)
    print(f"{table}\n\ngoal: {GOAL}")
    if arguments.store:
        store("prune", parameters=vars(arguments), goal=GOAL, table=table)


if __name__ == "__main__":
    main()
