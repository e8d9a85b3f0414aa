"""Rank and nuclear norm of states without their singular values, for a GPU, where decompositions of small matrices are slow.

The rank is an inertia: by Sylvester's law, the number of eigenvalues of S^T S over a threshold is the number of positive pivots when
the threshold is taken from the diagonal and the matrix eliminated symmetrically, with no eigenvalue computed. The nuclear norm is
the trace of Q^T S with Q the polar factor of S, which products alone converge to. All in float64; a whole measurement is some
hundred small kernels, which are recorded once for each shape and replayed. `staterank_utils.spectra` chooses between these and
decompositions; on a CPU everything here runs as well, through LAPACK, so that tests can compare.
"""

from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SQUARINGS = 12  # of the Gram matrix: its largest eigenvalue is then known to 5e-5 at worst, far inside EDGE
EDGE = 1e-3  # relative distance from the threshold within which a singular value is called on the edge
CHUNK = 192  # states that are measured together
LARGEST_TILE = 128  # rows of a matrix that one program of the kernel holds in registers
GROWTH, N_GROWTH = (3.4445, -4.7750, 2.0315), 14  # quintic that lifts small values fastest; 14 steps lift 2e-8 to 0.7
POLISH, N_POLISH = (15 / 8, -10 / 8, 3 / 8), 4  # quintic that converges to 1 from there
TINY = torch.finfo(torch.float64).tiny


def positive_eigenvalues(matrices: Float[Tensor, "n d d"]) -> Int[Tensor, " n"]:
    """How many eigenvalues of symmetric matrices are positive: the inertia, by elimination.

    Source: Sylvester's law of inertia; for matrices beyond one tile, Haynsworth, "Determination of the inertia of a partitioned
    Hermitian matrix", 1968: the inertia is that of a leading block plus that of its Schur complement.

    Args:
        matrices: float64, symmetric; only numbers far from 0 in relation to the rounding of the largest eigenvalue count reliably.

    Example:
        >>> positive_eigenvalues(torch.diag(torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64))[None])
        tensor([2])
    """
    d = matrices.shape[-1]
    if not matrices.is_cuda:
        return _by_lapack(matrices)
    if d <= LARGEST_TILE:
        return _by_kernel(matrices)
    head, side, tail = matrices[:, :LARGEST_TILE, :LARGEST_TILE], matrices[:, :LARGEST_TILE, LARGEST_TILE:], matrices[:, LARGEST_TILE:, LARGEST_TILE:]  # fmt: skip
    complement = tail - side.mT @ torch.linalg.solve_ex(head, side)[0]
    return _by_kernel(head.contiguous()) + positive_eigenvalues(complement.contiguous())


def _by_lapack(matrices: Float[Tensor, "n d d"]) -> Int[Tensor, " n"]:
    """Bunch and Kaufman's factorization: a block of two has one eigenvalue of each sign, a block of one its own."""
    factors, pivots, _ = torch.linalg.ldl_factor_ex(matrices)
    single = pivots > 0
    alone = (factors.diagonal(dim1=-2, dim2=-1) > 0) & single
    return alone.sum(-1) + (~single).sum(-1) // 2


def _by_kernel(matrices: Float[Tensor, "n d d"]) -> Int[Tensor, " n"]:
    counts = torch.empty(len(matrices), dtype=torch.int32, device=matrices.device)
    d = matrices.shape[-1]
    tile = max(16, 1 << (d - 1).bit_length())
    _kernel()[(len(matrices),)](matrices, counts, d, TILE=tile, num_warps=16 if tile > 64 else 4)
    return counts.long()


@cache
def _kernel() -> Any:
    from staterank_utils import inertia_kernel  # triton is there only where torch was built for a GPU

    return inertia_kernel.count_positive_pivots


def gram(states: Float[Tensor, "n d_k d_v"]) -> tuple[Float[Tensor, "n d d"], Float[Tensor, " n"]]:
    """S^T S or S S^T, the smaller, of states scaled to a largest entry of 1, and the scales.

    Args:
        states: any real floating dtype.

    Returns:
        float64; the scale of a zero state is 1.

    Example:
        >>> matrices, scale = gram(torch.tensor([[[0.0, 4.0, 0.0]]]))
        >>> matrices.tolist(), scale.tolist()
        ([[[1.0]]], [4.0])
    """
    wide, scale = _scaled(states)
    return wide.mT @ wide, scale


def _scaled(states: Float[Tensor, "n d_k d_v"]) -> tuple[Float[Tensor, "n rows d"], Float[Tensor, " n"]]:
    """States in float64 with no more columns than rows and a largest entry of 1, and what they were divided by."""
    wide = states.double()
    if wide.shape[-2] < wide.shape[-1]:
        wide = wide.mT
    largest = wide.abs().amax((-2, -1))
    scale = torch.where(largest > 0, largest, 1.0)
    return wide / scale[:, None, None], scale


def largest_eigenvalue(matrices: Float[Tensor, "n d d"]) -> Float[Tensor, " n"]:
    """The largest eigenvalue of positive semidefinite matrices, by repeated squaring and a Rayleigh quotient.

    Args:
        matrices: float64, symmetric, positive semidefinite.

    Returns:
        A lower bound, at most 5e-5 of itself too small; where one eigenvalue stands out at all, exact to rounding.

    Example:
        >>> largest_eigenvalue(torch.diag(torch.tensor([9.0, 4.0], dtype=torch.float64))[None]).item()
        9.0
    """
    power = matrices
    for _ in range(SQUARINGS):
        power = power / power.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
        power = power @ power
    # The column under the largest diagonal entry is not orthogonal to the leading eigenvector.
    column = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    vector = power.gather(-1, column[:, None, None].expand(-1, power.shape[-1], 1))
    vector = vector / vector.norm(dim=-2, keepdim=True).clamp_min(TINY)
    return (vector.mT @ matrices @ vector)[:, 0, 0]


def ranks(
    states: Float[Tensor, "n d_k d_v"], *, rel_tol: float, factors: tuple[float, ...] = (1.0,)
) -> Int[Tensor, "n factor"]:
    """Numbers of singular values over each of some multiples of `rel_tol` times the largest one.

    Args:
        states: real floating dtype, finite, on any device.
        rel_tol: in (0, 1), not under 1e-7, where the rounding of squares begins to count.
        factors: the multiples.

    Example:
        >>> ranks(torch.diag(torch.tensor([1.0, 1.0005e-2, 1e-6]))[None], rel_tol=1e-2, factors=(1.001, 1.0, 0.999)).tolist()
        [[1, 2, 2]]
    """
    matrices, _ = gram(states)
    largest = largest_eigenvalue(matrices)
    shifts = torch.stack([(factor * rel_tol) ** 2 * largest for factor in factors], 1)
    diagonal = torch.eye(matrices.shape[-1], dtype=torch.float64, device=states.device)
    shifted = matrices[:, None] - shifts[..., None, None] * diagonal
    counts = positive_eigenvalues(shifted.flatten(0, 1)).view(shifts.shape)
    return torch.where(largest[:, None] > 0, counts, 0)


def stable_ranks(states: Float[Tensor, "n d_k d_v"]) -> Float[Tensor, " n"]:
    """Squared Frobenius norm over the square of the largest singular value; 0 for a zero state.

    Args:
        states: real floating dtype, finite, on any device.

    Example:
        >>> stable_ranks(torch.eye(3)[None]).tolist()
        [3.0]
    """
    matrices, _ = gram(states)
    largest = largest_eigenvalue(matrices)
    return torch.where(largest > 0, matrices.diagonal(dim1=-2, dim2=-1).sum(-1) / largest.clamp_min(TINY), 0.0)


def nuclear_norms(states: Float[Tensor, "n d_k d_v"]) -> Float[Tensor, " n"]:
    """Nuclear norms by the polar factor: the trace of Q^T S, with Q from products alone.

    Source: the quintic iterations of Jordan et al., "Muon", 2024 (growth), and of Kovarik, 1970 (polish); singular values under
    2e-8 of the largest count as less than they are, so the error is under 2e-8 d of the largest.

    Args:
        states: real floating dtype, finite, on any device.

    Returns:
        float64.

    Example:
        >>> nuclear_norms(torch.diag(torch.tensor([3.0, -4.0]))[None]).round(decimals=9).tolist()
        [7.0]
    """
    wide, scale = _scaled(states)
    largest = largest_eigenvalue(wide.mT @ wide).sqrt()
    factor = wide / ((1 + EDGE) * largest).clamp_min(TINY)[:, None, None]
    for a, b, c in (*[GROWTH] * N_GROWTH, *[POLISH] * N_POLISH):
        square = factor.mT @ factor
        factor = a * factor + factor @ torch.baddbmm(square, square, square, beta=b, alpha=c)
    return (factor * wide).sum((-2, -1)) * scale


def in_chunks(measure: Callable[..., Tensor], states: Float[Tensor, "*lead d_k d_v"], **options: Hashable) -> Tensor:
    """`measure(states, **options)` for any number of states, on the CPU; on a GPU from recordings, one for each kind of call.

    Chunks of one size let one recording serve any number of states; zero states fill the last one.

    Args:
        measure: `ranks`, `nuclear_norms` or `stable_ranks`.
        states: on any device.
        options: of the measure.

    Returns:
        ``(*lead, ...)``: what the measure gives for each state.

    Example:
        >>> in_chunks(nuclear_norms, torch.eye(2).expand(3, 1, 2, 2)).round(decimals=9).tolist()
        [[2.0], [2.0], [2.0]]
    """
    flat = states.reshape(-1, *states.shape[-2:])
    if not flat.is_cuda or min(flat.shape[-2:]) > LARGEST_TILE:
        measured = torch.cat([measure(part, **options) for part in flat.split(CHUNK)])
    else:
        graph, inputs, outputs = _recorded(measure, tuple(flat.shape[1:]), flat.dtype, flat.device, **options)
        parts = []
        for part in flat.split(CHUNK):
            inputs[: len(part)] = part
            inputs[len(part) :] = 0
            graph.replay()
            parts.append(outputs[: len(part)].clone())
        measured = torch.cat(parts)
    return measured.view(*states.shape[:-2], *measured.shape[1:]).cpu()


@lru_cache(maxsize=8)
def _recorded(
    measure: Callable[..., Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    **options: Hashable,
) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    inputs = torch.zeros((CHUNK, *shape), dtype=dtype, device=device)
    measure(inputs, **options)  # compiles kernels and fills the libraries' workspaces, which a recording must not
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = measure(inputs, **options)
    return graph, inputs, outputs
