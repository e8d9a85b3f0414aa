"""Slow, obviously right versions in float64, which the fast paths are tested against."""

import torch
from jaxtyping import Float
from torch import Tensor


def gated_delta_rule(
    query: Float[Tensor, "batch token head d_k"],
    key: Float[Tensor, "batch token head d_k"],
    value: Float[Tensor, "batch token head d_v"],
    log_decay: Float[Tensor, "batch token head"] | Float[Tensor, "batch token head d_k"],
    write_strength: Float[Tensor, "batch token head"],
) -> tuple[Float[Tensor, "batch token head d_v"], Float[Tensor, "batch token head d_k d_v"]]:
    """The gated delta rule, token by token.

    Source: S(t) = a_t (I - b_t k_t k_t^T) S(t-1) + b_t k_t v_t^T, o(t) = S(t)^T q(t) / sqrt(d_k), from S(0) = 0, with
    a_t = exp(log_decay) and b_t = write_strength (Gated DeltaNet, arXiv:2412.06464, Eq. 10). With one decay for each channel,
    diag(a_t) stands in the place of a_t, to the right of the bracket (Kimi Delta Attention, arXiv:2510.26692, Eq. 1).

    Args:
        query, key, value: float64, keys and queries of length 1, one for every value head.
        log_decay: natural logarithm of a_t, at most 0.
        write_strength: b_t, in [0, 1], or in [0, 2] where a model allows negative eigenvalues.

    Returns:
        Outputs o(t), and the states S(t) after every token.

    Example:
        >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        >>> out, states = gated_delta_rule(one, one, 3 * one, torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double())
        >>> states.item()
        3.0
    """
    n_batch, n_tokens, n_heads, d_k = key.shape
    state = key.new_zeros(n_batch, n_heads, d_k, value.shape[-1])
    outputs, states = [], []
    for t in range(n_tokens):
        k, v, q = key[:, t], value[:, t], query[:, t]
        decay, b = log_decay[:, t].exp(), write_strength[:, t][..., None]
        kept = decay.reshape(*decay.shape[:2], -1, 1) * state
        written = b * (v - torch.einsum("bhk,bhkv->bhv", k, kept))
        state = kept + k.unsqueeze(-1) * written.unsqueeze(-2)
        states.append(state)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q, state) / d_k**0.5)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def lola(
    query: Float[Tensor, "token d_k"],
    key: Float[Tensor, "token d_k"],
    value: Float[Tensor, "token d_v"],
    log_decay: Float[Tensor, " token"] | Float[Tensor, "token d_k"],
    write_strength: Float[Tensor, " token"],
    *,
    window: int,
    sparse: int,
    stateful: bool = True,
    ridge: float = 1e-4,
) -> Float[Tensor, "token d_v"]:
    """The gated delta rule of one head with a cache of pairs, in lists: as `lola.read_cached`, which says what it does.

    Args:
        query, key, value, log_decay, write_strength: float64, of one head.
        window, sparse, stateful: as there.
        ridge: added to the Gram matrix.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> lola(one, one, 3 * one, torch.zeros(1).double(), torch.ones(1).double(), window=0, sparse=0).item()
        3.0
    """
    state = key.new_zeros(key.shape[1], value.shape[1])
    recent: list[int] = []
    kept: list[int] = []
    outputs = []
    for t in range(len(key)):
        recent.append(t)
        if len(recent) > window:
            oldest = recent.pop(0)
            state = log_decay[oldest].exp().reshape(-1, 1) * state
            kept.append(oldest)
            if len(kept) > sparse:
                best = min(kept, key=lambda i: float((state.T @ key[i] - value[i]).square().sum()))
                kept.remove(best)
                if stateful:
                    wrong = value[best] - state.T @ key[best]
                    state = state + write_strength[best] * torch.outer(key[best], wrong)
        out = state.T @ query[t]
        # A pair of strength 0 writes nothing.
        if cached := [i for i in recent + kept if write_strength[i] > 0]:
            k, b = key[cached], write_strength[cached]
            weights = torch.linalg.solve(k @ k.T + torch.diag((1 - b + ridge) / b), k @ query[t])
            out = out + weights @ (value[cached] - k @ state)
        outputs.append(out / key.shape[1] ** 0.5)
    return torch.stack(outputs)


def normalised_lola(
    query: Float[Tensor, "token d_k"],
    key: Float[Tensor, "token d_k"],
    value: Float[Tensor, "token d_v"],
    query_features: Float[Tensor, "token d_k"],
    key_features: Float[Tensor, "token d_k"],
    *,
    window: int,
    sparse: int,
    stateful: bool = True,
) -> Float[Tensor, "token d_v"]:
    """Linear attention of one head with a normaliser and a cache of pairs, in lists: as `lola.read_normalised`, which says what it does.

    Args:
        query, key, value, query_features, key_features: float64, of one head; features are positive.
        window, sparse, stateful: as there.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> normalised_lola(one, one, 3 * one, one, one, window=0, sparse=0).item()
        3.0
    """
    written: list[int] = []
    recent: list[int] = []
    kept: list[int] = []
    outputs = []

    def error(pair: int) -> float:
        if not (stateful and written):
            return float(value[pair].square().sum())
        weights = key_features[written] @ key_features[pair]
        return float((weights @ value[written] / weights.sum() - value[pair]).square().sum())

    for t in range(len(key)):
        recent.append(t)
        if len(recent) > window:
            kept.append(recent.pop(0))
            if len(kept) > sparse:
                best = min(kept, key=error)
                kept.remove(best)
                written += [best] if stateful else []
        cached = recent + kept
        weights = torch.cat(
            [(key[cached] @ query[t] / key.shape[1] ** 0.5).exp(), key_features[written] @ query_features[t]]
        )
        outputs.append(
            weights @ value[cached + written] / weights.sum() if len(weights) else torch.zeros_like(value[t])
        )
    return torch.stack(outputs)
