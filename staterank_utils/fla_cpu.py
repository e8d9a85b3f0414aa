"""flash-linear-attention's own models (package `fla`) on a machine without a GPU: slow, exact, each call where its tensors are.

fla computes with Triton kernels, which a CPU cannot run. A `FlaKernel` stands in the place of each of them in one model: tensors on a
CPU go to fla's own naive operator (`fla.ops.*.naive`), or to a few lines of torch where fla has none; all others go to the kernel as ever.
fla itself is not changed: `rebinding` makes copies of the methods of a model's modules that call these instead.

Recurrences run token by token in float32. On a GPU, calls that a kernel refuses for their dtype (`REFUSE_FLOAT32`) go to the
naive operator as well, and fla's Mamba-2 is corrected where it is wrong or refuses; see `mamba2_forward`.
"""

import functools
import importlib
import inspect
import itertools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn

from staterank_utils.rebinding import Rebinding

Recurrence = Callable[[dict[str, Tensor], Tensor | None], tuple[Tensor, Tensor]]
REFUSE_FLOAT32 = ("chunk_delta_rule",)  # kernels that are there for narrower dtypes alone


class FlaKernel:
    """A function of fla that a CPU cannot run, run where its tensors are.

    Args:
        stock: fla's.
        version: the same in plain torch.
        plain: the version in plain torch on every device, in float32.

    Example:
        >>> FlaKernel(torch.neg, torch.abs, plain=False)(torch.tensor(-1.0)).item()
        1.0
    """

    def __init__(self, stock: Callable[..., Any], version: Callable[..., Any], *, plain: bool):
        self.stock, self.version, self.plain = stock, version, plain
        self.__name__ = stock.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = next(x for x in itertools.chain(args, kwargs.values()) if isinstance(x, Tensor))
        refused = self.__name__ in REFUSE_FLOAT32 and first.dtype == torch.float32
        chosen = self.version if self.plain or refused or first.device.type == "cpu" else self.stock
        return chosen(*args, **kwargs)


def rebinding(*, plain: bool) -> Rebinding:
    """What makes the methods of fla's modules call a `FlaKernel` in the place of each kernel.

    Args:
        plain: as in `FlaKernel`.

    Raises:
        ModuleNotFoundError: fla is not installed.

    Example:
        >>> if find_spec("fla"):
        ...     len(rebinding(plain=False).wraps) > 20
        ... else:
        ...     True
        True
    """
    _import_fla()
    known: dict[tuple[str, Any], FlaKernel] = {}
    for path, name, version in _plain_versions():
        stock: Callable[..., Any] = getattr(importlib.import_module(path), name)
        known[name, stock] = FlaKernel(stock, version, plain=plain)

    def kernel(name: str, function: Any) -> Any:
        return known.get((name, function), function)

    return Rebinding({name: functools.partial(kernel, name) for name, _ in known})


def corrections(module: nn.Module, *, plain: bool) -> dict[str, MethodType]:
    """Methods of a module of fla that are wrong or refuse what they should do, made right: those of Mamba-2's layer.

    Args:
        module: of a model of fla.
        plain: `mamba2_forward` on every device.

    Example:
        >>> corrections(nn.Linear(1, 1), plain=False)
        {}
    """
    if (type(module).__module__, type(module).__name__) != ("fla.layers.mamba2", "Mamba2"):
        return {}
    versions = {
        "cuda_kernels_forward": mamba2_forward if plain else _one_token_or_prompt(type(module).cuda_kernels_forward)
    }
    versions["torch_forward"] = mamba2_forward
    # By the attribute's name, since pickle asks the class for that.
    return {name: MethodType(_named(function, name), module) for name, function in versions.items()}


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    named.__name__ = name
    return named


def activations(module: nn.Module, *, plain: bool) -> dict[str, FlaKernel]:
    """A module's attributes that are activation functions of fla.

    Args:
        module, plain: as in `corrections`.

    Example:
        >>> activations(nn.Linear(1, 1), plain=False)
        {}
    """
    ops = importlib.import_module("fla.modules.activations.ops")
    versions: dict[Any, Callable[..., Any]] = {ops.swish: F.silu, ops.sigmoid: torch.sigmoid}
    stock: dict[str, Any] = {
        name: getattr(value, "stock", value) for name, value in vars(module).items() if callable(value)
    }
    return {name: FlaKernel(value, versions[value], plain=plain) for name, value in stock.items() if value in versions}


def is_fla(model: nn.Module) -> bool:
    """Whether a model's class is one of fla's.

    Example:
        >>> is_fla(nn.Linear(1, 1))
        False
    """
    return any(each.__module__.startswith("fla.") for each in type(model).__mro__)


def loses_its_cache(model: nn.Module) -> bool:
    """Whether `generate` makes other tokens with a cache than without: transformers 5.24 gives it to models under a name that fla 0.6 does not know.

    Example:
        >>> loses_its_cache(nn.Linear(1, 1))
        False
    """
    renamed = Version(transformers.__version__) >= Version("5.24")
    return renamed and is_fla(model) and "cache" not in inspect.signature(model.forward).parameters


def wrote(settings: dict[str, Any]) -> bool:
    """Whether a model's configuration is one of fla's: all of them have a setting that is fla's alone.

    Example:
        >>> wrote({"model_type": "mamba2", "fuse_cross_entropy": True}), wrote({"model_type": "mamba2"})
        (True, False)
    """
    return "fuse_cross_entropy" in settings


def knows(model_type: str) -> bool:
    """Whether fla is installed and has a model of this type; then it is imported, and transformers' Auto classes know it too.

    Raises:
        ModuleNotFoundError: it has one, and triton is not installed, which its package does not ask for.

    Example:
        >>> knows("no such model")
        False
    """
    found = find_spec("fla")
    if found is None or not found.submodule_search_locations:
        return False
    if not Path(found.submodule_search_locations[0], "models", model_type).is_dir():
        return False
    if find_spec("triton") is None:
        raise ModuleNotFoundError(
            f"{model_type!r} is a model of flash-linear-attention, which imports triton on a CPU too: pip install triton",
            name="triton",
        )
    _import_fla()
    importlib.import_module(f"fla.models.{model_type}")
    return True


def _import_fla() -> None:
    with warnings.catch_warnings():
        # That there is no GPU is said in the log, by `load_model`; flash-attn is for softmax layers.
        warnings.simplefilter("ignore", ImportWarning)
        warnings.filterwarnings("ignore", message="Triton is not supported", category=UserWarning)
        importlib.import_module("fla")


# ---------------------------------------------------------------- which


def _plain_versions() -> list[tuple[str, str, Callable[..., Any]]]:
    """(module, name in it, plain version) of everything that the supported models call and a CPU cannot run."""
    mixed = importlib.import_module("fla.ops.rwkv7.fused_addcmul").torch_addcmul_rwkv7
    norm = "fla.modules.norm"
    return [
        ("fla.layers.gated_deltanet", "chunk_gated_delta_rule", _gated_delta_rule),
        ("fla.layers.gated_deltanet", "fused_recurrent_gated_delta_rule", _gated_delta_rule),
        ("fla.layers.gated_deltanet", "causal_conv1d", _causal_conv1d),
        ("fla.layers.delta_net", "chunk_delta_rule", _delta_rule),
        ("fla.layers.delta_net", "fused_recurrent_delta_rule", _delta_rule),
        ("fla.layers.kda", "chunk_kda", _kda),
        ("fla.layers.kda", "fused_recurrent_kda", _kda),
        ("fla.layers.gla", "chunk_gla", _gla),
        ("fla.layers.gla", "fused_recurrent_gla", _gla),
        ("fla.layers.multiscale_retention", "chunk_retention", _retention),
        ("fla.layers.multiscale_retention", "fused_chunk_retention", _retention),
        ("fla.layers.multiscale_retention", "fused_recurrent_retention", _retention),
        ("fla.layers.linear_attn", "chunk_linear_attn", _linear_attention),
        ("fla.layers.linear_attn", "fused_chunk_linear_attn", _linear_attention),
        ("fla.layers.linear_attn", "fused_recurrent_linear_attn", _linear_attention),
        ("fla.layers.simple_gla", "chunk_simple_gla", _simple_gla),
        ("fla.layers.simple_gla", "fused_recurrent_simple_gla", _simple_gla),
        ("fla.layers.rwkv7", "chunk_rwkv7", _rwkv7),
        ("fla.layers.rwkv7", "fused_mul_recurrent_rwkv7", _rwkv7_of_kk),
        ("fla.layers.rwkv7", "fused_addcmul_rwkv7", mixed),
        ("fla.layers.rwkv7", "fused_k_rwkv7", lambda k, a, k_a: k.addcmul(k * (a - 1), k_a)),
        ("fla.layers.rwkv7", "gate_output_correction", _gate_output_correction),
        ("fla.layers.rwkv7", "l2_norm", _l2_norm),
        ("fla.layers.rwkv7", "token_shift", _token_shift),
        ("fla.models.rwkv7.modeling_rwkv7", "token_shift", _token_shift),
        ("fla.modules.causal_conv1d.ops", "causal_conv1d", _causal_conv1d),
        ("fla.modules.causal_conv1d.ops", "causal_conv1d_update", _causal_conv1d_update),
        ("fla.modules.rotary.ops", "rotary_embedding", _rotary_embedding),
        ("fla.modules.mlp", "swiglu", lambda x, y: F.silu(x) * y),
        ("fla.modules.mlp", "swiglu_linear", lambda x, y, weight, bias: F.linear(F.silu(x) * y, weight, bias)),
        (f"{norm}.layernorm", "rms_norm", functools.partial(_norm, is_rms_norm=True)),
        (f"{norm}.layernorm", "layer_norm", _norm),
        (f"{norm}.layernorm", "group_norm", _norm),
        (f"{norm}.fused_norm_gate", "rms_norm_gated", _rms_norm_gated),
        (f"{norm}.layernorm_gated", "rmsnorm_fn", _rms_norm_then_gate),
    ]


# ---------------------------------------------------------------- recurrences


def _naive(ops: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"fla.ops.{ops}.naive"), name)


def _scan(
    recurrence: Recurrence,
    tokens: dict[str, Tensor],
    *,
    initial_state: Tensor | None,
    output_final_state: bool | None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run a recurrence over (batch, token, head, ...), or over the sequences that stand one behind the other in a batch of one.

    Args:
        recurrence: (tokens, state) -> (outputs, state), states (batch, head, d_k, d_v).
        state_v_first: states come and go as (batch, head, d_v, d_k).
        cu_seqlens: where each sequence begins, and the end.
    """
    state = initial_state.transpose(-1, -2) if initial_state is not None and state_v_first else initial_state
    if cu_seqlens is None:
        out, last = recurrence(tokens, state)
    else:
        outs, states = [], []
        for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            piece = {name: x[:, start:stop] for name, x in tokens.items()}
            o, s = recurrence(piece, None if state is None else state[i : i + 1])
            outs.append(o)
            states.append(s)
        out, last = torch.cat(outs, 1), torch.cat(states)
    last = last.transpose(-1, -2).contiguous() if state_v_first else last
    return out.to(tokens["v"].dtype), last if output_final_state else None


def _l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _strength(beta: Tensor, *, is_logit: bool, up_to_two: bool) -> Tensor:
    if not is_logit:
        return beta.float()
    return beta.float().sigmoid() * (2 if up_to_two else 1)


def _gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    rule = _naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    gate = importlib.import_module("fla.ops.gated_delta_rule.gate").naive_gdn_gate
    q, k = (_l2_norm(x.float()) if use_qk_l2norm_in_kernel else x for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    tokens = {
        "q": q,
        "k": k,
        "v": v,
        "g": gate(g, A_log, dt_bias) if use_gate_in_kernel else g,
        "beta": _strength(beta, is_logit=use_beta_sigmoid_in_kernel, up_to_two=allow_neg_eigval),
    }
    return _scan(
        lambda piece, state: rule(**piece, scale=scale, initial_state=state, output_final_state=True), tokens, **options
    )


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, use_qk_l2norm_in_kernel: bool = False, **options: Any
) -> tuple[Tensor, Tensor | None]:
    rule = _naive("delta_rule", "delta_rule_recurrence")
    q, k = (_l2_norm(x.float()) if use_qk_l2norm_in_kernel else x for x in (q, k))

    def recurrence(piece: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, last = rule(**{name: x.transpose(1, 2) for name, x in piece.items()}, initial_state=state)
        return out.transpose(1, 2), last

    return _scan(recurrence, {"q": q, "k": k, "v": v, "beta": beta}, **options)


def _kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    rule = _naive("kda", "naive_recurrent_kda")
    gates = importlib.import_module("fla.ops.kda.gate")
    if use_gate_in_kernel and lower_bound is not None:
        g = gates.naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
    elif use_gate_in_kernel:
        g = gates.naive_kda_gate(g, A_log, dt_bias)
    q, k = (_l2_norm(x.float()) if use_qk_l2norm_in_kernel else x for x in (q, k))
    beta = _strength(beta, is_logit=use_beta_sigmoid_in_kernel, up_to_two=allow_neg_eigval)
    return _scan(
        lambda piece, state: rule(**piece, scale=scale, initial_state=state, output_final_state=True),
        {"q": q, "k": k, "v": v, "g": g, "beta": beta},
        **options,
    )


def _gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    # The decay of each channel of a key is `g` in chunk_gla and `gk` in fused_recurrent_gla.
    rule = _naive("gla", "naive_recurrent_gla")
    decay = g if gk is None else gk
    assert decay is not None
    return _scan(
        lambda piece, state: rule(**piece, initial_state=state, output_final_state=True),
        {"q": q, "k": k, "v": v, "gk": decay},
        **options,
    )


def _simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    rule = _naive("simple_gla", "naive_recurrent_simple_gla")
    return _scan(
        lambda piece, state: rule(**piece, scale=scale, initial_state=state),
        {"q": q, "k": k, "v": v, "g": g},
        **options,
    )


def simple_gla(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """fla's recurrence of a decay per head, on a GPU; Mamba-2 reads a prompt by it, see `mamba2_forward`.

    Example:
        >>> if find_spec("fla"):
        ...     q = torch.ones(1, 2, 1, 4)
        ...     options = {"g": torch.zeros(1, 2, 1), "initial_state": None, "output_final_state": True}
        ...     SIMPLE_GLA(q, q, q, **options)[1].shape
        ... else:
        ...     torch.Size([1, 1, 4, 4])
        torch.Size([1, 1, 4, 4])
    """
    rule = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
    made: tuple[Tensor, Tensor | None] = rule(*args, **options)
    return made


SIMPLE_GLA = FlaKernel(simple_gla, _simple_gla, plain=False)


def retention_decay(n_heads: int) -> Tensor:
    """RetNet's natural logarithm of the decay a token, fixed by the head's index: log(1 - 2^(-5 - head)).

    Example:
        >>> retention_decay(1).exp().item()
        0.96875
    """
    return (1 - 2.0 ** (-5.0 - torch.arange(n_heads, dtype=torch.float))).log()


def _retention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    return _simple_gla(q, k, v, retention_decay(q.shape[2]).to(q.device).expand(q.shape[:3]), **options)


def _linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    normalize: bool = True,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    decay = q.new_zeros(q.shape[:3], dtype=torch.float32)
    if not normalize:
        assert not isinstance(initial_state, tuple)
        return _simple_gla(q, k, v, decay, scale, initial_state=initial_state, **options)
    # The sum of keys is what a value that is always 1 leaves in one column more.
    with_ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if initial_state is not None:
        state, keys = initial_state
        initial_state = torch.cat([state, keys.permute(0, 2, 3, 1).to(state.dtype)], -1)
    out, last = _simple_gla(q, k, with_ones, decay, scale, initial_state=initial_state, **options)
    out = out[..., :-1] / (out[..., -1:] + 1e-10)
    return out, None if last is None else (last[..., :-1].contiguous(), last[..., -1][:, None].contiguous())


def _rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor | None]:
    rule = _naive("generalized_delta_rule.dplr", "dplr_recurrence")
    for name in ("safe_gate", "lower_bound", "chunk_size"):
        options.pop(name, None)  # hints to the kernel, which change no result

    def recurrence(piece: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, last = rule(**{name: x.transpose(1, 2) for name, x in piece.items()}, initial_state=state)
        return out.transpose(1, 2), last

    # The naive operator divides queries by sqrt(d_k).
    q = r.float() * (scale * r.shape[-1] ** 0.5)
    return _scan(recurrence, {"q": q, "k": k, "v": v, "alpha": a, "beta": b, "gk": w}, **options)


def _gate_output_correction(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (o + ((r * k * r_k).sum(-1, keepdim=True) * v).view_as(o)) * g


def _rwkv7_of_kk(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, scale: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor | None]:
    return _rwkv7(r, w, k, v, -kk, kk * a, scale, **options)


def mamba2_forward(
    self: nn.Module,
    input_states: Tensor,
    last_state: dict[str, Any] | None = None,
    use_cache: bool | None = False,
    attention_mask: Tensor | None = None,
    *,
    change: Callable[[Tensor], Tensor] = lambda log_decay: log_decay,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Mamba-2's layer, from any state over any number of tokens, on any device; `change` is applied to its log-decay.

    fla's own (`Mamba2.torch_forward`) refuses several tokens after a state, and in a prompt deals B and C of several groups
    out to the heads in another order than when decoding, so that prompt and decoding contradict each other.

    Example:
        >>> mamba2_forward(nn.Linear(1, 1), torch.zeros(1, 1, 1))  # a layer of another kind
        Traceback (most recent call last):
            ...
        AttributeError: 'Linear' object has no attribute 'n_groups'
    """
    n_tokens = input_states.shape[1]
    n_group = self.n_groups * self.ssm_state_size
    mask = None if attention_mask is None else attention_mask[:, -n_tokens:, None].to(input_states.dtype)
    gate, mixed, dt = self.in_proj(input_states).split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
    mixed = mixed if mask is None else mixed * mask
    mixed, conv_state = _causal_conv1d(
        mixed,
        self.conv1d.weight.squeeze(1),
        self.conv1d.bias,
        initial_state=None if last_state is None else last_state["conv_state"],
        output_final_state=True,
    )
    mixed = self.act(mixed)
    mixed = mixed if mask is None else mixed * mask
    x, key, query = mixed.split([self.intermediate_size, n_group, n_group], -1)
    x = x.unflatten(-1, (self.num_heads, self.head_dim))
    key, query = (
        y.unflatten(-1, (self.n_groups, -1)).repeat_interleave(self.num_heads // self.n_groups, 2) for y in (key, query)
    )
    step = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.dt_limit)
    out, state = SIMPLE_GLA(
        q=query.float(),
        k=key.float(),
        v=x.float() * step[..., None],
        g=change(step * -self.A_log.float().exp()),
        scale=1.0,
        initial_state=None if last_state is None else last_state["recurrent_state"],
        output_final_state=True,
        state_v_first=True,
    )
    out = out + x.float() * self._get_D(expand_to_head_dim=True).float()
    out = out.flatten(2)
    out = self.norm(out, gate) if self.rmsnorm else out * self.act(gate)
    return self.out_proj(out.to(input_states.dtype)), conv_state if use_cache else None, state


def _one_token_or_prompt(bound: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba2.cuda_kernels_forward for what it can do, and `mamba2_forward` for several tokens after a state."""

    @functools.wraps(bound)
    def forward(
        self: nn.Module, hidden_states: Tensor, last_state: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        chosen = bound if last_state is None or hidden_states.shape[1] == 1 else mamba2_forward
        return chosen(self, hidden_states, last_state, *args, **kwargs)

    return forward


# ---------------------------------------------------------------- modules


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Over (batch, token, channel); the state is the last inputs, (batch, channel, width)."""
    width = weight.shape[-1]

    def of_sequence(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        n_batch, n_tokens, n_channels = x.shape
        state = x.new_zeros(n_batch, n_channels, width) if state is None else state
        inputs = torch.cat((state.to(x), x.transpose(1, 2)), -1)
        if not n_tokens:
            return x, inputs
        out = F.conv1d(
            inputs[..., 1:].float(), weight[:, None].float(), None if bias is None else bias.float(), groups=n_channels
        )
        out = out if activation is None else F.silu(out)
        return out.transpose(1, 2).to(x.dtype), inputs[..., -width:].contiguous()

    if cu_seqlens is None:
        out, last = of_sequence(x, initial_state)
    else:
        parts = [
            of_sequence(x[:, start:stop], None if initial_state is None else initial_state[i : i + 1])
            for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
        ]
        out, last = torch.cat([part for part, _ in parts], 1), torch.cat([state for _, state in parts])
    out = out if residual is None else out + residual
    return out, last if output_final_state else None


def _causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    assert weight is not None
    last: Any
    out, last = _causal_conv1d(x.reshape(len(cache), 1, -1), weight, bias, None, cache, True, activation)
    cache.copy_(last)
    out = out.view(x.shape)
    return out if residual is None else out + residual, cache


def _token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: Tensor | None = None,
) -> Any:
    """For each token, the one before it less itself; the cache is the last token."""
    if cu_seqlens is not None:
        raise NotImplementedError("several sequences in one row are not supported on a CPU: give each its own row")
    before = torch.zeros_like(x[:, :1]) if cache is None else cache.view(len(x), 1, -1).to(x)
    out = torch.cat((before, x[:, :-1]), 1) - x
    return (out, x[:, -1:].clone()) if output_cache else out


def _rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    rotary: ModuleType = importlib.import_module("fla.modules.rotary.ops")
    n_sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    offsets = torch.as_tensor(seqlen_offsets, device=x.device).expand(n_sequences)
    if cu_seqlens is None:
        places = offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        bounds = list(itertools.pairwise(cu_seqlens.tolist()))
        places = torch.cat(
            [
                offset + torch.arange(stop - start, device=x.device)
                for offset, (start, stop) in zip(offsets, bounds, strict=True)
            ]
        )[None]
    return rotary.rotary_embedding_ref(x.float(), cos[places].float(), sin[places].float(), interleaved).to(x.dtype)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Any:
    wide = x.float() if residual is None else x.float() + residual.float()
    out = wide.unflatten(-1, (num_groups, -1))
    out = out if is_rms_norm else out - out.mean(-1, keepdim=True)
    out = (out * (out.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2)
    out = out if weight is None else out * weight.float()
    out = (out if bias is None else out + bias.float()).to(x.dtype)
    if not prenorm:
        return out
    kept = torch.float32 if residual_in_fp32 else x.dtype
    return out, wide.to(kept if residual is None else residual.dtype)


def _rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    if residual is not None or prenorm:
        raise NotImplementedError("a gated norm with a residual is not supported on a CPU")
    gate = g.float().sigmoid() if activation == "sigmoid" else F.silu(g.float())
    return (_norm(x.float(), weight, bias, eps=eps, is_rms_norm=True) * gate).to(x.dtype)


def _rms_norm_then_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    reference = importlib.import_module("fla.modules.norm.layernorm_gated").rms_norm_ref
    return reference(x, weight, bias, z, eps, group_size, norm_before_gate)
