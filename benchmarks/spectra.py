"""Rank and nuclear norm of one moment of a large model, beside the decompositions that one would reach for.

    python -m benchmarks.spectra [--store]

1,152 random states of 128 x 128, as many as Qwen3-Next has, with singular values that decay over eight orders of magnitude, float32.
Each way is run in turn in one process. Ranks are compared with those of a float64 SVD; a head is on the edge where they differ between
thresholds a thousandth over and under. The limit is the time of the float64 operations that a way cannot do without, at the rate that a large float64
product reaches in the same process. `--store` keeps the table for the book.
"""

import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.limits import operations_per_second
from benchmarks.profiles import where_time_goes
from benchmarks.timing import options, over_first, rounds, store
from staterank_utils.inertia import polar_steps
from staterank_utils.markdown import markdown_table
from staterank_utils.spectra import effective_rank, effective_rank_bounds, nuclear_norm, rank_and_norm, singular_values

N_STATES, D = 1152, 128
REL_TOL = 1e-4
GOAL = "on a GPU at most 5 ms for the rank, 20 ms for rank and norm; on two CPU cores at most 300 ms for the rank; every rank that of the SVD, except on the edge"


def decaying(n: int, d: int) -> Tensor:
    """Float32 states whose singular values fall from 1 to 1e-8, each at its own pace."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, d, d, dtype=torch.float64, generator=generator))[0] for _ in range(2))
    pace = 2 + 6 * torch.rand(n, 1, dtype=torch.float64, generator=generator)
    sigma = 10 ** (-pace * torch.linspace(0, 1, d, dtype=torch.float64))
    return (left * sigma[:, None] @ right).float()


def products_needed(device: str) -> dict[str, float]:
    """Of one state, in products of two matrices of its size, by our ways."""
    if device == "cpu":  # the Gram matrix, and its reduction to tridiagonal form (4/3 of d^3)
        return dict.fromkeys(
            ("ours: rank", "ours: nuclear norm", "ours: rank and norm", "ours: all singular values"), 1 + 2 / 3
        )
    # The Gram matrix, elimination (a third of d^3); three products a step of the polar factor. Squarings are in narrower dtypes.
    shared, elimination = 1, 1 / 6
    polar_factor = 3 * len(polar_steps(D))
    return {
        "ours: rank": shared + elimination,
        "ours: nuclear norm": shared + polar_factor,
        "ours: rank and norm": shared + elimination + polar_factor,
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options(__doc__, argv, repeats=5, on_model=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = decaying(N_STATES, D).to(device)
    exact = torch.linalg.svdvals(states.cpu().double())
    rank, norm = (exact > REL_TOL * exact[:, :1]).sum(-1), exact.sum(-1)

    def eigenvalues() -> Tensor:
        wide = states.double()
        return torch.linalg.eigvalsh(wide.mT @ wide)

    ways: dict[str, Callable[[], object]] = {
        "svdvals, one state at a time": lambda: [torch.linalg.svdvals(state) for state in states],
        "svdvals, batched": lambda: torch.linalg.svdvals(states),
        "eigvalsh of float64 Gram matrices": eigenvalues,
        "ours: rank": functools.partial(effective_rank, states),
        "ours: nuclear norm": functools.partial(nuclear_norm, states),
        "ours: rank and norm": functools.partial(rank_and_norm, states),
        "ours: rank, and which are on the edge": lambda: (effective_rank(states), effective_rank_bounds(states)),
        "ours: all singular values": functools.partial(singular_values, states),
    }
    seconds = rounds(ways, arguments.repeats)
    medians, ratios = ({name: statistics.median(values) for name, values in seconds.items()}, over_first(seconds))
    rate = operations_per_second(device, torch.float64) / (2 * D**3)  # products of two states a second
    limits = {name: f"{1000 * N_STATES * n / rate:.1f}" for name, n in products_needed(device).items()}
    rows = [(name, f"{1000 * medians[name]:,.1f}", f"{ratios[name]:.4f}", limits.get(name, "–")) for name in ways]
    table = markdown_table((f"{N_STATES:,} states of {D} x {D}", "ms, median", "over the first", "limit, ms"), rows)
    low, high = effective_rank_bounds(states)
    differ, edge = effective_rank(states).cpu() != rank, (low != high).cpu()
    error = ((nuclear_norm(states).cpu() - norm) / norm).abs().max().item()
    table += (
        f"\n\nRanks that differ from the SVD's: {int(differ.sum())} of {N_STATES:,}, of these not on the edge: "
        f"{int((differ & ~edge).sum())}; on the edge: {int(edge.sum())}. Largest relative error of a nuclear norm: {error:.0e}."
    )
    if device == "cpu":
        explained = "eigvalsh of float64 Gram matrices", "ours: rank"
        table += "\n\n" + where_time_goes({name: ways[name] for name in explained})
    print(f"{table}\n\ngoal: {GOAL}")
    if arguments.store:
        peak = {"operations per second": rate * 2 * D**3}
        store("spectra", parameters=vars(arguments) | peak, goal=GOAL, table=table)


if __name__ == "__main__":
    main()
