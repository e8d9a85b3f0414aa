"""The two adapters that stand between this package and a model's code: `LinearLayer` of a layer, `ModelAdapter` of a whole model."""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin

from staterank_utils.architectures.caches import LinearOnlyCache, recurrent_state
from staterank_utils.architectures.core import Blocks, Change, Gates, changed
from staterank_utils.rebinding import calls_through, forward_within, functions_called

# ---------------------------------------------------------------- a whole model


class ModelAdapter:
    """What depends on a model's architecture and on no single layer: its cache, its arguments, its logits.

    This class serves most models. A family whose models want something else has a subclass, which its layers name.

    Args:
        model: of transformers or fla, unwrapped.

    Attributes:
        own_cache: whether it has a cache of its own, in whose place the caches of transformers do not serve.
        masks_by_kind: whether its forward takes a mask for each kind of layer, made beforehand.

    Example:
        >>> from staterank_utils import load_model
        >>> from staterank_utils.architectures import model_adapter
        >>> type(model_adapter(load_model("hybrid")).make_cache()).__name__
        'DynamicCache'
    """

    own_cache: ClassVar[bool] = False
    masks_by_kind: ClassVar[bool] = False

    def __init__(self, model: Any):
        self.model = model

    def make_cache(self, max_tokens: int | None = None) -> Any:
        """An empty cache.

        Args:
            max_tokens: room for keys and values from the start; by default they grow.
        """
        config = self.model.config
        cache = DynamicCache(config=config) if max_tokens is None else StaticCache(config, max_tokens)
        counts_tokens = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
        return cache if counts_tokens else LinearOnlyCache(config)

    def fitted(self, cache: Any, input_ids: Tensor) -> Any:
        """The cache that the model's forward is given for these tokens, or None."""
        return cache

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits from hidden states; by default, apply the output embedding."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits


# ---------------------------------------------------------------- a layer


def kept_as(path: str) -> Any:
    """A property of an adapter: a number that its module keeps under this name.

    Args:
        path: of the attribute; dots lead into what the module holds.

    Example:
        >>> class Layer(LinearLayer):
        ...     n_heads = kept_as("out_features")
        >>> Layer(0, nn.Linear(2, 8)).n_heads
        8
    """
    get = attrgetter(path)
    return property(lambda self: int(get(self.module)))


class LinearLayer:
    """A linear-attention layer of a model, bound to its module. All that depends on the architecture is asked of it.

    A family is a subclass: it names the classes of modules that it describes and says what the attributes and methods below are for
    them. Those that are None here may be left out; what needs them is then refused, with the reason.

    Args:
        index: of its decoder layer.
        module: the layer itself.

    Attributes:
        describes: the modules' classes, each with the Python module that defines it.
        model_adapter: what serves the whole model.
        n_heads: states that a layer keeps (value heads).
        n_keys: key heads; each serves as many consecutive value heads.
        d_k, d_v: shape of a state.
        d_k_setting: name of d_k in the model's configuration, where key channels can be cut; None where they cannot.
        heads_settings: names of n_heads and n_keys in the model's configuration, where a model with fewer in every layer is one of the same
            class; empty where a norm across heads or the like stands against that.
        output_module: name of the submodule whose first input, (batch, token, head * d_v), is what the heads put out, head by head, at
            the place where a head at zero is a head removed: the output projection where the norm behind a head is its own, else the
            norm across heads.
        gate_modules: names of the submodules whose outputs hold the gates; "" is the layer itself.
        write_module: name of the submodule whose output `without_writes` changes; None where writes cannot be stopped exactly.
        scans: names of the functions, in the layer's Python module, that run the recurrence over tokens: called with query, key,
            value, g and beta, each (batch, token, head, ...), and initial_state, they return outputs and the last state. Without
            any, prompts are read in segments that end where a state is wanted.
        kernels: names of all functions, in the layer's Python module, that have a Triton (or CUDA) and a plain version.
        weights: where the heads are in each weight that has a part for every head; without any, heads cannot be removed.
        kept_whole: why they cannot.
        read_gates: (outputs of `gate_modules`) -> (log_decay, write_strength), each (batch, token, head); a decay for each channel has
            an axis of channels behind.
        change_decay: (change) -> a block for one forward pass, in which `change` is applied to the layer's log-decay, writes stay as
            they are, and `gates` tells the changed one; None where a layer has no decay, or none that can be changed.
        without_writes: (output of `write_module`, places of heads) -> that output, with numbers put in the place of others (`index_fill`) so
            that these heads write nothing. It is called once, on NaN, to see which.
        keeps_dtype: whether its states are in the dtype of the weights, and not in float32.
        idle: (arguments of the module's forward) -> what the layer returns when it has no head left; None where it must keep one.
        mend: (forward of the module's class) -> a forward that does for every path and for a pruned layer, where the class's does not.

    Example:
        >>> from staterank_utils import load_model
        >>> from staterank_utils.architectures import linear_layers
        >>> layer = linear_layers(load_model("hybrid"))[0]
        >>> layer.n_heads, layer.n_keys, layer.d_k, layer.d_v, layer.name, type(layer).__name__
        (16, 8, 64, 64, 'Qwen3NextGatedDeltaNet', 'Qwen3NextLayer')
    """

    describes: ClassVar[tuple[str, ...]] = ()
    model_adapter: ClassVar[type[ModelAdapter]] = ModelAdapter
    n_heads: int
    n_keys: int
    d_k: int
    d_v: int
    d_k_setting: ClassVar[str | None] = None
    heads_settings: ClassVar[tuple[str, ...]] = ()
    output_module: ClassVar[str]
    gate_modules: ClassVar[tuple[str, ...]]
    write_module: ClassVar[str | None] = None
    scans: ClassVar[tuple[str, ...]] = ()
    kernels: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[Blocks, ...]] = ()
    kept_whole: ClassVar[str] = ""
    keeps_dtype: ClassVar[bool] = False
    read_gates: Callable[..., Gates]
    change_decay: Callable[[Change], AbstractContextManager[None]] | None = None
    without_writes: Callable[..., Tensor] | None = None
    idle: Callable[..., Any] | None = None
    mend: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    def __init__(self, index: int, module: nn.Module):
        self.index, self.module = index, module

    @classmethod
    def describes_class(cls, module_class: type) -> bool:
        """Whether it describes a class, or one that this is a subclass of."""
        return any(full_name(each) in cls.describes for each in module_class.__mro__)

    @property
    def described(self) -> type[nn.Module]:
        """The class that the adapter describes: the module's own, or a base class of it."""
        return next(each for each in type(self.module).__mro__ if full_name(each) in self.describes)

    @property
    def name(self) -> str:
        """Of the class, for messages."""
        return self.described.__name__

    def kernel(self, name: str) -> Callable[..., Any]:
        """One of `kernels`, as the layer's Python module has it."""
        found: Callable[..., Any] = getattr(sys.modules[self.described.__module__], name)
        return found

    # ---- its heads

    @property
    def heads(self) -> list[int]:
        """Its heads by the indices they had before any was removed, in order.

        Example:
            >>> from staterank_utils import load_model, prune_heads
            >>> from staterank_utils.architectures import linear_layers
            >>> linear_layers(prune_heads(load_model("hybrid"), {0: [1, 2]}))[0].heads
            [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        """
        return list(getattr(self.module, "staterank_heads", range(self.n_heads)))

    @property
    def keys(self) -> list[int]:
        """For each of its key heads, which one of the whole model it is.

        Example:
            >>> from staterank_utils import load_model, prune_heads
            >>> from staterank_utils.architectures import linear_layers
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
        """The submodule that `output_module` names."""
        return self.module.get_submodule(self.output_module)

    @property
    def decay_can_change(self) -> bool:
        """Whether its states decay in a way that `decay_changed` can change."""
        return self.change_decay is not None

    def gates(self, *outputs: Tensor) -> Gates:
        """Apply `read_gates`, then the changes of the decay that hold for the layer.

        Example:
            >>> from staterank_utils import load_model
            >>> from staterank_utils.architectures import linear_layers, noted_change
            >>> layer = linear_layers(load_model("hybrid", device="cpu"))[0]
            >>> with noted_change(layer.module, lambda log_decay: 2 * log_decay):
            ...     twice, _ = layer.gates(torch.zeros(1, 3, 32))
            >>> torch.equal(twice, 2 * layer.gates(torch.zeros(1, 3, 32))[0])
            True
        """
        log_decay, write_strength = self.read_gates(*outputs)
        return changed(self.module, log_decay), write_strength

    def log_norm(self, log_decay: Tensor, *outputs: Tensor) -> Float[Tensor, "batch token head"]:
        """The logarithm of the spectral norm of the transition A_t in S(t) = A_t S(t-1) + writes.

        Here the largest decay of a channel, which it is where A_t is a diagonal matrix, or that times a reflection.

        Args:
            log_decay: (batch, token, head), or (batch, token, head, channel).
            outputs: of its `gate_modules`; only a family with a norm of its own looks at them.

        Example:
            >>> from staterank_utils import load_model
            >>> from staterank_utils.architectures import linear_layers
            >>> linear_layers(load_model("hybrid"))[0].log_norm(torch.tensor([[[[-1.0, -2.0]]]]))
            tensor([[[-1.]]])
        """
        return log_decay.amax(-1) if log_decay.ndim == 4 else log_decay

    def scans_through(self, call: Callable[..., Any]) -> AbstractContextManager[None]:
        """While entered, its calls of its `scans` are made by `call(kernel, query, key, value, g=..., beta=..., ...)`.

        Args:
            call: makes the call of the kernel, and returns what that returns.

        Raises:
            ValueError: no method of the module's class calls them.

        Example:
            >>> from staterank_utils import load_model
            >>> from staterank_utils.architectures import linear_layers
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
        if absent := [name for name, found in functions_called(self.module, self.scans).items() if not found]:
            own = type(self.module) is self.described
            why = f"mend `scans` of {type(self).__name__}" if own else f"its class overrides a method of {self.name}"
            raise ValueError(f"{type(self.module).__name__} does not call {', '.join(absent)} itself: {why}")
        return forward_within(self.module, lambda: calls_through(self.module, dict.fromkeys(self.scans, call)))

    @property
    def normalised(self) -> bool:
        """Whether what it reads of its states is divided by a sum over keys."""
        return False

    def pairs_through(self, call: Callable[..., Any]) -> AbstractContextManager[None]:
        """As `scans_through`, for what keeps pairs: where keys and queries go through a feature map, `call` gets them from before it too, as `raw`.

        Args:
            call: makes the call of the kernel, and returns what that returns.
        """
        return self.scans_through(call)

    def decay_changed(self, change: Change) -> AbstractContextManager[None]:
        """A block in which `change` is applied to its log-decay, and to what `gates` tells of it.

        Raises:
            ValueError: it has no decay, or its adapter does not say how to change it.
        """
        if self.change_decay is None:
            raise ValueError(
                f"layer {self.index} ({self.name}) has no decay that can be changed: {type(self).__name__} has no `change_decay`"
            )
        return forward_within(self.module, functools.partial(self.change_decay, change))

    def stop_writes(self, places: list[int]) -> RemovableHandle:
        """From now on these heads write nothing, until the handle is removed.

        Args:
            places: from `places`.

        Raises:
            ValueError: its architecture writes in a way that cannot be stopped exactly.
        """
        without_writes = self.without_writes
        if self.write_module is None or without_writes is None:
            raise ValueError(f"the writes of {self.name} cannot be stopped exactly: choose kind 'zero' or 'mean'")

        @functools.cache
        def on(device: torch.device, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
            """Which of its numbers are replaced, and by what; made once, so that a graph can be captured."""
            put_out = without_writes(torch.full((1, 1, width), torch.nan, dtype=dtype, device=device), places)
            if put_out.isnan().all():
                raise ValueError(
                    f"`without_writes` of {type(self).__name__} put no number in the place of another: it must replace numbers (index_fill), not "
                    "multiply them"
                )
            return ~put_out.isnan(), put_out

        def hook(projection: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            replaced, put_out = on(output.device, output.dtype, output.shape[-1])
            return torch.where(replaced, put_out, output)

        return self.module.get_submodule(self.write_module).register_forward_hook(hook)

    # ---- its states in a cache

    def state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        """The states that a cache holds of it: a view, unless `set_state` says how they are written."""
        return recurrent_state(cache, self.index)

    def set_state(self, cache: Any, places: list[int], states: Float[Tensor, "batch place d_k d_v"]) -> None:
        """Write states of some heads into a cache.

        Args:
            cache: that holds states of this layer.
            places: from `places`.
            states: of these heads.
        """
        self.state(cache)[:, places] = states

    # ---- its weights

    @property
    def blocks(self) -> list[Blocks]:
        """Of `weights`, those that it has."""
        names = {name for name, _ in self.module.named_parameters()}
        return [blocks for blocks in self.weights if not blocks.optional or blocks.weight in names]

    @property
    def sizes(self) -> dict[str, int]:
        """d_k and d_v by name, as `Blocks.rows` takes them."""
        return {"d_k": self.d_k, "d_v": self.d_v}

    def resize(self, n_keys: int, n_heads: int, d_k: int) -> None:
        """Set the module's own numbers, once its weights are cut."""

    def rescale(self, before: int, now: int) -> None:
        """Let a norm across heads divide by what it divided by when the heads that are gone put out 0.

        Args:
            before, now: number of heads; those that are left are named in `heads`.
        """

    # ---- what it cannot do, and why

    @property
    def refusal(self) -> str | None:
        """Why a layer with these settings cannot be traced, or None."""
        return None

    @property
    def padding_refusal(self) -> str | None:
        """Why prompts cannot be padded on the left, or None."""
        return None

    @property
    def caching_refusal(self) -> str | None:
        """Why its heads cannot have a cache of pairs, or None."""
        return "it runs no delta rule on keys of length 1 that can be looked into"


def full_name(each: type) -> str:
    """Of a class, with the Python module that defines it.

    Example:
        >>> full_name(nn.Linear)
        'torch.nn.modules.linear.Linear'
    """
    return f"{each.__module__}.{each.__qualname__}"
