"""A sparse cache beside the state, or in its place: LoLA, for linear attention with a normaliser and for layers with a delta rule.

A head keeps the pairs (key, value) of the last tokens and, of the older ones, those that its state recalls worst. All other pairs are
written to the state. No training. Source: LoLA (arXiv:2505.23666), for linear attention whose outputs are normalised (`read_normalised`). A delta rule
has no normaliser, so three things differ there (`read_cached`). The error of a pair is the squared length of S^T k - v. To what is read from the state, a ridge regression on the cached
pairs is added, weighted by their write strengths: a single pair is read as one write of the delta rule. And cached pairs neither decay nor are
overwritten. So a pair whose key is written again with another value has a large error and stays, where the delta rule would have forgotten it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import LinearLayer, linear_layers
from staterank_utils.kernels import unit
from staterank_utils.models import read_tokens
from staterank_utils.surgery import Head, all_heads, heads_by_layer, noted

AT_ONCE = 64  # tokens whose reads are computed together
TINY = 1e-10  # of fla's normaliser, so that nothing is divided by 0
Raw = tuple[Tensor, Tensor] | None  # queries and keys before a feature map
RIDGE = 1e-4  # added to the Gram matrix of cached keys, which may be the same twice


@dataclass(frozen=True)
class Held:
    """What heads remember: a state, and pairs in slots, of which an empty one is a pair of zeros.

    Attributes:
        state: of the pairs that left the cache.
        keys, values, strengths: of the cached pairs: the window, oldest first, then the sparse cache.
        log_decay: of the tokens in the window, which the state has not read yet.

    Example:
        >>> Held.empty(torch.zeros(2, 3, 4, 8), window=2, sparse=1).keys.shape
        torch.Size([2, 3, 3, 4])
    """

    state: Float[Tensor, "batch head d_k d_v"]
    keys: Float[Tensor, "batch head slot d_k"]
    values: Float[Tensor, "batch head slot d_v"]
    strengths: Float[Tensor, "batch head slot"]
    log_decay: Float[Tensor, "batch head window channel"]

    @classmethod
    def empty(
        cls, state: Float[Tensor, "batch head d_k d_v"], *, window: int, sparse: int, channels: int = 1
    ) -> "Held":
        """No pairs yet.

        Args:
            state: zeros, or what pairs from before left.
            window, sparse: numbers of slots.
            channels: decays per head, 1 or d_k.
        """
        *lead, d_k, d_v = state.shape
        slots = window + sparse
        return cls(
            state, state.new_zeros(*lead, slots, d_k), state.new_zeros(*lead, slots, d_v), state.new_zeros(*lead, slots),
            state.new_zeros(*lead, window, channels),
        )  # fmt: skip


def read_cached(
    query: Float[Tensor, "batch token head d_k"],
    key: Float[Tensor, "batch token head d_k"],
    value: Float[Tensor, "batch token head d_v"],
    log_decay: Float[Tensor, "batch token head"] | Float[Tensor, "batch token head d_k"],
    write_strength: Float[Tensor, "batch token head"],
    *,
    window: int,
    sparse: int,
    stateful: bool = True,
    held: Held | None = None,
) -> tuple[Float[Tensor, "batch token head d_v"], Held]:
    """The gated delta rule with a cache of pairs, token by token.

    Source: LoLA, arXiv:2505.23666, Alg. 1, changed as this module says; `reference.lola` is the same in float64, slowly. At token t the
    pair (k_t, v_t) enters the window, and the oldest one there leaves it: the state takes that token's decay, and of the pair and those of
    the sparse cache the one with the smallest squared length of S^T k - v is written into the state. With K and V the cached keys and values and b
    their write strengths, o(t) = [S^T q + (V - K S)^T w] / sqrt(d_k), where (K K^T + diag((1 - b + 1e-4) / b)) w = K q.

    Args:
        query, key: of length 1, one for every value head; float32 or float64.
        value: of every token.
        log_decay: natural logarithm, at most 0, per head or per channel.
        write_strength: b, in [0, 1].
        window: pairs of the last tokens that are kept (eta).
        sparse: older pairs that are kept (lambda); both 0: the gated delta rule.
        stateful: without it there is no state, and a pair that leaves the cache is gone.
        held: from the tokens before; by default there are none.

    Returns:
        Outputs, and what is held after the last token.

    Raises:
        ValueError: a number of slots under 0, a write strength over 1, or `held` of other numbers of slots.

    Example:
        >>> key = torch.eye(4)[:3].reshape(1, 3, 1, 4)
        >>> value = torch.tensor([5.0, 6.0, 7.0]).reshape(1, 3, 1, 1)
        >>> gates = torch.full((1, 3, 1), -9.0), torch.ones(1, 3, 1)  # everything is forgotten at once
        >>> plain, cached = (read_cached(2 * key[:, [0, 1, 0]], key, value, *gates, window=0, sparse=n)[0] for n in (0, 2))
        >>> plain.flatten()[2].item() < 0.01, round(cached.flatten()[2].item(), 2)
        (True, 5.0)
    """
    _check_slots(window, sparse)
    if (strongest := float(write_strength.max())) > 1:
        raise ValueError(f"write strengths must be at most 1, got {strongest:.3g}: a firmer write than that is no fit")
    n_tokens, d_k = key.shape[1], key.shape[-1]
    decays = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    if held is None:
        state = key.new_zeros(key.shape[0], key.shape[2], d_k, value.shape[-1])
        held = Held.empty(state, window=window, sparse=sparse, channels=decays.shape[-1])
    if (found := (held.log_decay.shape[2], held.keys.shape[2])) != (window, window + sparse):
        raise ValueError(f"held has a window of {found[0]} of {found[1]} pairs, expected {window} of {window + sparse}")
    # Pairs by number: those that are held, the window first, then the new ones.
    keys, values, strengths = (
        torch.cat([old, new.transpose(1, 2)], 2)
        for old, new in zip((held.keys, held.values, held.strengths), (key, value, write_strength), strict=True)
    )
    in_order = [*range(window), *range(window + sparse, window + sparse + n_tokens)]
    waiting = torch.cat([held.log_decay, decays.transpose(1, 2)], 2)  # in that order
    state, norms = held.state, values.square().sum(-1)
    kept = torch.arange(window, window + sparse, device=key.device).expand(*norms.shape[:2], -1)
    slots, reads, predicted, outputs = kept, [], [], []
    for t, leaves in enumerate(in_order[:n_tokens]):
        gone = kept.new_full((*norms.shape[:2], 1), leaves)
        state = state * waiting[:, :, t].exp().unsqueeze(-1)
        if sparse:
            candidates = torch.cat([kept, gone], -1)
            errors = (
                (_pick(keys, candidates) @ state - _pick(values, candidates)).square().sum(-1)
                if stateful
                else norms.gather(2, candidates)
            )
            best = errors.argmin(-1, keepdim=True)
            # The one that leaves the window takes the place of the one that goes, itself perhaps.
            kept = candidates.scatter(-1, best, gone)[..., :sparse]
            gone = candidates.gather(-1, best)
        recent = torch.tensor(in_order[t + 1 : t + 1 + window], dtype=torch.long, device=key.device)
        slots = torch.cat([recent.expand(*norms.shape[:2], -1), kept], -1)
        reads.append(slots)
        if stateful:
            k, v = _pick(keys, gone), _pick(values, gone)
            state = state + k.mT @ (strengths.gather(2, gone).unsqueeze(-1) * (v - k @ state))
            predicted.append(torch.cat([query[:, t].unsqueeze(2), _pick(keys, slots)], 2) @ state)
        if len(reads) == AT_ONCE or t == n_tokens - 1:
            rows = query[:, t + 1 - len(reads) : t + 1].transpose(1, 2)
            outputs.append(_read(rows, keys, values, strengths, torch.stack(reads, 2), predicted))
            reads, predicted = [], []
    out = torch.cat(outputs, 2).transpose(1, 2) / d_k**0.5
    last = _pick(keys, slots), _pick(values, slots), strengths.gather(2, slots)
    return out, Held(state, *last, waiting[:, :, n_tokens:])


def _pick(
    pairs: Float[Tensor, "batch head pair d"], numbers: Int[Tensor, "batch head slot"]
) -> Float[Tensor, "batch head slot d"]:
    return pairs.gather(2, numbers.unsqueeze(-1).expand(-1, -1, -1, pairs.shape[-1]))


def _read(
    query: Float[Tensor, "batch head token d_k"],
    keys: Float[Tensor, "batch head pair d_k"],
    values: Float[Tensor, "batch head pair d_v"],
    strengths: Float[Tensor, "batch head pair"],
    slots: Int[Tensor, "batch head token slot"],
    predicted: list[Tensor],
) -> Float[Tensor, "batch head token d_v"]:
    """What some tokens read of the pairs that they have, and of their states.

    Args:
        query: of these tokens.
        keys, values, strengths: of all pairs.
        slots: which pairs each token has.
        predicted: what the state of each token says to its query, and to the keys that it has; empty without states.
    """
    flat, shape = slots.flatten(2), slots.shape[2:]
    k, v = (_pick(x, flat).unflatten(2, shape) for x in (keys, values))
    said = torch.stack(predicted, 2) if predicted else v.new_zeros(*v.shape[:3], 1 + v.shape[3], v.shape[4])
    if not slots.shape[-1]:
        return said[..., 0, :]
    b = strengths.gather(2, flat).unflatten(2, shape)
    root = b.sqrt().unsqueeze(-1)
    system = root * (k @ k.mT) * root.mT + torch.diag_embed(1 + RIDGE - b)
    weights = root * torch.cholesky_solve(root * (k @ query.unsqueeze(-1)), torch.linalg.cholesky(system))
    read: Tensor = said[..., 0, :] + (weights.mT @ (v - said[..., 1:, :])).squeeze(-2)
    return read


@dataclass(frozen=True)
class Summed:
    """What heads with a normaliser remember.

    Attributes:
        state, keys: sums over the pairs that left the cache, of features of keys times values, and of features of keys.
        pairs: of each slot, side by side: key, features of the key, value, and whether it holds a pair; the window, oldest first, then the sparse cache.

    Example:
        >>> [each.shape for each in vars(Summed.empty(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 8), slots=3)).values()]
        [torch.Size([1, 2, 4, 8]), torch.Size([1, 2, 4]), torch.Size([1, 2, 3, 17])]
    """

    state: Float[Tensor, "batch head d_k d_v"]
    keys: Float[Tensor, "batch head d_k"]
    pairs: Float[Tensor, "batch head slot parts"]

    @classmethod
    def empty(
        cls,
        features: Float[Tensor, "batch token head d_k"],
        value: Float[Tensor, "batch token head d_v"],
        *,
        slots: int,
    ) -> "Summed":
        """Nothing yet.

        Args:
            features, value: of any tokens.
            slots: how many pairs may be kept.
        """
        n_batch, _, n_heads, d_k = features.shape
        d_v, lead = value.shape[-1], (n_batch, n_heads)
        state, keys = features.new_zeros(*lead, d_k, d_v), features.new_zeros(*lead, d_k)
        return cls(state, keys, features.new_zeros(*lead, slots, 2 * d_k + d_v + 1))


def read_normalised(
    query: Float[Tensor, "batch token head d_k"],
    key: Float[Tensor, "batch token head d_k"],
    value: Float[Tensor, "batch token head d_v"],
    query_features: Float[Tensor, "batch token head d_k"],
    key_features: Float[Tensor, "batch token head d_k"],
    *,
    window: int,
    sparse: int,
    stateful: bool = True,
    held: Summed | None = None,
) -> tuple[Float[Tensor, "batch token head d_v"], Summed]:
    """Linear attention with a normaliser and a cache of pairs, token by token: LoLA as its paper has it.

    Source: LoLA, arXiv:2505.23666, Alg. 1; `reference.normalised_lola` is the same in float64, slowly. With phi the features, H the sum of phi(k) v^T over
    the pairs that are not cached, and s that of phi(k): of the pair that leaves the window and those of the sparse cache the one with the smallest
    squared length of H^T phi(k) / (s . phi(k)) - v is added to H and s, and o(t) = [sum exp(q . k / sqrt(d_k)) v + H^T phi(q)] / [sum exp(q . k / sqrt(d_k))
    + s . phi(q)], summed over the cached pairs.

    Args:
        query, key: before the feature map, one for every value head; float32 or float64.
        value: of every token.
        query_features, key_features: behind it.
        window, sparse: as in `read_cached`; both 0: linear attention.
        stateful: as there; the error of a pair is then the squared length of its value.
        held: from the tokens before; by default there are none.

    Returns:
        Outputs, and what is held after the last token.

    Raises:
        ValueError: a number of slots under 0, or `held` of another number of slots.

    Example:
        >>> key, value = torch.eye(4)[:3].reshape(1, 3, 1, 4), torch.tensor([5.0, 6.0, 7.0]).reshape(1, 3, 1, 1)
        >>> mean, last = (read_normalised(key, key, value, key * 0 + 1, key * 0 + 1, window=n, sparse=0, stateful=n == 0)[0] for n in (0, 1))
        >>> mean.flatten().tolist(), last.flatten().tolist()
        ([5.0, 5.5, 6.0], [5.0, 6.0, 7.0])
    """
    _check_slots(window, sparse)
    d_k, d_v = key.shape[-1], value.shape[-1]
    held = held or Summed.empty(key_features, value, slots=window + sparse)
    if (found := held.pairs.shape[2]) != window + sparse:
        raise ValueError(f"held has {found} pairs, expected {window} + {sparse}")
    state, sums, pairs = held.state, held.keys, held.pairs
    new = torch.cat([key, key_features, value, torch.ones_like(value[..., :1])], -1).transpose(1, 2)
    parts, outputs = (d_k, d_k, d_v, 1), []
    for t in range(key.shape[1]):
        recent = torch.cat([pairs[:, :, :window], new[:, :, t : t + 1]], 2)
        candidates = torch.cat([pairs[:, :, window:], recent[:, :, :1]], 2)  # the last of them leaves the window
        _, features, values, is_there = candidates.split(parts, -1)
        recalled = features @ state / (features @ sums.unsqueeze(-1) + TINY) if stateful else 0.0
        error = (recalled - values).square().sum(-1).masked_fill(is_there[..., 0] == 0, -1.0)
        best = error.argmin(-1)[..., None, None].expand(-1, -1, 1, candidates.shape[-1])
        _, features, values, _ = candidates.gather(2, best).split(parts, -1)  # zeros, of an empty slot
        if stateful:
            state, sums = state + features.mT @ values, sums + features[:, :, 0]
        kept = candidates.scatter(2, best, candidates[:, :, -1:])[:, :, :sparse]
        pairs = torch.cat([recent[:, :, 1:], kept], 2)
        keys, _, values, is_there = pairs.split(parts, -1)
        scores = (keys @ query[:, t].unsqueeze(-1) / d_k**0.5).masked_fill(is_there == 0, float("-inf"))
        # Every term is divided by the largest: what is written counts as exp(0).
        written = (sums != 0).any(-1)[..., None, None]
        shift = torch.cat([scores, torch.where(written, 0.0, float("-inf"))], 2).amax(2, keepdim=True)
        shift = shift.masked_fill(shift.isinf(), 0.0)  # where there is nothing to read
        weights = (scores - shift).exp()
        features = torch.where(written, query_features[:, t].unsqueeze(-2) * (-shift).exp(), 0.0)
        above = weights.mT @ values + features @ state
        outputs.append(above / (weights.sum(2, keepdim=True) + features @ sums.unsqueeze(-1) + TINY))
    return torch.cat(outputs, 2).transpose(1, 2), Summed(state, sums, pairs)


def _check_slots(window: int, sparse: int) -> None:
    if window < 0 or sparse < 0:
        raise ValueError(f"a number of cached pairs is at least 0, got window {window} and sparse {sparse}")


def pairs_in_state(layer: LinearLayer, share: float = 1.0) -> int:
    """How many pairs take the bytes of a share of a state: d_k d_v / (d_k + d_v), rounded.

    Args:
        layer: from `linear_layers`.
        share: of the state.

    Raises:
        ValueError: less than one pair.

    Example:
        >>> from staterank_utils import load_model
        >>> layer = linear_layers(load_model("hybrid"))[0]
        >>> pairs_in_state(layer), pairs_in_state(layer, 1 / 8)
        (32, 4)
    """
    pairs = round(share * layer.d_k * layer.d_v / (layer.d_k + layer.d_v))
    if pairs < 1:
        raise ValueError(
            f"{share:.3g} of a state of {layer.d_k} x {layer.d_v} is less than one pair: take a larger share"
        )
    return pairs


@torch.inference_mode()
def recall_errors(
    model: PreTrainedModel, prompts: Int[Tensor, "prompt token"], *, n_pairs: int
) -> Float[Tensor, " head"]:
    """How badly the state of every head recalls the pairs of the last tokens: squared lengths of S^T k - v, or of S^T phi(k) / (s . phi(k)) - v with a
    normaliser, summed, over those of v.

    An empty state has the error 1, one that recalls every pair 0. The sums run over the last tokens of all prompts.

    Args:
        model: from `load_model`, for which `why_not` is None.
        prompts: of equal length.
        n_pairs: of the last tokens of each.

    Returns:
        In the order of `all_heads`.

    Raises:
        ValueError: prompts that are shorter, or a layer whose heads cannot have a cache.

    Example:
        >>> from staterank_utils import load_model
        >>> recall_errors(load_model("hybrid"), torch.arange(64).reshape(1, 64), n_pairs=8).shape
        torch.Size([144])
    """
    if not 1 <= n_pairs <= prompts.shape[1]:
        raise ValueError(f"n_pairs must lie in 1..{prompts.shape[1]}, the length of the prompts, got {n_pairs}")
    wrong: dict[int, Tensor] = {}

    def look(
        index: int, kernel: Callable[..., Any], *args: Tensor, raw: Raw = None, **options: Any
    ) -> tuple[Tensor, Any]:
        out, last = kernel(*args, **options | {"output_final_state": True})
        _, key, value, *features = _tokens(args, raw, options)
        k, v = (x[:, -n_pairs:].transpose(1, 2).float() for x in (features[1] if raw else key, value))
        recalled = k @ (last[0] if raw else last).float()
        if raw:
            recalled = recalled / (k @ last[1].float().transpose(1, 2).mT + TINY)
        wrong[index] = (recalled - v).square().sum((0, 2, 3)) / v.square().sum((0, 2, 3))
        return out, last

    with ExitStack() as stack:
        layers = linear_layers(model)
        for layer in layers:
            _check_rule(layer)
            stack.enter_context(layer.pairs_through(partial(look, layer.index)))
        read_tokens(model, prompts.to(model.device))
    return torch.cat([wrong[layer.index].cpu() for layer in layers if layer.n_heads])


def _by_head(query: Tensor, key: Tensor, value: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In float32, a query and a key for every value head, of length 1 where the kernel makes them so."""
    per_key = value.shape[2] // key.shape[2]
    q, k = (x.float().repeat_interleave(per_key, 2) for x in (query, key))
    if normalize:
        q, k = unit(q), unit(k)
    return q, k, value.float()


def why_not(model: PreTrainedModel) -> str | None:
    """Why heads of a model cannot have a cache of pairs, or None: every linear layer must run a delta rule with strengths up to 1, or have a normaliser.

    Args:
        model: any that `linear_layers` accepts.

    Example:
        >>> from staterank_utils import load_model
        >>> why_not(load_model("hybrid")) is None
        True
    """
    return next((layer.caching_refusal for layer in linear_layers(model) if layer.caching_refusal), None)


def _check_rule(layer: LinearLayer) -> None:
    if reason := layer.caching_refusal:
        raise ValueError(f"layer {layer.index} ({layer.name}) cannot have a cache of pairs: {reason}")


@contextmanager
def cache_pairs(
    model: PreTrainedModel, heads: Iterable[Head], *, window: int, sparse: int, stateful: bool = True
) -> Iterator[None]:
    """Run a model some of whose heads have a cache of pairs, inside a `with` block.

    It works around `forward`, `generate` and what this package evaluates, with a cache or without one, for one set of prompts at a time.
    `trace_states` and the cache of the model then hold the states of the plain recurrence. It goes token by token, so it is slow; CUDA graphs are
    not supported.

    Source: `read_cached`, and `read_normalised` for layers whose outputs are divided by a sum of keys.

    Args:
        model: from `load_model`, for which `why_not` is None.
        heads: (layer, head) pairs.
        window, sparse, stateful: as in `read_cached`.

    Raises:
        ValueError: as in `read_cached`; a layer whose heads cannot have a cache; a head that the model does not have, or that is named twice; or tokens
            that go on from others than those that were read last.

    Example:
        >>> from staterank_utils import load_model
        >>> model, ids = load_model("hybrid"), torch.arange(32).reshape(1, 32)
        >>> whole = model(ids).logits
        >>> with cache_pairs(model, [(0, 3)], window=0, sparse=0):
        ...     same = model(ids).logits
        >>> (same - whole).abs().max().item() < 1e-4
        True
    """
    chosen = heads_by_layer(heads, all_heads(model), what="linear-attention")
    with ExitStack() as stack:
        for layer in linear_layers(model):
            if layer.index in chosen:
                _check_rule(layer)
                rule = read_normalised if layer.normalised else read_cached
                read = partial(rule, window=window, sparse=sparse, stateful=stateful)
                stack.enter_context(layer.pairs_through(_Reader(layer.places(chosen[layer.index]), read)))
        what = f"{window} recent and {sparse} other pairs cached{'' if stateful else ' in place of states'}: {chosen}"
        stack.enter_context(noted(model, what))
        yield


class _Reader:
    """Makes the calls of a layer's kernel, and puts in the outputs and states of some heads."""

    def __init__(self, places: list[int], read: Callable[..., tuple[Tensor, Any]]):
        self.places, self.read = places, read
        self.held: Held | Summed | None = None
        self.last: Tensor | None = None

    def __call__(
        self, kernel: Callable[..., Any], *args: Tensor, raw: Raw = None, **options: Any
    ) -> tuple[Tensor, Any]:
        value = options["v"] if raw else args[2]
        if value.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "cached pairs do not support CUDA graphs, which generation uses on a GPU: score given answers, or generate on a CPU"
            )
        if options.get("cu_seqlens") is not None:
            raise ValueError(
                "cached pairs do not support packed prompts, nor padded ones of fla's models: read them one by one"
            )
        start = _state(options.get("initial_state"))
        if start is not None and (self.last is None or not torch.equal(start, self.last)):
            raise ValueError(
                "these tokens go on from others than those that were read last: inside this block, read one set of prompts at a time"
            )
        out, last = kernel(*args, **options)
        tokens = (x[:, :, self.places].float() for x in _tokens(args, raw, options))
        mine, self.held = self.read(*tokens, held=None if start is None else self.held)
        out = out.clone()
        out[:, :, self.places] = mine.to(out.dtype)
        # The states of the plain recurrence, by which the tokens that go on from here are known.
        state = _state(last)
        self.last = None if state is None else state.clone()
        return out, last


def _state(kept: Tensor | tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Of what a kernel takes and gives, the states without the sum of keys."""
    return kept[0] if isinstance(kept, tuple) else kept


def _tokens(args: tuple[Tensor, ...], raw: Raw, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """What `read_cached` or `read_normalised` takes, from a call of a kernel."""
    if raw:
        return (*raw, options["v"], options["q"], options["k"])
    by_head = _by_head(*args[:3], normalize=bool(options.get("use_qk_l2norm_in_kernel")))
    return (*by_head, options["g"], options["beta"])
