"""Tiny models of flash-linear-attention's own classes, with random weights that give every gate something to do."""

import warnings
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from architectures.oracle import ALL, Architecture, Expected, from_projections, mixed_by, recurrence, unit
from staterank_utils.architectures import LinearLayer, linear_layers
from staterank_utils.fla_cpu import knows
from staterank_utils.rebinding import calls_through

GROUPED = {"head_dim": 8, "num_heads": 2, "num_v_heads": 4, "expand_v": 2.0}
FOUR = {"num_heads": 4, "expand_k": 1.0, "expand_v": 2.0}
RWKV7 = {"head_dim": 8} | {f"{name}_low_rank_dim": 8 for name in ("decay", "gate", "a", "v")}
MAMBA2 = {"head_dim": 8, "num_heads": 8, "state_size": 16, "expand": 2, "residual_in_fp32": False}

# Name -> model type and settings. Four value heads on two key heads where a family knows groups. KDA's kernel of bounded decay needs
# 16 key channels or more.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GatedDeltaNet": ("gated_deltanet", GROUPED),
    "GatedDeltaNet, negative eigenvalues": ("gated_deltanet", GROUPED | {"allow_neg_eigval": True, "use_gate": False}),
    "DeltaNet": ("delta_net", FOUR),
    "DeltaNet, gated": ("delta_net", FOUR | {"use_gate": True, "qk_norm": "sum", "qk_activation": "elu"}),
    "KDA": ("kda", GROUPED),
    "KDA, bounded decay": ("kda", GROUPED | {"safe_gate": True, "lower_bound": -5.0, "head_dim": 16}),
    "GLA": ("gla", FOUR | {"num_kv_heads": 2}),
    "GLA, short convolutions": ("gla", FOUR | {"num_kv_heads": 2, "use_short_conv": True, "fuse_norm": False}),
    "RetNet": ("retnet", FOUR | {"num_kv_heads": 2, "norm_eps": 1e-4}),
    "LinearAttention": ("linear_attn", FOUR | {"num_kv_heads": 2}),
    "LinearAttention, normalised": (
        "linear_attn",
        FOUR | {"num_kv_heads": 2, "norm_feature_map": True, "feature_map": "elu"},
    ),
    "Mamba2": ("mamba2", MAMBA2),
    "Mamba2, two groups": ("mamba2", MAMBA2 | {"n_groups": 2}),
    "RWKV7": ("rwkv7", RWKV7),
}


def tiny(name: str) -> PreTrainedModel:
    """A random model of a few thousand weights, two layers deep."""
    model_type, settings = MODELS[name]
    assert knows(model_type), "fla is not installed"
    options = {} if model_type == "mamba2" else {"intermediate_size": 48}
    config = AutoConfig.for_model(model_type, vocab_size=64, hidden_size=32, num_hidden_layers=2, **options, **settings)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # fla warns that the authors of RWKV do not vouch for its version.
        warnings.filterwarnings("ignore", message="According to Bo")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter += 0.15 * torch.randn(parameter.shape)
            elif "norm" in key or key.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


KERNELS = {
    "gated_deltanet": "chunk_gated_delta_rule",
    "delta_net": "chunk_delta_rule",
    "kda": "chunk_kda",
    "gla": "chunk_gla",
    "retnet": "chunk_retention",
    "linear_attn": "chunk_linear_attn",
    "rwkv7": "chunk_rwkv7",
}


def expected(model: PreTrainedModel, ids: Tensor) -> list[Expected]:
    """From what one full pass gives to the kernels; of Mamba-2, from the output of its first projection."""
    model_type, found = model.config.model_type, []
    layers = [layer.module for layer in linear_layers(model)]
    if model_type == "mamba2":
        return from_projections(model, ids, mamba2)

    def look(kernel, **seen):
        found.append(of_kernel(model_type, layers[len(found)], seen))
        return kernel(**seen)

    with_gradients = model_type == "linear_attn"  # without, it takes another kernel
    with ExitStack() as stack, torch.set_grad_enabled(with_gradients):
        for layer in layers:
            stack.enter_context(calls_through(layer, {KERNELS[model_type]: look}))
        model(ids, use_cache=False)
    return found


def of_kernel(model_type: str, layer: nn.Module, seen: dict[str, Tensor]) -> Expected:
    """States and gates from what a layer gave to its kernel."""
    k, v = seen["k"], seen["v"]
    spread = partial(torch.repeat_interleave, repeats=v.shape[2] // k.shape[2], dim=2)
    one = k.new_ones(v.shape[:3], dtype=torch.float64)
    twice = 2 if getattr(layer, "allow_neg_eigval", False) else 1
    write, remove = None, None
    if model_type == "gated_deltanet":
        decay = -layer.A_log.double().exp() * F.softplus(seen["g"].double() + layer.dt_bias.double())
        k, decay, write = spread(unit(k)), decay[..., None], twice * seen["beta"].double().sigmoid()
    elif model_type == "delta_net":
        k = unit(k) if layer.qk_norm == "l2" else k
        decay, write = 0 * one[..., None], seen["beta"]
    elif model_type == "kda":
        g = seen["g"].double() + layer.dt_bias.double().view(layer.num_v_heads, -1)
        rate = layer.A_log.double().exp()[:, None]
        decay = -rate * F.softplus(g) if layer.lower_bound is None else layer.lower_bound * (rate * g).sigmoid()
        k, write = spread(unit(k)), twice * seen["beta"].double().sigmoid()
    elif model_type == "gla":
        decay = seen["g"]
    elif model_type == "retnet":
        decay = (-4 - one.cumsum(-1)).exp2().neg().log1p()[..., None]  # 1 - 2^(-5-h) for head h = 0, 1, ...
    elif model_type == "linear_attn":
        decay = 0 * one[..., None]
    else:
        assert model_type == "rwkv7"
        decay, remove = seen["w"], (seen["a"], seen["b"])
    states = recurrence(k, v, decay, write, remove)
    if remove is not None:
        write = -(seen["b"].double() / seen["a"].double()).mean(-1)  # removed along kappa, put back as a kappa
    return Expected(states, decay.double().mean(-1), one if write is None else write)


def mamba2(of_model: LinearLayer, projected: Tensor) -> Expected:
    """From the output of in_proj."""
    layer = of_model.module
    size, n_group = layer.intermediate_size, layer.n_groups * layer.ssm_state_size
    _, mixed, step = projected.split([size, layer.conv_dim, layer.num_heads], -1)
    value, key, _ = mixed_by(layer.conv1d, mixed).split([size, n_group, n_group], -1)
    step = F.softplus(step + layer.dt_bias.double())
    # Consecutive heads share a group, as in the paper's repository.
    key = key.unflatten(-1, (layer.n_groups, -1)).repeat_interleave(layer.num_heads // layer.n_groups, 2)
    value = value.unflatten(-1, (layer.num_heads, -1)) * step[..., None]
    decay = -layer.A_log.double().exp() * step
    return Expected(recurrence(key, value, decay[..., None]), decay, step)


# RetNet's decay follows from a head's index, and RWKV-7 mixes the values of a head's first layer into all.
REFUSED = {"RetNet": ALL, "RWKV7": ALL, "Mamba2, two groups": frozenset(("unevenly",))}
ARCHITECTURES = {
    f"fla {name}": Architecture(partial(tiny, name), expected, refused=REFUSED.get(name, frozenset()))
    for name in MODELS
}
