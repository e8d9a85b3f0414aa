"""Layers of flash-linear-attention's own models: Gated DeltaNet, DeltaNet, KDA, GLA, RetNet, linear attention, Mamba-2, RWKV-7.

They run on a CPU too, see `staterank_utils.fla_cpu`. fla keeps the states of some layers as d_v x d_k (`Turned`).
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from staterank_utils.architectures.core import Blocks, Change, Gates, Parts, changed, kernels_called, noted_change
from staterank_utils.architectures.delta import ONE, K, V, log_decay, silenced
from staterank_utils.architectures.layer import LinearLayer, ModelAdapter, kept_as
from staterank_utils.fla_cpu import SIMPLE_GLA, mamba2_forward, retention_decay
from staterank_utils.rebinding import calls_through, forward_within, replaced


class FlaModel(ModelAdapter):
    """fla has a cache of its own."""

    own_cache = True

    def make_cache(self, max_tokens: int | None = None) -> Any:
        return importlib.import_module("fla.models.utils").Cache()


class FlaLayer(LinearLayer):
    """What layers of fla share."""

    model_adapter = FlaModel
    n_heads = n_keys = kept_as("num_heads")
    d_k, d_v = kept_as("head_k_dim"), kept_as("head_v_dim")
    output_module = "o_proj"

    def state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        state: Tensor = cache[self.index]["recurrent_state"]
        return state

    def idle(
        self,
        hidden_states: Float[Tensor, "batch token d_model"],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *rest: Any,
        **more: Any,
    ) -> tuple[Tensor, None, Any]:
        """It adds nothing, and tells the cache, which counts tokens by layer."""
        n_batch, n_tokens, _ = hidden_states.shape
        if past_key_values is not None:
            empty = hidden_states.new_zeros(n_batch, 0, 0, 0, dtype=torch.float32)
            past_key_values.update(layer_idx=self.module.layer_idx, recurrent_state=empty, offset=n_tokens)
        return torch.zeros_like(hidden_states), None, past_key_values


class Turned(FlaLayer):
    """A layer that keeps its states as (d_v, d_k)."""

    def state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        return super().state(cache).transpose(-1, -2)


def _by_head(x: Float[Tensor, "batch token row"], n_heads: int) -> Float[Tensor, "batch token head channel"]:
    return x.unflatten(-1, (n_heads, -1))


@contextmanager
def _decay_made_outside(
    layer: nn.Module, change: Change, log_decay_of: Callable[[nn.Module, Tensor], Tensor], *kernels: str
) -> Iterator[None]:
    """For kernels that make the decay of `g` themselves: it is made here, changed, and given to them as it is."""

    def call(kernel: Callable[..., Any], *, g: Tensor, **options: Any) -> Any:
        # Inside another such block, `g` is the decay already.
        made = log_decay_of(layer, g) if options.get("use_gate_in_kernel") else g
        within = {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None}
        # A decay that is bounded in training may be changed to lie beyond its bound.
        within |= {"safe_gate": False, "lower_bound": None} if "safe_gate" in options else {}
        return kernel(g=change(made), **options | within)

    with kernels_called(layer, change, call, kernels):
        yield


def _strength(layer: nn.Module, b: Float[Tensor, "batch token head"]) -> Float[Tensor, "batch token head"]:
    return b.float().sigmoid() * (2 if layer.allow_neg_eigval else 1)


# ---------------------------------------------------------------- with a delta rule

QUERY: Parts = (("value", "d_k"),)  # where several queries share a key
VALUE: Parts = (("key", "d_v"),)  # and its value
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


class FlaDeltaLayer(FlaLayer):
    """What layers of fla with a delta rule share."""

    write_module = "b_proj"

    def without_writes(self, output: Float[Tensor, "batch token head"], places: list[int]) -> Tensor:
        return silenced(output, places)


class GroupedDeltaLayer(Turned, FlaDeltaLayer):
    """With several value heads on a key head."""

    n_heads = kept_as("num_v_heads")

    @property
    def refusal(self) -> str | None:
        return "its key heads are more than its value heads" if self.n_heads < self.n_keys else None

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        layer = self.module
        layer.num_heads, layer.num_v_heads = n_keys, n_heads
        layer.key_dim, layer.value_dim = n_keys * layer.head_k_dim, n_heads * layer.head_v_dim
        if hasattr(layer, "gate_dim"):
            layer.gate_dim = n_heads * layer.head_k_dim


class GatedDeltaNetLayer(GroupedDeltaLayer):
    """Gated DeltaNet."""

    describes = ("fla.layers.gated_deltanet.GatedDeltaNet",)
    gate_modules = ("a_proj", "b_proj")
    weights = (
        *DELTA,
        Blocks("a_proj.weight", ONE),
        Blocks("A_log", ONE),
        Blocks("dt_bias", ONE),
        Blocks("g_proj.weight", V, optional=True),
    )

    def read_gates(self, a: Tensor, b: Tensor) -> Gates:
        return log_decay(self.module, a), _strength(self.module, b)

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        kernels = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
        return _decay_made_outside(self.module, change, log_decay, *kernels)


class DeltaNetLayer(FlaDeltaLayer):
    """DeltaNet, whose states do not decay."""

    describes = ("fla.layers.delta_net.DeltaNet",)
    gate_modules = ("b_proj",)
    weights = (*DELTA, Blocks("g_proj.weight", V, optional=True))

    @property
    def refusal(self) -> str | None:
        return None if self.module.use_beta else "without use_beta it has no write strength to read"

    def read_gates(self, b: Float[Tensor, "batch token head"]) -> Gates:
        beta = _strength(self.module, b)
        return torch.zeros_like(beta), beta

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        layer = self.module
        layer.num_heads = n_heads
        layer.key_dim, layer.value_dim = n_heads * layer.head_k_dim, n_heads * layer.head_v_dim


def _kda_decay(layer: nn.Module, f: Float[Tensor, "batch token head channel"]) -> Tensor:
    f = f.float() + layer.dt_bias.float().view(layer.num_v_heads, -1)
    rate = layer.A_log.float().exp()[:, None]
    return -rate * F.softplus(f) if layer.lower_bound is None else layer.lower_bound * (rate * f).sigmoid()


class KDALayer(GroupedDeltaLayer):
    """Kimi Delta Attention."""

    describes = ("fla.layers.kda.KimiDeltaAttention",)
    gate_modules = ("f_proj", "b_proj")
    weights = (
        *DELTA,
        Blocks("f_proj.1.weight", QUERY),
        Blocks("dt_bias", QUERY),
        Blocks("A_log", ONE),
        Blocks("g_proj.1.weight", V),
        Blocks("g_proj.1.bias", V),
    )

    def read_gates(self, f: Tensor, b: Float[Tensor, "batch token head"]) -> Gates:
        return _kda_decay(self.module, _by_head(f, self.n_heads)), _strength(self.module, b)

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        return _decay_made_outside(self.module, change, _kda_decay, "chunk_kda", "fused_recurrent_kda")


# ---------------------------------------------------------------- without a delta rule


class GroupedLayer(FlaLayer):
    """With several query heads on a key and value head; a value of 0 writes nothing."""

    n_keys = kept_as("num_kv_heads")
    write_module = "v_proj"
    weights: ClassVar[tuple[Blocks, ...]] = (
        Blocks("q_proj.weight", QUERY),
        Blocks("k_proj.weight", K),
        Blocks("v_proj.weight", VALUE),
        Blocks("g_proj.weight", V, optional=True),
        Blocks("q_conv1d.weight", QUERY, optional=True),
        Blocks("k_conv1d.weight", K, optional=True),
        Blocks("v_conv1d.weight", VALUE, optional=True),
        Blocks("o_proj.weight", V, axis=1),
    )

    def stop_writes(self, places: list[int]) -> RemovableHandle:
        """Query heads that share keys and values share the writes too."""
        per_key = self.n_heads // self.n_keys
        if len(places) != len({place // per_key for place in places}) * per_key:
            raise ValueError(
                f"{per_key} heads of {self.name} share one key and value head, so their writes stop together: "
                f"got heads {sorted(places)}. Choose whole groups, or kind 'zero' or 'mean'"
            )
        return super().stop_writes(places)

    def without_writes(self, v: Float[Tensor, "batch token row"], places: list[int]) -> Tensor:
        keys = sorted({place // (self.n_heads // self.n_keys) for place in places})
        columns = [key * self.d_v + i for key in keys for i in range(self.d_v)]
        return v.index_fill(-1, torch.tensor(columns, device=v.device), 0.0)

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        layer = self.module
        layer.num_heads, layer.num_kv_heads = n_heads, n_keys
        layer.num_kv_groups = n_heads // max(1, n_keys)
        layer.key_dim, layer.value_dim = n_heads * layer.head_k_dim, n_heads * layer.head_v_dim
        layer.key_dim_per_group, layer.value_dim_per_group = n_keys * layer.head_k_dim, n_keys * layer.head_v_dim

    def fixed_gates(self, log_decay: Float[Tensor, " head"], projected: Tensor) -> Gates:
        """Of heads whose decay is the same at every token."""
        decay = log_decay.to(projected.device).expand(*projected.shape[:2], -1)
        return decay, torch.ones_like(decay)


class GLALayer(Turned, GroupedLayer):
    """Gated linear attention."""

    describes = ("fla.layers.gla.GatedLinearAttention",)
    gate_modules = ("gk_proj",)
    weights = (*GroupedLayer.weights, Blocks("gk_proj.1.weight", K), Blocks("gk_proj.1.bias", K))

    @property
    def refusal(self) -> str | None:
        if self.module.mode != "fused_chunk":
            return None
        return "mode 'fused_chunk' keeps its states as (d_k, d_v) after long prompts and as (d_v, d_k) after short ones: set attn_mode='chunk'"

    def read_gates(self, gk: Float[Tensor, "batch token row"]) -> Gates:
        layer = self.module
        decay = F.logsigmoid(gk.float()) / layer.gate_logit_normalizer
        decay = decay if layer.clamp_min is None else decay.clamp_min(layer.clamp_min)
        decay = _by_head(decay, layer.num_kv_heads).repeat_interleave(layer.num_kv_groups, -2)
        return decay, torch.ones_like(decay[..., 0])

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        def call(kernel: Callable[..., Any], **options: Any) -> Any:
            name = "g" if "g" in options else "gk"  # of chunk_gla, and of fused_recurrent_gla
            return kernel(**options | {name: change(options[name].float())})

        return kernels_called(self.module, change, call, ("chunk_gla", "fused_recurrent_gla"))


class RetNetLayer(GroupedLayer):
    """Retention, whose decay follows from a head's index."""

    describes = ("fla.layers.multiscale_retention.MultiScaleRetention",)
    gate_modules = ("q_proj",)
    weights = ()
    kept_whole = "a head's decay follows from its index among all, so those that stay would get the decay of others"

    @property
    def refusal(self) -> str | None:
        if self.module.mode != "parallel":
            return None
        return "mode 'parallel' keeps no state after a long prompt: set attn_mode='chunk'"

    def read_gates(self, q: Float[Tensor, "batch token row"]) -> Gates:
        return self.fixed_gates(retention_decay(self.n_heads), q)

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        """The kernels make the decay of a head's index; the one that is called in their place is told it, all changes made."""

        def call(kernel: Callable[..., Any], *, q: Tensor, **options: Any) -> Any:
            log_decay = retention_decay(self.n_heads).to(q.device).expand(*q.shape[:2], -1)
            return SIMPLE_GLA(q=q, g=changed(self.module, log_decay), **options)

        kernels = ("chunk_retention", "fused_chunk_retention", "fused_recurrent_retention")
        return kernels_called(self.module, change, call, kernels)


class LinearAttentionLayer(GroupedLayer):
    """Linear attention, whose states do not decay; with a normaliser, the sum of keys stands beside them in the cache."""

    describes = ("fla.layers.linear_attn.LinearAttention",)
    gate_modules = ("q_proj",)

    def state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        kept = cache[self.index]["recurrent_state"]
        state: Tensor = kept[0] if isinstance(kept, tuple) else kept
        return state

    @property
    def refusal(self) -> str | None:
        name = type(self.module.feature_map_k).__name__
        if name not in ("HedgehogFeatureMap", "DPFPFeatureMap"):
            return None
        return f"its feature map ({name}) makes states of another width than its keys have: only maps that keep the width are served"

    @property
    def normalised(self) -> bool:
        return bool(self.module.do_feature_map_norm)

    @property
    def caching_refusal(self) -> str | None:
        return None if self.normalised else "what it reads is not divided by a sum over keys"

    def pairs_through(self, call: Callable[..., Any]) -> AbstractContextManager[None]:
        return forward_within(self.module, functools.partial(self._with_raw, call))

    @contextmanager
    def _with_raw(self, call: Callable[..., Any]) -> Iterator[None]:
        seen: dict[str, Tensor] = {}

        def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output

        def through(kernel: Callable[..., Any], **options: Any) -> Any:
            query, key = _by_head(seen["q_proj"], self.n_heads), _by_head(seen["k_proj"], self.n_keys)
            return call(kernel, raw=(query, key.repeat_interleave(self.module.num_kv_groups, 2)), **options)

        handles = [
            self.module.get_submodule(name).register_forward_hook(functools.partial(look, name))
            for name in ("q_proj", "k_proj")
        ]
        kernels = ("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn")
        try:
            with calls_through(self.module, dict.fromkeys(kernels, through)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def read_gates(self, q: Float[Tensor, "batch token row"]) -> Gates:
        return self.fixed_gates(torch.zeros(self.n_heads), q)


# ---------------------------------------------------------------- Mamba-2 and RWKV-7


class FlaMamba2Layer(Turned):
    """Mamba-2, with a norm over the heads of a group."""

    describes = ("fla.layers.mamba2.Mamba2",)
    n_keys = kept_as("n_groups")
    d_k, d_v = kept_as("ssm_state_size"), kept_as("head_dim")
    gate_modules = ("in_proj",)
    write_module = "in_proj"
    weights = (
        Blocks("in_proj.weight", (*V, *V, *K, *K, *ONE)),
        Blocks("in_proj.bias", (*V, *V, *K, *K, *ONE), optional=True),
        Blocks("conv1d.weight", (*V, *K, *K)),
        Blocks("conv1d.bias", (*V, *K, *K), optional=True),
        Blocks("A_log", ONE),
        Blocks("dt_bias", ONE),
        Blocks("D", ONE),
        Blocks("norm.weight", V, optional=True),
        Blocks("out_proj.weight", V, axis=1),
    )

    @property
    def output(self) -> nn.Module:
        own: nn.Module = self.module.norm if self.module.rmsnorm else self.module.out_proj
        return own

    @property
    def refusal(self) -> str | None:
        if self.module.D_has_hdim:
            return "D_has_hdim is not supported"
        bounded = self.module.dt_limit[0] > 0
        return "a step has a lower bound (dt_limit), so writes cannot be stopped" if bounded else None

    def read_gates(self, projected: Float[Tensor, "batch token row"]) -> Gates:
        layer = self.module
        dt = F.softplus(projected[..., -self.n_heads :].float() + layer.dt_bias.float()).clamp(*layer.dt_limit)
        return -layer.A_log.float().exp() * dt, dt

    @contextmanager
    def change_decay(self, change: Change) -> Iterator[None]:
        forward = functools.partial(mamba2_forward, self.module, change=functools.partial(changed, self.module))
        methods = {"torch_forward": forward, "cuda_kernels_forward": forward}
        with replaced(self.module, methods), noted_change(self.module, change):
            yield

    def without_writes(self, projected: Float[Tensor, "batch token row"], places: list[int]) -> Tensor:
        # A step of softplus(-inf) = 0 writes nothing and lets the state stand.
        return silenced(projected, [projected.shape[-1] - self.n_heads + place for place in places])

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        layer = self.module
        layer.n_groups, layer.num_heads = n_keys, n_heads
        layer.intermediate_size = n_heads * layer.head_dim
        layer.conv_dim = layer.intermediate_size + 2 * n_keys * layer.ssm_state_size

    def rescale(self, before: int, now: int) -> None:
        # The norm is over the heads of a group, and what is gone from a group put out 0.
        layer = self.module
        if layer.norm is None:
            return
        if len(set(self.keys)) < len(self.keys):
            raise ValueError(
                "the norm of fla's Mamba2 is over the heads of a group: remove whole groups, or as many heads of each"
            )
        size = layer.intermediate_size // layer.n_groups
        share = layer.norm.group_size / size
        layer.norm.weight.data *= share**0.5
        layer.norm.eps *= share
        layer.norm.group_size = size


class RWKV7Layer(FlaLayer):
    """RWKV-7, whose transition is a diagonal matrix minus one of rank 1."""

    describes = ("fla.layers.rwkv7.RWKV7Attention",)
    d_k = kept_as("head_dim")
    gate_modules = ("w_lora", "a_lora", "k_proj")
    write_module = "k_proj"
    kept_whole = "a head of any layer mixes in the values of the first layer's head of the same index"

    def read_gates(self, w: Tensor, a: Tensor, k: Tensor) -> Gates:
        # The number is exp(-1/2), as in the layer.
        decay = -0.6065306597126334 * w.float().sigmoid()
        return _by_head(decay, self.n_heads), _by_head(a.float().sigmoid(), self.n_heads).mean(-1)

    def log_norm(self, log_decay: Tensor, *outputs: Tensor) -> Float[Tensor, "batch token head"]:
        """Of A_t = diag(w) - (a kappa) kappa^T, no larger than the largest decay where a is the same for all channels."""
        _, a, k = outputs
        kappa = F.normalize(_by_head(k.double() * self.module.k_k.double().flatten(), self.n_heads), dim=-1)
        strength = _by_head(a.double().sigmoid(), self.n_heads)
        transition = torch.diag_embed(log_decay.double().exp()) - (strength * kappa)[..., None] * kappa[..., None, :]
        return torch.linalg.matrix_norm(transition, ord=2).log()

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        def call(kernel: Callable[..., Any], *, w: Tensor, **options: Any) -> Any:
            if "safe_gate" in options:  # a changed decay may lie beyond the bound that this counts on
                options |= {"safe_gate": False}
            return kernel(w=change(w.float()).to(w.dtype), **options)

        return kernels_called(self.module, change, call, ("chunk_rwkv7", "fused_mul_recurrent_rwkv7"))

    def without_writes(self, k: Float[Tensor, "batch token row"], places: list[int]) -> Tensor:
        columns = [place * self.d_k + i for place in places for i in range(self.d_k)]
        return k.index_fill(-1, torch.tensor(columns, device=k.device), 0.0)


ADAPTERS = (
    GatedDeltaNetLayer,
    DeltaNetLayer,
    KDALayer,
    GLALayer,
    RetNetLayer,
    LinearAttentionLayer,
    FlaMamba2Layer,
    RWKV7Layer,
)
