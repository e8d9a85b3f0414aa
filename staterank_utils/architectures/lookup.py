"""Which layers of a model keep a state, and what their heads are called."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from staterank_utils.architectures import delta, fla_models, kda, mlstm, ssd
from staterank_utils.architectures.layer import LinearLayer, ModelAdapter, full_name
from staterank_utils.fla_cpu import is_fla

FAMILIES = (delta, kda, ssd, mlstm, fla_models)
ADAPTERS: dict[str, type[LinearLayer]] = {}  # full name of a module's class -> what adapts it
# Class of a module -> full name of the class that is described, which it is or comes from.
_described: "WeakKeyDictionary[type, str | None]" = WeakKeyDictionary()
_model_adapters: "WeakKeyDictionary[nn.Module, type[ModelAdapter]]" = WeakKeyDictionary()


def register(adapter: type[LinearLayer]) -> type[LinearLayer]:
    """Let an adapter serve the classes of modules that it describes, from now on.

    Args:
        adapter: subclass of `LinearLayer`; as a decorator of it, too.

    Raises:
        ValueError: it describes no class, leaves out what every adapter must say, or gives both or neither of `weights` and `kept_whole`.

    Example:
        >>> register(LinearLayer)
        Traceback (most recent call last):
            ...
        ValueError: LinearLayer describes no class of modules: name some in `describes`
    """
    if not adapter.describes:
        raise ValueError(f"{adapter.__name__} describes no class of modules: name some in `describes`")
    required = ("n_heads", "n_keys", "d_k", "d_v", "gate_modules", "read_gates")
    absent = [name for name in required if not hasattr(adapter, name)]
    if adapter.output is LinearLayer.output and not hasattr(adapter, "output_module"):
        absent.append("output_module")
    if absent:
        raise ValueError(f"{adapter.__name__} does not say {', '.join(absent)}: every adapter must")
    if bool(adapter.weights) == bool(adapter.kept_whole):
        raise ValueError(
            f"{adapter.__name__} must say either where its heads are (`weights`) or why they cannot be removed (`kept_whole`)"
        )
    ADAPTERS.update(dict.fromkeys(adapter.describes, adapter))
    _described.clear()
    _model_adapters.clear()
    return adapter


for _family in FAMILIES:
    for _adapter in _family.ADAPTERS:
        register(_adapter)

SOFTMAX_PROJECTION = "o_proj"  # of softmax attention, in every architecture here
# Architectures whose state is there but comes out wrong, without an error, when a prompt is read in segments.
WRONG_IN_SEGMENTS = {
    "mamba": "a continuation of several tokens ignores the state it is given",
    "falcon_mamba": "a continuation of several tokens ignores the state it is given",
    "jamba": "a continuation of several tokens ignores the state it is given",
    "zamba": "a continuation of several tokens ignores the state it is given",
    "recurrent_gemma": "a continuation of several tokens ignores the state, and the state is a vector",
}


def find_layers(model: nn.Module) -> list[LinearLayer]:
    """Find linear-attention layers without checking that their model is supported.

    Example:
        >>> find_layers(nn.Linear(2, 2))
        []
    """
    found = [
        adapter(layer_index(name, module), module)
        for name, module in model.named_modules()
        if (adapter := _adapter_of(type(module))) is not None
    ]
    return sorted(found, key=lambda layer: layer.index)


def _adapter_of(module_class: type) -> type[LinearLayer] | None:
    """Of a class, or of the class that it is a subclass of."""
    if module_class not in _described:
        names = (full_name(each) for each in module_class.__mro__)
        _described[module_class] = next((name for name in names if name in ADAPTERS), None)
    name = _described[module_class]
    return None if name is None else ADAPTERS[name]


def model_adapter(model: nn.Module) -> ModelAdapter:
    """What serves a model as a whole, as its first linear-attention layer says; of a model without any, `ModelAdapter`.

    Args:
        model: any of transformers or fla.

    Example:
        >>> from staterank_utils import load_model
        >>> model_adapter(load_model("hybrid")).masks_by_kind
        True
    """
    if model not in _model_adapters:  # decoding asks at every token
        first = next((layer.model_adapter for layer in find_layers(model)), ModelAdapter)
        _model_adapters[model] = first
    return _model_adapters[model](model)


def layer_index(name: str, module: nn.Module) -> int:
    """Of a module's decoder layer: what it says itself, else the last number in its name. One that layers share says -1.

    Args:
        name: as `named_modules` gives it.
        module: a layer, or a part of it.

    Raises:
        ValueError: neither says a number.

    Example:
        >>> layer_index("model.layers.3.shared_transformer.self_attn", nn.Identity())
        3
    """
    index = getattr(module, "layer_idx", None)
    if index is not None and index >= 0:
        return int(index)
    numbers = [part for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ValueError(f"{type(module).__name__} does not say its layer, and its name {name!r} has no number")
    return int(numbers[-1])


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """The linear-attention layers of a model, in order.

    Args:
        model: any model of transformers.

    Raises:
        ValueError: the architecture is silently wrong in segments, has no linear-attention layer, or has none that a
            adapter describes; the message says which.

    Example:
        >>> from staterank_utils import load_model
        >>> [layer.index for layer in linear_layers(load_model("hybrid"))]
        [0, 1, 2, 4, 5, 6, 8, 9, 10]
    """
    model_type = getattr(model.config, "model_type", "?")
    if model_type in WRONG_IN_SEGMENTS:
        raise ValueError(
            f"{model_type} cannot be traced: {WRONG_IN_SEGMENTS[model_type]} (transformers 5.17 to 5.24), so its states would be wrong"
        )
    known = {name.rpartition(".")[2]: name for name in ADAPTERS}
    strangers = {
        type(module)
        for module in model.modules()
        if type(module).__name__ in known and _adapter_of(type(module)) is None
    }
    if strangers:
        named = ", ".join(sorted(f"{full_name(each)} (known: {known[each.__name__]})" for each in strangers))
        raise ValueError(
            f"{model_type} cannot be traced: {named} is another class than the one of that name that is known. Load the model without trust_remote_code"
        )
    found = find_layers(model)
    if not found:
        classes = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "layer_idx")})
        families = sorted({name.split(".")[-2].removeprefix("modeling_") for name in ADAPTERS})
        raise ValueError(
            f"{model_type} has no linear-attention layer that is supported: its layers are {', '.join(classes) or 'unknown'}. "
            f"Supported are those of {', '.join(families)}. Add an adapter to staterank_utils/architectures if it keeps a matrix-valued state."
        )
    if is_fla(model) and getattr(model.config, "attn", None):
        raise ValueError(
            f"{model_type} with softmax layers (attn={model.config.attn}) cannot be traced: no check here covers how fla's cache keeps both"
        )
    for layer in found:
        if reason := layer.refusal:
            raise ValueError(f"layer {layer.index} ({layer.name}) cannot be traced: {reason}")
    return found


def softmax_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layer -> its softmax attention; of one that several layers share, the first of them.

    Args:
        model: any that `linear_layers` accepts.

    Example:
        >>> from staterank_utils import load_model
        >>> list(softmax_layers(load_model("hybrid")))
        [3, 7, 11]
    """
    linear = {layer.module for layer in linear_layers(model)}
    return {
        layer_index(name, module): module
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, SOFTMAX_PROJECTION) and module not in linear
    }


def state_size(model: nn.Module) -> int:
    """Largest rank that a state of a model can have, min(d_k, d_v).

    Args:
        model: any that `linear_layers` accepts.

    Example:
        >>> from staterank_utils import load_model
        >>> state_size(load_model("hybrid"))
        64
    """
    layer = linear_layers(model)[0]
    return min(layer.d_k, layer.d_v)


def check_heads(
    heads: Mapping[Any, Iterable[Any]],
    known: Mapping[int, Sequence[int]],
    *,
    what: str = "linear-attention",
    removed: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, list[int]]:
    """Heads as whole numbers, layer by layer; refuses what is unknown or named twice.

    Args:
        heads: layer -> heads that somebody names, as integers of any library.
        known: layer -> heads that there are.
        what: kind of heads, for the messages.
        removed: layer -> heads that there were.

    Raises:
        TypeError: a layer or head that is no whole number.
        ValueError: a layer without such heads, a head that it does not have or no longer has, or one that is named twice.

    Example:
        >>> import torch
        >>> check_heads({0: torch.tensor([1, 2])}, {0: [0, 1, 2, 3]})
        {0: [1, 2]}
    """
    checked: dict[int, list[int]] = {}
    for layer_named, of_layer in heads.items():
        layer = _whole(layer_named, "a layer")
        if layer not in known:
            raise ValueError(f"layer {layer} has no {what} heads: layers {list(known)} have")
        names = checked.setdefault(layer, [])
        if not isinstance(of_layer, Iterable):
            raise TypeError(f"expected the heads of layer {layer} as a list, such as [3], got {of_layer!r}")
        for named in of_layer:
            head = _whole(named, f"a head of layer {layer}")
            if head in (removed or {}).get(layer, []):
                raise ValueError(
                    f"head {(layer, head)} was removed before: layer {layer} has heads {list(known[layer])}"
                )
            if head not in known[layer]:
                raise ValueError(f"layer {layer} has no head {head}: its {what} heads are {list(known[layer])}")
            if head in names:
                raise ValueError(f"head {(layer, head)} is named twice")
            names.append(head)
    return checked


def _whole(number: Any, what: str) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{what} is named by a whole number, got {number!r}") from None
