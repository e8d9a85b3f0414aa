"""Layers whose norm runs across heads: Mamba-2 and its relatives, and MiniMax's lightning attention.

Mamba-2 in the words of this package: a state is S(t) = a_t S(t-1) + dt_t B_t x_t^T, with keys B and queries C (d_k numbers,
shared by the heads of a group), values x (d_v numbers), decay a_t = exp(-exp(A_log) dt_t), and the step dt_t as write
strength. The cache holds its transpose.

Where a norm runs across heads, the output of a head is taken before the norm. A removed head still counts in the norm, as
the zeros that it would be if it were ablated (`NormOfKept`), so any heads can be removed, also unevenly.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from staterank_utils.architectures.core import Blocks, Change, Gates, Parts, noted_change
from staterank_utils.architectures.delta import CONVOLUTIONS, ONE, V, tell_nothing
from staterank_utils.architectures.layer import LinearLayer, ModelAdapter, kept_as
from staterank_utils.rebinding import Rebinding, calls_through, replaced

# ---------------------------------------------------------------- norms across heads


class NormOfKept(nn.Module):
    """A norm across heads for a layer that lost some: it runs over all of them, with zeros where a head is gone.

    Args:
        norm: of the whole layer, any class whose one parameter is a weight for each channel; that weight is cut already.
        heads: that are left, by their indices in the whole layer.
        n_heads, d_v: of the whole layer.

    Example:
        >>> norm = nn.RMSNorm(4, eps=0.0).requires_grad_(False)
        >>> norm.weight = nn.Parameter(torch.ones(2), requires_grad=False)
        >>> NormOfKept(norm, [1], n_heads=2, d_v=2)(torch.tensor([[[3.0, 4.0]]]))  # norm of (0, 0, 3, 4)
        tensor([[[1.2000, 1.6000]]])
    """

    def __init__(self, norm: Any, heads: Sequence[int], *, n_heads: int, d_v: int):
        super().__init__()
        self.weight, self.heads, self.n_heads, self.d_v = norm.weight, list(heads), n_heads, d_v
        # In a tuple, so that its weight is not a second parameter of the model.
        self.whole = (norm,)

    def forward(self, *inputs: Tensor) -> Tensor:
        heads = torch.tensor(self.heads, dtype=torch.long, device=inputs[0].device)
        channels = (heads[:, None] * self.d_v + torch.arange(self.d_v, device=heads.device)).flatten()
        weight, *wide = (
            x.new_zeros(*x.shape[:-1], self.n_heads * self.d_v).index_copy(-1, channels, x)
            for x in (self.weight, *inputs)
        )
        out: Tensor = torch.func.functional_call(self.whole[0], {"weight": weight}, tuple(wide))
        return out.index_select(-1, channels)


class AcrossHeads(LinearLayer):
    """A layer with one norm over all heads."""

    def rescale(self, before: int, now: int) -> None:
        norm: Any = self.module.norm
        if isinstance(norm, NormOfKept):
            norm.heads = self.heads
        elif not isinstance(norm, nn.Identity):
            self.module.norm = NormOfKept(norm, self.heads, n_heads=before, d_v=self.d_v)


# ---------------------------------------------------------------- Mamba-2


def _step(layer: nn.Module, raw: Tensor) -> Tensor:
    """Compute the step dt; a raw dt of -inf is no step at all, also where steps have a lower bound."""
    dt = F.softplus(raw).clamp(*layer.time_step_limit)
    return dt.masked_fill(raw == float("-inf"), 0.0)


def _mended(run: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a Mamba-2 layer with three corrections, none of which changes what a whole layer computes of a prompt.

    - transformers bounds dt in the kernel for many tokens and forgets to in the kernel for one; where there is a bound,
      both now get the dt that the first would compute.
    - transformers 5.17 drops the token axis in FalconH1's norm where there is one token, and then mixes up the batch.
    - in a pruned layer, FalconH1's multipliers are those of the rows that are left, and the kernel for training is not
      used, which has a norm of its own.
    """

    @functools.wraps(run)
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            bounded = tuple(self.time_step_limit) != (0.0, float("inf"))
            if hasattr(self, "staterank_whole"):
                stack.enter_context(_pruned(self))
            if hidden_states.shape[1] == 1:
                stack.enter_context(_tokenwise_norm(self))
            return (_with_bounded_steps(self, run) if bounded else run)(self, hidden_states, *args, **kwargs)

    return forward


def _with_bounded_steps(layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(place: int) -> Callable[..., Any]:
        def call(
            kernel: Callable[..., Any],
            *args: Any,
            dt_bias: Tensor,
            dt_softplus: bool,
            dt_limit: Any = None,
            **options: Any,
        ) -> Any:
            dt = _step(layer, args[place].float() + dt_bias.float())
            return kernel(*args[:place], dt, *args[place + 1 :], **options)

        return call

    calls = {"mamba2_chunk_scan": bounded(1), "mamba2_selective_state_update": bounded(2)}
    made: Callable[..., Any] = Rebinding(
        {name: functools.partial(functools.partial, call) for name, call in calls.items()}
    ).of(run)
    return made


@contextmanager
def _changed_decay(layer: nn.Module, change: Change) -> Iterator[None]:
    """The kernels make decay and write of one step dt: they are given the step of the changed decay, and values divided by how much it changed."""

    def steps(raw: Tensor, rate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The changed step and the factor of the values, each (batch, token, head)."""
        step = raw.float() if bias is None else _step(layer, raw.float() + bias.float())
        changed = change(rate.float() * step) / rate.float()
        return changed, torch.where(changed > 0, step / changed, 0.0)

    def scan(
        kernel: Callable[..., Any],
        x: Float[Tensor, "batch token head d_v"],
        dt: Float[Tensor, "batch token head"],
        rate: Float[Tensor, " head"],
        *rest: Tensor,
        D: Float[Tensor, " head"] | None,
        dt_bias: Tensor | None = None,
        **options: Any,
    ) -> Any:
        step, factor = steps(dt, rate, dt_bias)
        options = {name: value for name, value in options.items() if name not in ("dt_softplus", "dt_limit")}
        made = kernel(x.float() * factor[..., None], step, rate, *rest, D=None, **options)
        if D is None:  # inside another such block, which adds it
            return made
        skip = D[..., None] * x.float()
        return (made[0] + skip, *made[1:]) if isinstance(made, tuple) else made + skip

    def update(
        kernel: Callable[..., Any],
        state: Tensor,
        x: Float[Tensor, "batch head d_v"],
        dt: Float[Tensor, "batch head d_v"],
        rate: Float[Tensor, "head d_v d_k"],
        key: Tensor,
        query: Tensor,
        D: Float[Tensor, "head d_v"] | None,
        *,
        z: Float[Tensor, "batch head d_v"] | None = None,
        dt_bias: Float[Tensor, "head d_v"] | None = None,
        **options: Any,
    ) -> Tensor:
        bias = None if dt_bias is None else dt_bias[:, 0]
        step, factor = (each[:, 0, :, None] for each in steps(dt[:, None, :, 0], rate[:, 0, 0], bias))
        options.pop("dt_softplus", None)
        made = kernel(state, x.float() * factor, step.expand_as(x).contiguous(), rate, key, query, None, **options)
        out: Tensor = made if D is None else made + D * x.float()
        return out if z is None else out * F.silu(z)

    calls: dict[str, Callable[..., Any]] = {"mamba2_chunk_scan": scan, "mamba2_selective_state_update": update}
    with calls_through(layer, calls), noted_change(layer, change):
        yield


@contextmanager
def _tokenwise_norm(layer: nn.Module) -> Iterator[None]:
    """One token of each of n prompts goes through FalconH1's norm as n tokens of one prompt."""
    norm: Any = layer.norm.whole[0] if isinstance(layer.norm, NormOfKept) else layer.norm
    if not hasattr(norm, "norm_before_gate"):
        yield
        return
    stock = norm.forward

    def tokenwise(*inputs: Tensor) -> Any:
        return stock(*(x.transpose(0, 1) for x in inputs)).reshape(inputs[0].shape)

    with replaced(norm, {"forward": tokenwise}):
        yield


@contextmanager
def _pruned(layer: nn.Module) -> Iterator[None]:
    training, layer.training = layer.training, False
    multipliers = layer._buffers.get("mup_vector")
    if multipliers is not None:
        # One number for each part of in_proj; transformers makes (and on loading, remakes) the vector of the whole layer.
        (keys, heads, d_k), d_v = layer.staterank_whole, layer.head_dim
        parts = multipliers.split([heads * d_v, heads * d_v, keys * d_k, keys * d_k, heads], -1)
        widths = [layer.intermediate_size] * 2 + [layer.n_groups * layer.ssm_state_size] * 2 + [layer.num_heads]
        layer._buffers["mup_vector"] = torch.cat(
            [part[..., :1].expand(1, 1, width) for part, width in zip(parts, widths, strict=True)], -1
        )
    try:
        yield
    finally:
        layer.training = training
        if multipliers is not None:
            layer._buffers["mup_vector"] = multipliers


# [z | x | B | C | dt], of which the convolution sees x, B and C.
IN: Parts = (("value", "d_v"), ("value", "d_v"), ("key", "d_k"), ("key", "d_k"), ("value", 1))


class Mamba2Layer(AcrossHeads):
    """Mamba-2 and its relatives in transformers."""

    describes: ClassVar[tuple[str, ...]] = (
        "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer",
        "transformers.models.zamba2.modeling_zamba2.Zamba2MambaMixer",
        "transformers.models.bamba.modeling_bamba.BambaMixer",
    )
    n_heads, n_keys = kept_as("num_heads"), kept_as("n_groups")
    d_k, d_v = kept_as("ssm_state_size"), kept_as("head_dim")
    gate_modules = ("in_proj",)
    write_module = "in_proj"
    kernels = (
        *CONVOLUTIONS,
        "mamba2_split_conv1d_scan_combined",
        "mamba2_selective_state_update",
        "mamba2_chunk_scan",
    )
    weights = (
        Blocks("in_proj.weight", IN),
        Blocks("in_proj.bias", IN, optional=True),
        Blocks("conv1d.weight", IN[1:4]),
        Blocks("conv1d.bias", IN[1:4], optional=True),
        Blocks("A_log", IN[4:]),
        Blocks("D", IN[4:]),
        Blocks("dt_bias", IN[4:]),
        Blocks("norm.weight", IN[:1], optional=True),
        Blocks("out_proj.weight", IN[:1], axis=1),
    )
    mend = staticmethod(_mended)

    @property
    def output(self) -> nn.Module:
        own: nn.Module = self.module.out_proj if isinstance(self.module.norm, nn.Identity) else self.module.norm
        return own

    @property
    def padding_refusal(self) -> str | None:
        if self.module.in_proj.bias is None:
            return None
        return "transformers adds the bias of in_proj to padding too, which the convolution then sees"

    def read_gates(self, projected: Float[Tensor, "batch token row"]) -> Gates:
        layer = self.module
        raw = projected[..., -self.n_heads :]
        if hasattr(layer, "mup_vector"):
            raw = raw * layer.mup_vector[..., -1]
        dt = _step(layer, raw.float() + layer.dt_bias.float())
        return -layer.A_log.float().exp() * dt, dt

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        return _changed_decay(self.module, change)

    def without_writes(self, projected: Float[Tensor, "batch token row"], places: list[int]) -> Tensor:
        # softplus(-inf) is exactly 0: no decay and no write.
        columns = projected.shape[-1] - self.n_heads + torch.tensor(places, device=projected.device)
        return projected.index_fill(-1, columns, float("-inf"))

    def state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        return super().state(cache).transpose(-1, -2)

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        layer = self.module
        if not hasattr(layer, "staterank_whole"):
            layer.staterank_whole = (layer.n_groups, layer.num_heads, layer.ssm_state_size)
        layer.n_groups, layer.num_heads, layer.ssm_state_size = n_keys, n_heads, d_k
        layer.intermediate_size = n_heads * layer.head_dim
        layer.conv_dim = layer.intermediate_size + 2 * n_keys * d_k
        if hasattr(layer, "groups_time_state_size"):
            layer.groups_time_state_size = n_keys * d_k

    def idle(
        self, hidden_states: Float[Tensor, "batch token d_model"], cache: Any = None, *rest: Any, **more: Any
    ) -> Tensor:
        """Nothing but the bias of its output projection, if it has one."""
        tell_nothing(self.module, hidden_states, more.get("cache_params", cache))
        out: Tensor = self.module.out_proj(hidden_states.new_zeros(*hidden_states.shape[:2], 0))
        return out


class Mamba2Model(ModelAdapter):
    """Its residual stream may be float32 in a model of bfloat16."""

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden.to(self.model.lm_head.weight.dtype)).float()


class FalconH1Model(ModelAdapter):
    """Its logits are scaled."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = super().logits(hidden) * self.model.model.lm_head_multiplier
        return logits


class GraniteModel(ModelAdapter):
    """Its logits are scaled."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = super().logits(hidden) / self.model.config.logits_scaling
        return logits


class OriginalMamba2Layer(Mamba2Layer):
    """Mamba-2 itself."""

    describes = ("transformers.models.mamba2.modeling_mamba2.Mamba2Mixer",)
    model_adapter = Mamba2Model


class FalconH1Layer(Mamba2Layer):
    """Falcon-H1."""

    describes = ("transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer",)
    model_adapter = FalconH1Model


class GraniteLayer(Mamba2Layer):
    """Granite 4."""

    describes = ("transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer",)
    model_adapter = GraniteModel


# ---------------------------------------------------------------- MiniMax


@contextmanager
def _lightning_changed_decay(layer: nn.Module, change: Change) -> Iterator[None]:
    """Its decay is a buffer, and three more follow from it."""
    log_decay = change(-layer.slope_rate.float().flatten()[None, None])[0, 0]
    slope = -log_decay[:, None, None]
    names = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    before = {name: layer._buffers[name] for name in names}
    with slope.device:  # the layer makes numbers without saying where
        factors = layer.decay_factors(slope)
    made = zip(names, (slope, *factors), strict=True)
    layer._buffers.update({name: value.to(layer.slope_rate.dtype) for name, value in made})
    try:
        yield
    finally:
        layer._buffers.update(before)


def _slopes_of_kept(layer: nn.Module) -> Float[Tensor, "head 1 1"]:
    """What transformers computes from the number of heads, for those that are left of the whole layer."""
    now, layer.num_attention_heads = layer.num_attention_heads, layer.staterank_whole
    try:
        rate: Tensor = type(layer).get_slope_rate(layer)
    finally:
        layer.num_attention_heads = now
    return rate[layer.staterank_heads]


@functools.cache
def _lightning_cache_class() -> type[Any]:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class CountingMiniMaxCache(MiniMaxCache):
        """The model's cache, which counts its tokens in layer 0 only: here, in whichever layer has softmax attention."""

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return max((layer.get_seq_length() for layer in self.layers), default=0)

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return self.get_seq_length() + query_length, 0

    return CountingMiniMaxCache


class MiniMaxModel(ModelAdapter):
    """Its cache counts tokens."""

    own_cache = True

    def make_cache(self, max_tokens: int | None = None) -> Any:
        return _lightning_cache_class()()


class MiniMaxLayer(AcrossHeads):
    """Lightning attention: a decay for each head, the same at every token, and no write strength."""

    describes = ("transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention",)
    keeps_dtype = True
    model_adapter = MiniMaxModel
    n_heads = n_keys = kept_as("num_attention_heads")
    d_k = d_v = kept_as("head_dim")
    output_module = "norm"
    gate_modules = ("qkv_proj",)
    write_module = "qkv_proj"
    weights = (
        Blocks("qkv_proj.weight", (("key", "d_k"), ("key", "d_k"), ("value", "d_v")), by_key=True),
        Blocks("output_gate.weight", V),
        # The decay follows from a head's index in the whole layer, so it goes with the head.
        Blocks("slope_rate", ONE),
        Blocks("query_decay", ONE),
        Blocks("key_decay", ONE),
        Blocks("diagonal_decay", ONE, axis=1),
        Blocks("norm.weight", V),
        Blocks("out_proj.weight", V, axis=1),
    )

    def read_gates(self, qkv: Float[Tensor, "batch token row"]) -> Gates:
        log_decay = -self.module.slope_rate.float().flatten().expand(*qkv.shape[:2], -1)
        return log_decay, torch.ones_like(log_decay)

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        return _lightning_changed_decay(self.module, change)

    def without_writes(self, qkv: Float[Tensor, "batch token row"], places: list[int]) -> Tensor:
        # SiLU keeps a zero, so values of 0 write nothing.
        columns = [place * 3 * self.d_v + 2 * self.d_v + i for place in places for i in range(self.d_v)]
        return qkv.index_fill(-1, torch.tensor(columns, device=qkv.device), 0.0)

    def state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        state: Tensor = cache.linear_cache[self.index]
        return state

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        layer = self.module
        if not hasattr(layer, "staterank_whole"):
            layer.staterank_whole = layer.num_attention_heads
            layer.get_slope_rate = functools.partial(_slopes_of_kept, layer)
        layer.num_attention_heads = n_heads

    def idle(self, *args: Any, **kwargs: Any) -> Any:
        """Its forward, which runs without heads too."""
        return type(self.module).forward(self.module, *args, **kwargs)


ADAPTERS = (OriginalMamba2Layer, FalconH1Layer, GraniteLayer, Mamba2Layer, MiniMaxLayer)
