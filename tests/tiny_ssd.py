"""Tiny random models of the layers in `layouts.ssd`: the real classes, grouped heads, d_k != d_v where the class allows it."""

import torch
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

from staterank_utils.models import choose_kernels

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
            shared_intermediate_size=24, num_local_experts=4, logits_scaling=2.0, position_embedding_type="rope",
        )
    )  # fmt: skip


def _zamba2() -> PreTrainedModel:
    return Zamba2ForCausalLM(
        Zamba2Config(
            **COMMON, num_attention_heads=2, num_hidden_layers=3, layers_block_type=[LINEAR, "hybrid", LINEAR], intermediate_size=48,
            n_mamba_heads=8, mamba_d_state=12, mamba_ngroups=2, chunk_size=16, time_step_min=0.3, adapter_rank=4,
            use_mem_rope=True,
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
            intermediate_size=24, num_local_experts=4, block_size=16,
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
    "zamba2": _zamba2,
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
    choose_kernels(model)
    return model
