"""Take heads out for good: a smaller model of the same class, whose cache has no room for the states of heads that are gone.

What was removed is written into the model's configuration, whose type is one of its own (`staterank_utils.pruned`), so that
`save_pretrained` and `from_pretrained` work as for any model, without remote code, after one `import staterank_utils`.

A head is named by the index that it had in the model before any was removed, also in a model that was pruned before.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import SupportsIndex

import torch
from transformers import PreTrainedModel

from staterank_utils.architectures import check_heads, linear_layers
from staterank_utils.budget import in_words, out_of_memory, weight_bytes
from staterank_utils.dispatch import choose_kernels, has_kernels
from staterank_utils.models import has_adapters, unwrapped
from staterank_utils.pruned import (
    FORMAT,
    RECORD,
    keep_heads,
    pruned_config_class,
    pruned_model_class,
    removed_heads,
)
from staterank_utils.surgery import check_no_intervention

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
        A model of a subclass of its class, of the same dtype, on the same device, for `generate`, `save_pretrained` and everything else.

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
    model = unwrapped(model)
    if has_adapters(model):
        raise ValueError(
            "this model has adapters of PEFT, whose weights know nothing of heads: merge them first, with merge_and_unload()"
        )
    check_no_intervention(model, "remove heads")
    kept = {layer.index: layer.heads for layer in linear_layers(model)}
    before = removed_heads(model.config.get_text_config())
    if not isinstance(heads, Mapping):
        raise TypeError(f"expected a mapping from layers to heads, such as {{0: [3]}}, got {heads!r}")
    chosen = check_heads(heads, kept, removed=before)
    if sum(map(len, chosen.values())) == sum(map(len, kept.values())):
        raise ValueError(
            "these are all heads of all layers: a model without any is not linear attention, keep at least one"
        )
    with torch.inference_mode(False), torch.no_grad():  # in the other, weights would be no ordinary ones
        with out_of_memory(
            f"no room for a second copy of the weights, {in_words(weight_bytes(model))}, that heads are removed from",
            advice="move the model to a device with more, or load it with dtype=torch.bfloat16",
        ):
            pruned = copy.deepcopy(model)
        for layer in linear_layers(pruned):
            of_layer, gone = kept[layer.index], chosen.get(layer.index, [])
            if gone and not layer.weights:
                raise ValueError(
                    f"heads of {layer.name} cannot be removed exactly, since {layer.kept_whole}: ablate them instead"
                )
            if gone and not layer.idle and len(gone) == len(of_layer):
                raise ValueError(f"layer {layer.index} must keep a head: {layer.name} cannot run without any")
            keep_heads(layer, [head for head in of_layer if head not in gone])
    record = {index: sorted({*before.get(index, []), *chosen.get(index, [])}) for index in kept}
    setattr(
        pruned.config.get_text_config(),
        RECORD,
        {"format": FORMAT, "heads": {str(i): gone for i, gone in record.items() if gone}},
    )
    if not before:
        pruned.config.__class__ = pruned_config_class(type(model.config))
        pruned.__class__ = pruned_model_class(type(model), type(model.config))
    if not has_kernels(pruned):
        choose_kernels(pruned)
    log.info(
        "removed %d of %d heads; %s bytes of query and key weights are duplicates",
        sum(map(len, chosen.values())),
        sum(map(len, kept.values())),
        f"{duplicated_bytes(pruned):,}",
    )
    return pruned


def duplicated_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a pruned model has twice, because heads of one key head no longer share it.

    Args:
        model: pruned or not.

    Example:
        >>> from staterank_utils import load_model
        >>> model = load_model("hybrid")  # two value heads on each of eight key heads
        >>> duplicated_bytes(prune_heads(model, {0: [0, 2, 4, 6]})), duplicated_bytes(prune_heads(model, {0: [0]})) > 0
        (532480, True)
    """
    total = 0
    for layer in linear_layers(model):
        keys = layer.keys
        n_duplicates = len(keys) - len(set(keys))
        for blocks in layer.blocks if n_duplicates else ():
            weight = blocks.tensor(layer.module)
            rows = blocks.size(n_keys=1, n_heads=0, sizes=layer.sizes)
            total += n_duplicates * rows * weight.nbytes // weight.shape[blocks.axis]
    return total
