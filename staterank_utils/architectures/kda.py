"""Layers with Kimi Delta Attention, the gated delta rule with one decay per channel: Kimi Linear, Ling 3.0, GLM-5.3."""

from torch import Tensor

from staterank_utils.architectures.core import Blocks, Gates, Parts
from staterank_utils.architectures.delta import CONVOLUTIONS, ONE, DeltaLayer, V
from staterank_utils.architectures.layer import kept_as

K: Parts = (("value", "d_k"),)
COMMON = (
    Blocks("q_proj.weight", K),
    Blocks("k_proj.weight", K),
    Blocks("v_proj.weight", V),
    Blocks("conv1d.weight", (*K, *K, *V)),
    Blocks("forget_gate.dt_bias", K),
    Blocks("b_proj.weight", ONE),
    Blocks("o_proj.weight", V, axis=1),
)
DECAY = Blocks("forget_gate.A_log", ONE)
LOW_RANK = (Blocks("forget_gate.f_b_proj.weight", K), Blocks("g_b_proj.weight", V))


class KimiDeltaLayer(DeltaLayer):
    """What the three share; they differ in the shape of A_log and in whether the gates' projections are of low rank."""

    n_heads = n_keys = kept_as("num_heads")
    d_k = d_v = kept_as("head_dim")
    output_module = "o_proj"
    gate_modules = ("forget_gate", "b_proj")
    write_module = "b_proj"
    scans = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    kernels = (*scans, *CONVOLUTIONS)

    def read_gates(self, log_decay: Tensor, b: Tensor) -> Gates:
        return log_decay.float(), b.float().sigmoid()

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        for owner in (self.module, self.module.forget_gate):
            owner.num_heads, owner.qkv_dim = n_heads, n_heads * d_k
        self.module.conv_dim = 3 * self.module.qkv_dim


class KimiLinearLayer(KimiDeltaLayer):
    """Kimi Linear: A_log has two axes more."""

    describes = ("transformers.models.kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention",)
    weights = (*COMMON, *LOW_RANK, Blocks("forget_gate.A_log", ONE, axis=2))


class BailingHybridLayer(KimiDeltaLayer):
    """Ling 3.0: the projections of its gates are whole."""

    describes = ("transformers.models.bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention",)
    weights = (*COMMON, Blocks("forget_gate.f_proj.weight", K), Blocks("g_proj.weight", V), DECAY)


class Glm5NextLayer(KimiDeltaLayer):
    """GLM-5.3."""

    describes = ("transformers.models.glm5_next.modeling_glm5_next.Glm5NextTextLinearAttention",)
    weights = (*COMMON, *LOW_RANK, DECAY)


ADAPTERS = (KimiLinearLayer, BailingHybridLayer, Glm5NextLayer)
