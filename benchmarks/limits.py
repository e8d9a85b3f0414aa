"""What a machine could do at best, measured on it: the limits that times are set beside."""

import statistics

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.timing import rounds
from staterank_utils.architectures import cache_bytes
from staterank_utils.budget import weight_bytes
from staterank_utils.models import make_cache

READ_BYTES = 2**28  # far beyond any cache


def operations_per_second(device: torch.device | str, dtype: torch.dtype, size: int = 2048) -> float:
    """Of a product of square matrices, an addition and a multiplication counted apart."""
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = rounds({"products": lambda: [a @ a for _ in range(3)]}, 5)["products"]
    return 3 * 2 * size**3 / min(seconds)


def bytes_per_second(device: torch.device | str) -> float:
    """Of reading a long vector once."""
    x = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / statistics.median(rounds({"reading": x.sum}, 5)["reading"])


def operations_a_token(model: PreTrainedModel) -> int:
    """Of the weight matrices that every token goes through, without the embeddings; the rest is little beside them."""
    matrices = (module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear))
    return sum(2 * weight.numel() for weight in matrices)


@torch.inference_mode()
def read(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, int]:
    """Run prompts through the model; the bytes that its cache then holds, by kind."""
    cache = make_cache(model)
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache_bytes(cache)


def step_bytes(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Bytes that a decoding step must move behind these prompts: weights once, states and convolution inputs twice, keys and values once."""
    held = read(model, ids)
    return weight_bytes(model) + 2 * held["recurrent"] + 2 * held["convolution"] + held["softmax"]
