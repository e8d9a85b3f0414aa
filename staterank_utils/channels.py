"""Shrink states from the other side: keep every head, and fewer channels of its queries and keys.

A state is d_k x d_v. Where keys leave some directions of d_k empty, channels can go at little loss; which, a rank-revealing
QR decomposition of the keys says. The method is that of Nazari and Rusch (arXiv:2602.04852), made anew from its description:
structured pruning of query and key channels by such a decomposition. Whether theirs reads keys before or after
normalization, alone or with queries, is not known to us; here it is keys alone, as the recurrence reads them.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import scipy.linalg
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.layouts import key_names, linear_layers
from staterank_utils.models import choose_kernels
from staterank_utils.tracing import scans_through

Channels = dict[int, dict[int, list[int]]]  # decoder layer -> key head -> channels


def select_channels(model: PreTrainedModel, prompts: Int[Tensor, "prompt token"], n_channels: int) -> Channels:
    """The channels of every key head that span its keys best, for `keep_channels`.

    Keys of all tokens, each of length 1, are decomposed as K P = Q R with column pivoting: the next channel is the one
    with most length left once those before it are projected out. The first `n_channels` of the order are kept.

    Source: arXiv:2602.04852 (see the module).

    Args:
        model: from `load_model`, pruned or not.
        prompts: calibration prompts; together at least as many tokens as a key has channels.
        n_channels: to keep a key head, 1..d_k.

    Returns:
        Decoder layer -> key head, by its index in the whole model -> channels, in order.

    Raises:
        ValueError: `n_channels` is not in 1..d_k, or there are fewer tokens than channels.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> channels = select_channels(load_model("hybrid"), torch.arange(128).reshape(1, 128), 39)
        >>> len(channels), list(channels[0]), len(channels[0][3])
        (6, [0, 1, 2, 3], 39)
    """
    layers = linear_layers(model)
    d_k = min(layout.d_k(layer) for _, layer, layout in layers)
    if not 1 <= n_channels <= d_k:
        raise ValueError(f"channels to keep must be in 1..{d_k}, got {n_channels}")
    if prompts.numel() < d_k:
        raise ValueError(f"{prompts.numel()} tokens cannot order {d_k} channels: give more or longer prompts")
    seen: dict[int, list[Tensor]] = {}

    def read(index: int, kernel: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen.setdefault(index, []).append(F.normalize(key.detach().double(), dim=-1).flatten(0, 1).cpu())
        return kernel(query, key, *rest, **options)

    with ExitStack() as stack, torch.inference_mode():
        for index, layer, layout in layers:
            stack.enter_context(scans_through(layer, layout, partial(read, index)))
        for prompt in prompts.to(model.device):
            model.base_model(input_ids=prompt[None], use_cache=False)
    chosen: Channels = {}
    for index, layer, layout in layers:
        names = key_names(layer, layout)
        chosen[index] = {}
        for place, name in enumerate(names):
            # Some versions of a layer repeat each key head for its value heads.
            keys = torch.cat(seen[index]).unflatten(1, (len(names), -1))[:, place, 0]
            _, order = scipy.linalg.qr(keys, mode="r", pivoting=True)
            chosen[index][name] = sorted(order[:n_channels].tolist())
    return chosen


def keep_channels(model: PreTrainedModel, channels: Mapping[int, Mapping[int, Sequence[int]]]) -> PreTrainedModel:
    """A copy of a model whose queries and keys have only some of their channels, and whose states so many rows fewer.

    Queries and keys are normalized over the channels that are left. The configuration holds the new d_k, so
    `from_pretrained` needs to know nothing else. Composes with `prune_heads`, in either order.

    Args:
        model: from `load_model`, pruned or not; it is not changed.
        channels: for every linear-attention layer and every of its key heads, by its index in the whole model, the channels
            to keep, the same number for all (`select_channels`).

    Returns:
        A model of the same class and dtype, on the same device.

    Raises:
        ValueError: a layer or key head is missing or unknown, numbers differ, or a channel is named twice or is not there.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> from staterank_utils.pruning import cache_bytes
        >>> model, ids = load_model("hybrid"), torch.arange(128).reshape(1, 128)
        >>> smaller = keep_channels(model, select_channels(model, ids, 32))
        >>> cache_bytes(smaller(ids.to(model.device), use_cache=True).past_key_values)["recurrent"]  # half of 48 * 64 * 64 * 4
        393216
    """
    layers = linear_layers(model)
    expected = {index: sorted(set(key_names(layer, layout))) for index, layer, layout in layers}
    if {index: sorted(of_layer) for index, of_layer in channels.items()} != expected:
        raise ValueError(
            f"channels must be given for layers and key heads {expected}, "
            f"got { ({index: sorted(of_layer) for index, of_layer in channels.items()}) }"
        )
    d_k = layers[0][2].d_k(layers[0][1])
    for index, of_layer in channels.items():
        for head, kept in of_layer.items():
            if not kept or len(set(kept)) < len(kept) or not set(kept) <= set(range(d_k)):
                raise ValueError(
                    f"channels of layer {index}, key head {head} must be some of 0..{d_k - 1}, each once; got {list(kept)}"
                )
    counts = {len(kept) for of_layer in channels.values() for kept in of_layer.values()}
    if len(counts) != 1:
        raise ValueError(f"all key heads must keep the same number of channels, got numbers {sorted(counts)}")
    [n_channels] = counts
    reduced = copy.deepcopy(model)
    for index, layer, layout in linear_layers(reduced):
        names, per_key = key_names(layer, layout), layout.n_heads(layer) // max(1, layout.n_keys(layer))
        groups = [(place, range(place * per_key, (place + 1) * per_key)) for place in range(len(names))]
        of_heads = [channels[index][name] for name in names]
        for blocks in layout.weights:
            rows = blocks.rows(groups, n_keys=len(names), per_key=per_key, sizes=layout.sizes(layer), channels=of_heads)
            blocks.cut(layer, rows)
        layout.resize(layer, len(names), layout.n_heads(layer), n_channels)
        setattr(reduced.config, layout.d_k_setting, n_channels)
    choose_kernels(reduced)
    return reduced
