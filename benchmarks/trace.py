"""What a trace costs: 12 positions with rank and norm on one prompt, beside one plain forward and beside the naive way.

    python -m benchmarks.trace [--store]

Each way is run in turn, several times, in one process; the table gives medians and ratios of medians. The naive way is what one
writes first: a forward from the start for every position, an SVD for every head. On a CPU transformers is timed without our kernels
as well, and operators are counted. On a GPU the ranks at every one of the 2,048 positions are
taken as well, and the table says for how long the GPU is at work in each way and with how many kernels and copies: in the rest of the time it
waits for the next launch. The limit is the time of the products with the weights of one forward, at the rate that a large product of their dtype
reaches in the same process. `--store` keeps the table for the book.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.limits import operations_a_token, operations_per_second
from benchmarks.profiles import gpu_work, where_gpu_time_goes, where_time_goes
from benchmarks.timing import by_transformers_alone, options, rounds, store
from staterank_utils import domain_prompts, effective_rank, load_model, load_tokenizer, trace_states
from staterank_utils.architectures import linear_layers
from staterank_utils.markdown import markdown_table
from staterank_utils.models import make_cache
from staterank_utils.spectra import rank_and_norm

POSITIONS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
GOAL = "12 positions with rank and norm in at most 1.15 forwards on a CPU, 1.1 on a GPU; the rank at every position in at most 3 on a GPU"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options(__doc__, argv, repeats=15)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    prompt = domain_prompts("prose", tokenizer, n_prompts=1, n_tokens=POSITIONS[-1], seed=0)
    layers = [layer.index for layer in linear_layers(model)]

    @torch.inference_mode()
    def forward(n_tokens: int = POSITIONS[-1]) -> list[torch.Tensor]:
        cache = make_cache(model)
        model.base_model(input_ids=prompt[:, :n_tokens].to(model.device), past_key_values=cache, use_cache=True)
        return [cache.layers[index].recurrent_states[0] for index in layers]

    def trace() -> None:
        trace_states(model, prompt, positions=POSITIONS, reduce=rank_and_norm)

    def every_position() -> None:
        trace_states(model, prompt, positions=range(1, POSITIONS[-1] + 1), reduce=effective_rank)

    def naive() -> None:
        for t in POSITIONS:
            for state in forward(t):
                for head in state[0]:
                    torch.linalg.svdvals(head.double())

    states = trace_states(model, prompt, positions=POSITIONS).values.to(model.device)
    ways: dict[str, Callable[[], object]] = {
        "one plain forward": forward,
        "trace of 12 positions, rank and norm": trace,
        "of that, rank and norm of the states alone": lambda: rank_and_norm(states),
        "naive: forward a position, SVD a head": naive,
    }
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        ways["trace of every position, rank"] = every_position
    else:
        ways["transformers alone: one plain forward"] = by_transformers_alone(model, forward)
    seconds = rounds(ways, arguments.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain = medians["one plain forward"]
    rate = operations_per_second(model.device, model.dtype)
    limit = POSITIONS[-1] * operations_a_token(model) / rate
    head = [
        f"{POSITIONS[-1]:,} tokens, model {arguments.model}",
        "ms, median",
        "over one forward",
        "range",
        "limit, ms",
    ]
    rows = []
    for name, m in medians.items():
        low, high = (1000 * end for end in (min(seconds[name]), max(seconds[name])))
        bound = f"{1000 * limit:.2g}" if "forward" in name and "naive" not in name else "–"
        rows.append([name, f"{1000 * m:.0f}", f"{m / plain:.2f}", f"{low:.0f} to {high:.0f}", bound])
    if on_gpu:
        head += ["GPU at work, ms", "kernels and copies"]
        work = {name: gpu_work(way) for name, way in ways.items()}
        for row in rows:
            busy, n_launched = (sum(numbers) for numbers in zip(*work[row[0]].values(), strict=True))
            row += [f"{1000 * busy:.1f}", f"{n_launched:,}"]
        explained = where_gpu_time_goes(work)
    else:
        explained = where_time_goes({name: ways[name] for name in list(ways)[:2]})
    table = markdown_table(head, rows) + "\n\n" + explained
    print(f"{table}\n\ngoal: {GOAL}")
    if arguments.store:
        made_with = vars(arguments) | {"positions": POSITIONS, "operations per second": rate}
        store("trace", parameters=made_with, goal=GOAL, table=table)


if __name__ == "__main__":
    main()
