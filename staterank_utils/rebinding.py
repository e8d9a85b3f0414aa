"""Let one module call other functions than its class names, and leave its class, its Python module and all other modules alone.

A method finds the functions that it calls in the globals of the Python module that defines it. A copy of the method with other globals,
set on the instance, calls others; when the copy is taken away again, everything is what it was. So two models of one class can
run side by side with different kernels, in two threads too.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

Wrap = Callable[[Any], Any]  # from a function to what is called in its place; the function itself where it stays
KINDS = (FunctionType, MethodType, functools.partial)


@contextmanager
def replaced(owner: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """A block in which attributes of an object have other values; then they are what they were.

    Args:
        owner: a module of torch, or any object with a `__dict__`.
        values: attribute -> value inside the block.

    Example:
        >>> from types import SimpleNamespace
        >>> owner = SimpleNamespace(scale=1)
        >>> with replaced(owner, {"scale": 2}):
        ...     owner.scale
        2
        >>> owner.scale
        1
    """
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            elif name in vars(owner):
                delattr(owner, name)


@contextmanager
def eagerly() -> Iterator[None]:
    """A block in which torch runs what it compiled as it was written, since compiled code does not look at hooks and methods again.

    This holds for the process, until the last of several such blocks ends, in whatever thread.

    Example:
        >>> import torch
        >>> double = torch.compile(lambda x: 2 * x, backend="eager")
        >>> with eagerly():
        ...     double(torch.ones(1)).item()
        2.0
    """
    global _stance, _n_blocks
    with _eager_lock:
        if _n_blocks == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _n_blocks += 1
    try:
        yield
    finally:
        with _eager_lock:
            _n_blocks -= 1
            if _n_blocks == 0:
                _stance.__exit__(None, None, None)


_eager_lock, _n_blocks = threading.Lock(), 0
_stance: Any = None


def calls_through(module: nn.Module, calls: Mapping[str, Callable[..., Any]]) -> AbstractContextManager[None]:
    """A block in which functions that a module's methods call by name are called as `call(function, ...)`.

    Args:
        module: whose own methods change; its submodules' do not.
        calls: name of a function, as a method calls it -> call.

    Example:
        >>> class Loud(nn.Module):
        ...     def forward(self, x):
        ...         return shout(x)
        >>> def shout(word):
        ...     return word.upper()
        >>> layer = Loud()
        >>> with calls_through(layer, {"shout": lambda function, word: function(word) + "!"}):
        ...     layer("hey")
        'HEY!'
        >>> layer("hey")
        'HEY'
    """
    return replaced(
        module,
        Rebinding({name: functools.partial(functools.partial, call) for name, call in calls.items()}).methods(module),
    )


def functions_called(module: nn.Module, names: Iterable[str]) -> dict[str, list[Any]]:
    """The functions that a module's methods call by some names, as of now.

    Args:
        module: any.
        names: as its methods call them.

    Example:
        >>> functions_called(nn.Linear(1, 1), ["F"]) == {"F": [nn.functional]}
        True
    """
    found: dict[str, list[Any]] = {name: [] for name in names}

    def look(name: str, function: Any) -> Any:
        found[name].append(function)
        return function

    Rebinding({name: functools.partial(look, name) for name in found}).methods(module)
    return found


@contextmanager
def forward_within(module: nn.Module, block: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """While entered, each forward pass of a module runs inside a block of its own, which may change what its methods call.

    Args:
        module: any.
        block: makes the context manager of one pass.

    Example:
        >>> import torch
        >>> from contextlib import nullcontext
        >>> layer, passes = nn.Identity(), []
        >>> with forward_within(layer, lambda: nullcontext(passes.append(1))):
        ...     _ = layer(torch.zeros(1))
        >>> passes, "forward" in vars(layer)
        ([1], False)
    """
    slot = forward_slot(module)
    stock = getattr(module, slot)

    @functools.wraps(stock)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with replaced(module, {slot: stock}), block():
            return getattr(module, slot)(*args, **kwargs)

    with replaced(module, {slot: inside}):
        yield


def forward_slot(module: nn.Module) -> str:
    """The attribute under which a module's own forward is found: accelerate, where it spreads layers over devices, keeps it aside.

    Example:
        >>> forward_slot(nn.Identity())
        'forward'
    """
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


class Rebinding:
    """Copies of functions that call others by name; functions that reach each other are copied once.

    Args:
        wraps: name of a function, as another calls it -> from that function to what is called in its place.

    Example:
        >>> import math
        >>> def root(x):
        ...     return math.sqrt(x)
        >>> Rebinding({"math": lambda module: None}).of(root) is root, Rebinding({"cmath": lambda module: None}).of(root) is root
        (False, True)
    """

    def __init__(self, wraps: Mapping[str, Wrap]):
        self.wraps = dict(wraps)
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no other function takes the place of one in memory

    def methods(self, module: nn.Module, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Those of a module's methods that call one of the functions, as they are to be set on the module.

        Args:
            module: any.
            given: attribute -> method, in place of what the module has.

        Returns:
            attribute -> bound method.
        """
        candidates: dict[str, Any] = {
            name: MethodType(function, module)
            for name, function in _methods_calling(type(module), frozenset(self.wraps)).items()
        }
        own = vars(module) if given is None else given
        candidates |= {name: value for name, value in own.items() if isinstance(value, KINDS)}
        made = {name: self.of(value) for name, value in candidates.items()}
        return {name: value for name, value in made.items() if value is not candidates[name]}

    def of(self, function: Any) -> Any:
        """A function, bound method or partial that calls the others, as deep as it is wrapped; the same object where it calls none."""
        if isinstance(function, MethodType):
            inner = self.of(function.__func__)
            return function if inner is function.__func__ else MethodType(inner, function.__self__)
        if isinstance(function, functools.partial):
            inner = self.of(function.func)
            return function if inner is function.func else functools.partial(inner, *function.args, **function.keywords)
        if not isinstance(function, FunctionType):
            return function
        if id(function) not in self._made:
            self._kept.append(function)
            self._made[id(function)] = function  # (one that reaches itself is not gone into twice)
            self._made[id(function)] = self._copy(function)
        return self._made[id(function)]

    def _copy(self, function: FunctionType) -> FunctionType:
        known = function.__globals__
        called = {name: known[name] for name in _names(function.__code__) & self.wraps.keys() if name in known}
        changed = {name: self.wraps[name](value) for name, value in called.items()}
        changed = {name: value for name, value in changed.items() if value is not called[name]}
        cells = function.__closure__ or ()
        inside = [self.of(cell.cell_contents) if _is_full(cell) else None for cell in cells]
        kept = [not _is_full(cell) or new is cell.cell_contents for cell, new in zip(cells, inside, strict=True)]
        if not changed and all(kept):
            return function
        copy = FunctionType(
            function.__code__,
            _globals_of(function, changed) if changed else known,
            function.__name__,
            function.__defaults__,
            tuple(cell if same else CellType(new) for cell, new, same in zip(cells, inside, kept, strict=True)),
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__dict__.update(function.__dict__)
        copy.__annotations__, copy.__doc__ = function.__annotations__, function.__doc__
        copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
        return copy


def _globals_of(function: FunctionType, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The globals of a copy. Without the name of a module, where torch.compile would look for them."""
    made = {**function.__globals__, **changed}
    if "__name__" not in _names(function.__code__):
        made.pop("__name__", None)
    return made


def _is_full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """That a function's code, or a function inside it, uses."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _methods_calling(owner: type, names: frozenset[str]) -> dict[str, FunctionType]:
    """Of a class of modules, the methods that reach one of the names, without those that torch gives to every module."""
    known = _methods.setdefault(owner, {})
    if names not in known:
        methods = {
            name: value
            for each in reversed(owner.__mro__[: owner.__mro__.index(nn.Module)])
            for name, value in vars(each).items()
            if isinstance(value, FunctionType)
        }
        never = Rebinding(dict.fromkeys(names, lambda value: None))
        known[names] = {name: value for name, value in methods.items() if never.of(value) is not value}
    return known[names]


_methods: "WeakKeyDictionary[type, dict[frozenset[str], dict[str, FunctionType]]]" = WeakKeyDictionary()
