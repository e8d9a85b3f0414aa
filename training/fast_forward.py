"""The training loss of a small model of a recipe's class, several times faster than its own forward.

Same parameters, same function (a test compares the logits), written so that `torch.compile` can fuse all that lies between
the matrix products and the chunked recurrence, which is fla's `chunk_gated_delta_rule` or `chunk_kda`, or `decayed_sum` here. One kernel of its backward pass is wrong on
Hopper GPUs with Triton 3.4 to 3.7.0, and fla refuses it there; `mend_backward` puts matrix products of torch in its place.
"""

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3NextForCausalLM
from transformers.models.bamba.modeling_bamba import BambaAttention, BambaMixer
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention, KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from staterank_utils.kernels import unit
from staterank_utils.sse import SSEGatedDeltaNet

Recurrence = Callable[..., Tensor]
FORGETS = -30.0  # log-decay that leaves nothing of a state


def gated_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Gated delta rule by fla's kernels: q, k (batch, token, key head, d), v (batch, token, head, d), gates (batch, token, head)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    out: Tensor = chunk_gated_delta_rule(q, k, v, log_decay, beta)[0]
    return out


def kda(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Kimi Delta Attention by fla's kernels: as `gated_delta`, with the decay of every channel, (batch, token, head, d)."""
    from fla.ops.kda import chunk_kda

    out: Tensor = chunk_kda(q, k, v, log_decay, beta)[0]
    return out


def decayed_sum(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, size: int = 64) -> Tensor:
    """Decay without the delta rule, as in Mamba-2: o_t = S_t^T q_t with S_t = a_t S_(t-1) + k_t v_t^T, by products within and between chunks.

    Args:
        q, k, v: (batch, token, head, d).
        log_decay: ln a_t, (batch, token, head).
        size: tokens of a chunk.
    """
    n_tokens = q.shape[1]
    rest = -n_tokens % size

    def chunks(x: Tensor) -> Tensor:
        """(batch, chunk, head, token, d)"""
        return F.pad(x, (0, 0, 0, 0, 0, rest)).unflatten(1, (-1, size)).transpose(2, 3)

    q, k, v = map(chunks, (q, k, v))
    g = chunks(log_decay.float()[..., None])[..., 0].cumsum(-1)
    near = (q @ k.mT).float() * _decays(g, g)
    out = near.to(v.dtype) @ v
    ends = g[..., -1].transpose(1, 2).cumsum(-1)  # (batch, head, chunk)
    added = (k * (g[..., -1:] - g).exp()[..., None].to(k.dtype)).mT @ v
    far = _decays(F.pad(ends, (1, -1)), ends, -1).to(v.dtype)  # from the end of one chunk to the start of a later one
    before = (far @ added.transpose(1, 2).flatten(-2)).unflatten(-1, added.shape[-2:]).transpose(1, 2)
    out = out + (q * g.exp()[..., None].to(q.dtype)) @ before
    return out.transpose(2, 3).flatten(1, 2)[:, :n_tokens]


def _decays(to: Tensor, of: Tensor, diagonal: int = 0) -> Tensor:
    """exp(to_i - of_j) for j <= i + diagonal, else 0, from logarithms that are summed up."""
    n = of.shape[-1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=of.device).tril(diagonal)
    return torch.where(earlier, to[..., :, None] - of[..., None, :], float("-inf")).exp()


def mend_backward() -> None:
    """Let the backward pass of fla's gated delta rule run in this process by `chunk_gradients` where fla's own kernel is wrong."""
    from fla.ops.gated_delta_rule import chunk

    fused = torch.compile(chunk_gradients, dynamic=False)

    def gradients(
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        g: Tensor,
        h: Tensor,
        dv: Tensor,
        do: Tensor,
        dh: Tensor,
        scale: float,
        chunk_size: int,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        if q.shape[1] % chunk_size or options.get("cu_seqlens") is not None or options.get("state_v_first"):
            raise ValueError(
                f"expected whole chunks of {chunk_size} tokens of one sequence per row, got {q.shape[1]} tokens"
            )
        made: tuple[Tensor, ...] = fused(q, k, v, g, h, dv, do, dh, scale, chunk_size)
        return made

    chunk.chunk_bwd_dqkwg = gradients


def chunk_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    h: Tensor,
    dv: Tensor,
    do: Tensor,
    dh: Tensor,
    scale: float,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, WY weights and decays within chunks, from the states between them.

    Args:
        q, k: (batch, token, key head, d).
        v: values that are written, do and dv: gradients of outputs and of those values, (batch, token, head, d).
        g: log2 of the decay, summed up within its chunk, (batch, token, head).
        h, dh: state before each chunk and its gradient after it, (batch, chunk, head, d, d).
        scale: of the queries.
        size: tokens of a chunk.

    Returns:
        dq, dk (batch, token, key head, d), dw (batch, token, head, d), and dg, the gradient of the summed-up natural logarithm.
    """
    n_keys = k.shape[2]
    per_key = v.shape[2] // n_keys

    def chunks(x: Tensor) -> Tensor:
        """(batch, chunk, head, token, d)"""
        return x.unflatten(1, (-1, size)).transpose(2, 3)

    def tokens(x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(1, 2)

    q_, k_ = (chunks(x.repeat_interleave(per_key, 2)) for x in (q, k))
    v_, do_, dv_ = map(chunks, (v, do, dv))
    g_ = g.unflatten(1, (-1, size)).transpose(2, 3)
    left, last = g_.exp2()[..., None], g_[..., -1:]
    dw = -(dv_ @ h.mT)
    dq = (do_ @ h.mT).float() * left * scale
    dk = (v_ @ dh.mT).float() * (last - g_).exp2()[..., None]
    of_last = last.exp2()[..., 0] * (h.float() * dh.float()).sum((-2, -1)) + (dk * k_).sum((-2, -1))
    below = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    decay = torch.where(below, g_[..., :, None] - g_[..., None, :], float("-inf")).exp2()
    ds = ((do_ @ v_.mT).float() * decay * scale).to(q.dtype)
    dq = dq + (ds @ k_).float()
    dk = dk + (ds.mT @ q_).float()
    dg = (dq * q_).sum(-1) - (dk * k_).sum(-1)
    dg = torch.cat([dg[..., :-1], dg[..., -1:] + of_last[..., None]], -1)
    dq, dk = (tokens(x).unflatten(2, (n_keys, per_key)).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, tokens(dw), dg.transpose(2, 3).flatten(1, 2)


RECURRENCES: dict[str, Recurrence] = {
    "gated delta": gated_delta, "sparse state expansion": gated_delta, "KDA": kda, "decay without delta": decayed_sum,
}  # fmt: skip


def recurrence_of(rule: str) -> Recurrence:
    """The recurrence of an update rule on a GPU.

    Args:
        rule: of a recipe.

    Raises:
        ValueError: a rule without a recurrence here.
    """
    if rule not in RECURRENCES:
        raise ValueError(f"no recurrence for the update rule {rule!r}: there is one for {', '.join(RECURRENCES)}")
    return RECURRENCES[rule]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)).to(x.dtype)


def _mlp(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    h = _rms_norm(x, norm, eps)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def _linear_inputs(
    x: Tensor,
    norm: Tensor,
    qkvz: Tensor,
    ba: Tensor,
    conv: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    eps: float,
    d: int,
    n_k: int,
    n_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    h = _rms_norm(x, norm, eps)
    per_key = n_v // n_k
    # Rows are grouped by key head; taking the groups apart in the weight costs nothing, in the activations a pass each.
    rows = qkvz.view(n_k, (2 + 2 * per_key) * d, -1).split([d, d, per_key * d, per_key * d], dim=1)
    mixed = F.linear(h, torch.cat([part.flatten(0, 1) for part in rows]))
    qkv, z = mixed.split([(2 * n_k + n_v) * d, n_v * d], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, d)) for part in _convolved(qkv, conv).split([n_k * d, n_k * d, n_v * d], dim=-1))
    q, k = (unit(u).to(x.dtype) for u in (q, k))
    b, a = F.linear(h, ba).unflatten(-1, (n_k, 2, per_key)).unbind(-2)
    log_decay = -a_log.exp() * F.softplus(a.flatten(-2).float() + dt_bias)
    return q, k, v, log_decay, b.flatten(-2).float().sigmoid().to(x.dtype), z


def _convolved(x: Tensor, conv: Tensor) -> Tensor:
    width = conv.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    return F.silu(reduce(torch.add, [padded[:, i : i + x.shape[1]] * conv[:, 0, i] for i in range(width)]))


class _Reorder(torch.autograd.Function):
    """Tokens in another order; the backward pass takes them back, where that of `gather` would add them up one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _taken(x, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _taken(gradient, *ctx.saved_tensors), None, None


def _taken(x: Tensor, order: Tensor) -> Tensor:
    rows = x.flatten(2)
    return rows.gather(1, order[..., None].expand_as(rows)).view_as(x)


def _reordered(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    made: Tensor = _Reorder.apply(x, order, inverse)
    return made


def _sse_inputs(
    x: Tensor,
    norm: Tensor,
    qkvz: Tensor,
    ba: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    conv: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    eps: float,
    d: int,
    n_k: int,
    n_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_linear_inputs`, of twice as many heads, and behind them the auxiliary loss and two orders of the tokens.

    The first heads have the shared states. The others read the tokens of one partition after the other, and forget all before the first
    token of each: since only the active partition of a token is read or written, one state stands for all.
    """
    h = _rms_norm(x, norm, eps)
    qkv, z = F.linear(h, qkvz).split([(2 * n_k + n_v) * d, n_v * d], dim=-1)
    q, k, v = _convolved(qkv, conv).split([n_k * d, n_k * d, n_v * d], dim=-1)
    more_q, more_k = F.linear(F.linear(h, down), up).chunk(2, dim=-1)
    shares = F.linear(h, router).float().softmax(-1)
    weight, chosen = shares.max(-1, keepdim=True)
    n_partitions = shares.shape[-1]
    active = torch.zeros_like(shares).scatter(-1, chosen, 1.0)
    balance = n_partitions * (shares.mean((0, 1)) * active.mean((0, 1))).sum()
    partition = chosen[..., 0]
    order = partition.argsort(dim=1, stable=True)
    inverse = order.argsort(dim=1)
    partition = partition.gather(1, order)
    first = F.pad(partition[:, 1:] != partition[:, :-1], (1, 0), value=True)

    def heads(u: Tensor) -> Tensor:
        return unit(u.unflatten(-1, (n_k, d)))

    def both(shared: Tensor, sparse: Tensor) -> Tensor:
        return torch.cat([shared, _reordered(sparse, order, inverse)], 2)

    def of_state(gates: Tensor) -> Tensor:
        """(batch, token, head) of the active partitions, from (batch, token, state)."""
        wide = gates.unflatten(-1, (1 + n_partitions, n_v))
        return both(wide[:, :, 0], wide.gather(2, (1 + chosen)[..., None].expand(-1, -1, -1, n_v))[:, :, 0])

    q, k = (both(heads(u), heads(u + more) * weight[..., None]).to(x.dtype) for u, more in ((q, more_q), (k, more_k)))
    v = v.unflatten(-1, (n_v, d))
    b, a = F.linear(h, ba).chunk(2, dim=-1)
    log_decay = of_state(-a_log.exp() * F.softplus(a.float() + dt_bias))
    begins = F.pad(first[..., None].expand(-1, -1, n_v), (n_v, 0), value=False)
    log_decay = log_decay.masked_fill(begins, FORGETS)
    return q, k, both(v, v), log_decay, of_state(b.float().sigmoid()).to(x.dtype), z, balance, order, inverse


def _joined(out: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    shared, sparse = out.chunk(2, dim=2)
    return shared + _reordered(sparse, inverse, order)


def _kda_inputs(
    x: Tensor,
    norm: Tensor,
    qkv: Tensor,
    b: Tensor,
    decay_down: Tensor,
    decay_up: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    conv: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    eps: float,
    d: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_linear_inputs`, with a decay per channel."""
    h = _rms_norm(x, norm, eps)
    q, k, v = (part.unflatten(-1, (-1, d)) for part in _convolved(F.linear(h, qkv), conv).chunk(3, dim=-1))
    q, k = (unit(u).to(x.dtype) for u in (q, k))
    a = F.linear(F.linear(h, decay_down), decay_up).float() + dt_bias
    log_decay = -a_log.exp() * F.softplus(a).unflatten(-1, (-1, d))
    z = F.linear(F.linear(h, gate_down), gate_up)
    return q, k, v, log_decay, F.linear(h, b).float().sigmoid().to(x.dtype), z


def _decayed_inputs(
    x: Tensor,
    norm: Tensor,
    projection: Tensor,
    conv: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    eps: float,
    d: int,
    n_k: int,
    n_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_linear_inputs`, for Mamba-2: what is written is scaled by the step that decides the decay. Last the values as they were."""
    width, keys = conv.shape[0] - 2 * n_k * d, n_k * d
    z, xbc, dt = F.linear(_rms_norm(x, norm, eps), projection).split([width, width + 2 * keys, n_v], dim=-1)
    v, k, q = (
        part.unflatten(-1, (n, -1))
        for n, part in zip((n_v, n_k, n_k), _convolved(xbc, conv).split([width, keys, keys], dim=-1), strict=True)
    )
    step = F.softplus(dt.float() + dt_bias)
    q, k = (u.repeat_interleave(n_v // n_k, 2) for u in (q, k))
    return q, k, (v * step[..., None]).to(x.dtype), -a_log.exp() * step, z, v


def _decayed_outputs(
    x: Tensor,
    out: Tensor,
    v: Tensor,
    z: Tensor,
    skip: Tensor,
    norm: Tensor,
    projection: Tensor,
    eps: float,
    n_groups: int,
) -> Tensor:
    gated = (out.float() + skip[:, None] * v.float()).flatten(-2) * F.silu(z.float())
    wide = gated.unflatten(-1, (n_groups, -1))
    normed = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2).to(x.dtype)
    return x + F.linear(normed, projection)


def _linear_outputs(
    x: Tensor, out: Tensor, z: Tensor, norm: Tensor, projection: Tensor, eps: float, gate: Callable[[Tensor], Tensor]
) -> Tensor:
    wide = out.float()
    normed = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    gated = normed * gate(z.unflatten(-1, out.shape[-2:]).float())
    return x + F.linear(gated.flatten(-2).to(x.dtype), projection)


def _attention(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Tensor:
    d = q_norm.shape[0]
    h = _rms_norm(x, norm, eps)
    query, gate = F.linear(h, q).unflatten(-1, (-1, 2 * d)).chunk(2, dim=-1)
    key, value = (F.linear(h, w).unflatten(-1, (-1, d)) for w in (k, v))
    query, key = (_rotate(_rms_norm(u, w, eps).transpose(1, 2), cos, sin) for u, w in ((query, q_norm), (key, k_norm)))
    out = F.scaled_dot_product_attention(query, key, value.transpose(1, 2), is_causal=True, enable_gqa=True)
    return x + F.linear(out.transpose(1, 2).flatten(-2) * gate.flatten(-2).sigmoid(), o)


def _plain_attention(
    x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, cos: Tensor, sin: Tensor, eps: float, d: int
) -> Tensor:
    """Softmax attention without gates and norms of its own."""
    h = _rms_norm(x, norm, eps)
    query, key, value = (F.linear(h, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q, k, v))
    query, key = (_rotate(u, cos, sin) for u in (query, key))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return x + F.linear(out.transpose(1, 2).flatten(-2), o)


def _latent_attention(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    latent: Tensor,
    kv: Tensor,
    o: Tensor,
    latent_norm: Tensor,
    eps: float,
    latent_eps: float,
    n_heads: int,
    d_shared: int,
    d_v: int,
) -> Tensor:
    """Softmax attention without positions, whose keys and values come from a latent, and a part of whose keys all heads share."""
    h = _rms_norm(x, norm, eps)
    query = F.linear(h, q).unflatten(-1, (n_heads, -1))
    low, shared = F.linear(h, latent).split([latent_norm.shape[0], d_shared], dim=-1)
    own, value = (
        F.linear(_rms_norm(low, latent_norm, latent_eps), kv)
        .unflatten(-1, (n_heads, -1))
        .split([query.shape[-1] - d_shared, d_v], dim=-1)
    )
    key = torch.cat([own, shared[:, :, None].expand(-1, -1, n_heads, -1)], dim=-1)
    query, key, value = (u.transpose(1, 2) for u in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return x + F.linear(out.transpose(1, 2).flatten(-2), o)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([(turned * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype), kept], dim=-1)


def _logits(x: Tensor, norm: Tensor, embedding: Tensor, eps: float) -> Tensor:
    return F.linear(_rms_norm(x, norm, eps), embedding)


def _weighted_loss(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(
        _logits(x, norm, embedding, eps).flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    weights = weights.flatten()
    return (losses * weights).sum() / weights.sum(), losses.detach()


def _part(module: torch.nn.Module, *names: str) -> Any:
    """The part of a module that has one of these names: each class has its own."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


class FastForward:
    """Loss and logits of a small model with dense MLPs and tied embeddings, of a class that a recipe may have.

    Args:
        model: the model; its parameters (float32) are used, not copied.
        recurrence: of its update rule, see `recurrence_of`.
        dtype: of activations and products.
        compiled: fuse with `torch.compile`.

    Raises:
        ValueError: more than one active partition, or Mamba-2 layers of another transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recurrence: Recurrence,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool = True,
    ):
        self.model, self.recurrence, self.dtype = model, recurrence, dtype
        if (n_active := getattr(model.config, "n_active", 1)) != 1:
            raise ValueError(
                f"expected one active partition per token, got n_active={n_active}: train it with its own forward"
            )
        if any(isinstance(m, BambaMixer) and not hasattr(m.norm, "group_size") for m in model.modules()):
            raise ValueError(
                "this transformers normalises the output of Mamba-2 layers over all heads, and later ones over each group: "
                "train with 5.23 or later, so that the model stays the same"
            )
        self._adds_one = isinstance(model, Qwen3NextForCausalLM)  # to the weights of its norms, as `_rms_norm` does
        self._fuse = cache(torch.compile(dynamic=False) if compiled else lambda function: function)

    def _norm(self, module: torch.nn.Module) -> Tensor:
        return module.weight if self._adds_one else module.weight - 1.0

    def _low(self, *modules: torch.nn.Module) -> list[Tensor]:
        return [module.weight.to(self.dtype) for module in modules]

    def _mixed(self, layer: torch.nn.Module, x: Tensor, angles: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | float]:
        """What a layer's first half gives, and the auxiliary loss of its router, weighted; 0 without one."""
        config, low, fuse = self.model.config, self._low, self._fuse
        before, eps = self._norm(layer.input_layernorm), config.rms_norm_eps
        m = _part(layer, "linear_attn", "mamba", "self_attn")
        if isinstance(m, SSEGatedDeltaNet):
            *inputs, z, balance, order, inverse = fuse(_sse_inputs)(
                x, before, *low(m.in_proj_qkvz, m.in_proj_ba, m.router, m.lora_down, m.lora_up, m.conv1d), m.A_log, m.dt_bias, eps, m.head_k_dim,
                m.keys, m.values,
            )  # fmt: skip
            out = fuse(_joined)(self.recurrence(*inputs), order, inverse)
            return fuse(_linear_outputs)(x, out, z, *low(m.norm, m.out_proj), eps, F.silu), config.balance * balance
        if isinstance(m, Qwen3NextGatedDeltaNet):
            if not m.num_v_heads:  # pruned to none, and the layer adds nothing
                return x, 0.0
            *inputs, z = fuse(_linear_inputs)(
                x, before, *low(m.in_proj_qkvz, m.in_proj_ba, m.conv1d), m.A_log, m.dt_bias, eps, m.head_k_dim, m.num_k_heads, m.num_v_heads
            )  # fmt: skip
            return fuse(_linear_outputs)(x, self.recurrence(*inputs), z, *low(m.norm, m.out_proj), eps, F.silu), 0.0
        if isinstance(m, KimiLinearDeltaAttention):
            forget = m.forget_gate
            *inputs, z = fuse(_kda_inputs)(
                x, before, torch.cat(low(m.q_proj, m.k_proj, m.v_proj)), *low(m.b_proj, forget.f_a_proj, forget.f_b_proj, m.g_a_proj, m.g_b_proj, m.conv1d),
                forget.A_log, forget.dt_bias, eps, m.head_dim,
            )  # fmt: skip
            return fuse(_linear_outputs)(
                x, self.recurrence(*inputs), z, *low(m.o_norm, m.o_proj), eps, torch.sigmoid
            ), 0.0
        if isinstance(m, BambaMixer):
            *inputs, z, v = fuse(_decayed_inputs)(
                x, before, *low(m.in_proj, m.conv1d), m.A_log, m.dt_bias, eps, m.ssm_state_size, m.n_groups, m.num_heads
            )
            out = fuse(self.recurrence)(*inputs)
            return fuse(_decayed_outputs)(x, out, v, z, m.D, *low(m.norm, m.out_proj), eps, m.n_groups), 0.0
        if isinstance(m, BambaAttention):
            return fuse(_plain_attention)(
                x, before, *low(m.q_proj, m.k_proj, m.v_proj, m.o_proj), *angles, eps, m.head_dim
            ), 0.0
        if isinstance(m, KimiLinearAttention):
            return fuse(_latent_attention)(
                x, before, *low(m.q_proj, m.kv_a_proj_with_mqa, m.kv_b_proj, m.o_proj), self._norm(m.kv_a_layernorm), eps,
                m.kv_a_layernorm.variance_epsilon, m.num_heads, m.qk_rope_head_dim, m.v_head_dim,
            ), 0.0  # fmt: skip
        return fuse(_attention)(
            x, before, *low(m.q_proj, m.k_proj, m.v_proj, m.o_proj), m.q_norm.weight, m.k_norm.weight, *angles, eps
        ), 0.0

    def _hidden(self, ids: Tensor) -> tuple[Tensor, Tensor | float]:
        """Hidden states, and the auxiliary loss of all routers, weighted; 0 without any."""
        of = self.model.model
        x = F.embedding(ids, of.embed_tokens.weight.to(self.dtype))
        angles: tuple[Tensor, ...] = ()
        if hasattr(of, "rotary_emb"):
            angles = tuple(u[:, None] for u in of.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None]))
        auxiliary: Tensor | float = 0.0
        for layer in of.layers:
            x, balance = self._mixed(layer, x, angles)
            auxiliary = auxiliary + balance
            m, norm = _part(layer, "mlp", "feed_forward"), _part(layer, "post_attention_layernorm", "pre_ff_layernorm")
            x = self._fuse(_mlp)(
                x, self._norm(norm), *self._low(m.gate_proj, m.up_proj, m.down_proj), self.model.config.rms_norm_eps
            )  # fmt: skip
        return x, auxiliary

    def _head(self) -> tuple[Tensor, Tensor]:
        """Last norm and embedding."""
        return self._norm(_part(self.model.model, "norm", "final_layernorm")), *self._low(self.model.lm_head)  # type: ignore[return-value]

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (batch, token, vocabulary)."""
        return _logits(self._hidden(ids)[0], *self._head(), self.model.config.rms_norm_eps)

    def loss(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean loss of predicting ids[:, 1:], with the auxiliary loss in it, and the loss of every token (flat, detached), in nats."""
        hidden, auxiliary = self._hidden(ids[:, :-1])
        loss, losses = self._fuse(_weighted_loss)(
            hidden, *self._head(), ids[:, 1:], weights, self.model.config.rms_norm_eps
        )
        return loss + auxiliary, losses


class Gradients:
    """Loss and gradients of batches of one shape; on a GPU recorded once as a graph and replayed, since launching takes longer than the work.

    Args:
        fast: of the model; gradients are left in its parameters.
    """

    WARM_UP = 2  # passes before the recording, in which kernels are compiled

    def __init__(self, fast: FastForward):
        self.fast = fast
        self.parameters = [p for p in fast.model.parameters() if p.requires_grad]
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the loss of every token, as in `FastForward.loss`; the next call overwrites both."""
        if not ids.is_cuda:
            return self._pass(ids, weights)
        if self._graph is None:
            self._record(ids, weights)
        assert self._graph is not None
        self._ids.copy_(ids)
        self._weights.copy_(weights)
        self._graph.replay()
        return self._made

    def _pass(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        loss, losses = self.fast.loss(ids, weights)
        loss.backward()
        return loss.detach(), losses

    def _record(self, ids: Tensor, weights: Tensor) -> None:
        self._ids, self._weights = ids.clone(), weights.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                self._pass(self._ids, self._weights)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._made = self._pass(self._ids, self._weights)
