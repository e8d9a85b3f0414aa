"""Tiny random models of the layers in `architectures.ssd`: the real classes, grouped heads, d_k != d_v where the class allows it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from architectures.oracle import Architecture, Expected, from_projections, mixed_by, recurrence
from staterank_utils.architectures import LinearLayer

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SOFTMAX = {"num_attention_heads": 2, "num_key_value_heads": 1}
# Eight heads (d_v = 8) in two groups, d_k = 12.
JAMBA_LIKE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 12, "mamba_chunk_size": 16}
# Every expert is chosen: near a tie, rounding would choose others in another order of sums.
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 4}
LINEAR, FULL = "linear_attention", "full_attention"


def _mamba2(**options: object) -> PreTrainedModel:
    return Mamba2ForCausalLM(
        Mamba2Config(**COMMON, num_heads=8, head_dim=8, state_size=12, n_groups=2, num_hidden_layers=2, chunk_size=16, **options)
    )  # fmt: skip


def _falcon_h1(**options: object) -> PreTrainedModel:
    return FalconH1ForCausalLM(
        FalconH1Config(
            **COMMON, **SOFTMAX, **JAMBA_LIKE, num_hidden_layers=2, mamba_d_ssm=64, intermediate_size=48, projectors_bias=True,
            ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7], lm_head_multiplier=0.5, **options,
        )
    )  # fmt: skip


def _nemotron_h() -> PreTrainedModel:
    return NemotronHForCausalLM(
        NemotronHConfig(
            **COMMON, **SOFTMAX, layers_block_type=["mlp", LINEAR, FULL, LINEAR], head_dim=16, intermediate_size=48,
            mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=12, n_groups=2, chunk_size=16, time_step_min=0.3,
        )
    )  # fmt: skip


def _granitemoehybrid() -> PreTrainedModel:
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **COMMON, **SOFTMAX, **JAMBA_LIKE, num_hidden_layers=3, layer_types=[LINEAR, FULL, LINEAR], intermediate_size=24,
            shared_intermediate_size=24, **EXPERTS, logits_scaling=2.0, position_embedding_type="rope",
        )
    )  # fmt: skip


def zamba2(**options: object) -> PreTrainedModel:
    layers = {"num_hidden_layers": 3, "layers_block_type": [LINEAR, "hybrid", LINEAR]}
    return Zamba2ForCausalLM(
        Zamba2Config(
            **COMMON, num_attention_heads=2, intermediate_size=48, n_mamba_heads=8, mamba_d_state=12, mamba_ngroups=2, chunk_size=16,
            time_step_min=0.3, adapter_rank=4, use_mem_rope=True, **layers | options,
        )
    )  # fmt: skip


def _bamba() -> PreTrainedModel:
    return BambaForCausalLM(
        BambaConfig(
            **COMMON, **SOFTMAX, **JAMBA_LIKE, num_hidden_layers=3, attn_layer_indices=[1], intermediate_size=48
        )
    )


def _minimax(*layers: str) -> PreTrainedModel:
    return MiniMaxForCausalLM(
        MiniMaxConfig(
            **COMMON, num_attention_heads=8, num_key_value_heads=2, head_dim=8, num_hidden_layers=len(layers), layer_types=list(layers),
            intermediate_size=24, **EXPERTS, block_size=16,
        )
    )  # fmt: skip


MODELS = {
    "mamba2": _mamba2,
    "mamba2 with biases": lambda: _mamba2(use_bias=True),
    "falcon_h1": _falcon_h1,
    "falcon_h1 with norm": lambda: _falcon_h1(mamba_rms_norm=True),
    "falcon_h1 with norm behind the gate": lambda: _falcon_h1(mamba_rms_norm=True, mamba_norm_before_gate=False),
    "nemotron_h": _nemotron_h,
    "granitemoehybrid": _granitemoehybrid,
    "zamba2": zamba2,
    "bamba": _bamba,
    "minimax": lambda: _minimax(LINEAR, FULL, LINEAR),
    "minimax, softmax first": lambda: _minimax(FULL, LINEAR, LINEAR),
    "minimax, all linear": lambda: _minimax(LINEAR, LINEAR),
}


def tiny(name: str) -> PreTrainedModel:
    """A model by its name in `MODELS`, with gates and norms that are not all alike."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("dt_bias", "A_log", ".D", "norm.weight", ".bias")):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def expected(model: PreTrainedModel, ids: Tensor) -> list[Expected]:
    """From the output of every layer's first projection."""
    of_layer = lightning if model.config.model_type == "minimax" else mamba2
    return from_projections(model, ids, partial(of_layer, model))


def lightning(model: PreTrainedModel, layer: LinearLayer, projected: Tensor) -> Expected:
    """MiniMax: a fixed decay for every head."""
    n_heads = layer.n_heads
    _, key, value = F.silu(projected).unflatten(-1, (n_heads, -1)).chunk(3, -1)
    depth = 1 - layer.index / (model.config.num_hidden_layers - 1 + 1e-5) + 1e-5
    slope = depth * 2 ** (-8 / n_heads * torch.arange(1, n_heads + 1, device=key.device).double())
    decay = (-slope).expand(*projected.shape[:2], -1)
    return Expected(recurrence(key, value, decay[..., None]), decay, torch.ones_like(decay))


def mamba2(model: PreTrainedModel, layer: LinearLayer, projected: Tensor) -> Expected:
    """Mamba-2 and its kin, with the multipliers of Falcon H1 and the lower bounds of a step."""
    n_heads, n_keys, d_k, d_v, module = layer.n_heads, layer.n_keys, layer.d_k, layer.d_v, layer.module
    widths = [n_heads * d_v, n_heads * d_v, n_keys * d_k, n_keys * d_k, n_heads]
    parts = [
        part * multiplier
        for part, multiplier in zip(
            projected.split(widths, -1), getattr(model.config, "ssm_multipliers", None) or [1.0] * 5, strict=True
        )
    ]
    value, key, _ = mixed_by(module.conv1d, torch.cat(parts[1:4], -1)).split(widths[1:4], -1)
    value = value.unflatten(-1, (n_heads, d_v))
    key = key.unflatten(-1, (n_keys, d_k)).repeat_interleave(n_heads // n_keys, -2)
    bounded = layer.name.startswith(("Nemotron", "Zamba"))
    step = F.softplus(parts[4] + module.dt_bias.double()).clamp(min=model.config.time_step_min if bounded else 0.0)
    decay = -module.A_log.double().exp() * step
    return Expected(recurrence(key, step[..., None] * value, decay[..., None]), decay, step)


ARCHITECTURES = {
    name: Architecture(
        partial(tiny, name), expected, pads=name != "mamba2 with biases", wide_states=not name.startswith("minimax")
    )
    for name in MODELS
}
