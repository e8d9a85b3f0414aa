"""Layers with Kimi Delta Attention, the gated delta rule with one decay a channel: Kimi Linear, Ling 3.0, GLM-5.3."""

from torch import Tensor, nn

from staterank_utils.layouts.core import Blocks, Gates, Layout, Parts, decay_argument
from staterank_utils.layouts.delta import ONE, V, idle, silenced


def _gates(layer: nn.Module, log_decay: Tensor, b: Tensor) -> Gates:
    return log_decay.float(), b.float().sigmoid()


def _resize(layer: nn.Module, n_keys: int, n_heads: int, d_k: int) -> None:
    for owner in (layer, layer.forget_gate):
        owner.num_heads, owner.qkv_dim = n_heads, n_heads * d_k
    layer.conv_dim = 3 * layer.qkv_dim


K: Parts = (("value", "d_k"),)
SCANS = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")


def _layout(layer_class: str, module: str, *, decay: Blocks, low_rank: bool) -> Layout:
    """The three differ in the shape of A_log and in whether the gates' projections are of low rank."""
    gates = ("forget_gate.f_b_proj", "g_b_proj") if low_rank else ("forget_gate.f_proj", "g_proj")
    return Layout(
        layer_class=layer_class,
        module=f"transformers.models.{module}.modeling_{module}",
        n_heads=lambda layer: layer.num_heads,
        n_keys=lambda layer: layer.num_heads,
        d_k=lambda layer: layer.head_dim,
        d_v=lambda layer: layer.head_dim,
        output=lambda layer: "o_proj",
        gate_modules=("forget_gate", "b_proj"),
        gates=_gates,
        write_module="b_proj",
        without_writes=silenced,
        changed_decay=decay_argument("g", SCANS),
        scans=SCANS,
        kernels=(
            *SCANS,
            "causal_conv1d_fn",
            "causal_conv1d_update",
        ),
        weights=(
            Blocks("q_proj.weight", K),
            Blocks("k_proj.weight", K),
            Blocks("v_proj.weight", V),
            Blocks("conv1d.weight", (*K, *K, *V)),
            Blocks(f"{gates[0]}.weight", K),
            Blocks("forget_gate.dt_bias", K),
            decay,
            Blocks("b_proj.weight", ONE),
            Blocks(f"{gates[1]}.weight", V),
            Blocks("o_proj.weight", V, axis=1),
        ),
        resize=_resize,
        idle=idle,
    )


DECAY = Blocks("forget_gate.A_log", ONE)
LAYOUTS = (
    _layout("KimiLinearDeltaAttention", "kimi_linear", decay=Blocks("forget_gate.A_log", ONE, axis=2), low_rank=True),
    _layout("BailingHybridDeltaAttention", "bailing_hybrid", decay=DECAY, low_rank=False),
    _layout("Glm5NextTextLinearAttention", "glm5_next", decay=DECAY, low_rank=True),
)
