"""What a model without some of its heads is to transformers: a stored type of its own, which `import staterank_utils` registers.

What is stored is the configuration of the whole model, with `removed_heads`, the type "staterank_pruned", and in `pruned_from` the type
of the whole model. From it, `AutoConfig` builds a subclass of the whole model's configuration, and `AutoModelForCausalLM` a subclass of the
whole model's class, which cuts its layers as soon as it is built. Without the import, transformers says that it does not know the type.
"""

import copy
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name

from staterank_utils import fla_cpu
from staterank_utils.architectures import LinearLayer, find_layers
from staterank_utils.dispatch import choose_kernels, has_kernels

MODEL_TYPE = "staterank_pruned"
FORMAT = 2
RECORD = "removed_heads"  # in the configuration: {"format": 2, "heads": {"layer": [head, ...]}}
WHOLE = "pruned_from"  # in what is stored: the model type of the whole model


def removed_heads(config: PreTrainedConfig) -> dict[int, list[int]]:
    """What a configuration says was removed: decoder layer -> heads, by their indices in the whole model.

    Args:
        config: of a model, pruned or not.

    Raises:
        ValueError: the record is in a format that this version does not read.

    Example:
        >>> from staterank_utils import load_model, prune_heads
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


# ---------------------------------------------------------------- classes


def config_class_of(settings: dict[str, Any]) -> type[PreTrainedConfig]:
    """The class of a configuration, of the library that wrote it.

    fla registers types of its own with transformers as soon as it is imported, which transformers does for some models; for
    mamba2, mamba and bitnet they then stand in the place of transformers' own.

    Args:
        settings: a configuration as it is stored.

    Raises:
        ValueError: a model type that is not known.
        ModuleNotFoundError: one of fla's, without triton.

    Example:
        >>> config_class_of({"model_type": "qwen3_next"}).__name__
        'Qwen3NextConfig'
    """
    model_type = settings.get("model_type")
    if model_type in CONFIG_MAPPING_NAMES and not fla_cpu.wrote(settings):
        package = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
        own: type[PreTrainedConfig] = getattr(package, CONFIG_MAPPING_NAMES[model_type])
        return own
    if not model_type:
        raise ValueError("the configuration names no model_type: is it a model's config.json?")
    fla_cpu.knows(model_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers does not know the model type {model_type!r}: if it is one of fla's, install flash-linear-attention, else "
            "import the module that registers it with AutoConfig"
        )
    found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return found


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class of a configuration: some models are known to transformers with their vision part alone.

    Args:
        config: of a model, whole or pruned.

    Example:
        >>> from transformers import Qwen3NextConfig
        >>> auto_class(Qwen3NextConfig()).__name__
        'AutoModelForCausalLM'
    """
    return _auto_class(type(config))


def _auto_class(config: type[PreTrainedConfig]) -> Any:
    both = AutoModelForImageTextToText
    with_vision = config in both._model_mapping and config not in AutoModelForCausalLM._model_mapping
    return both if with_vision else AutoModelForCausalLM


class PrunedConfig(PreTrainedConfig):
    """What `AutoConfig` finds under the model type "staterank_pruned"; it makes the configuration of a pruned model of any family.

    Example:
        >>> from staterank_utils import load_model, prune_heads
        >>> stored = prune_heads(load_model("hybrid"), {0: [3]}).config.to_dict()
        >>> stored["model_type"], stored["pruned_from"], type(PrunedConfig.from_dict(stored)).__name__
        ('staterank_pruned', 'qwen3_next', 'PrunedQwen3NextConfig')
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a pruned model.

        Args:
            config_dict: as it is stored.

        Raises:
            ValueError: it does not say which model was pruned, or is in a format that this version does not read.
        """
        if WHOLE not in config_dict:
            raise ValueError(
                f"a configuration of type {MODEL_TYPE!r} needs {WHOLE!r}, the model type of the whole model"
            )
        settings = {name: value for name, value in config_dict.items() if name != WHOLE}
        settings["model_type"] = config_dict[WHOLE]
        whole = config_class_of(settings)
        config = pruned_config_class(whole).from_dict(settings, **kwargs)
        made = config[0] if isinstance(config, tuple) else config  # (with what was not used, where that is asked for)
        removed_heads(made.get_text_config())
        pruned_model_class(_auto_class(whole)._model_mapping[whole], whole)
        return config


class _Pruned:
    """What a pruned model's class has before that of the whole model."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _cut_as_recorded(self)  # type: ignore[arg-type]
        choose_kernels(self)  # type: ignore[arg-type]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if not has_kernels(self):  # type: ignore[arg-type]
            choose_kernels(self)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class stands in no module, and is made again of the whole model's.
        return _reduced(super().__reduce_ex__(2), pruned_model_class, *_made_of[type(self)])


def pruned_config_class(whole: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of a pruned model's configuration.

    Args:
        whole: the class of the whole model's.

    Example:
        >>> from transformers import Qwen3NextConfig
        >>> pruned_config_class(Qwen3NextConfig).__name__
        'PrunedQwen3NextConfig'
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _reduced(super(_config_classes[whole], self).__reduce_ex__(2), pruned_config_class, whole)

    def to_dict(self: Any) -> dict[str, Any]:
        return whole.to_dict(self) | {"model_type": MODEL_TYPE, WHOLE: whole.model_type}

    if whole not in _config_classes:
        words = f"{whole.__name__} of a pruned model."
        attributes = {
            "__init__": init,
            "to_dict": to_dict,
            "__reduce_ex__": reduce_ex,
            "__module__": __name__,
            "__doc__": words,
        }
        _config_classes[whole] = type(f"Pruned{whole.__name__}", (whole,), attributes)
    return _config_classes[whole]


def pruned_model_class(whole: type[PreTrainedModel], whole_config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The class of a pruned model, known to transformers' Auto classes from then on.

    Args:
        whole: the class of the whole model.
        whole_config: the class of its configuration.

    Example:
        >>> from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
        >>> pruned_model_class(Qwen3NextForCausalLM, Qwen3NextConfig).__name__
        'PrunedQwen3NextForCausalLM'
    """
    if whole not in _model_classes:
        config, words = pruned_config_class(whole_config), f"{whole.__name__} without some of its heads."
        # transformers initializes buffers of classes of its own in another way than others'.
        attributes = {"config_class": config, "__module__": whole.__module__, "__doc__": words}
        _model_classes[whole] = type(f"Pruned{whole.__name__}", (_Pruned, whole), attributes)
        _made_of[_model_classes[whole]] = (whole, whole_config)
    for auto in vars(modeling_auto).values():  # also of those that learned of the whole model since the last call
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and whole_config in mapping and mapping[whole_config] is whole:
            auto.register(pruned_config_class(whole_config), _model_classes[whole], exist_ok=True)  # type: ignore[attr-defined]
    return _model_classes[whole]


_config_classes: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}
_model_classes: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}
_made_of: dict[type, tuple[type, type]] = {}  # class of a pruned model -> what it was made of


def _reduced(stock: Any, make: Callable[..., Any], *made_of: Any) -> tuple[Any, ...]:
    """What pickle is told of an object, with a class that is made again."""
    _, _, *rest = stock
    return (_without_init, (make, *made_of), *rest)


def _without_init(make: Callable[..., Any], *made_of: Any) -> Any:
    """An object of a pruned class, as pickle fills it."""
    made = make(*made_of)
    return made.__new__(made)


AutoConfig.register(MODEL_TYPE, PrunedConfig, exist_ok=True)

# ---------------------------------------------------------------- without this package


def plain_model(pruned: PreTrainedModel) -> PreTrainedModel:
    """The same network as a model of the whole model's own class, which loads without this package.

    Where heads that shared a key head went unevenly, so that layers have different numbers of key heads, some key heads become several with
    the same weights, as many as its configuration can say for all layers.

    Args:
        pruned: from `prune_heads`; it is not changed.

    Returns:
        A model with copies of its weights, on its device, in evaluation mode. Heads are counted anew in it, from 0.

    Raises:
        ValueError: a model that was not pruned, whose layers keep different numbers of heads, or of an architecture whose configuration
            cannot say a smaller number.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model, prune_heads
        >>> heads = {layer.index: [14, 15] for layer in find_layers(load_model("hybrid"))}
        >>> pruned = prune_heads(load_model("hybrid"), heads)
        >>> plain, ids = plain_model(pruned), torch.arange(9).reshape(1, 9).to(pruned.device)
        >>> type(plain).__name__, plain.config.linear_num_value_heads, torch.equal(plain(ids).logits, pruned(ids).logits)
        ('Qwen3NextForCausalLM', 14, True)
    """
    if type(pruned) not in _made_of:
        raise ValueError(f"{type(pruned).__name__} was not pruned: it is a model of its own class already")
    layers = find_layers(pruned)
    settings = layers[0].heads_settings
    if not settings:
        raise ValueError(
            f"a model of {layers[0].name} cannot say in its configuration that it has fewer heads: keep it as a pruned model"
        )
    if len({layer.n_heads for layer in layers}) > 1:
        counts = ", ".join(f"{layer.n_heads} in layer {layer.index}" for layer in layers)
        raise ValueError(
            f"layers keep different numbers of heads ({counts}), and its class has one number for all: choose as many of every layer "
            "(select_heads with per_layer=True)"
        )
    copied = copy.deepcopy(pruned)
    layers = find_layers(copied)
    if len({layer.n_keys for layer in layers}) > 1:
        per_key = math.gcd(*(layer.n_heads // layer.n_keys for layer in layers))
        for layer in layers:
            _split_keys(layer, per_key)
    whole: Any
    whole_config: Any
    whole, whole_config = _made_of[type(pruned)]
    config = whole_config.from_dict(whole_config.to_dict(pruned.config))
    text = config.get_text_config()
    delattr(text, RECORD)
    for name, size in zip(settings, (layers[0].n_heads, layers[0].n_keys), strict=True):
        setattr(text, name, size)
    with torch.device(pruned.device):  # (also the buffers that are not stored)
        made = whole(config)
    made.load_state_dict(copied.state_dict(), assign=True)
    made.tie_weights()
    trained = {name: parameter.requires_grad for name, parameter in pruned.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained[name])
    if made.can_generate():
        made.generation_config = copy.deepcopy(pruned.generation_config)
    choose_kernels(made)
    return made.eval()


# ---------------------------------------------------------------- layers


def keep_heads(layer: LinearLayer, kept: Sequence[int]) -> None:
    """Cut a layer down to some of its heads, in place. Its weights may be on any device, also "meta".

    Args:
        layer: from `linear_layers`.
        kept: heads that stay, by the indices that they had before any was removed.

    Example:
        >>> from staterank_utils import load_model
        >>> from staterank_utils.architectures import linear_layers
        >>> layer = linear_layers(load_model("hybrid"))[0]
        >>> keep_heads(layer, [0, 1, 2, 3])
        >>> layer.n_heads, layer.module.out_proj.in_features
        (4, 256)
    """
    names, keys = layer.heads, layer.keys
    if list(kept) == names:
        return
    per_key = len(names) // len(keys)
    # Duplicates of a key head are one again, so that two removals make the same layer as both at once.
    of_key: dict[int, list[int]] = {}
    for position, name in enumerate(names):
        if name in kept:
            of_key.setdefault(keys[position // per_key], []).append(position)
    size = math.gcd(*map(len, of_key.values()))
    chunks = [heads[start : start + size] for heads in of_key.values() for start in range(0, len(heads), size or 1)]
    for heads in chunks:
        _check_duplicates(layer, sorted({head // per_key for head in heads}))
    _regroup(layer, [(heads[0] // per_key, heads) for heads in chunks])
    if kept:
        layer.rescale(len(names), len(kept))
    elif layer.idle:
        layer.module.forward = layer.idle


def _split_keys(layer: LinearLayer, per_key: int) -> None:
    """Give a layer a key head for every `per_key` heads, with the weights of the one that they shared, in place."""
    shared = layer.n_heads // layer.n_keys
    starts = range(0, layer.n_heads, per_key)
    _regroup(layer, [(start // shared, range(start, start + per_key)) for start in starts])


def _regroup(layer: LinearLayer, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Leave a layer these key heads, each with the heads on it, all by their positions in it."""
    names, keys, module = layer.heads, layer.keys, layer.module
    for blocks in layer.blocks:
        there = blocks.tensor(module).shape[blocks.axis]
        expected = blocks.size(n_keys=len(keys), n_heads=len(names), sizes=layer.sizes)
        if there != expected:
            raise ValueError(
                f"{type(layer).__name__} says that {blocks.weight} has {expected} rows along axis {blocks.axis}, and it has {there}: mend its `weights`"
            )
    for blocks in layer.blocks:
        blocks.cut(module, blocks.rows(groups, n_keys=len(keys), per_key=len(names) // len(keys), sizes=layer.sizes))
    kept = [names[position] for _, heads in groups for position in heads]
    layer.resize(len(groups), len(kept), layer.d_k)
    if (layer.n_keys, layer.n_heads) != (len(groups), len(kept)):
        raise ValueError(
            f"{type(layer).__name__} still counts {layer.n_heads} heads on {layer.n_keys} keys where {len(kept)} on {len(groups)} are left: mend its `resize`"
        )
    module.staterank_heads, module.staterank_keys = kept, [keys[key] for key, _ in groups]


def _check_duplicates(layer: LinearLayer, positions: Sequence[int]) -> None:
    """Refuse to make one key head of several that differ, all by their positions in a layer."""
    per_key = len(layer.heads) // len(layer.keys)
    for blocks in layer.blocks if len(positions) > 1 else ():
        weight = blocks.tensor(layer.module)
        rows = [
            torch.tensor(
                blocks.rows([(at, ())], n_keys=len(layer.keys), per_key=per_key, sizes=layer.sizes),
                dtype=torch.long,
                device=weight.device,
            )
            for at in positions
        ]
        first, *others = (weight.index_select(blocks.axis, of_key) for of_key in rows)
        if not weight.is_meta and not all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"duplicates of key head {layer.keys[positions[0]]} of layer {layer.index} were trained apart since heads were removed, so they cannot be one again: "
                "remove all heads at once, before training"
            )


def _cut_as_recorded(model: PreTrainedModel) -> None:
    """Cut the layers of a model that was just built as its configuration's record says."""
    removed = removed_heads(model.config.get_text_config())
    layers = find_layers(model) if removed else []
    if layers and (unknown_layers := sorted(set(removed) - {layer.index for layer in layers})):
        raise ValueError(
            f"the configuration removes heads of layers {unknown_layers}, which have no linear attention: {[layer.index for layer in layers]} have"
        )
    for layer in layers:
        names, gone = layer.heads, removed.get(layer.index, [])
        if not gone:
            continue
        if unknown := sorted(set(gone) - set(names)):
            raise ValueError(
                f"the configuration removes heads {unknown} of layer {layer.index}, which has 0..{len(names) - 1}"
            )
        keep_heads(layer, [name for name in names if name not in gone])
