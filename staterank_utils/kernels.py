"""The gated delta rule and the small modules around it, in few passes over memory, for a CPU without a compiler.

The same functions as transformers' plain torch versions, to float32 rounding, with these differences in how they compute:

- key heads that serve several value heads are never repeated where their products are the same for all of them;
- a prompt is worked through in blocks of a few hundred tokens, so that what is computed stays in the processor's cache;
- within a chunk, only what depends on the chunk before is computed one after the other; all else is one batched product;
- the short convolution runs in the order that memory has, channels last;
- a step of one token reads the state once and writes it once.

They hold for tensors on a CPU, in float32, where no gradient is asked for; `dispatch.choose_kernels` puts them in, and sends
everything else to transformers.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

CHUNK = 32
BLOCK_TOKENS = 512
EPS = 1e-6  # of the length of queries and keys, as in transformers


def unit(x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
    """Vectors of length 1, as a delta rule takes queries and keys.

    Args:
        x: of any float dtype.

    Returns:
        At least float32.

    Example:
        >>> [round(each, 3) for each in unit(torch.tensor([3.0, 4.0])).tolist()]
        [0.6, 0.8]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)


# ---------------------------------------------------------------- kernels


def torch_chunk_gated_delta_rule(
    query: Float[Tensor, "batch token key_head d_k"],
    key: Float[Tensor, "batch token key_head d_k"],
    value: Float[Tensor, "batch token head d_v"],
    g: Float[Tensor, "batch token head"],
    beta: Float[Tensor, "batch token head"],
    chunk_size: int = CHUNK,
    initial_state: Float[Tensor, "batch head d_k d_v"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Float[Tensor, "batch token head d_v"], Float[Tensor, "batch head d_k d_v"] | None]:
    """The gated delta rule over many tokens, chunk by chunk.

    Source: Gated DeltaNet, arXiv:2412.06464, Sec. 3.3 (the WY form of a chunk). With c the cumulative log-decay in a
    chunk, A = I + strictly lower part of b_i exp(c_i - c_j) k_i.k_j, U = A^-1 (b v) and W = A^-1 (b exp(c) k), the values
    that a chunk writes are U - W S, with S the state before it. Only differences c_i - c_j <= 0 are exponentiated.

    Args:
        query, key: each key head serves as many consecutive value heads as there are for one.
        value: what is written.
        g: natural logarithm of the decay, at most 0.
        beta: write strength.
        chunk_size: tokens in a chunk.
        initial_state: the state to continue from, 0 by default; it is not changed.
        output_final_state: also return the state after the last token.
        use_qk_l2norm_in_kernel: divide queries and keys by their length.

    Returns:
        Outputs, and the final state or None.

    Example:
        >>> one, zero = torch.ones(1, 3, 1), torch.zeros(1, 3, 1)  # writes at full strength, no decay
        >>> key = torch.eye(4)[:3].reshape(1, 3, 1, 4)
        >>> value = torch.tensor([5.0, 6.0, 7.0]).reshape(1, 3, 1, 1)
        >>> out, state = torch_chunk_gated_delta_rule(2 * key, key, value, g=zero, beta=one, output_final_state=True)
        >>> out.flatten().tolist(), state.flatten().tolist()  # queries are scaled by 1 / sqrt(d_k)
        ([5.0, 6.0, 7.0], [5.0, 6.0, 7.0, 0.0])
    """
    n_batch, _, n_heads, d_v = value.shape
    state = value.new_zeros(n_batch, n_heads, key.shape[-1], d_v) if initial_state is None else initial_state.clone()
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    for row in range(n_batch):
        tokens = tuple(x[row] for x in (query, key, value, g, beta))
        state[row] = _sequence(tokens, state[row], out[row], chunk_size, use_qk_l2norm_in_kernel)
    return out, state if output_final_state else None


def gated_delta_rule_states(
    query: Float[Tensor, "1 token key_head d_k"],
    key: Float[Tensor, "1 token key_head d_k"],
    value: Float[Tensor, "1 token head d_v"],
    g: Float[Tensor, "1 token head"],
    beta: Float[Tensor, "1 token head"],
    *,
    positions: Sequence[int],
    keep: Callable[[Tensor], None],
    initial_state: Float[Tensor, "1 head d_k d_v"] | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Float[Tensor, "1 token head d_v"], Float[Tensor, "1 head d_k d_v"]]:
    """As `torch_chunk_gated_delta_rule` for one sequence, and the states at some positions on the way.

    A state inside a chunk is the one before the chunk, decayed, and one product of the keys and of what they wrote until
    then; so a position costs a product, not a call that ends there, and at the end of a chunk nothing.

    Args:
        positions: numbers of tokens, increasing, in 1..token.
        keep: is given each of the states (1, head, d_k, d_v), in order.

    Returns:
        Outputs, and the final state.

    Example:
        >>> one, zero, seen = torch.ones(1, 3, 1), torch.zeros(1, 3, 1), []
        >>> key = torch.eye(4)[:3].reshape(1, 3, 1, 4)
        >>> value = torch.tensor([5.0, 6.0, 7.0]).reshape(1, 3, 1, 1)
        >>> _ = gated_delta_rule_states(key, key, value, zero, one, positions=[1, 2], keep=seen.append)
        >>> [state.flatten().tolist() for state in seen]
        [[5.0, 0.0, 0.0, 0.0], [5.0, 6.0, 0.0, 0.0]]
    """
    state = (
        value.new_zeros(value.shape[2], key.shape[-1], value.shape[3]) if initial_state is None else initial_state[0]
    )
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    tokens = tuple(x[0] for x in (query, key, value, g, beta))
    last = _sequence(tokens, state, out[0], CHUNK, use_qk_l2norm_in_kernel, positions, lambda state: keep(state[None]))
    return out, last[None]


def _sequence(
    tokens: tuple[Tensor, ...],
    state: Float[Tensor, "head d_k d_v"],
    out: Float[Tensor, "token head d_v"],
    chunk_size: int,
    normalize: bool,
    positions: Sequence[int] = (),
    keep: Callable[[Tensor], None] = lambda _: None,
) -> Float[Tensor, "head d_k d_v"]:
    """One sequence, block by block: fill `out`, give `keep` the states at the positions, return the last."""
    n_tokens = len(out)
    upper = torch.full((chunk_size, chunk_size), float("-inf"), device=out.device).triu(1)
    for start in range(0, n_tokens, BLOCK_TOKENS):
        stop = min(start + BLOCK_TOKENS, n_tokens)
        ends = [position - start for position in positions if start < position <= stop]
        q, k, v, log_decay, strength = (x[start:stop] for x in tokens)
        out[start:stop], state, inside = _block(q, k, v, log_decay, strength, state, upper, normalize, ends)
        for found in inside:
            keep(found)
    return state


def _block(
    q: Float[Tensor, "token key_head d_k"],
    k: Float[Tensor, "token key_head d_k"],
    v: Float[Tensor, "token head d_v"],
    log_decay: Float[Tensor, "token head"],
    write_strength: Float[Tensor, "token head"],
    state: Float[Tensor, "head d_k d_v"],
    upper: Float[Tensor, "chunk chunk"],
    normalize: bool,
    ends: Sequence[int],
) -> tuple[Float[Tensor, "token head d_v"], Float[Tensor, "head d_k d_v"], Iterator[Float[Tensor, "head d_k d_v"]]]:
    """A block of one sequence: outputs, the state behind it, and the states after `ends` tokens, made one by one."""
    size = len(upper)
    n_tokens, n_keys, d_k = k.shape
    n_heads, d_v = v.shape[1:]
    group = n_heads // n_keys
    if missing := -n_tokens % size:
        # A padded token writes nothing and does not decay.
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
        log_decay, write_strength = (F.pad(x, (0, 0, 0, missing)) for x in (log_decay, write_strength))
    n = (n_tokens + missing) // size

    def chunked(x: Tensor) -> Tensor:
        return x.unflatten(0, (n, size)).permute(2, 0, 1, *range(3, x.ndim + 1))

    # (chunk of the block first, so that a chunk of all heads is one piece of memory)
    q_scale, k_scale = (
        ((x * x).sum(-1).add_(EPS).rsqrt_() if normalize else torch.ones_like(x[..., 0])) for x in (q, k)
    )
    b = chunked(write_strength).unflatten(0, (n_keys, group)).permute(2, 0, 1, 3).contiguous()  # (n, key, group, size)
    # float64, or a weak decay is lost behind a strong one in the sum; the bound keeps -inf, a decay to nothing, a number.
    c = chunked(log_decay).double().clamp_min_(-1e4).unflatten(0, (n_keys, group)).permute(2, 0, 1, 3).cumsum(-1)
    q = (q * q_scale.mul_(d_k**-0.5)[..., None]).unflatten(0, (n, size)).transpose(1, 2)
    k = torch.mul(
        k.unflatten(0, (n, size)).transpose(1, 2), k_scale.unflatten(0, (n, size)).transpose(1, 2)[..., None]
    ).contiguous()
    q = q.contiguous()  # (n, key, size, d_k)
    v = v.unflatten(0, (n, size)).transpose(1, 2).unflatten(1, (n_keys, group))  # (n, key, group, size, d_v)

    flat_k = k.flatten(0, 1)
    kt = flat_k.transpose(-1, -2)
    decay = (c[..., None] - c[..., None, :]).float().add_(upper).exp_()  # (n, key, group, size, size)
    system = torch.bmm(flat_k, kt).view(n, n_keys, 1, size, size) * decay
    system.mul_(b[..., None])
    attention = torch.bmm(q.flatten(0, 1), kt).view(n, n_keys, 1, size, size) * decay
    from_start = c.float().exp_()

    right = v.new_empty(n, n_keys, group, size, d_v + d_k)
    torch.mul(v, b[..., None], out=right[..., :d_v])
    torch.mul(k[:, :, None], (b * from_start)[..., None], out=right[..., d_v:])
    inverse = _inverse(system.view(-1, size, size))
    solved = torch.bmm(inverse, right.view(-1, size, d_v + d_k)).view(n, n_heads, size, d_v + d_k)
    written, reading = solved[..., :d_v].contiguous(), solved[..., d_v:].contiguous()
    k_end = (k[:, :, None] * (c[..., -1:] - c).float().exp_()[..., None]).view(n, n_heads, size, d_k).transpose(-1, -2)
    end = from_start[..., -1].reshape(n, n_heads, 1, 1)
    states = v.new_empty(n + 1, n_heads, d_k, d_v)
    states[0] = state
    for i in range(n):
        written[i].baddbmm_(reading[i], states[i], alpha=-1)
        torch.mul(states[i], end[i], out=states[i + 1])
        states[i + 1].baddbmm_(k_end[i], written[i])
    q_start = (q[:, :, None] * from_start[..., None]).view(-1, size, d_k)
    out = torch.bmm(q_start, states[:n].view(-1, d_k, d_v))
    out.baddbmm_(attention.view(-1, size, size), written.view(-1, size, d_v))

    def inside() -> Iterator[Tensor]:
        for end in ends:
            i, j = divmod(end - 1, size)
            if j == size - 1:
                yield states[i + 1]
                continue
            decays = (c[i, ..., j : j + 1] - c[i, ..., : j + 1]).float().exp_()  # (key, group, token)
            keys = (k[i, :, None, : j + 1] * decays[..., None]).view(n_heads, j + 1, d_k)
            start = states[i] * from_start[i, ..., j].reshape(n_heads, 1, 1)
            yield start.baddbmm_(keys.transpose(-1, -2), written[i, :, : j + 1])

    read = out.view(n, n_heads, size, d_v).transpose(1, 2).reshape(n * size, n_heads, d_v)[:n_tokens]
    return read, states[n], inside()


def _inverse(system: Float[Tensor, "n size size"]) -> Float[Tensor, "n size size"]:
    """Inverse of unit lower triangular matrices; what stands on and above the diagonal is not read."""
    size = system.shape[-1]
    return torch.linalg.solve_triangular(
        system, torch.eye(size, device=system.device).expand_as(system), upper=False, unitriangular=True
    )


def torch_recurrent_gated_delta_rule(
    query: Float[Tensor, "batch token key_head d_k"],
    key: Float[Tensor, "batch token key_head d_k"],
    value: Float[Tensor, "batch token head d_v"],
    g: Float[Tensor, "batch token head"],
    beta: Float[Tensor, "batch token head"],
    initial_state: Float[Tensor, "batch head d_k d_v"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    in_place: bool = False,
) -> tuple[Float[Tensor, "batch token head d_v"], Float[Tensor, "batch head d_k d_v"] | None]:
    """As `torch_chunk_gated_delta_rule`, for one token from a given state; any other call goes there.

    With r = S^T k and p = S^T q read from the old state in one product: d = b (v - a r), o = a p + (q.k) d, and the new
    state is a S + k d^T.

    Args:
        in_place: the new state is written into `initial_state`.

    Example:
        >>> key, state = torch.eye(4)[:1].reshape(1, 1, 1, 4), torch.full((1, 1, 4, 1), 3.0)
        >>> out, new = torch_recurrent_gated_delta_rule(
        ...     2 * key, key, torch.full((1, 1, 1, 1), 5.0), g=torch.zeros(1, 1, 1), beta=torch.ones(1, 1, 1),
        ...     initial_state=state, output_final_state=True,
        ... )
        >>> out.item(), new.flatten().tolist()
        (5.0, [5.0, 3.0, 3.0, 3.0])
    """
    if value.shape[1] != 1 or initial_state is None:
        return torch_chunk_gated_delta_rule(
            query, key, value, g, beta, initial_state=initial_state, output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )  # fmt: skip
    n_keys, d_k = key.shape[2:]
    group = value.shape[2] // n_keys
    kq = torch.stack((key[:, 0], query[:, 0]), 2)  # (batch, key_head, 2, d_k)
    if use_qk_l2norm_in_kernel:
        kq.mul_((kq * kq).sum(-1, keepdim=True).add_(EPS).rsqrt_())
    if group > 1:
        kq = kq.repeat_interleave(group, 1)
    read = torch.matmul(kq, initial_state)  # (batch, head, 2, d_v)
    decay = g[:, 0].exp()[..., None]
    read.mul_(decay[..., None])
    delta = (value[:, 0] - read[:, :, 0]).mul_(beta[:, 0][..., None])
    k = kq[:, :, 0]
    out = read[:, :, 1].addcmul_(delta, (k * kq[:, :, 1]).sum(-1, keepdim=True)).mul_(d_k**-0.5)
    state = initial_state.mul_(decay[..., None]) if in_place else initial_state * decay[..., None]
    state.addcmul_(k[..., None], delta[:, :, None])
    return out[:, None], state if output_final_state else None


def causal_conv1d_fn(
    hidden_states: Float[Tensor, "batch channel token"],
    weight: Float[Tensor, "channel width"],
    bias: Float[Tensor, " channel"] | None = None,
    activation: str | None = None,
) -> Float[Tensor, "batch channel token"]:
    """The causal convolution of each channel, followed by SiLU or nothing; computed, and left, channels last.

    Example:
        >>> causal_conv1d_fn(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]])).tolist()
        [[[1.0, 12.0, 23.0]]]
    """
    n_batch, n_channels, n_tokens = hidden_states.shape
    width = weight.shape[-1]
    x = hidden_states.transpose(1, 2).contiguous()
    out = torch.empty_like(x)
    for row in range(n_batch):
        image = x[row : row + 1].transpose(1, 2).unsqueeze(2)  # channels last, as the fast convolution wants it
        filtered = F.conv2d(image, weight[:, None, None], bias, padding=(0, width - 1), groups=n_channels)
        filtered = filtered[0, :, 0, :n_tokens].t()
        if activation is None:
            out[row] = filtered
        else:
            torch.sigmoid(filtered, out=out[row]).mul_(filtered)
    return out.transpose(1, 2)


def causal_conv1d_update(
    hidden_states: Float[Tensor, "batch channel token"],
    conv_state: Float[Tensor, "batch channel width"],
    weight: Float[Tensor, "channel width"],
    bias: Float[Tensor, " channel"] | None = None,
    activation: str | None = None,
) -> Float[Tensor, "batch channel token"]:
    """One more token of `causal_conv1d_fn`; the inputs that the next one needs replace `conv_state`.

    Example:
        >>> kept = torch.tensor([[[1.0, 2.0]]])
        >>> causal_conv1d_update(torch.tensor([[[3.0]]]), kept, torch.tensor([[10.0, 1.0]])).item(), kept.tolist()
        (23.0, [[[2.0, 3.0]]])
    """
    window = torch.cat((conv_state[..., 1:], hidden_states), -1)
    conv_state.copy_(window)
    out = window.mul_(weight).sum(-1, keepdim=True)
    if bias is not None:
        out += bias[:, None]
    return out if activation is None else F.silu(out, inplace=True)


STATES = {"torch_chunk_gated_delta_rule": gated_delta_rule_states}  # kernels that can also tell the states on the way


def serves_kernel(name: str, arguments: dict[str, Any]) -> bool:
    """Whether a kernel of this module is made for these arguments.

    Args:
        name: of the kernel.
        arguments: of the call, by name.

    Example:
        >>> names = ("query", "key", "value", "g", "beta")
        >>> [serves_kernel("torch_chunk_gated_delta_rule", dict.fromkeys(names, x)) for x in (torch.ones(1), torch.ones(1).half())]
        [True, False]
    """
    if torch.compiler.is_compiling():
        return False
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    if torch.is_autocast_enabled("cpu") or any(_is_transformed(x) for x in tensors):
        return False
    if arguments.get("cu_seqlens") is not None or arguments.get("seq_idx") is not None:
        return False
    if arguments.get("activation") not in (None, "silu", "swish"):
        return False
    if name == "causal_conv1d_update":
        new, kept, weight = (arguments[key] for key in ("hidden_states", "conv_state", "weight"))
        return new.shape[-1] == 1 and kept.shape[-1] == weight.shape[-1]
    return True


def _is_transformed(x: Tensor) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation, or is inside a transformation of torch.func."""
    return (
        forward_ad.unpack_dual(x).tangent is not None
        if forward_ad._current_level >= 0
        else is_functorch_wrapped_tensor(x)
    )


# ---------------------------------------------------------------- modules


def _rms_norm(self: nn.Module, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    scale = (x * x).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
    return (x * scale).mul_(1 + self.weight)


def _rms_norm_gated(
    self: nn.Module, hidden_states: Float[Tensor, "*batch d"], gate: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    scale = (hidden_states * hidden_states).mean(-1, keepdim=True).add_(self.variance_epsilon).rsqrt_()
    return (hidden_states * scale).mul_(self.weight).mul_(F.silu(gate))


def _gated_delta_net(
    self: nn.Module,
    hidden_states: Float[Tensor, "batch token d_model"],
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Float[Tensor, "batch token d_model"]:
    """The layer as in transformers, module by module and kernel by kernel, with fewer copies in between."""
    cache = kwargs.pop("cache_params", cache)  # its name before transformers 5.24
    if attention_mask is not None:
        hidden_states = hidden_states * attention_mask[:, :, None].to(hidden_states.dtype)
    n_batch, n_tokens, _ = hidden_states.shape
    conv_state = recurrent_state = None
    recording = False
    if cache is not None:
        # By attribute, since transformers 5.17 has no methods for it.
        held = cache.layers[self.layer_idx]
        recording = held.record_past
        if held.has_previous_state[0]:
            conv_state, recurrent_state = held.conv_states[0], held.recurrent_states[0]

    # Both projections are grouped by key head: [query | key | values | gates z] and [b | a].
    n_keys, d_k, d_v = self.num_k_heads, self.head_k_dim, self.head_v_dim
    group = self.num_v_heads // n_keys
    parts = self.in_proj_qkvz(hidden_states).view(n_batch, n_tokens, n_keys, -1)
    query, key, value, z = parts.split([d_k, d_k, group * d_v, group * d_v], -1)
    b, a = self.in_proj_ba(hidden_states).view(n_batch, n_tokens, n_keys, 2, group).unbind(3)
    mixed = hidden_states.new_empty(n_batch, n_tokens, self.conv_dim)
    sizes = [self.key_dim, self.key_dim, self.value_dim]
    for room, part in zip(mixed.split_with_sizes(sizes, -1), (query, key, value), strict=True):
        room.view(part.shape).copy_(part)
    mixed = mixed.transpose(1, 2)

    weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
    if conv_state is not None and n_tokens == 1 and not recording:
        mixed = causal_conv1d_update(mixed, conv_state, weight, bias, self.activation)
    else:
        if cache is not None:
            mixed = cache.update_conv_state(mixed, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        mixed = causal_conv1d_fn(mixed, weight, bias, activation=self.activation, **kwargs)
        if cache is not None:
            mixed = mixed[:, :, -n_tokens:]
    query, key, value = mixed.transpose(1, 2).split_with_sizes(sizes, -1)

    one_token = recurrent_state is not None and n_tokens == 1
    rule: Any = torch_recurrent_gated_delta_rule if one_token else torch_chunk_gated_delta_rule
    if one_token:
        # The cache is about to be overwritten with the new state.
        kwargs["in_place"] = True
    out, last_state = rule(
        query.unflatten(-1, (-1, d_k)),
        key.unflatten(-1, (-1, d_k)),
        value.unflatten(-1, (-1, d_v)),
        g=F.softplus(a.flatten(2) + self.dt_bias) * -self.A_log.exp(),
        beta=b.flatten(2).sigmoid(),
        initial_state=recurrent_state,
        output_final_state=cache is not None,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=kwargs.pop("cu_seq_lens_q", None),
        **kwargs,
    )
    if cache is not None:
        cache.update_recurrent_state(last_state, self.layer_idx)
    heads = (n_batch, n_tokens, n_keys, group, d_v)
    out = self.norm(out.view(heads), z.unflatten(-1, (group, d_v)))
    return self.out_proj(out.view(n_batch, n_tokens, self.value_dim))


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "Qwen3NextRMSNorm": _rms_norm,
    "Qwen3NextRMSNormGated": _rms_norm_gated,
    "Qwen3NextGatedDeltaNet": _gated_delta_net,
}


def fast_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """A faster forward for a module of just this class of transformers.

    Example:
        >>> fast_forward(nn.Linear(1, 1)) is None
        True
    """
    of_transformers = type(module).__module__ == "transformers.models.qwen3_next.modeling_qwen3_next"
    return FORWARDS.get(type(module).__name__) if of_transformers else None


def serves_module(module: nn.Module, x: Tensor) -> bool:
    """Whether a forward of `FORWARDS` is made for this module and input: float32 on a CPU, and no gradient asked for.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     serves_module(layer, torch.ones(2)), serves_module(layer, torch.ones(2).bfloat16())
        (True, False)
        >>> serves_module(layer, torch.ones(2))  # its weights want a gradient
        False
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") or _is_transformed(x):
        return False
    if getattr(module, "num_v_heads", 1) == 0:
        return False  # all its heads were pruned
    if not torch.is_grad_enabled():
        return next(module.parameters()).dtype == torch.float32
    return not x.requires_grad and all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------- memory


@contextmanager
def ordered_weights(model: nn.Module) -> Iterator[None]:
    """A block in which float32 weight matrices lie column by column in the memory of a CPU: same values, same shapes, other strides.

    A product with one row, as in decoding, then reads them more than twice as fast; products with many rows do not care. It costs a
    copy of these weights, so it pays from some 16 tokens on.

    Args:
        model: its weights on other devices and of other dtypes stay as they are.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with ordered_weights(layer):
        ...     layer.weight.stride()
        (1, 2)
        >>> layer.weight.stride()
        (3, 1)
    """
    chosen = [
        parameter
        for parameter in model.parameters()
        if parameter.ndim == 2 and parameter.dtype == torch.float32 and parameter.device.type == "cpu" and parameter.is_contiguous()
        and not parameter.is_inference()
    ]  # fmt: skip
    with torch.inference_mode(False):
        before = [parameter.data for parameter in chosen]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for parameter, data in zip(chosen, before, strict=True):
                parameter.data = data.t().contiguous().t()
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for parameter, data in zip(chosen, before, strict=True):
                parameter.data = data


def keep_freed_memory() -> bool:
    """Ask the C library to keep what torch frees, for the next tensor, and not to hand it back to the system each time.

    A fresh page costs more than most of the arithmetic that is done on it. This is a setting of the process; it does
    nothing where the C library is not glibc.

    Returns:
        Whether it was accepted.

    Example:
        >>> keep_freed_memory() or not sys.platform.startswith("linux")
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_threshold, limit = -1, -3, 2**31 - 1
    return bool(mallopt(mmap_threshold, limit)) and bool(mallopt(trim_threshold, limit))
