"""What watching a training costs: one measurement of the states beside one training step.

    python -m benchmarks.watch [--store]

A step is forward, backward and AdamW in float32 on 4 windows of 512 tokens. The measurement is `layer_metrics` on prompts of 512 tokens, as
`StateRankCallback` makes it at every log. Both are run in turn, in one process; the ratio is the median of the ratios within a round. The
last columns spread it over the steps between two logs: 500 by default in transformers' Trainer. `--store` keeps the table for the book.
"""

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.timing import options, over_first, rounds, store
from staterank_utils import domain_prompts, load_model, load_tokenizer
from staterank_utils.callback import layer_metrics
from staterank_utils.markdown import markdown_table

N_TOKENS, WINDOWS = 512, 4
PROMPTS = (1, 4)
BETWEEN = (500, 100, 10)  # steps between two logs
GOAL = "under 2 % of a step at the Trainer's default of 500 steps between logs"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options(__doc__, argv, repeats=5)
    model, tokenizer = load_model(arguments.model, dtype=torch.float32), load_tokenizer(arguments.model)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = domain_prompts("prose", tokenizer, n_prompts=WINDOWS, n_tokens=N_TOKENS, seed=0).to(model.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = rounds(
        {"step": step, **{f"{n}": partial(layer_metrics, model, ids[:n]) for n in PROMPTS}}, arguments.repeats
    )
    ratios = over_first(seconds)
    rows = [
        (
            f"{n} x {N_TOKENS}", f"{statistics.median(seconds[f'{n}']):.3f} s", f"{statistics.median(seconds['step']):.3f} s",
            f"{ratios[f'{n}']:.2f}", *(f"{ratios[f'{n}'] / steps:.2%}" for steps in BETWEEN),
        )
        for n in PROMPTS
    ]  # fmt: skip
    head = ("prompts", "measurement", "step", "ratio", *(f"every {steps} steps" for steps in BETWEEN))
    table = markdown_table(head, rows)
    print(f"{table}\n\ngoal: {GOAL}")
    if arguments.store:
        store("watch", parameters=vars(arguments), goal=GOAL, table=table)


if __name__ == "__main__":
    main()
