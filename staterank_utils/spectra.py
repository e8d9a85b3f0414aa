"""How many directions a state uses: from a matrix to its singular values, and from those to one number.

Three measures keep three names. `effective_rank` counts singular values over a threshold and is the paper's; `entropy_rank`
and `stable_rank` need no threshold and weigh the values instead. Each takes states and answers on their device; `Spectrum`
gives them all from singular values that are already at hand.
"""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from staterank_utils import inertia

REL_TOL = 1e-4  # the paper's threshold
AT_ONCE = 32  # states that one thread decomposes together
_LATER: ContextVar[list[tuple[tuple[int, ...], Tensor]] | None] = ContextVar("checks that wait", default=None)


def singular_values(state: Float[Tensor, "*lead d_k d_v"]) -> Float[Tensor, "*lead d"]:
    """Singular values of states, largest first.

    Computed in float64 on the CPU, where batches of small matrices are faster than on a GPU. A float64 state goes through an
    SVD. Any narrower state goes through the eigenvalues of its Gram matrix, three times faster: the absolute error is then
    under 1e-7 of the largest value, no more than the rounding of a float32 state itself moves it, and a value that rounding
    would put under the root of a negative number is 0.

    Args:
        state: ``(*lead, d_k, d_v)``, any real floating dtype, any device; [K, V] and [V, K] give the same.

    Returns:
        float64 on the CPU, ``(*lead, min(d_k, d_v))``, in the unit of the state.

    Raises:
        ValueError: fewer than two axes, no rows or columns, not a real floating dtype, or a NaN or infinity.

    Example:
        >>> singular_values(torch.diag(torch.tensor([1.0, 3.0])))
        tensor([3., 1.], dtype=torch.float64)
    """
    _check(state)
    here = state.detach().cpu()
    decomposed = torch.linalg.svdvals if state.dtype == torch.float64 else _from_gram
    values = torch.cat(_side_by_side(decomposed, here))
    return values.view(*here.shape[:-2], values.shape[-1])


def _from_gram(states: Float[Tensor, "n d_k d_v"]) -> Float[Tensor, "n d"]:
    """Singular values from the eigenvalues of Gram matrices, a few states at a time, which stay in the cache."""
    values = states.new_empty(len(states), min(states.shape[1:]), dtype=torch.float64)
    for part, room in zip(states.split(AT_ONCE), values.split(AT_ONCE), strict=True):
        wide, _ = inertia.scaled(part)  # whose squares, in float64, neither overflow nor vanish
        torch.sqrt(torch.linalg.eigvalsh(wide.mT @ wide).flip(-1).clamp_min_(0), out=room)
    return values


def _check(state: Tensor) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(
            f"expected states as a tensor of shape (..., d_k, d_v), got {type(state).__name__}: make one with torch.tensor"
        )
    if state.ndim < 2:
        raise ValueError(f"a state is a matrix: expected (..., d_k, d_v), got shape {tuple(state.shape)}")
    if 0 in state.shape[-2:]:
        raise ValueError(f"a state has at least one row and one column, got shape {tuple(state.shape)}")
    if not state.dtype.is_floating_point:
        raise ValueError(f"expected a real floating dtype, got {state.dtype}")
    if not state.numel():
        return
    # Both ends of all values: a NaN is both, and one pass finds them.
    finite, later = torch.isfinite(torch.stack(torch.aminmax(state.detach()))).all(), _LATER.get()
    if state.is_cuda and later is not None:
        later.append((tuple(state.shape), finite))
    else:
        _check_finite(tuple(state.shape), finite)


def _check_finite(shape: tuple[int, ...], finite: Tensor) -> None:
    if not finite:
        raise ValueError(f"state of shape {shape} holds a NaN or an infinity")


@contextmanager
def finite_at_the_end() -> Iterator[None]:
    """A block in which states on a GPU are checked for NaN and infinity when it ends, since asking makes the GPU wait.

    Raises:
        ValueError: at the end, a state within was not finite.

    Example:
        >>> with finite_at_the_end():
        ...     effective_rank(torch.eye(3)).item()
        3
    """
    checks: list[tuple[tuple[int, ...], Tensor]] = []
    token = _LATER.set(checks)
    try:
        yield
    except torch.linalg.LinAlgError:
        # If a decomposition fails on NaN input, the NaN is reported instead of the LinAlgError.
        for shape, finite in checks:
            _check_finite(shape, finite)
        raise
    finally:
        _LATER.reset(token)
    for shape, finite in checks:
        _check_finite(shape, finite)


def decompose(
    state: Float[Tensor, "*lead d_k d_v"],
) -> tuple[Float[Tensor, "*lead d_k d"], Float[Tensor, "*lead d"], Float[Tensor, "*lead d d_v"]]:
    """Singular vectors and values of states: U, sigma (largest first) and V^T with state = U diag(sigma) V^T.

    Args:
        state: as in `singular_values`.

    Returns:
        float64, on the CPU, where batches of small matrices are faster than on a GPU.

    Example:
        >>> u, sigma, vh = decompose(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
        >>> sigma.tolist(), ((u * sigma) @ vh).tolist()
        ([3.0, 1.0], [[0.0, 3.0], [1.0, 0.0]])
    """
    wide = state.detach().to(device="cpu", dtype=torch.float64)
    parts = _side_by_side(functools.partial(torch.linalg.svd, full_matrices=False), wide)
    u, sigma, vh = (torch.cat(part).reshape(*wide.shape[:-2], *part[0].shape[1:]) for part in zip(*parts, strict=True))
    return u, sigma, vh


def _side_by_side(decomposed: Callable[[Tensor], Any], matrices: Float[Tensor, "*lead n m"]) -> list[Any]:
    """The results of a decomposition, one for each thread's share of the matrices, since LAPACK takes them one after the other.

    Each thread keeps to itself: a matrix of 128 x 128 that LAPACK spreads over threads of its own takes four times longer, and a thread of the pool that once
    had such threads slows down all later work of the process, since OpenMP then counts more threads than cores. The number that LAPACK
    goes by is one for all threads, so it is 1 while the pool works, and what it was afterwards.
    """
    n_threads = torch.get_num_threads()
    shares = matrices.reshape(-1, *matrices.shape[-2:]).tensor_split(n_threads)

    def alone(share: Tensor) -> Any:
        torch.set_num_threads(1)  # a thread that waited since an earlier call may have another number
        return decomposed(share)

    torch.set_num_threads(1)
    try:
        return list(_threads().map(alone, shares))
    finally:
        torch.set_num_threads(n_threads)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "staterank")


# A forked process has none of the threads, and would wait for them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)


@dataclass(frozen=True)
class Spectrum:
    """Measures of states whose singular values are known.

    Attributes:
        sigma: singular values ``(*lead, d)``, largest first.

    Example:
        >>> spectrum = Spectrum(torch.tensor([4.0, 2.0, 0.0]))
        >>> spectrum.effective_rank().item(), spectrum.nuclear_norm().item(), spectrum.stable_rank().item()
        (2, 6.0, 1.25)
    """

    sigma: Float[Tensor, "*lead d"]

    def effective_rank(self, *, rel_tol: float = REL_TOL) -> Int[Tensor, "*lead"]:
        """See `effective_rank`."""
        _check_range(rel_tol)
        return (self.sigma > rel_tol * self.sigma[..., :1]).sum(-1)

    def nuclear_norm(self) -> Float[Tensor, "*lead"]:
        """See `nuclear_norm`."""
        return self.sigma.sum(-1)

    def stable_rank(self) -> Float[Tensor, "*lead"]:
        """See `stable_rank`."""
        return self._relative().square().sum(-1)

    def entropy_rank(self) -> Float[Tensor, "*lead"]:
        """See `entropy_rank`."""
        relative = self._relative()
        share = relative / relative.sum(-1, keepdim=True).clamp_min(1.0)
        return torch.where(self.sigma[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)

    def _relative(self) -> Float[Tensor, "*lead d"]:
        """Singular values over the largest one; all 0 for a zero state."""
        largest = self.sigma[..., :1]
        return torch.where(largest > 0, self.sigma / largest, 0.0)


def effective_rank(state: Float[Tensor, "*lead d_k d_v"], *, rel_tol: float = REL_TOL) -> Int[Tensor, "*lead"]:
    """Count the singular values larger than `rel_tol` times the largest one.

    On the CPU they are computed and counted. On a GPU they are counted without being computed (`staterank_utils.inertia`), some
    hundred times faster than by a decomposition there; `effective_rank_bounds` tells where that could matter. A `rel_tol` under
    1e-7, where the rounding of squares begins to count, goes through singular values on the CPU. States of every size go the
    same way, as many at a time as fill a GPU or the cache of a core.

    Source: Eq. 6 of arXiv:2602.02195, as reported by an independent reader. There: S_t is `state`, epsilon is `rel_tol`.

    Args:
        state: as in `singular_values`. A float16 or bfloat16 state was rounded to about 1e-3 or 8e-3 of its values; under a
            smaller threshold, what is counted is that rounding, so it is refused.
        rel_tol: relative threshold, dimensionless, in (0, 1).

    Returns:
        int64 per leading index, 0..min(d_k, d_v). A zero state has rank 0.

    Raises:
        ValueError: `rel_tol` is outside (0, 1) or below the resolution of the state's dtype, or as in `singular_values`.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([1.0, 1e-2, 1e-6]))).item()
        2
    """
    return _ranks_over(state, rel_tol, (1.0,))[..., 0]


def effective_rank_bounds(
    state: Float[Tensor, "*lead d_k d_v"], *, rel_tol: float = REL_TOL, within: float = 1e-3
) -> tuple[Int[Tensor, "*lead"], Int[Tensor, "*lead"]]:
    """`effective_rank` at thresholds a little over and a little under the one asked for: where they differ, a value is on the edge.

    Args:
        state, rel_tol: as in `effective_rank`.
        within: relative distance from the threshold, in (0, 1); on a GPU at least 1e-3, twice what the threshold itself may be off by.

    Returns:
        Smallest and largest rank, int64 per leading index. For a trace, side by side:
        ``reduce=lambda states: torch.stack(effective_rank_bounds(states), -1)``.

    Raises:
        ValueError: `within` is outside (0, 1) or too small for a GPU, or as in `effective_rank`.

    Example:
        >>> low, high = effective_rank_bounds(torch.diag(torch.tensor([1.0, 1.0005e-4, 1e-6])))
        >>> low.item(), high.item()
        (1, 2)
    """
    if not 0 < within < 1:
        raise ValueError(f"within must be in (0, 1), got {within}")
    if state.is_cuda and within < inertia.EDGE:
        raise ValueError(
            f"within must be at least {inertia.EDGE} on a GPU, where the largest singular value is only known to half of that, got {within}: "
            "take the states to the CPU"
        )
    low, high = _ranks_over(state, rel_tol, (1 + within, 1 - within)).unbind(-1)
    return low, high


def rank_and_norm(state: Float[Tensor, "*lead d_k d_v"]) -> Float[Tensor, "*lead 2"]:
    """`effective_rank` and `nuclear_norm` side by side, for one pass of `trace_states`; states, ways and errors as there.

    One decomposition on a CPU, one preparation on a GPU serve both.

    Example:
        >>> rank_and_norm(torch.diag(torch.tensor([3.0, 1.0]))).tolist()
        [2.0, 4.0]
    """
    _check_resolution(state, REL_TOL)
    if state.is_cuda and state.numel():
        _check(state)
        return inertia.in_chunks(inertia.ranks_and_norms, state, rel_tol=REL_TOL)
    spectrum = Spectrum(singular_values(state))
    return torch.stack([spectrum.effective_rank().double(), spectrum.nuclear_norm()], -1).to(state.device)


def _check_range(rel_tol: float) -> None:
    if not 0 < rel_tol < 1:
        raise ValueError(f"rel_tol must be in (0, 1), got {rel_tol}")


def _check_resolution(state: Tensor, rel_tol: float) -> None:
    if state.dtype.is_floating_point and rel_tol < torch.finfo(state.dtype).eps:
        raise ValueError(
            f"rel_tol={rel_tol} is below the resolution of {state.dtype}, {torch.finfo(state.dtype).eps:.1g}: the rank would count rounding; "
            "keep states in float32, or raise rel_tol"
        )


def _ranks_over(state: Tensor, rel_tol: float, factors: tuple[float, ...]) -> Int[Tensor, "*lead factor"]:
    """Ranks at multiples of a threshold."""
    _check_range(rel_tol)
    _check_resolution(state, rel_tol)
    # Counted without a decomposition where the square of the threshold is far over rounding.
    if state.is_cuda and state.numel() and rel_tol >= 1e-7:
        _check(state)
        return inertia.in_chunks(inertia.ranks, state, rel_tol=rel_tol, factors=factors)
    sigma = singular_values(state)
    ranks = [(sigma > factor * rel_tol * sigma[..., :1]).sum(-1) for factor in factors]
    return torch.stack(ranks, -1).to(state.device)


def nuclear_norm(state: Float[Tensor, "*lead d_k d_v"]) -> Float[Tensor, "*lead"]:
    """Sum of the singular values, n_h(t) of arXiv:2602.02195; on a GPU by the polar factor, to 1e-5 of itself.

    Args:
        state: as in `singular_values`.

    Returns:
        float64 per leading index, in the unit of the state.

    Raises:
        ValueError: as in `singular_values`.

    Example:
        >>> nuclear_norm(torch.diag(torch.tensor([3.0, -4.0]))).item()
        7.0
    """
    if state.is_cuda and state.numel():
        _check(state)
        return inertia.in_chunks(inertia.nuclear_norms, state)
    return Spectrum(singular_values(state)).nuclear_norm().to(state.device)


def stable_rank(state: Float[Tensor, "*lead d_k d_v"]) -> Float[Tensor, "*lead"]:
    """Squared Frobenius norm over squared largest singular value: 1..min(d_k, d_v), and 0 for a zero state.

    On a GPU from the Gram matrix and its largest eigenvalue: where many values crowd at the top, up to 1e-3 of itself too large.

    Source: Rudelson and Vershynin, J. ACM 54(4), 2007.

    Args:
        state: as in `singular_values`.

    Returns:
        float64 per leading index, dimensionless.

    Raises:
        ValueError: as in `singular_values`.

    Example:
        >>> stable_rank(torch.eye(3)).item()
        3.0
    """
    if state.is_cuda and state.numel():
        _check(state)
        return inertia.in_chunks(inertia.stable_ranks, state)
    return Spectrum(singular_values(state)).stable_rank().to(state.device)


def entropy_rank(state: Float[Tensor, "*lead d_k d_v"]) -> Float[Tensor, "*lead"]:
    """Exponential of the entropy of the singular values' shares: 1..min(d_k, d_v), and 0 for a zero state.

    It needs all values, which are computed on the CPU wherever the state is.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007. Not the paper's effective rank.

    Args:
        state: as in `singular_values`.

    Returns:
        float64 per leading index, dimensionless.

    Raises:
        ValueError: as in `singular_values`.

    Example:
        >>> round(entropy_rank(torch.eye(4)).item(), 6)
        4.0
    """
    return Spectrum(singular_values(state)).entropy_rank().to(state.device)
