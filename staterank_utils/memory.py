"""State rank is memory length: half-lives, the rank they predict, the bound they prove, and interventions on them.

A head's state follows S(t) = A_t S(t-1) + b_t k_t v_t^T. What it was told m tokens ago has since been multiplied by m transitions, so
it counts against the threshold eps of the effective rank only while the product of their norms is above eps.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import linear_layers, state_size
from staterank_utils.architectures.core import Change
from staterank_utils.spectra import REL_TOL, singular_values
from staterank_utils.surgery import Head, all_heads, heads_by_layer, noted
from staterank_utils.tracing import StateTrace, trace_states

JUST_ABOVE = 1.01  # times eps: the threshold of a measured rank that is held against the bound at eps


def half_lives(trace: StateTrace) -> Float[Tensor, "layer batch head"]:
    """Tokens after which a head's state has lost half of what it held, by the mean log-decay: ln 2 / abs(mean log a).

    Args:
        trace: from `trace_states`; of a decay for each channel, the mean over channels counts.

    Returns:
        float64, in tokens; infinite for a head without decay.

    Example:
        >>> from staterank_utils import load_model, trace_states
        >>> trace = trace_states(load_model("hybrid"), torch.arange(64).reshape(1, 64), positions=[64])
        >>> half_lives(trace).shape
        torch.Size([9, 1, 16])
    """
    return math.log(2) / trace.log_decay.abs()


def predicted_rank(log_decay: Float[Tensor, "*lead"], *, d: int, rel_tol: float = REL_TOL) -> Float[Tensor, "*lead"]:
    """The effective rank that a head's decay alone predicts: min(d, 1 + log(1/eps) / abs(mean log a)), with nothing fitted.

    This is the number of tokens that a state remembers above eps, the newest one included, clipped at its size. With a mean it is a
    prediction; `rank_bound` is the theorem.

    Args:
        log_decay: mean log-decay per token, at most 0, such as `StateTrace.log_decay`.
        d: largest possible rank, min(d_k, d_v).
        rel_tol: the threshold eps of the effective rank, in (0, 1).

    Returns:
        float64, 1..d; d for a head without decay.

    Raises:
        ValueError: a log-decay over 0 or not a number, d under 1, or `rel_tol` outside (0, 1).

    Example:
        >>> predicted_rank(torch.tensor([-9.21034, -0.5, 0.0]), d=64).round(decimals=1).tolist()
        [2.0, 19.4, 64.0]
    """
    _check(log_decay, d, rel_tol)
    return (1 + math.log(1 / rel_tol) / log_decay.double().abs()).clamp_max(d)


def half_life_at(rank: float | int, *, rel_tol: float = REL_TOL) -> float:
    """The half-life, in tokens, at which `predicted_rank` gives a rank: log(2) (r - 1) / log(1/eps).

    Args:
        rank: over 1; d itself is reached by this half-life and by every longer one.
        rel_tol: as in `predicted_rank`.

    Raises:
        ValueError: a rank that is not over 1, or `rel_tol` outside (0, 1).

    Example:
        >>> round(half_life_at(64), 2)
        4.74
    """
    if not rank > 1:
        raise ValueError(f"the law gives every head a rank over 1, got rank={rank}")
    _check_tolerance(rel_tol)
    return math.log(2) * (rank - 1) / math.log(1 / rel_tol)


@dataclass(frozen=True)
class RankBound:
    """What the memory bound says of heads.

    Attributes:
        rank: the largest effective rank that is possible, int64.
        void: whether decay bounds nothing: the bound is that of the size of the state, or of the number of tokens read.

    Example:
        >>> bound = rank_bound(torch.zeros(8), torch.ones(9), d=4)
        >>> bound.rank.item(), bound.void.item()  # no decay, no bound beyond d
        (4, True)
    """

    rank: Int[Tensor, "*lead"]
    void: Bool[Tensor, "*lead"]


def rank_bound(
    log_norms: Float[Tensor, "*lead token"],
    state_norms: Float[Tensor, "*lead one_more"],
    *,
    d: int,
    rel_tol: float = REL_TOL,
) -> RankBound:
    """The memory bound: the least m of tokens after which what was there before is under eps.

    Unrolling m tokens, S(t) = A_t ... A_{t-m+1} S(t-m) + R with rank(R) <= m, so by Eckart and Young the (m+1)-th singular value is at
    most the product of the norms of the transitions times ||S(t-m)||, and the effective rank at eps is at most m once that is under
    eps ||S(t)||. For m = t it is Theorem 3.1 of arXiv:2602.02195, rank <= t.

    Source: the book's page on what rank measures; Theorem 3.1 as reported by an independent reader.

    Args:
        log_norms: logarithm of the spectral norm of A_i at the last tokens, oldest first, natural logarithm: `StateTrace.log_norms`. A scalar decay is its own
            norm, of a diagonal one the largest entry is, a matrix has its spectral norm.
        state_norms: spectral norms of S before the first of these tokens and after each of them: one more than there are tokens. 0 where nothing was
            written yet.
        d: largest possible rank, min(d_k, d_v).
        rel_tol: the threshold eps, in (0, 1).

    Returns:
        One bound per leading index, at most d. As few as d tokens are enough, since no bound is over d.

    Raises:
        ValueError: not one state norm more than transitions, a negative or not finite norm, d under 1, or `rel_tol` outside (0, 1).

    Example:
        >>> half = torch.full((20,), 0.5).log()
        >>> rank_bound(half, torch.ones(21), d=64).rank.item()  # 2^-14 is the first power under 1e-4
        14
    """
    n_tokens = log_norms.shape[-1]
    if state_norms.shape[-1] != n_tokens + 1:
        raise ValueError(
            f"expected {n_tokens + 1} norms of states, one before {n_tokens} transitions and one after each, got {state_norms.shape[-1]}"
        )
    if not (torch.isfinite(state_norms).all() and (state_norms >= 0).all()):
        raise ValueError(
            f"norms of states must be finite and at least 0, got {state_norms.min()} to {state_norms.max()}"
        )
    _check(log_norms.clamp_max(0), d, rel_tol)
    norms = state_norms.double()
    # Entry m - 1: the last m transitions, and the state before them.
    lost = log_norms.double().flip(-1).cumsum(-1).neg()
    needed = math.log(1 / rel_tol) + norms[..., :-1].flip(-1).log() - norms[..., -1:].log()
    rank = _first(lost >= needed, d)
    # A state of zeros has rank 0.
    return RankBound(torch.where(norms[..., -1] > 0, rank, 0), rank >= _first(norms[..., :-1].flip(-1) == 0, d))


def _first(met: Bool[Tensor, "*lead m"], d: int) -> Int[Tensor, "*lead"]:
    """The smallest m = 1, 2, ... that meets a condition, d where none under it does."""
    met = met[..., :d]
    return torch.where(met.any(-1), met.int().argmax(-1) + 1, d)


@dataclass(frozen=True)
class BoundCheck:
    """Measured ranks beside the memory bound, (layer, batch, position, head) each.

    Attributes:
        positions: numbers of tokens read.
        rank: effective rank at 1.01 times the threshold, int64; above `bound` only by an error of computation.
        bound: from the head's own decays and norms, int64.
        void: whether decay bounds nothing there.

    Example:
        >>> from staterank_utils import load_model
        >>> check = check_memory_bound(load_model("hybrid"), torch.arange(64).reshape(1, 64), positions=[32, 64])
        >>> check.n_violations, check.rank.shape
        (0, torch.Size([9, 1, 2, 16]))
    """

    positions: tuple[int, ...]
    rank: Int[Tensor, "layer batch position head"]
    bound: Int[Tensor, "layer batch position head"]
    void: Bool[Tensor, "layer batch position head"]

    @property
    def n_violations(self) -> int:
        """Number of states whose rank exceeds the bound."""
        return int((self.rank > self.bound).sum())


def check_memory_bound(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch token"],
    *,
    positions: Sequence[int],
    rel_tol: float = REL_TOL,
    batch_size: int | None = None,
) -> BoundCheck:
    """Hold every head's rank against the memory bound of its own decays and norms (claim C0).

    For each position the states of the d tokens before it are looked at too, so it takes d + 1 times as many.

    Args:
        model: from `load_model`, with at least float32 states.
        input_ids, positions, batch_size: as in `trace_states`.
        rel_tol: the threshold eps.

    Returns:
        Ranks at 1.01 eps and bounds at eps.

    Raises:
        ValueError: as in `trace_states` and `rank_bound`.

    Example:
        >>> from staterank_utils import load_model
        >>> check = check_memory_bound(load_model("pure"), torch.arange(64).reshape(1, 64), positions=[64])
        >>> bool((check.rank <= check.bound).all())
        True
    """
    d = state_size(model)
    looked_at = sorted({t for end in positions for t in range(max(1, end - d), end + 1)})

    def norm_and_rank(states: Tensor) -> Tensor:
        sigma = singular_values(states)
        largest = sigma[..., 0]
        return torch.stack([largest, (sigma > JUST_ABOVE * rel_tol * largest[..., None]).sum(-1).double()], -1)

    trace = trace_states(
        model, input_ids, positions=looked_at, reduce=norm_and_rank, log_norms=True, batch_size=batch_size
    )
    assert trace.log_norms is not None
    norms, ranks = trace.values.double().unbind(-1)  # (layer, batch, position, head)
    found, bounds = [], []
    for end in positions:
        start = max(0, end - d)
        before = [
            norms[:, :, looked_at.index(t)] if t else torch.zeros_like(norms[:, :, 0]) for t in range(start, end + 1)
        ]
        transitions = trace.log_norms[:, :, start:end].transpose(-1, -2)
        bounds.append(rank_bound(transitions, torch.stack(before, -1), d=d, rel_tol=rel_tol))
        found.append(ranks[:, :, looked_at.index(end)].long())
    return BoundCheck(
        tuple(positions),
        torch.stack(found, 2),
        torch.stack([bound.rank for bound in bounds], 2),
        torch.stack([bound.void for bound in bounds], 2),
    )


def _check(log_decay: Tensor, d: int, rel_tol: float) -> None:
    if bool(log_decay.isnan().any()) or bool((log_decay > 0).any()):
        raise ValueError(f"a log-decay is at most 0, got {log_decay.max().item()}: is it the decay itself?")
    if d < 1:
        raise ValueError(f"d must be at least 1, got {d}")
    _check_tolerance(rel_tol)


def _check_tolerance(rel_tol: float) -> None:
    if not 0 < rel_tol < 1:
        raise ValueError(f"rel_tol must be in (0, 1), got {rel_tol}")


# ---------------------------------------------------------------- interventions


def can_cap(model: PreTrainedModel) -> bool:
    """Whether the half-lives of a model can be capped: whether every linear layer decays in a way that can be changed.

    Args:
        model: any that `linear_layers` accepts.

    Example:
        >>> from staterank_utils import load_model
        >>> can_cap(load_model("hybrid"))
        True
    """
    return all(layer.decay_can_change for layer in linear_layers(model))


@contextmanager
def cap_half_life(model: PreTrainedModel, tokens: float | int) -> Iterator[None]:
    """Run a model whose heads forget at least as fast as a half-life of `tokens`, inside a `with` block.

    The log-decay of every token, of every channel where there are several, becomes min(log a, -ln 2 / tokens). What a token writes
    stays as it is, and so do the weights. Blocks nest, also with `ablate_heads` and `scale_decay`, in any order; where two of them
    change the decay, the outer one does so first. They work around `forward`, `generate` and `trace_states`, which then tells the
    changed decay.

    Source: an intervention of this project; the page on memory and recall.

    Args:
        model: from `load_model`.
        tokens: the longest half-life that is left, over 0.

    Raises:
        ValueError: `tokens` is not a finite number over 0, or an architecture without decay.

    Example:
        >>> from staterank_utils import load_model, trace_states
        >>> model, ids = load_model("hybrid"), torch.arange(64).reshape(1, 64)
        >>> with cap_half_life(model, 16):
        ...     half_lives(trace_states(model, ids, positions=[64])).max().round(decimals=4).item() <= 16
        True
    """
    if not 0 < tokens < math.inf:
        raise ValueError(f"a half-life is a number of tokens over 0, got {tokens}")
    ceiling = -math.log(2) / tokens
    with _decay_changed(
        model, {layer.index: lambda log_decay: log_decay.clamp_max(ceiling) for layer in linear_layers(model)},
        f"half-lives capped at {tokens} tokens",
    ):  # fmt: skip
        yield


@contextmanager
def scale_decay(model: PreTrainedModel, factor: float | int, heads: Iterable[Head] | None = None) -> Iterator[None]:
    """Run a model with the log-decay of some heads multiplied by a factor, inside a `with` block.

    A factor of 2 halves every half-life. What a token writes stays as it is, and so do the weights. As for nesting, see
    `cap_half_life`.

    Source: an intervention of this project; the page on what rank measures.

    Args:
        model: from `load_model`.
        factor: over 0.
        heads: (layer, head) pairs; all heads by default.

    Raises:
        ValueError: a factor that is not a finite number over 0, a head that the model does not have or that is named twice, or an
            architecture without decay.
        TypeError: a head that is not named by whole numbers.

    Example:
        >>> from staterank_utils import load_model, trace_states
        >>> model, ids = load_model("hybrid"), torch.arange(64).reshape(1, 64)
        >>> before = trace_states(model, ids, positions=[64]).log_decay
        >>> with scale_decay(model, 2.0, heads=[(0, 3)]):
        ...     inside = trace_states(model, ids, positions=[64]).log_decay
        >>> (inside / before)[0, 0].round(decimals=4).tolist()[:4]
        [1.0, 1.0, 1.0, 2.0]
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"factor must be a number over 0, got {factor}")
    chosen = heads_by_layer(all_heads(model) if heads is None else heads, all_heads(model), what="linear-attention")
    changes = {
        layer.index: _scaled([factor if head in chosen[layer.index] else 1.0 for head in layer.heads])
        for layer in linear_layers(model)
        if layer.index in chosen
    }
    with _decay_changed(model, changes, f"log-decay times {factor}: {chosen}"):
        yield


def _scaled(factors: list[float]) -> Change:
    """Multiplies the log-decay of each head by a number."""

    @functools.cache
    def on(device: torch.device) -> Float[Tensor, " head"]:
        """Moved once, so that a graph can be captured."""
        return torch.tensor(factors, device=device)

    def change(log_decay: Tensor) -> Tensor:
        return log_decay * on(log_decay.device).view(-1, *[1] * (log_decay.ndim - 3))

    return change


@contextmanager
def _decay_changed(model: PreTrainedModel, changes: dict[int, Change], what: str) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in linear_layers(model):
            if layer.index in changes and layer.n_heads:
                stack.enter_context(layer.decay_changed(changes[layer.index]))
        stack.enter_context(noted(model, what))
        yield
