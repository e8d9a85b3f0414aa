"""Which implementation of a kernel serves a layer: chosen for one model, on its own modules, and taken away without a trace.

transformers binds fla's Triton kernels when fla can be imported, also on a machine without a GPU, where they die. A `Kernel` stands in
the place of such a function, in one model alone: float32 tensors on a CPU that need no gradient go to the version in
`staterank_utils.kernels`, others on a CPU to transformers' plain torch version, tensors on a GPU to fla where it is installed. Neither
transformers nor fla is changed: the methods of a model's modules are rebound (`staterank_utils.rebinding`).
"""

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any, Literal
from weakref import WeakSet

import torch
import transformers
from torch import Tensor, nn

from staterank_utils import fla_cpu, kernels
from staterank_utils.architectures import LinearLayer, find_layers, linear_layers
from staterank_utils.fla_cpu import FlaKernel
from staterank_utils.rebinding import Rebinding, forward_slot, functions_called, replaced

log = logging.getLogger(__name__)
SEGMENT = 2048  # tokens of a prompt that run through the model at a time
TOKENS_ON_GPU = 16384  # of all prompts together, where fla's kernels serve
WHOLE_CHUNKS = 64  # tokens, of fla's kernels
PLAIN_KERNELS = "STATERANK_PLAIN_KERNELS"  # the environment variable
# What transformers takes of fla for these, by the names in its modeling modules.
OF_FLA = {
    "torch_chunk_gated_delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "torch_recurrent_gated_delta_rule": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "chunk_kimi_delta_attention": ("fla.ops.kda", "chunk_kda"),
    "recurrent_kimi_delta_attention": ("fla.ops.kda", "fused_recurrent_kda"),
}

OURS = "staterank_utils.architectures."  # whose adapters name kernels of transformers

Backend = Literal["fla", "torch"]


class Kernel:
    """A function that layers of transformers call, run where its tensors are.

    Args:
        stock: as transformers has it.
        plain: transformers' plain version on every device.
        known: whether other versions may be found by its name; what an adapter of somebody else's calls so may be another rule.

    Attributes:
        backend: whose kernel serves tensors on a GPU.
        states: the version that tells states on the way, or None.

    Example:
        >>> from transformers.models.qwen3_next import modeling_qwen3_next
        >>> kernel = Kernel(modeling_qwen3_next.torch_chunk_gated_delta_rule, plain=True)
        >>> kernel.__name__, kernel.backend, kernel.states
        ('torch_chunk_gated_delta_rule', 'torch', None)
    """

    def __init__(self, stock: Callable[..., Any], *, plain: bool, known: bool = True):
        self.stock, self.plain, self.__name__ = stock, plain, stock.__name__
        self.reference = getattr(stock, "__wrapped__", stock)
        self.known = known
        others = known and not plain
        self.fast = getattr(kernels, self.__name__, None) if others else None
        self.states = kernels.STATES.get(self.__name__) if others else None
        of_fla = _of_fla(self.__name__) if others else None
        self.on_gpu = self.reference if plain else of_fla or stock
        self.backend: Backend = "fla" if of_fla else "torch"
        self._names = _parameters(self.reference)
        # The arguments that each takes; transformers' own on a GPU chooses itself.
        self._of_fast = _parameters(self.fast) if self.fast else ()
        self._of_gpu = None if self.on_gpu is stock else _parameters(self.on_gpu)

    def __call__(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.device.type == "cpu" and self.fast is not None:
            arguments = dict(zip(self._names, (first, *args), strict=False)) | kwargs
            if kernels.serves_kernel(self.__name__, arguments):
                return self.fast(**{key: value for key, value in arguments.items() if key in self._of_fast})
        chosen, known = (self.on_gpu, self._of_gpu) if first.is_cuda else (self.reference, self._names)
        if known is not None:
            kwargs = {key: value for key, value in kwargs.items() if key in known}
        return chosen(first, *args, **kwargs)


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@functools.cache
def _of_fla(name: str) -> Callable[..., Any] | None:
    """fla's function, if it is installed and there is a GPU that can run it."""
    if name not in OF_FLA or not torch.cuda.is_available():
        return None
    module, function = OF_FLA[name]
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except ImportError:
        return None
    return found


# ---------------------------------------------------------------- choice


def choose_kernels(model: nn.Module, *, plain: bool | None = None) -> str:
    """Let each call of a linear-attention kernel in a model run where its tensors are, from now on, and say what that means.

    `load_model` does this. Any other model is served for the length of each call of this package (`suited_kernels`); choose its kernels
    once to use them in the model's own `forward` and `generate` too. Another choice replaces the one before.

    Args:
        model: any with a supported linear-attention layer. No other model is touched.
        plain: use transformers' plain version on every device: slower, in true float32. By default what the environment variable
            STATERANK_PLAIN_KERNELS says, 1 or 0. Set to 1 before a model is loaded, it also leaves the C library's setting for freed
            memory as it is.

    Returns:
        "torch", "fla" (Triton), "torch (fla is not installed)", or for a model of fla's own on a CPU "fla's naive operators (slow,
        exact)", for the log.

    Raises:
        ValueError: a model that `linear_layers` refuses or that runs inside a block such as `memory.cap_half_life`, or an environment
            variable that is neither 0 nor 1.

    Example:
        >>> from staterank_utils import load_model
        >>> choose_kernels(load_model("hybrid", device="cpu"))
        'torch'
    """
    plain = _is_plain() if plain is None else plain
    layers = linear_layers(model)
    if any(isinstance(vars(layer.module).get(forward_slot(layer.module)), FunctionType) for layer in layers):
        raise ValueError("kernels are not chosen inside a block that changes what the model computes: leave it first")
    if model not in _chosen and fla_cpu.loses_its_cache(model):
        log.warning(
            "%s: fla loses its cache in `generate` with transformers %s, and then makes other tokens: pass use_cache=False, or install transformers<5.24",
            type(model).__name__,
            transformers.__version__,
        )
    chosen = _attributes(model, plain=plain)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if _is_ours(value)]:
            delattr(module, name)
            if name == "_old_forward":  # accelerate's
                setattr(module, name, MethodType(type(module).forward, module))
    for module, attributes in chosen.items():
        for name, value in attributes.items():
            setattr(module, name, value)
    _chosen.add(model)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if fla_cpu.is_fla(model):
        return "fla's naive operators (slow, exact)" if plain or on_cpu else "fla"
    if plain:
        return "torch"
    if on_cpu:
        kernels.keep_freed_memory()
        return "torch"
    named = any(layer.kernels for layer in layers)
    return "fla" if "fla" in backends(model).values() else "torch (fla is not installed)" if named else "torch"


@contextmanager
def suited_kernels(model: nn.Module) -> Iterator[None]:
    """A block in which any model has kernels that its device can run; one whose kernels are chosen keeps them.

    Args:
        model: any of transformers or fla.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> from staterank_utils.models import CHECKPOINTS
        >>> model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CHECKPOINTS / "hybrid"))
        >>> with suited_kernels(model):
        ...     _ = model(torch.ones(1, 3, dtype=torch.long))
        >>> any("forward" in vars(module) for module in model.modules())
        False
    """
    if model in _chosen or has_kernels(model):
        _chosen.add(model)
        yield
        return
    with ExitStack() as stack:
        for module, attributes in _attributes(model, plain=_is_plain()).items():
            stack.enter_context(replaced(module, attributes))
        _chosen.add(model)
        stack.callback(_chosen.discard, model)
        yield


def backends(model: nn.Module) -> dict[int, Backend]:
    """Whose kernels serve each linear-attention layer of a model, as was chosen.

    Args:
        model: whose kernels are chosen, or inside `suited_kernels`.

    Returns:
        decoder layer -> "fla" (Triton, on a GPU) or "torch".

    Example:
        >>> from staterank_utils import load_model
        >>> set(backends(load_model("hybrid", device="cpu")).values())
        {'torch'}
    """
    return {layer.index: backend_of(layer) for layer in find_layers(model)}


def backend_of(layer: LinearLayer) -> Backend:
    """As `backends`, of one layer.

    Args:
        layer: from `linear_layers`.

    Example:
        >>> from staterank_utils import load_model
        >>> backend_of(linear_layers(load_model("hybrid", device="cpu"))[0])
        'torch'
    """
    if not next(layer.module.parameters(), torch.empty(0)).is_cuda:
        return "torch"
    called = [kernel for found in functions_called(layer.module, layer.scans).values() for kernel in found]
    return (
        "fla"
        if called and all(isinstance(kernel, Kernel) and kernel.backend == "fla" for kernel in called)
        else "torch"
    )


def segment_size(layers: Sequence[LinearLayer], *, n_prompts: int) -> int:
    """How many tokens of each prompt a model is given at a time.

    Of what a layer takes, only softmax attention's grows with the prompt. On a GPU larger segments are faster, since experts are read anew
    for each, and softmax attention takes slower kernels for every one but the first. Only fla's kernels leave room for them: transformers' own take
    100 kB per token and head, and more.

    Args:
        layers: from `linear_layers`.
        n_prompts: that are read side by side.

    Example:
        >>> from staterank_utils import load_model
        >>> segment_size(linear_layers(load_model("hybrid", device="cpu")), n_prompts=1)
        2048
    """
    if all(backend_of(layer) == "fla" for layer in layers):
        return max(SEGMENT, TOKENS_ON_GPU // n_prompts // WHOLE_CHUNKS * WHOLE_CHUNKS)
    return SEGMENT


def limit_autotuning() -> bool:
    """Where there is a GPU, let every Triton kernel of this process keep one configuration, of four warps where it has one.

    Otherwise each kernel is tuned for each shape when it first meets it, which takes minutes; a model that was pruned unevenly has a
    shape of its own in every layer. It changes Triton for the whole process, so only a program calls it: the command, a chapter, a
    training, a benchmark, the tests.

    Returns:
        Whether there is a GPU.

    Example:
        >>> limit_autotuning() == torch.cuda.is_available()
        True
    """
    if not torch.cuda.is_available():
        return False
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    # Where kernels run, not where they are defined: transformers imports fla's as soon as a model's class is named.
    def limited(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        if len(self.configs) > 1:
            self.configs = sorted(
                self.configs,
                key=lambda c: (c.num_warps != 4, c.num_stages != 3, -c.kwargs.get("BK", 0), c.kwargs.get("BV", 0)),
            )[:1]
        return run(self, *args, **kwargs)

    Autotuner.run = limited
    return True


_chosen: "WeakSet[nn.Module]" = WeakSet()  # models with kernels of their own
_ours: "WeakSet[FunctionType]" = WeakSet()  # functions that were made for a module's methods


def _is_ours(value: Any) -> bool:
    return isinstance(value, FlaKernel) or (isinstance(value, MethodType) and value.__func__ in _ours)


def has_kernels(model: nn.Module) -> bool:
    """Whether kernels were chosen for a model, or for the one that it is a copy of.

    Args:
        model: any.

    Example:
        >>> from staterank_utils import load_model
        >>> has_kernels(load_model("hybrid")), has_kernels(nn.Linear(1, 1))
        (True, False)
    """
    layers = find_layers(model)
    held = [value for layer in layers for value in vars(layer.module).values()]
    return any(isinstance(value, MethodType) and value.__func__ in _ours for value in held)


def _is_plain() -> bool:
    asked_for = os.environ.get(PLAIN_KERNELS, "0")
    if asked_for not in ("0", "1"):
        raise ValueError(
            f"{PLAIN_KERNELS} must be 1 (transformers' plain kernels) or 0 (the fast ones), got {asked_for!r}"
        )
    return asked_for == "1"


def _attributes(model: nn.Module, *, plain: bool) -> dict[nn.Module, dict[str, Any]]:
    """What is to be set on each module of a model, so that it calls kernels suited to its tensors."""
    layers = {layer.module: layer for layer in find_layers(model)}
    chosen = {
        name: Kernel(layer.kernel(name), plain=plain, known=type(layer).__module__.startswith(OURS))
        for layer in layers.values()
        for name in layer.kernels
    }
    # A fast forward calls what the layer's own calls.
    rebinding = Rebinding({name: functools.partial(_in_place_of, kernel) for name, kernel in chosen.items()})
    of_fla = fla_cpu.rebinding(plain=plain) if fla_cpu.is_fla(model) else None
    found: dict[nn.Module, dict[str, Any]] = {}
    for module in model.modules():
        own = {name: value for name, value in vars(module).items() if not _is_ours(value)}
        given: dict[str, Any] = {}
        slot, own_forward = forward_slot(module), type(module).forward
        if (held := own.get(slot)) is None or (isinstance(held, MethodType) and held.__func__ is own_forward):
            if (layer := layers.get(module)) and layer.mend:
                given[slot] = MethodType(layer.mend(own_forward), module)
            elif not plain and (fast := kernels.fast_forward(module)):
                given[slot] = MethodType(_dispatched_forward(own_forward, fast), module)
        if of_fla:
            given |= fla_cpu.corrections(module, plain=plain)
            made = of_fla.methods(module, {**own, **given}) | fla_cpu.activations(module, plain=plain)
        elif module in layers:
            made = rebinding.methods(module, {**own, **given})
        else:
            made = {}
        if attributes := {**given, **made}:
            found[module] = attributes
            methods = [value for value in attributes.values() if isinstance(value, MethodType)]
            _ours.update(method.__func__ for method in methods if isinstance(method.__func__, FunctionType))
    return found


def _in_place_of(kernel: Kernel, function: Any) -> Kernel:
    return kernel


def _dispatched_forward(original: Callable[..., Any], fast: Callable[..., Any]) -> FunctionType:
    @functools.wraps(original)
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = fast if kernels.serves_module(self, hidden_states) else original
        return chosen(self, hidden_states, *args, **kwargs)

    return forward  # type: ignore[return-value]
