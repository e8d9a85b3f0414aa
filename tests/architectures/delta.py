"""Tiny random models of the architectures with a delta rule: the real classes, a few thousand weights."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from architectures.oracle import ALL, Architecture, Expected, unit
from staterank_utils.architectures import linear_layers
from staterank_utils.reference import gated_delta_rule
from staterank_utils.sse import SSEConfig, SSEForCausalLM

LAYERS = ["linear_attention", "full_attention", "linear_attention"]
COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "layer_types": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
# Two key heads, four value heads, states of 8 x 16.
GROUPED = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
}  # fmt: skip
# Every expert is chosen: near a tie, rounding would choose others in another order of sums.
EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse", "dense"],
}  # fmt: skip
KDA = COMMON | {"linear_num_heads": 4, "linear_head_dim": 8} | LATENT


def _bailing() -> PreTrainedModel:
    options = KDA | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 2}
    del options["linear_num_heads"], options["linear_head_dim"]
    return transformers.BailingHybridForCausalLM(transformers.BailingHybridConfig(**options, num_mtp_layers=0))


def _glm() -> PreTrainedModel:
    text = KDA | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "n_routed_experts": 2,
        "q_lora_rank": 16, "qk_rope_head_dim": 0, "index_topk": 16, "index_head_dim": 8, "index_n_heads": 16,
        "index_kpool": 4, "hc_mult": 2,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 4,
        "projection_intermediate_size": 16, "image_size": 8,
    }  # fmt: skip
    return transformers.Glm5NextForConditionalGeneration(
        transformers.Glm5NextConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=60,
            video_token_id=61,
            image_start_token_id=56,
            image_end_token_id=57,
            video_start_token_id=58,
            video_end_token_id=59,
        )
    )


def _qwen4(**more: Any) -> PreTrainedModel:
    layers = ["linear_attention", "full_attention", "linear_attention"]
    # Enough indexer heads that no two blocks of tokens score exactly 0, which would be a tie.
    indexer = {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    }  # fmt: skip
    options = COMMON | GROUPED | EXPERTS | indexer | {"layer_types": layers, "hc_count": 2, "hc_lowrank": 8} | more
    del options["intermediate_size"]
    return transformers.Qwen4ExpForCausalLM(transformers.Qwen4ExpTextConfig(**options))


PLE = {
    "ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 50, "heads_per_ngram": 2, "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
}  # fmt: skip
# Without softmax layers, `generate` of transformers takes no cache.
PURE = {"num_hidden_layers": 2, "layer_types": LAYERS[:1] * 2, "use_cache": False}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_next": lambda: transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(**COMMON | GROUPED | {"num_experts": 0, "mlp_only_layers": [0, 1, 2]})
    ),
    "qwen3_5": lambda: transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**COMMON | GROUPED)),
    "qwen3_5, no softmax": lambda: transformers.Qwen3_5ForCausalLM(
        transformers.Qwen3_5TextConfig(**COMMON | GROUPED | PURE)
    ),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeForCausalLM(
        transformers.Qwen3_5MoeTextConfig(**COMMON | GROUPED | EXPERTS)
    ),
    "qwen4_exp": _qwen4,
    "qwen4_exp, per-layer embedding": lambda: _qwen4(**PLE),
    "olmo_hybrid": lambda: transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**COMMON | GROUPED)),
    "staterank_sse": lambda: SSEForCausalLM(
        SSEConfig(
            **COMMON | GROUPED | {"num_experts": 0, "mlp_only_layers": [0, 1, 2]},
            n_partitions=3,
            n_active=2,
            lora_rank=4,
        )
    ),
    "kimi_linear": lambda: transformers.KimiLinearForCausalLM(
        transformers.KimiLinearConfig(**KDA, num_local_experts=2)
    ),
    "bailing_hybrid": _bailing,
    "glm5_next": _glm,
}
if not hasattr(transformers, "BailingHybridConfig"):  # transformers 5.17 does not know it yet
    del MODELS["bailing_hybrid"]


def tiny(name: str) -> PreTrainedModel:
    """The same weights every time, with gates that decay and write at every strength."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter, value in model.named_parameters():
        if parameter.endswith("A_log"):
            value.uniform_(-1.0, 1.5)
        elif parameter.endswith("dt_bias"):
            value.uniform_(-3.0, 0.5)
    return model


@torch.no_grad()
def expected(model: PreTrainedModel, ids: Tensor) -> list[Expected]:
    """From what one full pass gives to the kernels."""
    calls: dict[int, Expected] = {}

    def look(index: int, kernel, query, key, value, *, g, beta, **options):
        spread = partial(torch.repeat_interleave, repeats=value.shape[2] // key.shape[2], dim=2)
        decay, write = g.double(), beta.double()
        q, k = spread(query).double(), spread(key).double()
        if options["use_qk_l2norm_in_kernel"]:
            q, k = unit(q), unit(k)
        _, states = gated_delta_rule(q, k, value.double(), decay, write)
        calls[index] = Expected(states, decay.mean(-1) if decay.ndim == 4 else decay, write)
        return kernel(query, key, value, g=g, beta=beta, **options)

    with ExitStack() as stack:
        for layer in linear_layers(model):
            stack.enter_context(layer.scans_through(partial(look, layer.index)))
        model(ids, use_cache=False)
    return list(calls.values())


ARCHITECTURES = {
    name: Architecture(partial(tiny, name), expected, refused=ALL if name == "staterank_sse" else frozenset())
    for name in MODELS
}
