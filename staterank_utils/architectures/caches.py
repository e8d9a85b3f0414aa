"""Caches: one for models without softmax attention, where the states are in those of transformers, and what a cache takes."""

from collections.abc import Collection
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

# Of the argument of a forward, from transformers 5.24 on and before it.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(names: Collection[str]) -> str | None:
    """What a forward calls its cache, by the names of its arguments; None where it takes none.

    Example:
        >>> cache_name(["input_ids", "past_key_values"])
        'past_key_values'
    """
    return next((name for name in CACHE_NAMES if name in names), None)


class LinearOnlyCache(DynamicCache):
    """A cache for a model without softmax attention: it counts its tokens itself.

    The stock cache asks an attention layer how many tokens it has seen, and raises where there is none. Steps of one token in Mamba-2,
    which tell no cache, are not counted.

    Args:
        config: of the model.

    Example:
        >>> import torch
        >>> from transformers import AutoConfig
        >>> from staterank_utils.models import CHECKPOINTS, initial_model
        >>> one_layer = {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}
        >>> config = AutoConfig.from_pretrained(CHECKPOINTS / "hybrid", **one_layer)
        >>> model, cache = initial_model(config), LinearOnlyCache(config)
        >>> for n_tokens in (5, 1, 1):
        ...     _ = model(torch.ones(1, n_tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
        >>> cache.get_seq_length()
        7
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self._counted = next((i for i, layer in enumerate(self.layers) if hasattr(layer, "recurrent_states")), 0)
        self._n_tokens = 0
        self._n_new = 1

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        # A layer may keep other convolutions too (`state_idx`), which do not read tokens one for one.
        if layer_idx == self._counted and not kwargs.get("state_idx", args[0] if args else 0):
            self._n_new = conv_states.shape[-1]
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        if layer_idx == self._counted:
            # A step of one token rewrites its convolution state in place, without update_conv_state.
            self._n_tokens += self._n_new
            self._n_new = 1
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._n_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._n_tokens + query_length, 0


def recurrent_state(cache: Any, layer_index: int) -> Float[Tensor, "batch head d_k d_v"]:
    """The states of a layer where a cache of transformers holds them, in the order in which it holds them.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> layer = SimpleNamespace(recurrent_states={0: torch.ones(1, 2, 4, 3)})
        >>> recurrent_state(SimpleNamespace(layers=[layer]), 0).shape
        torch.Size([1, 2, 4, 3])
    """
    state: Tensor = cache.layers[layer_index].recurrent_states[0]
    return state


def cache_bytes(cache: Any) -> dict[str, int]:
    """Bytes of the tensors that a cache holds, by what they are for.

    Args:
        cache: after a forward pass.

    Returns:
        "recurrent" (the states S), "convolution" (the last inputs of the short convolutions), "softmax" (keys and values).

    Raises:
        TypeError: a cache of another kind.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> model = load_model("hybrid")
        >>> cache = model(torch.ones(1, 9, dtype=torch.long, device=model.device), use_cache=True).past_key_values
        >>> cache_bytes(cache)["recurrent"]  # 144 states of 64 x 64 in float32
        2359296
    """
    if not hasattr(cache, "layers"):
        raise TypeError(
            f"expected a cache of transformers or fla, got {type(cache).__name__}: of another, add up the bytes of its tensors"
        )
    total = {"recurrent": 0, "convolution": 0, "softmax": 0}
    for layer in cache.layers:
        tensors = {
            "recurrent": getattr(layer, "recurrent_states", {}).values(),
            "convolution": getattr(layer, "conv_states", {}).values(),
            "softmax": (getattr(layer, "keys", None), getattr(layer, "values", None)),
        }
        if state := getattr(layer, "state", None):
            # A cache of fla: by name, one tensor or several of a kind. RWKV keeps the last token where others keep more.
            names = (
                ("recurrent", ("recurrent_state",)),
                ("convolution", ("conv_state", "ffn_state")),
                ("softmax", ("attn_state",)),
            )
            held = {name: x if isinstance(x, (tuple, list)) else (x,) for name, x in state.items()}
            tensors = {kind: [x for name in of_kind for x in held[name]] for kind, of_kind in names}
        for kind, of_layer in tensors.items():
            total[kind] += sum(x.numel() * x.element_size() for x in of_layer if isinstance(x, Tensor))
    # (the caches of MiniMax and xLSTM keep their states beside their layers)
    total["recurrent"] += sum(x.nbytes for x in getattr(cache, "linear_cache", ()) if isinstance(x, Tensor))
    return total
