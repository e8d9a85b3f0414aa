"""Take heads out for good: a smaller model of the same class, whose cache has no room for the states of heads that are gone.

What was removed is written into the model's configuration. Importing this module (`import staterank_utils` does) teaches the
models to read it, so that `save_pretrained` and `from_pretrained` work as for any model, without remote code.

A head is named by the index that it had in the model before any was removed, also in a model that was pruned before.
"""

import copy
import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from staterank_utils.budget import in_words, out_of_memory, weight_bytes
from staterank_utils.layouts import Layout, check_heads, find_layers, head_names, key_names, linear_layers
from staterank_utils.models import choose_kernels, correct_forward
from staterank_utils.surgery import check_no_intervention

FORMAT = 1
RECORD = "removed_heads"  # in the configuration: {"format": 1, "heads": {"layer": [head, ...]}}

log = logging.getLogger(__name__)


def prune_heads(model: PreTrainedModel, heads: Mapping[int, Iterable[SupportsIndex]]) -> PreTrainedModel:
    """A copy of a model without some of its linear-attention heads.

    Every weight that belongs to a head loses its part, and the cache its state. What is left computes what the model computes
    with those heads ablated (`surgery.ablate_heads`, kind "zero"). A key head goes with the last of its value heads. Where
    the key heads of a layer keep different numbers of value heads, those that keep more are duplicated until all serve the
    same number, since the layer class knows no other form; `duplicated_bytes` says what that adds.

    Source: the removal in arXiv:2602.02195 (Joint Rank-Norm Pruning); how the paper removes heads is not known.

    Args:
        model: from `load_model`; it is not changed.
        heads: decoder layer -> heads to remove. A layer may lose all of its heads, and then passes its input on unchanged.

    Returns:
        A model of the same class and dtype, on the same device, for `generate`, `save_pretrained` and everything else.

    Raises:
        ValueError: a layer without linear attention, a head that the model does not have, named twice or removed before,
            nothing left of all layers, or a model under an intervention such as `ablate_heads`.
        TypeError: heads that are not a mapping, or not named by whole numbers.
        torch.OutOfMemoryError: no room for the second model.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> from staterank_utils.surgery import ablate_heads
        >>> model, ids = load_model("hybrid"), torch.arange(32).reshape(1, 32)
        >>> smaller = prune_heads(model, {0: [3], 5: [1, 2]})
        >>> with ablate_heads(model, [(0, 3), (5, 1), (5, 2)]):
        ...     ablated = model(ids.to(model.device)).logits
        >>> torch.allclose(smaller(ids.to(model.device)).logits, ablated, atol=1e-4)
        True
    """
    check_no_intervention(model, "remove heads")
    kept = {index: head_names(layer, layout) for index, layer, layout in linear_layers(model)}
    before = removed_heads(model.config.get_text_config())
    if not isinstance(heads, Mapping):
        raise TypeError(f"expected a mapping from layers to heads, such as {{0: [3]}}, got {heads!r}")
    chosen = check_heads(heads, kept, removed=before)
    if sum(map(len, chosen.values())) == sum(map(len, kept.values())):
        raise ValueError(
            "these are all heads of all layers: a model without any is not linear attention, keep at least one"
        )
    with out_of_memory(
        f"no room for a second copy of the weights, {in_words(weight_bytes(model))}, that heads are removed from",
        advice="move the model to a device with more, or load it with dtype=torch.bfloat16",
    ):
        pruned = copy.deepcopy(model)
    for index, layer, layout in linear_layers(pruned):
        if chosen.get(index) and not layout.weights:
            raise ValueError(
                f"heads of {layout.layer_class} cannot be removed exactly, since {layout.kept_whole}: ablate them instead"
            )
        if chosen.get(index) and not layout.idle and len(chosen[index]) == len(kept[index]):
            raise ValueError(f"layer {index} must keep a head: {layout.layer_class} cannot run without any")
        _keep(layer, layout, [head for head in kept[index] if head not in chosen.get(index, [])])
    record = {index: sorted({*before.get(index, []), *chosen.get(index, [])}) for index in kept}
    setattr(
        pruned.config.get_text_config(),
        RECORD,
        {"format": FORMAT, "heads": {str(i): gone for i, gone in record.items() if gone}},
    )
    choose_kernels(pruned)
    log.info(
        "removed %d of %d heads; %s bytes of query and key weights are duplicates",
        sum(map(len, chosen.values())),
        sum(map(len, kept.values())),
        f"{duplicated_bytes(pruned):,}",
    )
    return pruned


def removed_heads(config: PreTrainedConfig) -> dict[int, list[int]]:
    """What a configuration says was removed: decoder layer -> heads, by their indices in the whole model.

    Args:
        config: of a model, pruned or not.

    Raises:
        ValueError: the record is in a format that this version does not read.

    Example:
        >>> from staterank_utils import load_model
        >>> removed_heads(prune_heads(prune_heads(load_model("hybrid"), {0: [3]}), {0: [1], 2: [7]}).config)
        {0: [1, 3], 2: [7]}
    """
    record = getattr(config, RECORD, None)
    if record is None:
        return {}
    found = record.get("format") if isinstance(record, dict) and isinstance(record.get("heads"), dict) else None
    if found != FORMAT:
        raise ValueError(
            f"the configuration's {RECORD!r} has format {found!r}, this version of staterank_utils reads {FORMAT}: "
            "load the model with the version that pruned it, or prune the whole model again"
        )
    return {int(layer): list(heads) for layer, heads in record["heads"].items()}


def duplicated_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a pruned model has twice, because heads of one key head no longer share it.

    Args:
        model: pruned or not.

    Example:
        >>> from staterank_utils import load_model
        >>> model = load_model("hybrid")  # two value heads on each of four key heads
        >>> duplicated_bytes(prune_heads(model, {0: [0, 2, 4, 6]})), duplicated_bytes(prune_heads(model, {0: [0]})) > 0
        (0, True)
    """
    total = 0
    for _, layer, layout in linear_layers(model):
        keys, sizes = key_names(layer, layout), layout.sizes(layer)
        n_duplicates = len(keys) - len(set(keys))
        for blocks in layout.blocks(layer) if n_duplicates else ():
            weight = blocks.tensor(layer)
            rows = sum(size if isinstance(size, int) else sizes[size] for kind, size in blocks.parts if kind == "key")
            total += n_duplicates * rows * weight.nbytes // weight.shape[blocks.axis]
    return total


def cache_bytes(cache: Any) -> dict[str, int]:
    """Bytes of the tensors that a cache holds, by what they are for.

    Args:
        cache: after a forward pass.

    Returns:
        "recurrent" (the states S), "convolution" (the last inputs of the short convolutions), "softmax" (keys and values).

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> model = load_model("hybrid")
        >>> cache = model(torch.ones(1, 9, dtype=torch.long, device=model.device), use_cache=True).past_key_values
        >>> cache_bytes(cache)["recurrent"]  # 48 states of 64 x 64 in float32
        786432
    """
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


# ---------------------------------------------------------------- layers


def _keep(layer: nn.Module, layout: Layout, kept: Sequence[int]) -> None:
    """Cut a layer down to some of its heads, in place. Its weights may be on any device, also "meta"."""
    names, keys = head_names(layer, layout), key_names(layer, layout)
    if list(kept) == names:
        return
    per_key = len(names) // len(keys)
    # Duplicates of a key head are one again, so that two removals make the same layer as both at once.
    of_key: dict[int, list[int]] = {}
    for position, name in enumerate(names):
        if name in kept:
            of_key.setdefault(keys[position // per_key], []).append(position)
    size = math.gcd(*map(len, of_key.values()))
    new = [
        (key, heads[start : start + size]) for key, heads in of_key.items() for start in range(0, len(heads), size or 1)
    ]
    groups = [(keys.index(key), heads) for key, heads in new]
    for blocks in layout.blocks(layer):
        rows = blocks.rows(groups, n_keys=len(keys), per_key=per_key, sizes=layout.sizes(layer))
        blocks.cut(layer, rows)
    layout.resize(layer, len(new), len(kept), layout.d_k(layer))
    layer.staterank_heads, layer.staterank_keys = list(kept), [key for key, _ in new]
    if kept and layout.rescale:
        layout.rescale(layer, len(names), len(kept))
    correct_forward(layer, layout)
    if not kept and layout.idle:
        layer.forward = functools.partial(layout.idle, layer)


def _cut_as_recorded(model: PreTrainedModel) -> None:
    """Cut the layers of a model that was just built as its configuration's record says."""
    removed = removed_heads(model.config.get_text_config())
    layers = find_layers(model) if removed else []
    if layers and (unknown_layers := sorted(set(removed) - {index for index, _, _ in layers})):
        raise ValueError(
            f"the configuration removes heads of layers {unknown_layers}, which have no linear attention: {[index for index, _, _ in layers]} have"
        )
    for index, layer, layout in layers:
        names, gone = head_names(layer, layout), removed.get(index, [])
        # A model is built from the inside out: its base model has done this already.
        if hasattr(layer, "staterank_heads") or not gone:
            continue
        if unknown := sorted(set(gone) - set(names)):
            raise ValueError(
                f"the configuration removes heads {unknown} of layer {index}, which has 0..{len(names) - 1}"
            )
        _keep(layer, layout, [name for name in names if name not in gone])


def _teach() -> None:
    """Let models build themselves as their configuration's record says: after the layers, before the weights.

    They also get kernels that run on their device, as `load_model` gives them to any model: once they are built, and once
    their weights are there, whose order in memory is the kernels' affair.
    """
    finish, load = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__

    @functools.wraps(finish)
    def post_init(self: PreTrainedModel) -> None:
        _cut_as_recorded(self)
        finish(self)
        if removed_heads(self.config.get_text_config()):
            choose_kernels(self)

    @functools.wraps(load)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # (with what was found, where that is asked for)
        if removed_heads(model.config.get_text_config()):
            choose_kernels(model)
        return loaded

    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]


_teach()
