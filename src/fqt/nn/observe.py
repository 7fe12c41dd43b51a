"""Seeing what a backward pass quantizes: every gradient operand, before its rounding."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fqt.nn.call import GradientOperand
from fqt.nn.convert import is_converted
from fqt.nn.wrappers import named_modules


@dataclass(frozen=True)
class _Named:
    """An observer that also gets the layer's qualified name."""

    name: str
    observer: Callable[[str, GradientOperand], None]

    def __call__(self, operand: GradientOperand) -> None:
        self.observer(self.name, operand)


def eagerly() -> AbstractContextManager:
    """While it lasts, nothing runs compiled: a compiled graph knows no observer."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing has been compiled, and importing it takes seconds
    return torch.compiler.set_stance("force_eager")


@contextmanager
def observe(model: nn.Module, observer: Callable[[str, GradientOperand], None]) -> Iterator[None]:
    """While it lasts, `observer(name, operand)` is called for every gradient that a converted layer quantizes.

    It runs inside the backward pass, before the product, once per product and call of the layer: a layer that is
    used twice, or the four projections of an attention, report each use under one name. What it does changes
    nothing: the noise comes from `operand.seed`, not from torch's generator. Forward passes made before the
    context, and layers in eval mode (their gradient is exact), are not seen. Observers do not nest: the inner one
    replaces the outer one while it lasts. What is compiled runs eagerly meanwhile.

    Args:
        model: a module with converted layers.
        observer: takes the layer's qualified name ("" is the model itself; without the words that `torch.compile`
            and other wrappers add) and the `GradientOperand`.
    """
    layers = [(name, module) for name, module in named_modules(model) if is_converted(module)]
    before = [module.__dict__.get("fqt_observer") for _, module in layers]
    for name, module in layers:
        module.__dict__["fqt_observer"] = _Named(name, observer)
    try:
        with eagerly():
            yield
    finally:
        for (_, module), old in zip(layers, before, strict=True):
            module.__dict__.pop("fqt_observer", None)
            if old is not None:
                module.__dict__["fqt_observer"] = old
