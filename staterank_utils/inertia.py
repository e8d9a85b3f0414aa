"""Rank and nuclear norm of states without their singular values, for a GPU, where decompositions of small matrices are slow.

The rank is an inertia: by Sylvester's law, the number of eigenvalues of S^T S over a threshold is the number of positive pivots when
the threshold is taken from the diagonal and the matrix eliminated symmetrically, with no eigenvalue computed. The nuclear norm is
the trace of Q^T S with Q the polar factor of S, which products alone converge to. All in float64, by batched products and one batched
elimination. `staterank_utils.spectra` chooses between these and decompositions; on a CPU everything here runs as well, through
LAPACK, so that tests can compare.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

SQUARINGS, AT_ONCE = 11, 4  # of the Gram matrix, and how many of them at most before it is scaled again
WIDE_SQUARINGS = 3  # of them the first, in float32
STARTS = 8  # vectors that the power is given
EDGE = 1e-3  # relative distance from the threshold within which a singular value is called on the edge; over the rounding of a bound
NUMBERS_AT_ONCE = (
    2**26
)  # numbers in the states that are measured together, at most: three and a half moments of Qwen3-Next
BYTES_A_NUMBER = 56  # of memory that ranks and norms take at most, measured
NORM_ERROR = 1e-5  # of a nuclear norm, relative
EXCHANGES = 12  # enough for the best polynomial to rounding, whatever the interval
HAIR = 1e-12  # of a threshold's square
SMALLEST = torch.finfo(torch.float64).tiny


def positive_eigenvalues(matrices: Float[Tensor, "n d d"]) -> Int[Tensor, " n"]:
    """How many eigenvalues of symmetric matrices are positive: the inertia, by elimination.

    Source: Sylvester's law of inertia. On a GPU the positive pivots of an elimination without exchanges, which the libraries there
    do for thousands of small matrices at once; on a CPU Bunch and Kaufman's factorization, of whose blocks one of two
    rows has an eigenvalue of each sign.

    Args:
        matrices: float64, symmetric; only numbers far from 0 in relation to the rounding of the largest eigenvalue count reliably.

    Example:
        >>> positive_eigenvalues(torch.diag(torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64))[None])
        tensor([2])
    """
    if matrices.is_cuda:
        factors, _, _ = torch.linalg.lu_factor_ex(matrices.mT, pivot=False)  # by columns, as it is copied there
        return (factors.diagonal(dim1=-2, dim2=-1) > 0).sum(-1)
    factors, pivots, _ = torch.linalg.ldl_factor_ex(matrices)
    single = pivots > 0
    alone = (factors.diagonal(dim1=-2, dim2=-1) > 0) & single
    return alone.sum(-1) + (~single).sum(-1) // 2


@dataclass(frozen=True)
class Prepared:
    """What all measures of states begin with.

    Attributes:
        wide, scale: as `scaled` makes them.
        gram: wide^T wide.
        largest: its largest eigenvalue.
        scales: what `upper_bound` makes a bound on it of.

    Example:
        >>> prepare(torch.eye(2)[None]).largest.round(decimals=9).tolist()
        [1.0]
    """

    wide: Float[Tensor, "n rows d"]
    scale: Float[Tensor, " n"]
    gram: Float[Tensor, "n d d"]
    largest: Float[Tensor, " n"]
    scales: Float[Tensor, "n scale"]


def prepare(states: Float[Tensor, "n d_k d_v"]) -> Prepared:
    """Scaled states, their Gram matrices and the largest eigenvalues of these.

    Args:
        states: real floating dtype, finite, on any device.

    Example:
        >>> prepared = prepare(torch.tensor([[[0.0, 4.0, 0.0]]]))
        >>> prepared.gram.tolist(), prepared.scale.tolist(), prepared.largest.tolist()
        ([[[16.0]]], [1.0], [16.0])
    """
    wide, scale = scaled(states)
    matrices = wide.mT @ wide
    return Prepared(wide, scale, matrices, *largest_eigenvalue(matrices))


def scaled(states: Float[Tensor, "n d_k d_v"]) -> tuple[Float[Tensor, "n rows d"], Float[Tensor, " n"]]:
    """States in float64 with no more columns than rows, and what they were divided by so that squares of float64 neither overflow nor vanish.

    Args:
        states: real floating dtype, finite, on any device. Of narrower dtypes nothing is divided.

    Example:
        >>> scaled(torch.tensor([[[0.0, 4.0, 2.0]]]).double())[0].tolist()
        [[[0.0], [1.0], [0.5]]]
    """
    wide = states.double()
    if wide.shape[-2] < wide.shape[-1]:
        wide = wide.mT
    if states.dtype != torch.float64:
        return wide, wide.new_ones(len(wide))
    largest = wide.abs().amax((-2, -1))
    scale = torch.where(largest > 0, largest, 1.0)
    return wide / scale[:, None, None], scale


def largest_eigenvalue(matrices: Float[Tensor, "n d d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n scale"]]:
    """The largest eigenvalue of positive semidefinite matrices, by repeated squaring and two steps of Lanczos.

    The squarings only find a direction; the error of the eigenvalue is quadratic in that of the direction. The first of them, which tell
    a crowd at the top apart, are done in float32, the rest in bfloat16. The direction is what the power makes of a few fixed random vectors,
    of which the one that grows most is taken: a single one may stand nearly at right angles to the eigenvector, and then rounding
    is what grows; a column of the power would be blind to what another block of the matrix holds.

    Args:
        matrices: float64, symmetric, positive semidefinite.

    Returns:
        The eigenvalue from below: exact to rounding where one or two stand out, and where many crowd at the top, in the worst
        spectrum of the tests, 1e-3 of itself too small. And what the power was multiplied by on the way, and the trace that it ended with, of
        which `upper_bound` makes a bound.

    Example:
        >>> largest, scales = largest_eigenvalue(torch.diag(torch.tensor([9.0, 4.0], dtype=torch.float64))[None])
        >>> largest.item(), 9.0 < upper_bound(scales).item() < 9.05
        (9.0, True)
    """
    power, scales = matrices, []
    for squaring in range(SQUARINGS):
        if _is_scaled(squaring):
            power, scale = _over_trace(power, torch.bfloat16 if squaring else torch.float32)
            scales.append(scale.double())
        power = power @ power
    scales.append(power.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).clamp_min(SMALLEST))
    grown = (power @ _starts(power.shape[-1], power.device)).double()
    length, most = grown.norm(dim=-2, keepdim=True).max(-1, keepdim=True)
    first = grown.take_along_dim(most, -1) / length.clamp_min(SMALLEST)
    image = matrices @ first
    own = first.mT @ image
    rest = image - own * first
    beside = rest.norm(dim=-2, keepdim=True)
    second = rest / beside.clamp_min(SMALLEST)
    other = second.mT @ (matrices @ second)
    half = (own - other) / 2
    return (other + half + torch.hypot(half, beside))[:, 0, 0], torch.stack(scales, 1)


def upper_bound(scales: Float[Tensor, "n scale"]) -> Float[Tensor, " n"]:
    """What the largest eigenvalue does not exceed, from the trace of the power: at most d^(1 / 2^SQUARINGS) times the eigenvalue, and as
    much again for rounding.

    Args:
        scales: from `largest_eigenvalue`.

    Example:
        >>> _, scales = largest_eigenvalue(torch.eye(16, dtype=torch.float64)[None])
        >>> 1.0 < upper_bound(scales).item() < 1.003
        True
    """
    return (scales.log() @ _roots(scales.device) + EDGE).exp()


def _is_scaled(squaring: int) -> bool:
    """Whether the power is put over its trace before this squaring."""
    return squaring == 0 or (squaring >= WIDE_SQUARINGS and (squaring - WIDE_SQUARINGS) % AT_ONCE == 0)


def _over_trace(matrices: Float[Tensor, "n d d"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positive semidefinite matrices in another dtype, and what they were multiplied by: their largest eigenvalue is then between
    1 / sqrt(d) and sqrt(d). One pass over memory.
    """
    d = matrices.shape[-1]
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(d * torch.finfo(matrices.dtype).tiny)
    scale = d**0.5 / trace
    return torch.mul(matrices, scale[:, None, None], out=torch.empty_like(matrices, dtype=dtype)), scale


@cache
def _roots(device: torch.device) -> Float[Tensor, " scale"]:
    """Of the power, that undo what it was multiplied by before each squaring, and the power itself."""
    undone = [-(2.0**-squaring) for squaring in range(SQUARINGS) if _is_scaled(squaring)]
    return torch.tensor([*undone, 2.0**-SQUARINGS], dtype=torch.float64, device=device)


@cache
def _starts(d: int, device: torch.device) -> Float[Tensor, "d start"]:
    return torch.randn(d, STARTS, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)


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
    return _ranks(prepare(states), rel_tol, factors)


def _ranks(prepared: Prepared, rel_tol: float, factors: tuple[float, ...]) -> Int[Tensor, "n factor"]:
    largest, diagonal = prepared.largest, prepared.gram.diagonal(dim1=-2, dim2=-1)
    own, counts = diagonal.clone(), []
    for factor in factors:
        # A hair over the threshold: a value that is equal to it does not count, and must not be a pivot of 0.
        torch.sub(own, (1 + HAIR) * (factor * rel_tol) ** 2 * largest[:, None], out=diagonal)
        counts.append(positive_eigenvalues(prepared.gram))
    diagonal.copy_(own)
    return torch.where(largest[:, None] > 0, torch.stack(counts, 1), 0)


def stable_ranks(states: Float[Tensor, "n d_k d_v"]) -> Float[Tensor, " n"]:
    """Squared Frobenius norm over the square of the largest singular value; 0 for a zero state.

    Args:
        states: real floating dtype, finite, on any device.

    Example:
        >>> stable_ranks(torch.eye(3)[None]).round(decimals=9).tolist()
        [3.0]
    """
    prepared = prepare(states)
    matrices, largest = prepared.gram, prepared.largest
    return torch.where(largest > 0, matrices.diagonal(dim1=-2, dim2=-1).sum(-1) / largest.clamp_min(SMALLEST), 0.0)


def nuclear_norms(states: Float[Tensor, "n d_k d_v"]) -> Float[Tensor, " n"]:
    """Nuclear norms by the polar factor: the trace of Q^T S, with Q from products alone.

    Source: the composition of best odd quintics of Amsel et al., "The Polar Express", arXiv:2505.16932. Singular values
    under NORM_ERROR / 2d of the largest may count for nothing, all others to NORM_ERROR / 4, so the error of a norm is under NORM_ERROR
    of itself.

    Args:
        states: real floating dtype, finite, on any device.

    Returns:
        float64.

    Example:
        >>> nuclear_norms(torch.diag(torch.tensor([3.0, -4.0]))[None]).round(decimals=4).tolist()
        [7.0]
    """
    return _nuclear_norms(prepare(states))


def _nuclear_norms(prepared: Prepared) -> Float[Tensor, " n"]:
    wide, bound = prepared.wide, upper_bound(prepared.scales)[:, None, None]
    factor, square = wide / bound.sqrt(), prepared.gram / bound
    polynomial, factored = torch.empty_like(square), torch.empty_like(wide)
    for a, b, c in polar_steps(wide.shape[-1]):
        # X (a + b G + c G^2), G = X^T X, with the square completed: what is added stands on the diagonal, and nothing large is copied.
        square.diagonal(dim1=-2, dim2=-1).add_(b / (2 * c))
        torch.baddbmm(polynomial, square, square, beta=0, alpha=c, out=polynomial)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a - b * b / (4 * c))
        factor, factored = torch.bmm(factor, polynomial, out=factored), factor
        torch.bmm(factor.mT, factor, out=square)
    # One step of Newton and Schulz, X (3 - G) / 2, of which the trace with S is enough.
    overlap = torch.bmm(factor.mT, wide, out=polynomial)
    trace = overlap.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (1.5 * trace - 0.5 * torch.linalg.vecdot(square.flatten(1), overlap.flatten(1))) * prepared.scale


def polar_steps(d: int) -> tuple[tuple[float, float, float], ...]:
    """The polynomials of `quintics` that `nuclear_norms` takes for states of d singular values, before its last step, which squares what is left.

    Example:
        >>> len(polar_steps(64)) <= len(polar_steps(256))
        True
    """
    return quintics(NORM_ERROR / (2 * d), (NORM_ERROR / 6) ** 0.5)


def ranks_and_norms(states: Float[Tensor, "n d_k d_v"], *, rel_tol: float) -> Float[Tensor, "n 2"]:
    """`ranks` at one threshold and `nuclear_norms`, side by side in float64, from one preparation.

    Args:
        states, rel_tol: as there.

    Example:
        >>> ranks_and_norms(torch.diag(torch.tensor([3.0, -4.0]))[None], rel_tol=1e-4).round(decimals=4).tolist()
        [[2.0, 7.0]]
    """
    prepared = prepare(states)
    return torch.stack([_ranks(prepared, rel_tol, (1.0,))[:, 0].double(), _nuclear_norms(prepared)], 1)


@cache
def quintics(smallest: float, error: float) -> tuple[tuple[float, float, float], ...]:
    """Odd polynomials a x + b x^3 + c x^5 whose composition maps [smallest, 1] to within `error` of 1.

    Each is the best of its kind on the interval that those before it leave, found by exchange: the greatest distances from 1
    alternate in sign at the two ends and the two inner extremes.

    Args:
        smallest: in (0, 1).
        error: in (0, 1).

    Example:
        >>> x = np.logspace(-7, 0, 50)
        >>> for a, b, c in quintics(1e-7, 1e-6):
        ...     x = a * x + b * x**3 + c * x**5
        >>> bool(np.abs(x - 1).max() < 1e-6)
        True
    """
    found, low, high = [], smallest, 1.0
    while high - low > 2 * error:
        inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
        for _ in range(EXCHANGES):
            x = np.array([low, *inner, high])
            a, b, c, distance = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
            inner = np.sqrt((-3 * b + np.array([1, -1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
            inner.sort()
        found.append((float(a), float(b), float(c)))
        low, high = 1 - abs(distance), 1 + abs(distance)
    return tuple(found)


def _numbers_at_once(device: torch.device) -> int:
    """As many as fill a GPU, or as half of its free memory is enough for."""
    if device.type != "cuda":
        return NUMBERS_AT_ONCE
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(NUMBERS_AT_ONCE, (torch.cuda.mem_get_info(device)[0] + unused) // (2 * BYTES_A_NUMBER))


def in_chunks(measure: Callable[..., Tensor], states: Float[Tensor, "*lead d_k d_v"], **options: Any) -> Tensor:
    """`measure(states, **options)` for any number of states, as many at a time as fill a GPU, or as half of its free memory is enough for.

    Args:
        measure: `ranks`, `nuclear_norms`, `ranks_and_norms` or `stable_ranks`.
        states: on any device.
        options: of the measure.

    Returns:
        ``(*lead, ...)``: what the measure gives for each state, on the device of the states.

    Example:
        >>> in_chunks(nuclear_norms, torch.eye(2).expand(3, 1, 2, 2)).round(decimals=4).tolist()
        [[2.0], [2.0], [2.0]]
    """
    flat = states.detach().reshape(-1, *states.shape[-2:])
    # Few fit anyway, and to ask for the free memory takes as long as they do.
    n_numbers = NUMBERS_AT_ONCE if flat.numel() < NUMBERS_AT_ONCE // 16 else _numbers_at_once(states.device)
    size = max(1, n_numbers // flat[0].numel())
    measured = torch.cat([measure(part, **options) for part in flat.split(size)])
    return measured.view(*states.shape[:-2], *measured.shape[1:])
