"""How far one gradient is from another, and what it looks like if it is not the one it should be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fqt.stats.passes import energy

_SAME_LINE = 1e-3  # 1 − cos² below which two gradients differ by a factor
_MOSTLY = 0.5  # of ‖a − b‖² that lies along b then: noise about a gradient of the right size does not


class Comparison:
    """How far gradients a lie from gradients b: ‖a − b‖², and how much of it lies along b."""

    def __init__(self) -> None:
        self.square = self.inner = 0.0  # ‖a − b‖², ⟨a − b, b⟩
        self.own = self.reference = self.product = 0.0  # ‖a‖², ‖b‖², ⟨a, b⟩
        self.precision = 0.0

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Takes one parameter's; gives its ‖a − b‖², float64 scalar on the CPU."""
        gap = a - b
        square = energy(gap)
        self.square += float(square)
        self.inner += _inner(gap, b)
        self.own += float(energy(a))
        self.reference += float(energy(b))
        self.product += _inner(a, b)
        self.precision = max(self.precision, torch.finfo(b.dtype).eps)
        return square

    @property
    def along(self) -> float:
        """⟨a − b, b⟩² over ‖a − b‖²‖b‖², in [0, 1]: 0 where a is b, NaN where b is 0."""
        if self.square == 0:
            return 0.0
        return self.inner**2 / (self.square * self.reference) if self.reference else math.nan

    @property
    def factor(self) -> float | None:
        """The c of a = c·b; None where no number is it."""
        if self.product**2 < (1 - _SAME_LINE) * self.own * self.reference or not self.along >= _MOSTLY:
            return None
        return self.product / self.reference

    @property
    def last_bits(self) -> float:
        """What another order of summation may make of ‖a − b‖² where a is b."""
        return (16 * self.precision) ** 2 * self.reference


def looks_like(repeated: Comparison, batches: int, left: int) -> str:
    """What gradients that are not the batches' look like, and what to do about it."""
    which, c = ("this batch" if batches == 1 else f"these {batches} batches"), repeated.factor
    if c is not None:
        ways = ["scaled (pass scale=)", "clipped (call Monitor.step before clipping)"]
        if batches > 1:
            ways.append('summed where reduction says averaged, or the reverse (pass reduction="sum" or "mean")')
        return f"the gradients are {c:.6g} times those of {which}: they were {', or '.join(ways)}"
    if left:
        return (
            f"the gradients are not those of {which}, and {left} more forward passes were seen in this step: pass "
            "all batches that were accumulated, Monitor.step(first, second, …)"
        )
    return (
        f"the gradients are not those of {which}: look for a missing zero_grad(), clipping entry by entry, "
        "averaging over workers, a communication hook that changes them, and a loss_fn, targets, autocast or "
        "random numbers other than training's"
    )


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
