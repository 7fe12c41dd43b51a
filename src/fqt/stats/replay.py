"""The forward passes of a training step, and how to make them again.

A pass is known by what the model was given. Made again with the same tensors it starts from the random state that
it started from in training, and so draws the same masks of dropout and the same rounding noise: the gradient comes
back bit for bit where the arithmetic is deterministic. Given other tensors it is another pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fqt.nn.ranges import Saved
from fqt.stats.passes import tensors

__all__ = ["Passes", "Replayed"]


@dataclass(frozen=True)
class _Pass:
    """One forward pass: the random states and remembered ranges it began from, and the tensors it was given."""

    random: Tensor
    devices: list[Tensor]
    inputs: list[Tensor]
    ranges: Saved

    def resume(self) -> None:
        """Random numbers and ranges from here on are those of the pass."""
        self.ranges.put_back()
        torch.set_rng_state(self.random)
        if self.devices:
            torch.cuda.set_rng_state_all(self.devices)


@dataclass
class Replayed:
    """How passes made again compare with those recorded.

    Attributes:
        unknown: passes given tensors that no recorded pass was given.
        left: recorded passes that were not made again.
    """

    unknown: int = 0
    left: int = 0


class Passes:
    """Records a model's forward passes while `recording`, and lets them be made again.

    Only passes in training mode with gradients enabled count. A recorded pass holds its input tensors, which as a
    rule are alive anyway, until `clear`. Tensors are looked for in lists, tuples and dicts; a pass without any is
    taken for the next recorded one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.recording = False
        self._passes: list[_Pass] = []
        self._unused: list[_Pass] | None = None  # a list while passes are made again
        self._found = Replayed()
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def __bool__(self) -> bool:
        return bool(self._passes)

    def close(self) -> None:
        """Takes the hook off the model."""
        self._hook.remove()

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._passes = []

    def begin(self) -> None:
        """Random numbers from here on are those of the first recorded pass."""
        self._passes[0].resume()

    @contextmanager
    def again(self) -> Iterator[Replayed]:
        """While it lasts, a pass with a recorded one's inputs draws that one's random numbers, each used once."""
        self._unused, self._found = list(self._passes), Replayed()
        self.begin()
        try:
            yield self._found
        finally:
            self._found.left, self._unused = len(self._unused), None

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if self._unused is not None:
            self._resume(tensors([args, kwargs]))
        elif self.recording:
            devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
            inputs = [t.detach() for t in tensors([args, kwargs])]
            self._passes.append(_Pass(torch.get_rng_state(), devices, inputs, Saved.of(model)))

    def _resume(self, inputs: list[Tensor]) -> None:
        assert self._unused is not None
        for index, recorded in enumerate(self._unused):
            if _same(recorded.inputs, inputs):
                recorded.resume()
                del self._unused[index]
                return
        self._found.unknown += 1


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(_equal, a, b))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN included; yes where torch cannot compare them."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    try:
        if torch.equal(a, b):
            return True
        return bool(((a == b) | ((a != a) & (b != b))).all())
    except (RuntimeError, NotImplementedError):  # layouts that have no comparison
        return True
