"""What a linear-attention head is in each architecture, one entry a layer class.

An architecture is added here and nowhere else: say which modules are linear-attention layers, how many heads they have,
how large a head's state is, and how decay and write strength follow from the layer's projections.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Blocks:
    """Which rows (or columns) of a weight belong to which head.

    Attributes:
        weight: name of the parameter in its layer.
        parts: one after the other, (whether there is a block for each "key" head or for each "value" head; its size, "d_k",
            "d_v" or 1).
        by_key: the parts of a key head and of its value heads stand together, one key head after the other; otherwise each
            part stands for itself, over all heads.
        axis: 0 for rows, 1 for columns.

    Example:
        >>> blocks = Blocks("conv1d.weight", (("key", "d_k"), ("value", "d_v")))
        >>> blocks.rows([(1, [2, 3])], n_keys=2, per_key=2, sizes={"d_k": 2, "d_v": 1})  # of key head 1 and its value heads
        [2, 3, 6, 7]
    """

    weight: str
    parts: tuple[tuple[Literal["key", "value"], Literal["d_k", "d_v", 1]], ...]
    by_key: bool = False
    axis: int = 0

    def rows(
        self,
        groups: Sequence[tuple[int, Sequence[int]]],
        *,
        n_keys: int,
        per_key: int,
        sizes: Mapping[str, int],
        channels: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        """Indices of what belongs to (key head, its value heads), in that order.

        Args:
            groups: key heads 0..n_keys - 1, each with the value heads 0..n_keys * per_key - 1 that it is to serve.
            n_keys: key heads that the weight has.
            per_key: value heads on a key head.
            sizes: of "d_k" and "d_v".
            channels: for each key head, which of its d_k channels; all by default.
        """
        parts = [(kind, size if isinstance(size, int) else sizes[size]) for kind, size in self.parts]
        counts = [(1 if kind == "key" else per_key) * size for kind, size in parts]

        def block(i: int, key: int, place: int) -> list[int]:
            """Rows of one block of part i: the place-th of a key head."""
            first = key * sum(counts) + sum(counts[:i]) if self.by_key else n_keys * sum(counts[:i]) + key * counts[i]
            size = parts[i][1]
            inside = channels[key] if channels and self.parts[i][1] == "d_k" else range(size)
            return [first + place * size + row for row in inside]

        def of_part(i: int, key: int, heads: Sequence[int]) -> list[int]:
            if parts[i][0] == "key":
                return block(i, key, 0)
            return [row for head in heads for row in block(i, *divmod(head, per_key))]

        order = range(len(parts))
        if self.by_key:
            return [row for key, heads in groups for i in order for row in of_part(i, key, heads)]
        return [row for i in order for key, heads in groups for row in of_part(i, key, heads)]

    def cut(self, layer: nn.Module, rows: Sequence[int]) -> None:
        """Leave a layer only these rows (or columns) of the weight, which may be on any device, also "meta"."""
        old = layer.get_parameter(self.weight)
        kept = old.data.index_select(self.axis, torch.tensor(rows, dtype=torch.long, device=old.device))
        path, _, attribute = self.weight.rpartition(".")
        owner = layer.get_submodule(path)
        setattr(owner, attribute, nn.Parameter(kept, requires_grad=old.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = kept.shape
        elif isinstance(owner, nn.Conv1d):
            owner.in_channels = owner.out_channels = owner.groups = len(kept)


@dataclass(frozen=True)
class Layout:
    """How to read one class of linear-attention layer.

    Attributes:
        layer_class: name of the module's class.
        module: Python module that defines it.
        n_heads: number of states a layer keeps (value heads).
        n_keys: number of key heads; each serves as many consecutive value heads.
        d_k, d_v: shape of a state; the cache holds (batch, head, d_k, d_v).
        d_k_setting: name of d_k in the model's configuration.
        gate_projection: name of the submodule whose output holds the gates.
        gates: (layer, output of that submodule) -> (log_decay, write_strength), each (batch, token, head).
        without_writes: (layer, output of that submodule, heads) -> that output, changed so that these heads write nothing.
        output_projection: name of the submodule that reads what the heads put out, (batch, token, head * d_v), head by head.
        scans: names of the functions, in the layer's Python module, that run the recurrence over tokens: called with query, key,
            value, g and beta, each (batch, token, head, ...), and initial_state, they return outputs and the last state.
        weights: where the heads are in each weight that has a part for every head.
        resize: (layer, key heads, value heads, d_k), sets the layer's own numbers to those.
        kernels: names of all functions, in the layer's Python module, that have a Triton and a plain version.

    Example:
        >>> from staterank_utils import load_model
        >>> _, layer, layout = linear_layers(load_model("hybrid"))[0]
        >>> layout.n_heads(layer), layout.d_k(layer), layout.d_v(layer)
        (8, 64, 64)
    """

    layer_class: str
    module: str
    n_heads: Callable[[nn.Module], int]
    n_keys: Callable[[nn.Module], int]
    d_k: Callable[[nn.Module], int]
    d_v: Callable[[nn.Module], int]
    d_k_setting: str
    gate_projection: str
    gates: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    without_writes: Callable[[nn.Module, Tensor, list[int]], Tensor]
    output_projection: str
    weights: tuple[Blocks, ...]
    resize: Callable[[nn.Module, int, int, int], None]
    scans: tuple[str, ...]
    kernels: tuple[str, ...]

    def sizes(self, layer: nn.Module) -> dict[str, int]:
        """d_k and d_v by name, as `Blocks.rows` takes them."""
        return {"d_k": self.d_k(layer), "d_v": self.d_v(layer)}


def _qwen3_next_gates(layer: nn.Module, ba: Float[Tensor, "batch token ba"]) -> tuple[Tensor, Tensor]:
    # Rows of in_proj_ba are grouped by key head: [b of its value heads | a of its value heads].
    grouped = ba.unflatten(-1, (layer.num_k_heads, 2, layer.num_v_heads // layer.num_k_heads))
    b, a = (grouped[..., i, :].flatten(-2).float() for i in (0, 1))
    return -layer.A_log.float().exp() * F.softplus(a + layer.dt_bias.float()), b.sigmoid()


def _qwen3_next_without_writes(layer: nn.Module, ba: Float[Tensor, "batch token ba"], heads: list[int]) -> Tensor:
    # The write strength is the sigmoid of b, so b = -inf writes exactly nothing.
    per_key = layer.num_v_heads // layer.num_k_heads
    columns = torch.tensor([head // per_key * 2 * per_key + head % per_key for head in heads], device=ba.device)
    return ba.index_fill(-1, columns, float("-inf"))


def _qwen3_next_resize(layer: nn.Module, n_keys: int, n_heads: int, d_k: int) -> None:
    layer.num_k_heads, layer.num_v_heads, layer.head_k_dim = n_keys, n_heads, d_k
    layer.key_dim, layer.value_dim = n_keys * layer.head_k_dim, n_heads * layer.head_v_dim
    layer.conv_dim = 2 * layer.key_dim + layer.value_dim


LAYOUTS = {
    layout.layer_class: layout
    for layout in (
        Layout(
            layer_class="Qwen3NextGatedDeltaNet",
            module="transformers.models.qwen3_next.modeling_qwen3_next",
            n_heads=lambda layer: layer.num_v_heads,
            n_keys=lambda layer: layer.num_k_heads,
            d_k=lambda layer: layer.head_k_dim,
            d_v=lambda layer: layer.head_v_dim,
            d_k_setting="linear_key_head_dim",
            gate_projection="in_proj_ba",
            gates=_qwen3_next_gates,
            without_writes=_qwen3_next_without_writes,
            output_projection="out_proj",
            weights=(
                Blocks(
                    "in_proj_qkvz.weight",
                    (("key", "d_k"), ("key", "d_k"), ("value", "d_v"), ("value", "d_v")),
                    by_key=True,
                ),
                Blocks("in_proj_ba.weight", (("value", 1), ("value", 1)), by_key=True),
                Blocks("conv1d.weight", (("key", "d_k"), ("key", "d_k"), ("value", "d_v"))),
                Blocks("A_log", (("value", 1),)),
                Blocks("dt_bias", (("value", 1),)),
                Blocks("out_proj.weight", (("value", "d_v"),), axis=1),
            ),
            resize=_qwen3_next_resize,
            scans=("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
            kernels=(
                "torch_chunk_gated_delta_rule",
                "torch_recurrent_gated_delta_rule",
                "causal_conv1d_fn",
                "causal_conv1d_update",
            ),
        ),
    )
}

# Architectures whose state is there but comes out wrong, without an error, when a prompt is read in segments.
WRONG_IN_SEGMENTS = {
    "mamba": "a continuation of several tokens ignores the state it is given",
    "falcon_mamba": "a continuation of several tokens ignores the state it is given",
    "jamba": "a continuation of several tokens ignores the state it is given",
    "zamba": "a continuation of several tokens ignores the state it is given",
    "recurrent_gemma": "a continuation of several tokens ignores the state, and the state is a vector",
    "minimax": "its cache counts the tokens of layer 0 only, so positions restart where layer 0 is linear",
    "bamba": "positions restart at every segment",
}


def linear_layers(model: nn.Module) -> list[tuple[int, nn.Module, Layout]]:
    """The linear-attention layers of a model, in order.

    Args:
        model: any model of transformers.

    Returns:
        (index of the decoder layer, module, its layout) for each.

    Raises:
        ValueError: the architecture is silently wrong in segments, has no linear-attention layer, or has none that a
            layout describes; the message says which.

    Example:
        >>> from staterank_utils import load_model
        >>> [index for index, _, _ in linear_layers(load_model("hybrid"))]
        [0, 1, 2, 4, 5, 6]
    """
    model_type = getattr(model.config, "model_type", "?")
    if model_type in WRONG_IN_SEGMENTS:
        raise ValueError(
            f"{model_type} cannot be traced: {WRONG_IN_SEGMENTS[model_type]} (transformers 5.17 to 5.23), so its states would be wrong"
        )
    found = [
        (module.layer_idx, module, LAYOUTS[type(module).__name__])
        for module in model.modules()
        if type(module).__name__ in LAYOUTS
    ]
    if not found:
        classes = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "layer_idx")})
        raise ValueError(
            f"{model_type} has no linear-attention layer that is supported: its layers are {', '.join(classes) or 'unknown'}, "
            f"and layouts exist for {', '.join(LAYOUTS)}. Add one to staterank_utils/layouts.py if it keeps a matrix-valued state."
        )
    return sorted(found, key=lambda entry: entry[0])


def head_names(layer: nn.Module, layout: Layout) -> list[int]:
    """The heads of a layer by the indices they had before any was removed, in order.

    Args:
        layer, layout: from `linear_layers`.

    Example:
        >>> from staterank_utils import load_model
        >>> from staterank_utils.pruning import prune_heads
        >>> _, layer, layout = linear_layers(prune_heads(load_model("hybrid"), {0: [1, 2]}))[0]
        >>> head_names(layer, layout)
        [0, 3, 4, 5, 6, 7]
    """
    return list(getattr(layer, "staterank_heads", range(layout.n_heads(layer))))


def key_names(layer: nn.Module, layout: Layout) -> list[int]:
    """For each key head that a layer has, which one of the whole model it is.

    Args:
        layer, layout: from `linear_layers`.

    Example:
        >>> from staterank_utils import load_model
        >>> from staterank_utils.pruning import prune_heads
        >>> _, layer, layout = linear_layers(prune_heads(load_model("hybrid"), {0: [1, 2, 3]}))[0]
        >>> key_names(layer, layout)  # the first serves one head now, so the others are there twice, once a head
        [0, 2, 2, 3, 3]
    """
    return list(getattr(layer, "staterank_keys", range(layout.n_keys(layer))))


def modeling_module(layer: nn.Module) -> ModuleType:
    """The Python module that defines a layer's class and the kernels that it calls.

    Args:
        layer: from `linear_layers`.

    Example:
        >>> from staterank_utils import load_model
        >>> _, layer, layout = linear_layers(load_model("hybrid"))[0]
        >>> module = modeling_module(layer)
        >>> module.__name__.rpartition(".")[-1], all(hasattr(module, name) for name in layout.kernels)
        ('modeling_qwen3_next', True)
    """
    return sys.modules[type(layer).__module__]
