"""What layers remember of their gradients' ranges from step to step (`fqt.kernels.ranges`).

A layer has one buffer per quantizer that remembers: `fqt_grad_input_hindsight` and the like, `RangeState.packed`.
It goes into state dicts, moves with the layer, and holds integers, so that `model.bfloat16()` does not round it. A
state dict without it, of a float model, is loaded all the same: the layer starts anew.

A call takes a copy when it runs forward; its backward pass quantizes in that, and teaches the buffer once. So a
second backward pass of one graph, or an activation checkpoint's, gives the same gradient and teaches nothing more.
A layer that is called several times in a step has one memory for all its calls. In eval mode gradients are exact:
nothing is used or taught. Processes of `DistributedDataParallel` take the first one's at every forward pass, as
they take its batch norm's statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fqt.errors import FqtError
from fqt.kernels.ranges import RANGES, Measured, RangeState
from fqt.nn.recipe import Recipe
from fqt.nn.wrappers import named_modules
from fqt.quant.quantizer import Quantizer

ROLES = ("grad_input", "grad_weight")
_ATTRIBUTE = "fqt_ranges"


def _buffer(role: str, source: str) -> str:
    return f"fqt_{role}_{source}"


_BUFFERS = tuple(_buffer(role, name) for role in ROLES for name, source in RANGES.items() if source.remembers)


@dataclass(frozen=True)
class Memory:
    """What a layer remembers, as one of its attributes.

    Attributes:
        buffers: the buffer's name of every role that remembers.
        learns: whether backward passes teach.
    """

    buffers: Mapping[str, str]
    learns: bool = True


def remembering(recipe: Recipe) -> dict[str, str]:
    """The name of the buffer of every role whose quantizer remembers a range."""
    operands = {role: recipe.operand(role) for role in ROLES}
    return {
        role: _buffer(role, q.scale.range) for role, q in operands.items() if q is not None and q.scale.remembers
    }


def attach(layer: nn.Module, recipe: Recipe) -> None:
    """Gives a layer the buffers that its recipe needs: those it has keep what they hold, others go."""
    wanted = remembering(recipe)
    for name in _BUFFERS:
        if name in layer._buffers and name not in wanted.values():
            del layer._buffers[name]
    for name in wanted.values():
        if name not in layer._buffers:
            device = next(layer.parameters(), torch.empty(0)).device
            layer.register_buffer(name, RangeState.empty(device).packed)
    layer.__dict__.pop(_ATTRIBUTE, None)
    if wanted:
        layer.__dict__[_ATTRIBUTE] = Memory(wanted)


def fit(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """Makes what is being loaded into a layer fit it, whatever recipe it was saved under."""
    for name in _BUFFERS:
        if name not in layer._buffers:
            state_dict.pop(prefix + name, None)
        elif prefix + name not in state_dict:
            state_dict[prefix + name] = RangeState.empty().packed


def remembered(model: nn.Module) -> dict[tuple[str, str], RangeState]:
    """What the layers of a model remember, by qualified name and role ("grad_input", "grad_weight"), as it is now.

    `clipped`, `entries` and `clipped_share` of each say what was clipped since the layer began; `bounds` what it is
    quantized in next. Empty where no quantizer remembers a range.
    """
    layers = [(name, module.__dict__.get(_ATTRIBUTE), module) for name, module in named_modules(model)]
    return {
        (name, role): RangeState.unpacked(module._buffers[buffer])  # type: ignore[arg-type]
        for name, memory, module in layers
        if memory is not None
        for role, buffer in memory.buffers.items()
    }


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """While it lasts, backward passes of forward passes made in it teach nothing: for measurements."""
    layers = [(m, m.__dict__[_ATTRIBUTE]) for m in model.modules() if _ATTRIBUTE in m.__dict__]
    for layer, memory in layers:
        layer.__dict__[_ATTRIBUTE] = replace(memory, learns=False)
    try:
        yield
    finally:
        for layer, memory in layers:
            layer.__dict__[_ATTRIBUTE] = memory


class Saved(NamedTuple):
    """The buffers of a model's ranges, and what they held."""

    buffers: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def of(model: nn.Module) -> Saved:
        """As they are now."""
        memories = [(m, m.__dict__[_ATTRIBUTE]) for m in model.modules() if _ATTRIBUTE in m.__dict__]
        buffers = [module.get_buffer(name) for module, memory in memories for name in memory.buffers.values()]
        return Saved(buffers, [buffer.clone() for buffer in buffers])

    def put_back(self) -> None:
        """As they were."""
        for buffer, value in zip(self.buffers, self.values, strict=True):
            buffer.copy_(value)


class Ranges:
    """One call's: the ranges as its forward pass found them, and the buffers that its backward pass teaches."""

    def __init__(self, layer: nn.Module, memory: Memory) -> None:
        self._buffers = {role: layer.get_buffer(name) for role, name in memory.buffers.items()}
        self._states = {role: RangeState.unpacked(buffer) for role, buffer in self._buffers.items()}
        self._untaught = set(self._buffers) if memory.learns else set()

    def state(self, role: str) -> RangeState | None:
        """What the gradient of a role is quantized in; None where nothing is remembered."""
        return self._states.get(role)

    def learn(self, role: str, quantizer: Quantizer, seen: Measured) -> None:
        """Teaches the role's buffer, the first time only: this may be another backward pass of the same graph."""
        if role in self._untaught:
            self._untaught.remove(role)
            buffer = self._buffers[role]
            buffer.copy_(quantizer.learned(RangeState.unpacked(buffer), seen).packed)


def check_call(where: str = "") -> None:
    """Raises FqtError where a training call cannot remember: it is part of a graph, or a function is transformed.

    Args:
        where: another place that the caller knows of.
    """
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        where = "in a traced or exported graph"
    elif torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        where = "under torch.func or in forward mode"
    if where:
        raise FqtError(
            f"a layer whose recipe remembers ranges cannot be trained {where}: call the model in eval mode, or "
            "give it a recipe with ranges of the tensor's own"
        )
