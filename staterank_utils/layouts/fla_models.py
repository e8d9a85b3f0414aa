"""Layers of flash-linear-attention's own models: Gated DeltaNet, DeltaNet, KDA, GLA, RetNet, linear attention, Mamba-2, RWKV-7.

They run on a CPU too, see `staterank_utils.fla_cpu`. fla keeps the states of some layers as d_v x d_k; `state` turns them.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from staterank_utils.fla_cpu import SIMPLE_GLA, mamba2_forward, retention_decay
from staterank_utils.layouts.core import (
    Blocks,
    Change,
    Gates,
    Layout,
    Parts,
    noted_change,
)
from staterank_utils.layouts.delta import ONE, K, V, log_decay, silenced
from staterank_utils.rebinding import calls_through, replaced


def _state(cache: Any, layer_index: int) -> Tensor:
    """As fla keeps it."""
    state: Tensor = cache[layer_index]["recurrent_state"]
    return state


def _turned_state(cache: Any, layer_index: int) -> Tensor:
    """Of a layer that keeps (d_v, d_k)."""
    return _state(cache, layer_index).transpose(-1, -2)


def _cache(model: nn.Module) -> Any:
    return importlib.import_module("fla.models.utils").Cache()


def _idle(
    layer: nn.Module,
    hidden_states: Float[Tensor, "batch token d_model"],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    *rest: Any,
    **more: Any,
) -> tuple[Tensor, None, Any]:
    """What a layer does without any head: it adds nothing, and tells the cache, which counts tokens by layer."""
    n_batch, n_tokens, _ = hidden_states.shape
    if past_key_values is not None:
        empty = hidden_states.new_zeros(n_batch, 0, 0, 0, dtype=torch.float32)
        past_key_values.update(layer_idx=layer.layer_idx, recurrent_state=empty, offset=n_tokens)
    return torch.zeros_like(hidden_states), None, past_key_values


def _by_head(x: Float[Tensor, "batch token row"], n_heads: int) -> Float[Tensor, "batch token head channel"]:
    return x.unflatten(-1, (n_heads, -1))


def _calls(
    make: Callable[[nn.Module, Change], Callable[..., Any]], *kernels: str
) -> Callable[[nn.Module, Change], AbstractContextManager[None]]:
    """`Layout.changed_decay` of a layer whose kernels are called as `make(layer, change)` says."""

    @contextmanager
    def changed(layer: nn.Module, change: Change) -> Iterator[None]:
        call = make(layer, change)
        with calls_through(layer, dict.fromkeys(kernels, call)), noted_change(layer, change):
            yield

    return changed


def _outside_the_kernel(
    log_decay_of: Callable[[nn.Module, Tensor], Tensor],
) -> Callable[[nn.Module, Change], Callable[..., Any]]:
    """For kernels that make the decay of `g` themselves: it is made here, changed, and given to them as it is."""

    def make(layer: nn.Module, change: Change) -> Callable[..., Any]:
        def call(kernel: Callable[..., Any], *, g: Tensor, **options: Any) -> Any:
            within = {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None}
            # A decay that is bounded in training may be changed to lie beyond its bound.
            within |= {"safe_gate": False, "lower_bound": None} if "safe_gate" in options else {}
            return kernel(g=change(log_decay_of(layer, g)), **options | within)

        return call

    return make


def _resize(layer: nn.Module, n_keys: int, n_heads: int, d_k: int) -> None:
    layer.num_heads, layer.num_v_heads = n_keys, n_heads
    layer.key_dim, layer.value_dim = n_keys * layer.head_k_dim, n_heads * layer.head_v_dim
    if hasattr(layer, "gate_dim"):
        layer.gate_dim = n_heads * layer.head_k_dim


def _resize_grouped(layer: nn.Module, n_keys: int, n_heads: int, d_k: int) -> None:
    layer.num_heads, layer.num_kv_heads = n_heads, n_keys
    layer.num_kv_groups = n_heads // max(1, n_keys)
    layer.key_dim, layer.value_dim = n_heads * layer.head_k_dim, n_heads * layer.head_v_dim
    layer.key_dim_per_group, layer.value_dim_per_group = n_keys * layer.head_k_dim, n_keys * layer.head_v_dim


QUERY: Parts = (("value", "d_k"),)  # where several queries share a key
VALUE: Parts = (("key", "d_v"),)  # and its value
COMMON: dict[str, Any] = {
    "d_k": lambda layer: layer.head_k_dim,
    "d_v": lambda layer: layer.head_v_dim,
    "output": lambda layer: "o_proj",
    "idle": _idle,
    "cache": _cache,
}
# Convolutions and the output gate are there or not, as the configuration says.
DELTA = (
    Blocks("q_proj.weight", K),
    Blocks("k_proj.weight", K),
    Blocks("v_proj.weight", V),
    Blocks("q_conv1d.weight", K, optional=True),
    Blocks("k_conv1d.weight", K, optional=True),
    Blocks("v_conv1d.weight", V, optional=True),
    Blocks("b_proj.weight", ONE),
    Blocks("o_proj.weight", V, axis=1),
)

GATED_DELTANET = Layout(
    layer_class="GatedDeltaNet",
    module="fla.layers.gated_deltanet",
    n_heads=lambda layer: layer.num_v_heads,
    n_keys=lambda layer: layer.num_heads,
    gate_modules=("a_proj", "b_proj"),
    gates=lambda layer, a, b: (log_decay(layer, a), b.float().sigmoid() * (2 if layer.allow_neg_eigval else 1)),
    changed_decay=_calls(_outside_the_kernel(log_decay), "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    write_module="b_proj",
    without_writes=silenced,
    state=_turned_state,
    weights=(
        *DELTA,
        Blocks("a_proj.weight", ONE),
        Blocks("A_log", ONE),
        Blocks("dt_bias", ONE),
        Blocks("g_proj.weight", V, optional=True),
    ),
    resize=_resize,
    refusal=lambda layer: (
        "its key heads are more than its value heads" if layer.num_v_heads < layer.num_heads else None
    ),
    **COMMON,
)


def _delta_gates(layer: nn.Module, b: Float[Tensor, "batch token head"]) -> Gates:
    beta = b.float().sigmoid() * (2 if layer.allow_neg_eigval else 1)
    return torch.zeros_like(beta), beta


def _resize_delta(layer: nn.Module, n_keys: int, n_heads: int, d_k: int) -> None:
    layer.num_heads = n_heads
    layer.key_dim, layer.value_dim = n_heads * layer.head_k_dim, n_heads * layer.head_v_dim


DELTANET = Layout(
    layer_class="DeltaNet",
    module="fla.layers.delta_net",
    n_heads=lambda layer: layer.num_heads,
    n_keys=lambda layer: layer.num_heads,
    gate_modules=("b_proj",),
    gates=_delta_gates,
    write_module="b_proj",
    without_writes=silenced,
    state=_state,
    weights=(*DELTA, Blocks("g_proj.weight", V, optional=True)),
    resize=_resize_delta,
    refusal=lambda layer: None if layer.use_beta else "without use_beta it has no write strength to read",
    **COMMON,
)


def _kda_decay(layer: nn.Module, f: Float[Tensor, "batch token head channel"]) -> Tensor:
    f = f.float() + layer.dt_bias.float().view(layer.num_v_heads, -1)
    rate = layer.A_log.float().exp()[:, None]
    return -rate * F.softplus(f) if layer.lower_bound is None else layer.lower_bound * (rate * f).sigmoid()


def _kda_gates(layer: nn.Module, f: Tensor, b: Float[Tensor, "batch token head"]) -> Gates:
    strength = b.float().sigmoid() * (2 if layer.allow_neg_eigval else 1)
    return _kda_decay(layer, _by_head(f, layer.num_v_heads)), strength


KDA = Layout(
    layer_class="KimiDeltaAttention",
    module="fla.layers.kda",
    n_heads=lambda layer: layer.num_v_heads,
    n_keys=lambda layer: layer.num_heads,
    gate_modules=("f_proj", "b_proj"),
    gates=_kda_gates,
    changed_decay=_calls(_outside_the_kernel(_kda_decay), "chunk_kda", "fused_recurrent_kda"),
    write_module="b_proj",
    without_writes=silenced,
    state=_turned_state,
    weights=(
        *DELTA,
        Blocks("f_proj.1.weight", QUERY),
        Blocks("dt_bias", QUERY),
        Blocks("A_log", ONE),
        Blocks("g_proj.1.weight", V),
        Blocks("g_proj.1.bias", V),
    ),
    resize=_resize,
    refusal=lambda layer: (
        "its key heads are more than its value heads" if layer.num_v_heads < layer.num_heads else None
    ),
    **COMMON,
)

# ---------------------------------------------------------------- without a delta rule


def _without_values(layer: nn.Module, v: Float[Tensor, "batch token row"], heads: list[int]) -> Tensor:
    """A value of 0 writes nothing; query heads that share keys and values share the writes too."""
    per_key = layer.num_heads // layer.num_kv_heads
    keys = sorted({head // per_key for head in heads})
    if len(heads) != len(keys) * per_key:
        raise ValueError(
            f"{per_key} heads of {type(layer).__name__} share one key and value head, so their writes stop together: "
            f"got heads {sorted(heads)}. Choose whole groups, or kind 'zero' or 'mean'"
        )
    places = [key * layer.head_v_dim + i for key in keys for i in range(layer.head_v_dim)]
    return v.index_fill(-1, torch.tensor(places, device=v.device), 0.0)


GROUPED: dict[str, Any] = COMMON | {
    "n_heads": lambda layer: layer.num_heads,
    "n_keys": lambda layer: layer.num_kv_heads,
    "write_module": "v_proj",
    "without_writes": _without_values,
}
GROUPED_WEIGHTS = (
    Blocks("q_proj.weight", QUERY),
    Blocks("k_proj.weight", K),
    Blocks("v_proj.weight", VALUE),
    Blocks("g_proj.weight", V, optional=True),
    Blocks("q_conv1d.weight", QUERY, optional=True),
    Blocks("k_conv1d.weight", K, optional=True),
    Blocks("v_conv1d.weight", VALUE, optional=True),
    Blocks("o_proj.weight", V, axis=1),
)


def _gla_gates(layer: nn.Module, gk: Float[Tensor, "batch token row"]) -> Gates:
    decay = F.logsigmoid(gk.float()) / layer.gate_logit_normalizer
    decay = decay if layer.clamp_min is None else decay.clamp_min(layer.clamp_min)
    decay = _by_head(decay, layer.num_kv_heads).repeat_interleave(layer.num_kv_groups, -2)
    return decay, torch.ones_like(decay[..., 0])


def _gla_call(layer: nn.Module, change: Change) -> Callable[..., Any]:
    def call(kernel: Callable[..., Any], **options: Any) -> Any:
        name = "g" if "g" in options else "gk"  # of chunk_gla, and of fused_recurrent_gla
        return kernel(**options | {name: change(options[name].float())})

    return call


GLA = Layout(
    layer_class="GatedLinearAttention",
    module="fla.layers.gla",
    gate_modules=("gk_proj",),
    gates=_gla_gates,
    changed_decay=_calls(_gla_call, "chunk_gla", "fused_recurrent_gla"),
    state=_turned_state,
    weights=(*GROUPED_WEIGHTS, Blocks("gk_proj.1.weight", K), Blocks("gk_proj.1.bias", K)),
    resize=_resize_grouped,
    refusal=lambda layer: (
        "mode 'fused_chunk' keeps its states as (d_k, d_v) after long prompts and as (d_v, d_k) after short ones: set attn_mode='chunk'"
        if layer.mode == "fused_chunk"
        else None
    ),
    **GROUPED,
)


def _fixed_gates(decay: Callable[[int], Tensor]) -> Callable[[nn.Module, Tensor], Gates]:
    def gates(layer: nn.Module, projected: Float[Tensor, "batch token row"]) -> Gates:
        log_decay = decay(layer.num_heads).to(projected.device).expand(*projected.shape[:2], -1)
        return log_decay, torch.ones_like(log_decay)

    return gates


def _retention_call(layer: nn.Module, change: Change) -> Callable[..., Any]:
    """The kernels make the decay of a head's index; this one is told it."""

    def call(kernel: Callable[..., Any], *, q: Tensor, **options: Any) -> Any:
        log_decay = retention_decay(layer.num_heads).to(q.device).expand(*q.shape[:2], -1)
        return SIMPLE_GLA(q=q, g=change(log_decay), **options)

    return call


RETNET = Layout(
    layer_class="MultiScaleRetention",
    module="fla.layers.multiscale_retention",
    gate_modules=("q_proj",),
    gates=_fixed_gates(retention_decay),
    changed_decay=_calls(_retention_call, "chunk_retention", "fused_chunk_retention", "fused_recurrent_retention"),
    state=_state,
    kept_whole="a head's decay follows from its index among all, so those that stay would get the decay of others",
    refusal=lambda layer: (
        "mode 'parallel' keeps no state after a long prompt: set attn_mode='chunk'"
        if layer.mode == "parallel"
        else None
    ),
    **GROUPED,
)

LINEAR_ATTENTION = Layout(
    layer_class="LinearAttention",
    module="fla.layers.linear_attn",
    gate_modules=("q_proj",),
    gates=_fixed_gates(torch.zeros),
    state=_state,
    weights=GROUPED_WEIGHTS,
    resize=_resize_grouped,
    refusal=lambda layer: (
        "its sum of keys is not kept, so it cannot be continued" if layer.do_feature_map_norm else None
    ),
    **GROUPED,
)

# ---------------------------------------------------------------- Mamba-2 and RWKV-7


def _mamba2_gates(layer: nn.Module, projected: Float[Tensor, "batch token row"]) -> Gates:
    dt = F.softplus(projected[..., -layer.num_heads :].float() + layer.dt_bias.float()).clamp(*layer.dt_limit)
    return -layer.A_log.float().exp() * dt, dt


def _mamba2_without_writes(layer: nn.Module, projected: Float[Tensor, "batch token row"], heads: list[int]) -> Tensor:
    # A step of softplus(-inf) = 0 writes nothing and lets the state stand.
    return silenced(layer, projected, [projected.shape[-1] - layer.num_heads + head for head in heads])


def _mamba2_resize(layer: nn.Module, n_keys: int, n_heads: int, d_k: int) -> None:
    layer.n_groups, layer.num_heads = n_keys, n_heads
    layer.intermediate_size = n_heads * layer.head_dim
    layer.conv_dim = layer.intermediate_size + 2 * n_keys * layer.ssm_state_size


def _mamba2_rescale(layer: nn.Module, before: int, now: int) -> None:
    # The norm is over the heads of a group, and what is gone from a group put out 0.
    if layer.norm is None:
        return
    if len(set(layer.staterank_keys)) < len(layer.staterank_keys):
        raise ValueError(
            "the norm of fla's Mamba2 is over the heads of a group: remove whole groups, or as many heads of each"
        )
    size = layer.intermediate_size // layer.n_groups
    share = layer.norm.group_size / size
    layer.norm.weight.data *= share**0.5
    layer.norm.eps *= share
    layer.norm.group_size = size


def _mamba2_refusal(layer: nn.Module) -> str | None:
    if layer.D_has_hdim:
        return "D_has_hdim is not supported"
    return "a step has a lower bound (dt_limit), so writes cannot be stopped" if layer.dt_limit[0] > 0 else None


@contextmanager
def _mamba2_changed_decay(layer: nn.Module, change: Change) -> Iterator[None]:
    forward = functools.partial(mamba2_forward, layer, change=change)
    with replaced(layer, {"torch_forward": forward, "cuda_kernels_forward": forward}), noted_change(layer, change):
        yield


MAMBA2 = Layout(
    layer_class="Mamba2",
    module="fla.layers.mamba2",
    n_heads=lambda layer: layer.num_heads,
    n_keys=lambda layer: layer.n_groups,
    d_k=lambda layer: layer.ssm_state_size,
    d_v=lambda layer: layer.head_dim,
    output=lambda layer: "norm" if layer.rmsnorm else "out_proj",
    gate_modules=("in_proj",),
    gates=_mamba2_gates,
    changed_decay=_mamba2_changed_decay,
    write_module="in_proj",
    without_writes=_mamba2_without_writes,
    state=_turned_state,
    weights=(
        Blocks("in_proj.weight", (*V, *V, *K, *K, *ONE)),
        Blocks("in_proj.bias", (*V, *V, *K, *K, *ONE), optional=True),
        Blocks("conv1d.weight", (*V, *K, *K)),
        Blocks("conv1d.bias", (*V, *K, *K), optional=True),
        Blocks("A_log", ONE),
        Blocks("dt_bias", ONE),
        Blocks("D", ONE),
        Blocks("norm.weight", V, optional=True),
        Blocks("out_proj.weight", V, axis=1),
    ),
    resize=_mamba2_resize,
    rescale=_mamba2_rescale,
    idle=_idle,
    cache=_cache,
    refusal=_mamba2_refusal,
)


def _rwkv7_gates(layer: nn.Module, w: Tensor, a: Tensor, k: Tensor) -> Gates:
    # The number is exp(-1/2), as in the layer.
    decay = -0.6065306597126334 * w.float().sigmoid()
    return _by_head(decay, layer.num_heads), _by_head(a.float().sigmoid(), layer.num_heads).mean(-1)


def _rwkv7_log_norm(layer: nn.Module, log_decay: Tensor, w: Tensor, a: Tensor, k: Tensor) -> Tensor:
    """Of A_t = diag(w) - (a kappa) kappa^T, no larger than the largest decay where a is the same for all channels."""
    kappa = F.normalize(_by_head(k.double() * layer.k_k.double().flatten(), layer.num_heads), dim=-1)
    strength = _by_head(a.double().sigmoid(), layer.num_heads)
    transition = torch.diag_embed(log_decay.double().exp()) - (strength * kappa)[..., None] * kappa[..., None, :]
    return torch.linalg.matrix_norm(transition, ord=2).log()


def _rwkv7_call(layer: nn.Module, change: Change) -> Callable[..., Any]:
    def call(kernel: Callable[..., Any], *, w: Tensor, **options: Any) -> Any:
        if "safe_gate" in options:  # a changed decay may lie beyond the bound that this counts on
            options |= {"safe_gate": False}
        return kernel(w=change(w.float()).to(w.dtype), **options)

    return call


def _rwkv7_without_writes(layer: nn.Module, k: Float[Tensor, "batch token row"], heads: list[int]) -> Tensor:
    places = [head * layer.head_dim + i for head in heads for i in range(layer.head_dim)]
    return k.index_fill(-1, torch.tensor(places, device=k.device), 0.0)


RWKV7 = Layout(
    layer_class="RWKV7Attention",
    module="fla.layers.rwkv7",
    n_heads=lambda layer: layer.num_heads,
    n_keys=lambda layer: layer.num_heads,
    gate_modules=("w_lora", "a_lora", "k_proj"),
    gates=_rwkv7_gates,
    log_norm=_rwkv7_log_norm,
    changed_decay=_calls(_rwkv7_call, "chunk_rwkv7", "fused_mul_recurrent_rwkv7"),
    write_module="k_proj",
    without_writes=_rwkv7_without_writes,
    state=_state,
    kept_whole="a head of any layer mixes in the values of the first layer's head of the same index",
    **COMMON | {"d_k": lambda layer: layer.head_dim},
)

LAYOUTS = (GATED_DELTANET, DELTANET, KDA, GLA, RETNET, LINEAR_ATTENTION, MAMBA2, RWKV7)
