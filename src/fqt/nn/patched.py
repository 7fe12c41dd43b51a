"""Methods patched on an instance, and how they follow the layer's class.

Some tools add to a single layer by keeping its bound method and putting a function around it into the instance's
`__dict__`, which wins over the class: accelerate's hooks (`module._old_forward`, read by a partial), its automatic
casting (a decorator around the class's function), or two lines by hand. When the class of a layer changes, what
they keep is the forward of the class as it was. So it is looked for in what the modules of a model hold, through
bound methods, partials, closures, decorators and callable objects, and exchanged. Functions are copied on the way,
with cells of their own for what changed: a cell belongs to whoever made the closure.

A function that reaches the layer's forward by way of a global variable, or not at all, cannot be followed.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Swaps = Mapping[nn.Module, tuple[Forward, Forward]]
"""By layer: its class's forward before and after."""

_DEPTH = 12


def rewire(model: nn.Module, swaps: Swaps) -> None:
    """Exchanges the forward of layers whose class has changed in all that the model's modules keep.

    Args:
        model: its modules may be the layers themselves, or keep another's bound method.
        swaps: the layers that have changed.
    """
    exchange = _Exchange(swaps)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            changed = exchange.of(value, swaps.get(module))
            if changed is not value:
                module.__dict__[name] = changed


def hidden(module: nn.Module) -> str:
    """Why it cannot be known what a layer computes: its forward was replaced; empty if it was not.

    A replacement that calls the class's own forward, as far as that can be followed, is none.
    """
    patch = vars(module).get("forward")
    if patch is None or _reaches(patch, module):
        return ""
    name = getattr(patch, "__qualname__", type(patch).__name__)
    return f"its forward was replaced on the instance by {name}, and what that computes cannot be seen"


def _reaches(value: Any, module: nn.Module, depth: int = 0) -> bool:
    """Whether a function calls the forward of the module's class, directly or by a name that it reads from it."""
    forward = type(module).forward
    exchange = _Exchange({module: (forward, _Found())}, wrapped=False)
    if exchange.of(value, exchange.swaps[module]) is not value:
        return True
    read = {name for function in exchange.functions for name in _names(function.__code__)} - {"forward"}
    return depth < _DEPTH and any(_reaches(vars(module).get(name), module, depth + 1) for name in read)


class _Found:
    """Stands for the forward that is looked for."""

    def __call__(self) -> None:
        """Never called: a bound method needs a function."""


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Exchange:
    """Copies of callables in which the forwards of some layers are exchanged.

    Args:
        swaps: the layers, each with its forward before and after.
        wrapped: whether to follow `__wrapped__`, which says what a function stands for, not what it calls.

    Attributes:
        functions: those that were gone through.
    """

    def __init__(self, swaps: Swaps, wrapped: bool = True) -> None:
        self.swaps, self.wrapped = swaps, wrapped
        self.functions: list[FunctionType] = []
        self._done: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._depth = 0

    def of(self, value: Any, own: tuple[Forward, Forward] | None) -> Any:
        """The value itself, or a copy if something in it has been exchanged.

        Args:
            value: anything; what is not callable stays.
            own: the exchange for the layer whose patch this is: there the class's bare function means the layer.
        """
        if own is not None and value is own[0]:
            return own[1]
        if not callable(value) or isinstance(value, type | nn.Module) or self._depth > _DEPTH:
            return value
        key = id(value), id(own)
        if key not in self._done:
            self._done[key] = value, value  # for what holds itself
            self._depth += 1
            self._done[key] = value, self._copy(value, own)
            self._depth -= 1
        return self._done[key][1]

    def _copy(self, value: Any, own: tuple[Forward, Forward] | None) -> Any:
        if isinstance(value, MethodType):
            layer = value.__self__
            swap = self.swaps.get(layer) if isinstance(layer, nn.Module) else None
            function = self.of(value.__func__, swap)
            return value if function is value.__func__ else MethodType(function, layer)
        if type(value) is partial:
            return self._partial(value, own)
        if isinstance(value, FunctionType):
            return self._function(value, own)
        return self._object(value, own)

    def _partial(self, value: partial, own: tuple[Forward, Forward] | None) -> partial:
        function = self.of(value.func, own)
        args = [self.of(a, own) for a in value.args]
        words = {k: self.of(a, own) for k, a in value.keywords.items()}
        members = self._members(value, own)
        same = function is value.func and _same(args, value.args) and _same(words.values(), value.keywords.values())
        if same and members is None:
            return value
        changed = partial(function, *args, **words)
        vars(changed).update(vars(value) if members is None else members)
        return changed

    def _function(self, value: FunctionType, own: tuple[Forward, Forward] | None) -> FunctionType:
        self.functions.append(value)
        cells = tuple(self._cell(cell, own) for cell in value.__closure__ or ())
        defaults = tuple(self.of(d, own) for d in value.__defaults__ or ())
        words = {k: self.of(d, own) for k, d in (value.__kwdefaults__ or {}).items()}
        members = self._members(value, own)
        same = _same(cells, value.__closure__ or ()) and _same(defaults, value.__defaults__ or ())
        if same and members is None and _same(words.values(), (value.__kwdefaults__ or {}).values()):
            return value
        changed = FunctionType(value.__code__, value.__globals__, value.__name__, defaults or None, cells or None)
        changed.__kwdefaults__ = words or None
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(changed, name, getattr(value, name))
        vars(changed).update(vars(value) if members is None else members)
        return changed

    def _cell(self, cell: CellType, own: tuple[Forward, Forward] | None) -> CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            return cell
        changed = self.of(content, own)
        return cell if changed is content else CellType(changed)

    def _object(self, value: Any, own: tuple[Forward, Forward] | None) -> Any:
        """A callable object that keeps a function as an attribute."""
        members = self._members(value, own)
        if members is None:
            return value
        try:
            changed = object.__new__(type(value))  # copy.copy asks the object, which may refuse to be pickled
        except TypeError:  # an extension type, of which more than its attributes would have to be copied
            return value
        for slot in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
            if hasattr(value, slot):
                setattr(changed, slot, getattr(value, slot))
        vars(changed).update(members)
        return changed

    def _members(self, value: Any, own: tuple[Forward, Forward] | None) -> dict[str, Any] | None:
        """What `value.__dict__` becomes; None if it stays."""
        before = getattr(value, "__dict__", {})
        after = {k: v if k == "__wrapped__" and not self.wrapped else self.of(v, own) for k, v in before.items()}
        return None if _same(after.values(), before.values()) else after


def _same(after: Any, before: Any) -> bool:
    return all(a is b for a, b in zip(after, before, strict=True))
