"""What adapters are made of: which rows of a weight belong to a head, and how a log-decay is changed for a while."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    def __post_init__(self) -> None:
        if wrong := sorted({kind for kind, _ in self.parts} - {"key", "value"}):
            raise ValueError(f"a part of {self.weight} belongs to a 'key' or a 'value' head, got {wrong[0]!r}")

    def size(self, *, n_keys: int, n_heads: int, sizes: Mapping[str, int]) -> int:
        """How many rows (or columns) the weight must have.

        Args:
            n_keys, n_heads: key heads and value heads of the layer.
            sizes: of "d_k" and "d_v".

        Example:
            >>> Blocks("q_proj.weight", (("key", "d_k"),)).size(n_keys=2, n_heads=4, sizes={"d_k": 8, "d_v": 16})
            16
        """
        return sum(
            (n_keys if kind == "key" else n_heads) * (size if isinstance(size, int) else sizes[size])
            for kind, size in self.parts
        )

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


@contextmanager
def kernels_called(
    layer: nn.Module, change: Change, call: Callable[..., Any], kernels: Sequence[str]
) -> Iterator[None]:
    """A block in which a layer's kernels are called as `call(kernel, ...)`, which changes the log-decay that they get.

    Args:
        layer: that calls the kernels.
        change: of its log-decay, which is noted for `LinearLayer.gates`.
        call: makes the call of a kernel.
        kernels: names of the functions, as the layer calls them.

    Example:
        >>> layer = nn.Identity()
        >>> with kernels_called(layer, lambda log_decay: 2 * log_decay, lambda kernel, **options: kernel(**options), ["rule"]):
        ...     changed(layer, torch.tensor([-1.0]))
        tensor([-2.])
    """
    with calls_through(layer, dict.fromkeys(kernels, call)), noted_change(layer, change):
        yield


@contextmanager
def decay_argument(layer: nn.Module, change: Change, *, name: str, kernels: Sequence[str]) -> Iterator[None]:
    """`kernels_called` for kernels that take the log-decay as one keyword argument.

    Args:
        layer: that calls the kernel.
        change: of its log-decay.
        name: of the argument.
        kernels: names of the functions, as the layer calls them.

    Example:
        >>> class Layer(nn.Module):
        ...     def forward(self, log_decay):
        ...         return rule(g=log_decay)
        >>> def rule(g):
        ...     return g
        >>> layer = Layer()
        >>> with decay_argument(layer, lambda log_decay: 2 * log_decay, name="g", kernels=["rule"]):
        ...     layer(-1.0)
        -2.0
    """

    def call(kernel: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return kernel(*args, **options | {name: change(options[name])})

    with kernels_called(layer, change, call, kernels):
        yield


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
        ...     changed(layer, torch.tensor([-1.0]))
        tensor([-2.])
    """
    noted = _changes.setdefault(layer, [])
    noted.append(change)
    try:
        yield
    finally:
        noted.remove(change)


def changed(layer: nn.Module, log_decay: Tensor) -> Tensor:
    """A layer's log-decay under all the changes that were noted, that of the innermost block first.

    Args:
        layer: whose decay it is.
        log_decay: as its projections give it.

    Example:
        >>> changed(nn.Identity(), torch.tensor([-1.0]))
        tensor([-1.])
    """
    for change in reversed(_changes.get(layer, [])):
        log_decay = change(log_decay)
    return log_decay
