"""What surgery and decoding cost: an ablated forward beside a plain one, and our greedy decoding beside `model.generate`.

    python -m benchmarks.ablate [--store]

Each way is run in turn, several times, in one process; ratios are medians of the ratios within a round. Decoding continues
prompts of equal length by a fixed number of tokens, once alone and once 32 side by side. Ten forwards are ablated by one block, as
prompts of a task are; entering it is part of the time. "checked" is what `evaluate` does where the
model gives the expected answer: one forward over prompt and answer. On a CPU `generate` is timed without our kernels as well, and operators are
counted. The limit is the time of the products with the weights, at the rate of a
large product, or of a step's bytes, at the rate of reading a long vector, whichever is longer. `--store` keeps the table for the book.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.limits import bytes_per_second, operations_a_token, operations_per_second, step_bytes
from benchmarks.profiles import where_time_goes
from benchmarks.timing import by_transformers_alone, options, over_first, rounds, store
from staterank_utils import domain_prompts, load_model, load_tokenizer
from staterank_utils.decoding import generate_greedily
from staterank_utils.markdown import markdown_table
from staterank_utils.models import make_cache
from staterank_utils.surgery import ablate_heads, all_heads, softmax_heads

FORWARD_TOKENS, FORWARDS = 1024, 10
PROMPT_TOKENS = 64
NEW_TOKENS = 32
BATCHES = (1, 32)
GOAL = (
    "an ablated forward takes at most 1.02 plain ones; ours decodes no slower than generate; on two CPU cores, 5,000 tokens/s read, 150 and 1,500 "
    "decoded at batches of 1 and 32"
)


def rows_of(seconds: dict[str, list[float]], tokens: int, limit: float) -> list[tuple[str, ...]]:
    """One row a way: median milliseconds, tokens a second, median ratio to the first way, and the tokens a second of a limit in seconds."""
    ratios = over_first(seconds)
    rows: list[tuple[str, ...]] = []
    for name, values in seconds.items():
        median = statistics.median(values)
        of_limit = "–" if "checked" in name else f"{tokens / limit:,.0f}"
        rows.append((name, f"{1000 * median:.0f}", f"{tokens / median:,.0f}", f"{ratios[name]:.3f}", of_limit))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options(__doc__, argv, repeats=15)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    prompts = domain_prompts("prose", tokenizer, n_prompts=max(BATCHES), n_tokens=FORWARD_TOKENS, seed=0)
    half = all_heads(model)[::2]
    has_softmax = bool(softmax_heads(model))

    @torch.inference_mode()
    def forward() -> None:
        for _ in range(FORWARDS):
            model.base_model(input_ids=prompts[:1].to(model.device), use_cache=False)

    def ablated() -> None:
        with ablate_heads(model, half):
            forward()

    peaks = {
        "operations per second": operations_per_second(model.device, model.dtype),
        "bytes per second": bytes_per_second(model.device),
    }
    a_token = operations_a_token(model) / peaks["operations per second"]
    a_byte = 1 / peaks["bytes per second"]
    rows = rows_of(
        rounds({"plain forwards": forward, "half of the heads ablated": ablated}, arguments.repeats),
        FORWARDS * FORWARD_TOKENS,
        FORWARDS * FORWARD_TOKENS * a_token,
    )
    decoded: dict[str, Callable[[], object]] = {}
    for batch in BATCHES:
        ids = prompts[:batch, :PROMPT_TOKENS].to(model.device)

        @torch.inference_mode()
        def library(ids: torch.Tensor = ids) -> torch.Tensor:
            # Of itself it fails on a model without softmax layers, for which it must be given a cache.
            cache = {} if has_softmax else {"past_key_values": make_cache(model)}
            made: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **cache)  # fmt: skip
            return made[:, PROMPT_TOKENS:]

        def ours(ids: torch.Tensor = ids, drafts: list[list[int]] | None = None) -> list[list[int]]:
            return generate_greedily(model, ids.tolist(), max_new_tokens=[NEW_TOKENS] * len(ids), drafts=drafts)

        ways: dict[str, Callable[[], object]] = {
            f"generate, batch {batch}": library,
            f"ours, batch {batch}": ours,
            f"ours, checked, batch {batch}": partial(ours, drafts=ours()),
        }
        decoded[f"ours, batch {batch}"] = ours
        if model.device.type == "cpu":
            ways[f"transformers alone: generate, batch {batch}"] = by_transformers_alone(model, library)
        limit = NEW_TOKENS * max(batch * a_token, a_byte * step_bytes(model, ids))
        rows += rows_of(rounds(ways, max(1, arguments.repeats // 3)), batch * NEW_TOKENS, limit)
    head = (
        f"{FORWARDS} forwards of {FORWARD_TOKENS:,} tokens; {PROMPT_TOKENS} + {NEW_TOKENS} tokens decoded",
        "ms, median",
        "tokens/s",
        "over the first of its group",
        "limit, tokens/s",
    )
    table = markdown_table(head, rows)
    if model.device.type == "cpu":
        table += "\n\n" + where_time_goes(decoded)
    print(f"{table}\n\ngoal: {GOAL}")
    if arguments.store:
        store("ablate", parameters=vars(arguments) | peaks, goal=GOAL, table=table)


if __name__ == "__main__":
    main()
