"""Scale: who shares a step, and where the codes' origin lies. Grid: which codes there are.

From a group's range [lo, hi] and a number of steps n (B = 2^b − 1, one less with dither):

    affine      offset = lo, step = (hi − lo)/n                     codes 0 … B
    zero        the same with 0 exactly on a code: offset = −z·step, z an integer      codes 0 … B
    symmetric   offset = 0, step = max(|lo|, |hi|)/(2^(b−1) − 1)    codes −(2^(b−1) − 1) … 2^(b−1) − 1

A constant group gets step 0 and offset lo (symmetric: step |lo|, code ±1), so that it comes back bit for bit.
Nothing is ever clipped: an absolute epsilon, the usual remedy against a zero range, was rejected because it is
a no-op for large values and swamps small ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.errors import FqtError

GROUPS = ("tensor", "row", "column")
MODES = ("affine", "zero", "symmetric")
AXES = ("sample", "token", "channel")
_LEAST_STEP = 2.0**-126


@dataclass(frozen=True)
class Scale:
    """Who shares a step, and where zero lies.

    Attributes:
        group: "tensor", "row" or "column" of the matrix that is quantized.
        mode: "affine", "zero" (affine with zero on a code) or "symmetric".
        axis: what a layer takes as rows: "sample", "token" (every position of a sequence or an image) or
            "channel" (the output channel); None for the operand's own habit. It says nothing for a matrix.
    """

    group: str = "row"
    mode: str = "affine"
    axis: str | None = None

    def __post_init__(self) -> None:
        for field, value, known in (("group", self.group, GROUPS), ("mode", self.mode, MODES)):
            if value not in known:
                raise FqtError(f"unknown scale {field} {value!r}; known: {', '.join(known)}")
        if self.axis is not None and self.axis not in AXES:
            raise FqtError(f"unknown axis {self.axis!r}; known: {', '.join(AXES)}")


@dataclass(frozen=True)
class Integers:
    """The uniform integer grid of `bits` bits, 2 to 8."""

    bits: int = 8

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in range(2, 9):
            raise FqtError(f"{self.bits!r} bits: this grid has 2 to 8")

    @property
    def affine_steps(self) -> int:
        """B = 2^b − 1, the last unsigned code."""
        return 2**self.bits - 1

    @property
    def symmetric_steps(self) -> int:
        """2^(b−1) − 1, the last signed code; −2^(b−1) is not used, so that the grid is symmetric."""
        return int(2 ** (self.bits - 1)) - 1


def parameters(lo: Tensor, hi: Tensor, mode: str, steps: int) -> tuple[Tensor, Tensor]:
    """Step and offset of each group.

    Args:
        lo, hi: the groups' ranges, any one shape, float32 or float64.
        mode: as in `Scale`.
        steps: how many steps the range is divided into (symmetric: its positive half).

    Returns:
        (step, offset) of lo's shape and dtype. Steps of groups that are not constant are at least 2⁻¹²⁶.
        NaN steps where the range is not finite.
    """
    if mode == "symmetric":
        magnitude = torch.maximum(lo.abs(), hi.abs())
        step = torch.where(lo == hi, magnitude, (magnitude / steps).clamp(min=_LEAST_STEP))
        offset = torch.zeros_like(lo)
    elif mode == "affine":
        step, offset = _affine_step(lo, hi, steps), lo
    else:
        step, offset = _zero_on_code(lo, hi, steps)
    if mode != "symmetric":
        constant = lo == hi
        step = torch.where(constant, 0.0, step)
        offset = torch.where(constant, lo, offset)
    finite = torch.isfinite(lo) & torch.isfinite(hi)
    return torch.where(finite, step, torch.nan), torch.where(finite, offset, 0.0)


def _affine_step(lo: Tensor, hi: Tensor, steps: int) -> Tensor:
    half = torch.where(hi * 0.5 - lo * 0.5 > torch.finfo(lo.dtype).max / 4, 0.5, 1.0).to(lo.dtype)
    return ((hi * half - lo * half) / steps / half).clamp(min=_LEAST_STEP)


def _zero_on_code(lo: Tensor, hi: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The integer zero code z, of the two nearest to −lo/step, that widens the step less.

    The step's last eight mantissa bits are cleared (rounding up), so that z·step is exact and zero itself
    lands exactly on code z.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    floor = (-lo / _affine_step(lo, hi, steps)).floor()

    # A side that holds values needs a code of its own.
    least, most = (lo < 0).to(lo.dtype), steps - (hi > 0).to(lo.dtype)
    below_, above_ = floor.clamp(least, most), (floor + 1).clamp(least, most)

    def widened(z: Tensor) -> Tensor:
        below = torch.where(lo < 0, -lo / z, 0.0)
        above = torch.where(hi > 0, hi / (steps - z), 0.0)
        return torch.maximum(below, above)

    z = torch.where(widened(below_) <= widened(above_), below_, above_)
    largest = torch.finfo(lo.dtype).max
    step = widened(z).clamp(_LEAST_STEP, largest * (1 - 2**-15))  # the next line may widen, not overflow
    bits = step.view(torch.int32 if step.dtype == torch.float32 else torch.int64)
    step = ((bits + 0xFF) & ~0xFF).view(step.dtype)
    return step, torch.where(z == 0, 0.0, (-z * step).clamp(min=-largest))
