"""Tiny models of flash-linear-attention's own classes, with random weights that give every gate something to do."""

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from staterank_utils.fla_cpu import knows

GROUPED = {"head_dim": 8, "num_heads": 2, "num_v_heads": 4, "expand_v": 2.0}
FOUR = {"num_heads": 4, "expand_k": 1.0, "expand_v": 2.0}
RWKV7 = {"head_dim": 8} | {f"{name}_low_rank_dim": 8 for name in ("decay", "gate", "a", "v")}
MAMBA2 = {"head_dim": 8, "num_heads": 8, "state_size": 16, "expand": 2, "residual_in_fp32": False}

# Name -> model type and settings. Four value heads on two key heads where a family knows groups.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "GatedDeltaNet": ("gated_deltanet", GROUPED),
    "GatedDeltaNet, negative eigenvalues": ("gated_deltanet", GROUPED | {"allow_neg_eigval": True, "use_gate": False}),
    "DeltaNet": ("delta_net", FOUR),
    "DeltaNet, gated": ("delta_net", FOUR | {"use_gate": True, "qk_norm": "sum", "qk_activation": "elu"}),
    "KDA": ("kda", GROUPED),
    "KDA, bounded decay": ("kda", GROUPED | {"safe_gate": True, "lower_bound": -5.0}),
    "GLA": ("gla", FOUR | {"num_kv_heads": 2}),
    "GLA, short convolutions": ("gla", FOUR | {"num_kv_heads": 2, "use_short_conv": True, "fuse_norm": False}),
    "RetNet": ("retnet", FOUR | {"num_kv_heads": 2, "norm_eps": 1e-4}),
    "LinearAttention": ("linear_attn", FOUR),
    "Mamba2": ("mamba2", MAMBA2),
    "Mamba2, two groups": ("mamba2", MAMBA2 | {"n_groups": 2}),
    "RWKV7": ("rwkv7", RWKV7),
}


def tiny_fla(name: str) -> PreTrainedModel:
    """A random model of a few thousand weights, two layers deep."""
    model_type, settings = TINY[name]
    assert knows(model_type), "fla is not installed"
    options = {} if model_type == "mamba2" else {"intermediate_size": 48}
    config = AutoConfig.for_model(model_type, vocab_size=64, hidden_size=32, num_hidden_layers=2, **options, **settings)
    with torch.random.fork_rng(), warnings.catch_warnings():
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
