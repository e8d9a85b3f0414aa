"""Layers with the gated delta rule and one decay per head: Qwen3-Next, Qwen3.5, Qwen4-Exp, Olmo Hybrid."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from staterank_utils.layouts.core import Blocks, Gates, Layout, Parts, decay_argument


def log_decay(layer: nn.Module, a: Float[Tensor, "batch token head"]) -> Float[Tensor, "batch token head"]:
    """Of a projection a: -exp(A_log) softplus(a + dt_bias), as in Mamba-2.

    Example:
        >>> layer = nn.Module()
        >>> layer.A_log, layer.dt_bias = torch.zeros(1), torch.zeros(1)
        >>> log_decay(layer, torch.zeros(1, 1, 1)).exp().item()  # -softplus(0) = -log(2)
        0.5
    """
    return -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias.float())


def silenced(layer: nn.Module, b: Float[Tensor, "batch token head"], heads: list[int]) -> Tensor:
    """The write strength is the sigmoid of b (or twice that), so b = -inf writes exactly nothing.

    Example:
        >>> silenced(nn.Module(), torch.zeros(1, 1, 2), [1]).sigmoid().tolist()
        [[[0.5, 0.0]]]
    """
    return b.index_fill(-1, torch.tensor(heads, device=b.device), float("-inf"))


def idle(
    layer: nn.Module,
    hidden_states: Float[Tensor, "batch token d_model"],
    cache_params: Any = None,
    *rest: Any,
    **more: Any,
) -> Float[Tensor, "batch token d_model"]:
    """What a layer does without any head: it adds nothing, and tells the cache, which counts tokens by what layers put in.

    Example:
        >>> idle(nn.Module(), torch.ones(1, 2, 3)).tolist()
        [[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    """
    if cache_params is not None:
        n_batch, n_tokens, _ = hidden_states.shape
        cache_params.update_conv_state(
            hidden_states.new_zeros(n_batch, 0, n_tokens), layer.layer_idx, conv_kernel_size=layer.conv_kernel_size
        )
        cache_params.update_recurrent_state(
            hidden_states.new_zeros(n_batch, 0, 0, 0, dtype=torch.float32), layer.layer_idx
        )
    return torch.zeros_like(hidden_states)


def _qwen3_next_gates(layer: nn.Module, ba: Float[Tensor, "batch token ba"]) -> Gates:
    # Rows of in_proj_ba are grouped by key head: [b of its value heads | a of its value heads].
    grouped = ba.unflatten(-1, (layer.num_k_heads, 2, layer.num_v_heads // layer.num_k_heads))
    b, a = (grouped[..., i, :].flatten(-2).float() for i in (0, 1))
    return log_decay(layer, a), b.sigmoid()


def _qwen3_next_without_writes(layer: nn.Module, ba: Float[Tensor, "batch token ba"], heads: list[int]) -> Tensor:
    per_key = layer.num_v_heads // layer.num_k_heads
    return silenced(layer, ba, [head // per_key * 2 * per_key + head % per_key for head in heads])


def _resize(layer: nn.Module, n_keys: int, n_heads: int, d_k: int) -> None:
    layer.num_k_heads, layer.num_v_heads, layer.head_k_dim = n_keys, n_heads, d_k
    layer.key_dim, layer.value_dim = n_keys * layer.head_k_dim, n_heads * layer.head_v_dim
    layer.conv_dim = 2 * layer.key_dim + layer.value_dim


K: Parts = (("key", "d_k"),)
V: Parts = (("value", "d_v"),)
ONE: Parts = (("value", 1),)
SCANS = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
GATED_DELTA: dict[str, Any] = {
    "n_heads": lambda layer: layer.num_v_heads,
    "n_keys": lambda layer: layer.num_k_heads,
    "d_k": lambda layer: layer.head_k_dim,
    "d_v": lambda layer: layer.head_v_dim,
    "d_k_setting": "linear_key_head_dim",
    "resize": _resize,
    "idle": idle,
    "changed_decay": decay_argument("g", SCANS),
    "scans": SCANS,
    "kernels": (
        *SCANS,
        "causal_conv1d_fn",
        "causal_conv1d_update",
    ),
}
CORE = (Blocks("conv1d.weight", (*K, *K, *V)), Blocks("A_log", ONE), Blocks("dt_bias", ONE))

QWEN3_NEXT = Layout(
    layer_class="Qwen3NextGatedDeltaNet",
    module="transformers.models.qwen3_next.modeling_qwen3_next",
    output=lambda layer: "out_proj",
    gate_modules=("in_proj_ba",),
    gates=_qwen3_next_gates,
    write_module="in_proj_ba",
    without_writes=_qwen3_next_without_writes,
    weights=(
        Blocks("in_proj_qkvz.weight", (*K, *K, *V, *V), by_key=True),
        Blocks("in_proj_ba.weight", (*ONE, *ONE), by_key=True),
        *CORE,
        Blocks("out_proj.weight", V, axis=1),
    ),
    **GATED_DELTA,
)

# Qwen3.5, its mixture of experts and Qwen4-Exp share one form.
QWEN3_5 = tuple(
    Layout(
        layer_class=f"{prefix}GatedDeltaNet",
        module=f"transformers.models.{name}.modeling_{name}",
        output=lambda layer: "out_proj",
        gate_modules=("in_proj_a", "in_proj_b"),
        gates=lambda layer, a, b: (log_decay(layer, a), b.float().sigmoid()),
        write_module="in_proj_b",
        without_writes=silenced,
        weights=(
            Blocks("in_proj_qkv.weight", (*K, *K, *V)),
            Blocks("in_proj_z.weight", V),
            Blocks("in_proj_a.weight", ONE),
            Blocks("in_proj_b.weight", ONE),
            *CORE,
            Blocks("out_proj.weight", V, axis=1),
        ),
        **GATED_DELTA,
    )
    for prefix, name in (("Qwen3_5", "qwen3_5"), ("Qwen3_5Moe", "qwen3_5_moe"), ("Qwen4ExpText", "qwen4_exp"))
)

OLMO_HYBRID = Layout(
    layer_class="OlmoHybridGatedDeltaNet",
    module="transformers.models.olmo_hybrid.modeling_olmo_hybrid",
    output=lambda layer: "o_proj",
    gate_modules=("a_proj", "b_proj"),
    gates=lambda layer, a, b: (log_decay(layer, a), b.float().sigmoid() * (2 if layer.allow_neg_eigval else 1)),
    write_module="b_proj",
    without_writes=silenced,
    weights=(
        Blocks("q_proj.weight", K),
        Blocks("k_proj.weight", K),
        Blocks("v_proj.weight", V),
        Blocks("g_proj.weight", V),
        Blocks("a_proj.weight", ONE),
        Blocks("b_proj.weight", ONE),
        *CORE,
        Blocks("o_proj.weight", V, axis=1),
    ),
    **GATED_DELTA,
)

LAYOUTS = (QWEN3_NEXT, *QWEN3_5, OLMO_HYBRID)
