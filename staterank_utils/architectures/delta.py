"""Layers with the gated delta rule and one decay per head: Qwen3-Next, Qwen3.5, Qwen4-Exp, Olmo Hybrid."""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from staterank_utils.architectures.core import Blocks, Change, Gates, Parts, decay_argument
from staterank_utils.architectures.layer import LinearLayer, ModelAdapter, kept_as


def log_decay(layer: nn.Module, a: Float[Tensor, "batch token head"]) -> Float[Tensor, "batch token head"]:
    """Of a projection a: -exp(A_log) softplus(a + dt_bias), as in Mamba-2.

    Example:
        >>> layer = nn.Module()
        >>> layer.A_log, layer.dt_bias = torch.zeros(1), torch.zeros(1)
        >>> log_decay(layer, torch.zeros(1, 1, 1)).exp().item()  # -softplus(0) = -log(2)
        0.5
    """
    return -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias.float())


def silenced(b: Float[Tensor, "batch token head"], places: list[int]) -> Tensor:
    """The write strength is the sigmoid of b (or twice that), so b = -inf writes exactly nothing.

    Example:
        >>> silenced(torch.zeros(1, 1, 2), [1]).sigmoid().tolist()
        [[[0.5, 0.0]]]
    """
    return b.index_fill(-1, torch.tensor(places, device=b.device), float("-inf"))


def tell_nothing(layer: nn.Module, hidden_states: Float[Tensor, "batch token d_model"], cache: Any) -> None:
    """Tell a cache of transformers, which counts tokens by what layers put in, that a layer without heads has read these.

    Example:
        >>> tell_nothing(nn.Module(), torch.ones(1, 2, 3), None) is None  # without a cache there is nobody to tell
        True
    """
    if cache is not None:
        n_batch, n_tokens, _ = hidden_states.shape
        cache.update_conv_state(
            hidden_states.new_zeros(n_batch, 0, n_tokens), layer.layer_idx, conv_kernel_size=layer.conv_kernel_size
        )
        cache.update_recurrent_state(hidden_states.new_zeros(n_batch, 0, 0, 0, dtype=torch.float32), layer.layer_idx)


K: Parts = (("key", "d_k"),)
V: Parts = (("value", "d_v"),)
ONE: Parts = (("value", 1),)
CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
CORE = (Blocks("conv1d.weight", (*K, *K, *V)), Blocks("A_log", ONE), Blocks("dt_bias", ONE))


class DeltaLayer(LinearLayer):
    """What layers with a delta rule of transformers share."""

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        return decay_argument(self.module, change, name="g", kernels=self.scans)

    def without_writes(self, output: Float[Tensor, "batch token head"], places: list[int]) -> Tensor:
        return silenced(output, places)

    @property
    def caching_refusal(self) -> str | None:
        return None

    def idle(
        self, hidden_states: Float[Tensor, "batch token d_model"], cache: Any = None, *rest: Any, **more: Any
    ) -> Float[Tensor, "batch token d_model"]:
        """It adds nothing.

        Example:
            >>> DeltaLayer(0, nn.Module()).idle(torch.ones(1, 2, 3)).tolist()
            [[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
        """
        tell_nothing(self.module, hidden_states, more.get("cache_params", cache))
        return torch.zeros_like(hidden_states)


class GatedDeltaLayer(DeltaLayer):
    """The gated delta rule with one decay per head: S(t) = a_t (I - b_t k_t k_t^T) S(t-1) + b_t k_t v_t^T."""

    n_heads, n_keys = kept_as("num_v_heads"), kept_as("num_k_heads")
    d_k, d_v = kept_as("head_k_dim"), kept_as("head_v_dim")
    d_k_setting = "linear_key_head_dim"
    heads_settings = ("linear_num_value_heads", "linear_num_key_heads")
    scans = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    kernels = (*scans, *CONVOLUTIONS)

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        layer = self.module
        layer.num_k_heads, layer.num_v_heads, layer.head_k_dim = n_keys, n_heads, d_k
        layer.key_dim, layer.value_dim = n_keys * d_k, n_heads * layer.head_v_dim
        layer.conv_dim = 2 * layer.key_dim + layer.value_dim


class Qwen3NextModel(ModelAdapter):
    """Its forward takes a mask for each kind of layer, made beforehand."""

    masks_by_kind = True


class Qwen3NextLayer(GatedDeltaLayer):
    """Rows of its projections are grouped by key head."""

    describes = ("transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet",)
    model_adapter = Qwen3NextModel
    output_module = "out_proj"
    gate_modules = ("in_proj_ba",)
    write_module = "in_proj_ba"
    weights = (
        Blocks("in_proj_qkvz.weight", (*K, *K, *V, *V), by_key=True),
        Blocks("in_proj_ba.weight", (*ONE, *ONE), by_key=True),
        *CORE,
        Blocks("out_proj.weight", V, axis=1),
    )

    def read_gates(self, ba: Float[Tensor, "batch token ba"]) -> Gates:
        # [b of its value heads | a of its value heads], one key head after the other.
        grouped = ba.unflatten(-1, (self.n_keys, 2, self.n_heads // self.n_keys))
        b, a = (grouped[..., i, :].flatten(-2).float() for i in (0, 1))
        return log_decay(self.module, a), b.sigmoid()

    def without_writes(self, ba: Float[Tensor, "batch token ba"], places: list[int]) -> Tensor:
        per_key = self.n_heads // self.n_keys
        return silenced(ba, [place // per_key * 2 * per_key + place % per_key for place in places])


class Qwen35Layer(GatedDeltaLayer):
    """Qwen3.5, its mixture of experts, and Qwen4-Exp share one form."""

    describes = (
        "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet",
        "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet",
        "transformers.models.qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextGatedDeltaNet",
    )
    output_module = "out_proj"
    gate_modules = ("in_proj_a", "in_proj_b")
    write_module = "in_proj_b"
    weights = (
        Blocks("in_proj_qkv.weight", (*K, *K, *V)),
        Blocks("in_proj_z.weight", V),
        Blocks("in_proj_a.weight", ONE),
        Blocks("in_proj_b.weight", ONE),
        *CORE,
        Blocks("out_proj.weight", V, axis=1),
    )

    def read_gates(self, a: Tensor, b: Tensor) -> Gates:
        return log_decay(self.module, a), b.float().sigmoid()


class OlmoHybridLayer(GatedDeltaLayer):
    """Its write strength may be up to 2."""

    describes = ("transformers.models.olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet",)
    output_module = "o_proj"
    gate_modules = ("a_proj", "b_proj")
    write_module = "b_proj"
    weights = (
        Blocks("q_proj.weight", K),
        Blocks("k_proj.weight", K),
        Blocks("v_proj.weight", V),
        Blocks("g_proj.weight", V),
        Blocks("a_proj.weight", ONE),
        Blocks("b_proj.weight", ONE),
        *CORE,
        Blocks("o_proj.weight", V, axis=1),
    )

    @property
    def caching_refusal(self) -> str | None:
        return "its write strengths may be over 1" if self.module.allow_neg_eigval else None

    def read_gates(self, a: Tensor, b: Tensor) -> Gates:
        return log_decay(self.module, a), b.float().sigmoid() * (2 if self.module.allow_neg_eigval else 1)


class SSELayer(DeltaLayer):
    """Sparse state expansion: a head here is one state of a value head, the shared ones first, then those of each partition."""

    describes = ("staterank_utils.sse.SSEGatedDeltaNet",)
    model_adapter = Qwen3NextModel
    n_heads, n_keys = kept_as("num_v_heads"), kept_as("num_k_heads")
    d_k, d_v = kept_as("head_k_dim"), kept_as("head_v_dim")
    scans = GatedDeltaLayer.scans
    kernels = GatedDeltaLayer.kernels
    output_module = "states"
    gate_modules = ("in_proj_ba", "router")
    kept_whole = "the states of a value head share its value and its place in the output"
    caching_refusal = "its keys are not of length 1"
    write_module = "in_proj_ba"

    def read_gates(self, ba: Float[Tensor, "batch token ba"], router: Float[Tensor, "batch token partition"]) -> Gates:
        # The router's probability scales the key, so it is not in the strength.
        _, active = self.module.route(router)
        gates: Gates = self.module.gates(ba, active)
        return gates

    def without_writes(self, ba: Float[Tensor, "batch token ba"], places: list[int]) -> Tensor:
        return silenced(ba, places)

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        # A partition that is not active does not decay, so there is nothing to change.
        return super().change_decay(lambda log_decay: torch.where(log_decay == 0, log_decay, change(log_decay)))


ADAPTERS = (Qwen3NextLayer, Qwen35Layer, OlmoHybridLayer, SSELayer)
