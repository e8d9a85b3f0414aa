"""The two forms in which an architecture is described: `Blocks` of a weight, and the `Layout` of a layer class."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from staterank_utils.rebinding import calls_through

Gates = tuple[Tensor, Float[Tensor, "batch token head"]]  # log-decay may have an axis of channels behind
Change = Callable[[Tensor], Tensor]  # of a log-decay, (batch, token, head) or (batch, token, head, channel)
Parts = tuple[tuple[Literal["key", "value"], Literal["d_k", "d_v", 1]], ...]


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
        optional: a layer may be without this weight, as its settings say.

    Example:
        >>> blocks = Blocks("conv1d.weight", (("key", "d_k"), ("value", "d_v")))
        >>> blocks.rows([(1, [2, 3])], n_keys=2, per_key=2, sizes={"d_k": 2, "d_v": 1})  # of key head 1 and its value heads
        [2, 3, 6, 7]
    """

    weight: str
    parts: Parts
    by_key: bool = False
    axis: int = 0
    optional: bool = False

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

    def tensor(self, layer: nn.Module) -> Tensor:
        """The parameter or buffer itself."""
        path, _, attribute = self.weight.rpartition(".")
        found: Tensor = getattr(layer.get_submodule(path), attribute)
        return found

    def cut(self, layer: nn.Module, rows: Sequence[int]) -> None:
        """Leave a layer only these rows (or columns) of the weight, which may be on any device, also "meta"."""
        path, _, attribute = self.weight.rpartition(".")
        old, owner = self.tensor(layer), layer.get_submodule(path)
        kept = old.data.index_select(self.axis, torch.tensor(rows, dtype=torch.long, device=old.device))
        is_parameter = isinstance(old, nn.Parameter)
        setattr(owner, attribute, nn.Parameter(kept, requires_grad=old.requires_grad) if is_parameter else kept)
        if attribute == "weight" and isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = kept.shape
        elif attribute == "weight" and isinstance(owner, nn.Conv1d):
            owner.in_channels = owner.out_channels = owner.groups = len(kept)


def recurrent_state(cache: Any, layer_index: int) -> Float[Tensor, "batch head d_k d_v"]:
    """The states of a layer where a cache of transformers holds them, in the order in which it holds them.

    Example:
        >>> from types import SimpleNamespace
        >>> layer = SimpleNamespace(recurrent_states={0: torch.ones(1, 2, 4, 3)})
        >>> recurrent_state(SimpleNamespace(layers=[layer]), 0).shape
        torch.Size([1, 2, 4, 3])
    """
    state: Tensor = cache.layers[layer_index].recurrent_states[0]
    return state


def _as_it_is(layer: nn.Module, n_keys: int, n_heads: int, d_k: int) -> None:
    """A layer that keeps no numbers of its own."""


@dataclass(frozen=True)
class Layout:
    """How to read one class of linear-attention layer.

    Attributes:
        layer_class: name of the module's class.
        module: Python module that defines it.
        n_heads: number of states a layer keeps (value heads).
        n_keys: number of key heads; each serves as many consecutive value heads.
        d_k, d_v: shape of a state.
        d_k_setting: name of d_k in the model's configuration, where key channels can be cut; None where they cannot.
        output: (layer) -> name of the submodule whose first input, (batch, token, head * d_v), head by head, is what the heads
            put out, at the place where a head at zero is a head removed: the output projection where the norm behind a head is
            its own, else the norm across heads.
        gate_modules: names of the submodules whose outputs hold the gates; "" is the layer itself.
        gates: (layer, outputs of those submodules) -> (log_decay, write_strength), each (batch, token, head); a decay for each
            channel has an axis of channels behind.
        log_norm: (layer, log_decay, outputs of those submodules) -> (batch, token, head), the logarithm of the spectral norm of the transition A_t
            in S(t) = A_t S(t-1) + writes, where it is not the largest decay of a channel.
        changed_decay: (layer, change) -> a block for one forward pass, in which `change` is applied to the layer's log-decay,
            writes stay as they are, and `LinearLayer.gates` tells the changed one; None where a layer has no decay.
        write_module: name of the submodule whose output `without_writes` changes; None where writes cannot be stopped exactly.
        without_writes: (layer, output of that submodule, heads) -> that output, changed so that these heads write nothing.
        state: (cache, layer index) -> (batch, head, d_k, d_v), a view of what the cache holds, to read and to write.
        set_state: (cache, layer index, heads, their states), writes these where `state` is no view.
        scans: names of the functions, in the layer's Python module, that run the recurrence over tokens: called with query, key,
            value, g and beta, each (batch, token, head, ...), and initial_state, they return outputs and the last state. Without
            any, prompts are read in segments that end where a state is wanted.
        kernels: names of all functions, in the layer's Python module, that have a Triton (or CUDA) and a plain version.
        weights: where the heads are in each weight that has a part for every head; without any, heads cannot be removed.
        kept_whole: why they cannot.
        resize: (layer, key heads, value heads, d_k), sets the layer's own numbers to those.
        rescale: (layer, value heads before, value heads now), makes a norm across heads divide by what it divided by when
            the heads that are gone put out 0; called when the heads that are left have been named.
        idle: (layer, arguments of its forward) -> what the layer returns when it has no head left; None where it must keep one.
        forward: wraps the forward of the class, where that does not do for some path or for a pruned layer.
        cache: (model) -> an empty cache; by default that of transformers for the model's configuration.
        arguments: (model, token ids, positions, cache or None) -> what the model needs to be told besides, by name.
        logits: (model, hidden states) -> logits, where there is more to it than the output embedding.
        refusal: (layer) -> why a layer with these settings is not supported, or None.
        padding_refusal: (layer) -> why prompts cannot be padded on the left, or None.

    Example:
        >>> from staterank_utils import load_model
        >>> from staterank_utils.layouts import linear_layers
        >>> layout = linear_layers(load_model("hybrid"))[0].layout
        >>> layout.layer_class, layout.scans[0]
        ('Qwen3NextGatedDeltaNet', 'torch_chunk_gated_delta_rule')
    """

    layer_class: str
    module: str
    n_heads: Callable[[nn.Module], int]
    n_keys: Callable[[nn.Module], int]
    d_k: Callable[[nn.Module], int]
    d_v: Callable[[nn.Module], int]
    output: Callable[[nn.Module], str]
    gate_modules: tuple[str, ...]
    gates: Callable[..., Gates]
    log_norm: Callable[..., Tensor] | None = None
    changed_decay: Callable[[nn.Module, Change], AbstractContextManager[None]] | None = None
    d_k_setting: str | None = None
    write_module: str | None = None
    without_writes: Callable[[nn.Module, Tensor, list[int]], Tensor] | None = None
    state: Callable[[Any, int], Tensor] = recurrent_state
    set_state: Callable[[Any, int, list[int], Tensor], None] | None = None
    scans: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    weights: tuple[Blocks, ...] = ()
    kept_whole: str = ""
    resize: Callable[[nn.Module, int, int, int], None] = _as_it_is
    rescale: Callable[[nn.Module, int, int], None] | None = None
    idle: Callable[..., Any] | None = None
    forward: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    cache: Callable[[nn.Module], Any] | None = None
    arguments: Callable[..., dict[str, Any]] | None = None
    logits: Callable[[Any, Tensor], Tensor] | None = None
    refusal: Callable[[nn.Module], str | None] | None = None
    padding_refusal: Callable[[nn.Module], str | None] | None = None


def decay_argument(name: str, kernels: Sequence[str]) -> Callable[[nn.Module, Change], AbstractContextManager[None]]:
    """`Layout.changed_decay` of layers that give their log-decay to a kernel as one keyword argument.

    Args:
        name: of the argument.
        kernels: names of the functions, as the layer calls them.

    Example:
        >>> class Layer(nn.Module):
        ...     def forward(self, log_decay):
        ...         return rule(g=log_decay)
        >>> def rule(g):
        ...     return g
        >>> layer = Layer()
        >>> with decay_argument("g", ["rule"])(layer, lambda log_decay: 2 * log_decay):
        ...     layer(-1.0)
        -2.0
    """

    def changed(layer: nn.Module, change: Change) -> AbstractContextManager[None]:
        def call(kernel: Callable[..., Any], *args: Any, **options: Any) -> Any:
            return kernel(*args, **options | {name: change(options[name])})

        return calls_through(layer, dict.fromkeys(kernels, call))

    return changed


_changes: WeakKeyDictionary[nn.Module, list[Change]] = WeakKeyDictionary()


@contextmanager
def noted_change(layer: nn.Module, change: Change) -> Iterator[None]:
    """A block in which `LinearLayer.gates` applies a change to the log-decay that a layer's projections give.

    Args:
        layer: whose gates are read.
        change: of its log-decay.

    Example:
        >>> layer = nn.Identity()
        >>> with noted_change(layer, lambda log_decay: 2 * log_decay):
        ...     len(changes_of(layer))
        1
    """
    noted = _changes.setdefault(layer, [])
    noted.append(change)
    try:
        yield
    finally:
        noted.remove(change)


def changes_of(layer: nn.Module) -> list[Change]:
    """The changes of its log-decay that a layer is under, outermost first.

    Example:
        >>> changes_of(nn.Identity())
        []
    """
    return _changes.get(layer, [])
