"""`LinearLayer`: one layer of one model, bound to what its architecture says of it."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from staterank_utils.layouts.core import Blocks, Change, Gates, Layout, changes_of
from staterank_utils.rebinding import calls_through, forward_within, functions_called


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A linear-attention layer. All that depends on its architecture is asked of it; nothing else knows a module's names.

    Attributes:
        index: of its decoder layer.
        module: the layer itself.
        layout: what is known of layers of its class.

    Example:
        >>> from staterank_utils import load_model
        >>> from staterank_utils.layouts import linear_layers
        >>> layer = linear_layers(load_model("hybrid"))[0]
        >>> layer.n_heads, layer.n_keys, layer.d_k, layer.d_v, layer.name
        (16, 8, 64, 64, 'Qwen3NextGatedDeltaNet')
    """

    index: int
    module: nn.Module
    layout: Layout

    @property
    def name(self) -> str:
        """Of its class, for messages."""
        return self.layout.layer_class

    # ---- sizes and heads

    @property
    def n_heads(self) -> int:
        """States that it keeps (value heads)."""
        return self.layout.n_heads(self.module)

    @property
    def n_keys(self) -> int:
        """Key heads; each serves as many consecutive value heads."""
        return self.layout.n_keys(self.module)

    @property
    def d_k(self) -> int:
        """Rows of a state."""
        return self.layout.d_k(self.module)

    @property
    def d_v(self) -> int:
        """Columns of a state."""
        return self.layout.d_v(self.module)

    @property
    def heads(self) -> list[int]:
        """Its heads by the indices they had before any was removed, in order.

        Example:
            >>> from staterank_utils import load_model, prune_heads
            >>> from staterank_utils.layouts import linear_layers
            >>> linear_layers(prune_heads(load_model("hybrid"), {0: [1, 2]}))[0].heads
            [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        """
        return list(getattr(self.module, "staterank_heads", range(self.n_heads)))

    @property
    def keys(self) -> list[int]:
        """For each of its key heads, which one of the whole model it is.

        Example:
            >>> from staterank_utils import load_model, prune_heads
            >>> from staterank_utils.layouts import linear_layers
            >>> layer = linear_layers(prune_heads(load_model("hybrid"), {0: [1, 2, 3]}))[0]
            >>> layer.keys  # the first serves one head now, so the others are there twice, once a head
            [0, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
        """
        return list(getattr(self.module, "staterank_keys", range(self.n_keys)))

    def places(self, heads: Sequence[int]) -> list[int]:
        """Where heads stand among those that it still has.

        Raises:
            ValueError: a head that it does not have.
        """
        names = self.heads
        return [names.index(head) for head in heads]

    # ---- what it computes

    @property
    def output(self) -> nn.Module:
        """The submodule whose first input, (batch, token, head * d_v), is what the heads put out (`Layout.output`)."""
        return self.module.get_submodule(self.layout.output(self.module))

    @property
    def has_decay(self) -> bool:
        """Whether its states decay, so that `decay_changed` can change that."""
        return self.layout.changed_decay is not None

    def gates(self, *outputs: Tensor) -> Gates:
        """(log_decay, write_strength) of what its `gate_modules` put out, under the changes that hold for it.

        Example:
            >>> from staterank_utils import load_model
            >>> from staterank_utils.layouts import linear_layers, noted_change
            >>> layer = linear_layers(load_model("hybrid", device="cpu"))[0]
            >>> with noted_change(layer.module, lambda log_decay: 2 * log_decay):
            ...     twice, _ = layer.gates(torch.zeros(1, 3, 32))
            >>> torch.equal(twice, 2 * layer.gates(torch.zeros(1, 3, 32))[0])
            True
        """
        log_decay, write_strength = self.layout.gates(self.module, *outputs)
        for change in reversed(changes_of(self.module)):
            log_decay = change(log_decay)
        return log_decay, write_strength

    def log_norm(self, log_decay: Tensor, *outputs: Tensor) -> Float[Tensor, "batch token head"]:
        """The logarithm of the spectral norm of A_t: the largest decay of a channel, or what the layout says.

        The largest decay is the norm where A_t is a diagonal matrix, or that times a reflection.

        Args:
            log_decay: (batch, token, head), or (batch, token, head, channel).
            outputs: of its `gate_modules`; only a layout with a norm of its own looks at them.

        Example:
            >>> from staterank_utils import load_model
            >>> from staterank_utils.layouts import linear_layers
            >>> linear_layers(load_model("hybrid"))[0].log_norm(torch.tensor([[[[-1.0, -2.0]]]]))
            tensor([[[-1.]]])
        """
        if self.layout.log_norm:
            return self.layout.log_norm(self.module, log_decay, *outputs)
        return log_decay.amax(-1) if log_decay.ndim == 4 else log_decay

    def scans_through(self, call: Callable[..., Any]) -> AbstractContextManager[None]:
        """While entered, its calls of its `scans` are made by `call(kernel, query, key, value, g=..., beta=..., ...)`.

        Args:
            call: makes the call of the kernel, and returns what that returns.

        Raises:
            ValueError: a subclass overrides the method that calls them.

        Example:
            >>> from staterank_utils import load_model
            >>> from staterank_utils.layouts import linear_layers
            >>> model, shapes = load_model("hybrid"), []
            >>> def look(kernel, query, key, *rest, **options):
            ...     shapes.append(tuple(key.shape))
            ...     return kernel(query, key, *rest, **options)
            >>> with linear_layers(model)[0].scans_through(look):
            ...     _ = model(torch.ones(1, 9, dtype=torch.long, device=model.device))
            >>> shapes[0][:2], shapes[0][-1]
            ((1, 9), 64)
        """
        if not self.n_heads:
            return nullcontext()  # it runs no recurrence
        scans = self.layout.scans
        if not all(functions_called(self.module, scans).values()):
            raise ValueError(
                f"{type(self.module).__name__} does not call {', '.join(scans)} itself: its class overrides a method of {self.name}"
            )
        return forward_within(self.module, lambda: calls_through(self.module, dict.fromkeys(scans, call)))

    def decay_changed(self, change: Change) -> AbstractContextManager[None]:
        """A block in which `change` is applied to its log-decay, and to what `gates` tells of it.

        Raises:
            ValueError: its architecture has no decay, or its layout does not say how to change it.
        """
        if self.layout.changed_decay is None:
            raise ValueError(
                f"layer {self.index} ({self.name}) has no decay that can be changed: its layout names no `changed_decay`"
            )
        return forward_within(self.module, functools.partial(self.layout.changed_decay, self.module, change))

    def stop_writes(self, places: list[int]) -> RemovableHandle:
        """From now on these heads write nothing, until the handle is removed.

        Args:
            places: from `places`.

        Raises:
            ValueError: its architecture writes in a way that cannot be stopped exactly.
        """
        without_writes, module = self.layout.without_writes, self.module
        if self.layout.write_module is None or without_writes is None:
            raise ValueError(f"the writes of {self.name} cannot be stopped exactly: choose kind 'zero' or 'mean'")

        @functools.cache
        def on(device: torch.device, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
            """Which of its numbers are replaced, and by what; made once, so that a graph can be captured."""
            put_out = without_writes(module, torch.full((1, 1, width), torch.nan, dtype=dtype, device=device), places)
            return ~put_out.isnan(), put_out

        def hook(projection: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            replaced, put_out = on(output.device, output.dtype, output.shape[-1])
            return torch.where(replaced, put_out, output)

        return module.get_submodule(self.layout.write_module).register_forward_hook(hook)

    # ---- its states in a cache

    def state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        """The states that a cache holds of it."""
        return self.layout.state(cache, self.index)

    def set_state(self, cache: Any, places: list[int], states: Float[Tensor, "batch place d_k d_v"]) -> None:
        """Write states of some heads into a cache.

        Args:
            cache: that holds states of this layer.
            places: from `places`.
            states: of these heads.
        """
        if self.layout.set_state:
            self.layout.set_state(cache, self.index, places, states)
        else:
            self.state(cache)[:, places] = states

    # ---- its weights

    @property
    def blocks(self) -> list[Blocks]:
        """Of its layout's weights, those that it has."""
        names = {name for name, _ in self.module.named_parameters()}
        return [blocks for blocks in self.layout.weights if not blocks.optional or blocks.weight in names]

    @property
    def sizes(self) -> dict[str, int]:
        """d_k and d_v by name, as `Blocks.rows` takes them."""
        return {"d_k": self.d_k, "d_v": self.d_v}

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        """Set the layer's own numbers, once its weights are cut."""
        self.layout.resize(self.module, n_keys, n_heads, d_k)

    # ---- what it cannot do, and why

    @property
    def refusal(self) -> str | None:
        """Why it cannot be traced, or None."""
        return self.layout.refusal(self.module) if self.layout.refusal else None

    @property
    def padding_refusal(self) -> str | None:
        """Why prompts cannot be padded on the left, or None."""
        return self.layout.padding_refusal(self.module) if self.layout.padding_refusal else None
