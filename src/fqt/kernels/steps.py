"""Steps as formats store them: what a block's largest magnitude becomes on symmetric scales.

A stored step is coarser than a float, so that it is chosen not too small: no value is clipped, whatever the
rounding of the step, but by "correctable" steps, which are meant to clip. A new way is one class here; `STORES` has
them by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fqt.kernels.codes import LEAST_STEP, Levels

E4M3 = Levels(0, 448 * 512, 3)
"""The numbers of E4M3, in units of its least, 2⁻⁹."""


def divided(x: Tensor, by: float) -> Tensor:
    """x/by to the nearest float on every device: on a GPU torch multiplies by the inverse of a Python number."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


@dataclass(frozen=True)
class Store:
    """One way to store steps.

    Attributes:
        name: as `Scale` has it.
        bits: of one step.
        common: bits that all steps of a tensor share.
        few: whether the steps of a tensor take at most 16 values but 0, so that a product can gather equal ones.
    """

    name: ClassVar[str]
    bits: ClassVar[int] = 32
    common: ClassVar[int] = 0
    few: ClassVar[bool] = False

    def steps(self, magnitude: Tensor, highest: int) -> Tensor:
        """The steps of blocks with these largest magnitudes, any one shape, for levels up to `highest`."""
        raise NotImplementedError

    def packed(self, step: Tensor) -> Tensor:
        """float32 steps of any shape as bytes, uint8: `bytes_packed` of them."""
        return step.reshape(-1).view(torch.uint8)

    def unpacked(self, data: Tensor, shape: torch.Size) -> Tensor:
        """The steps that `packed` has made bytes of."""
        return data.view(torch.float32).view(shape)

    def bytes_packed(self, count: int) -> int:
        """How many bytes `packed` makes of so many steps."""
        return 4 * count

    def code_share(self, blocks: int) -> float:
        """Of the bits that a code can take, how many the codes of so many blocks do take."""
        return 1.0


@dataclass(frozen=True)
class Float32(Store):
    """A float32 per block; its steps are `ops.parameters`'."""

    name: ClassVar[str] = "float32"


@dataclass(frozen=True)
class Power(Store):
    """The least power of two that is not below max|x|/highest (E8M0, MX formats)."""

    name: ClassVar[str] = "power"
    bits: ClassVar[int] = 8

    def steps(self, magnitude: Tensor, highest: int) -> Tensor:
        """Powers of two."""
        mantissa, exponent = torch.frexp(divided(magnitude, highest).clamp(min=LEAST_STEP))
        return torch.ldexp(torch.ones_like(magnitude), exponent - (mantissa == 0.5).int())

    def packed(self, step: Tensor) -> Tensor:
        """The exponent, as E8M0 has it, with 0 for a step of 0 and 255 for NaN."""
        return (step.reshape(-1).view(torch.int32) >> 23 & 255).to(torch.uint8)

    def unpacked(self, data: Tensor, shape: torch.Size) -> Tensor:
        """The powers of two."""
        step = (data.to(torch.int32) << 23).view(torch.float32)
        return torch.where(data == 255, torch.nan, step).view(shape)

    def bytes_packed(self, count: int) -> int:
        """One each."""
        return count


@dataclass(frozen=True)
class SmallFloat(Store):
    """s·g: one float32 g = M/(largest·highest·room) for the tensor, M its largest value, and the E4M3 number s
    nearest to max|x|/(highest·room·g) for each block.

    Attributes:
        largest: what s is for the block that holds M.
        room: below 1, the part of the range of codes that the largest values take before s is rounded.
        clips: whether a rounded s may clip; else it is rounded up where it would.
    """

    bits: ClassVar[int] = 8
    common: ClassVar[int] = 32
    largest: ClassVar[int]
    room: ClassVar[float]
    clips: ClassVar[bool]

    def unit(self, magnitude: Tensor, highest: int) -> Tensor:
        """The step that E4M3's least number stands for: a scalar."""
        whole = magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())
        return divided(whole, self.largest * highest * self.room).clamp(min=LEAST_STEP) / 512

    def steps(self, magnitude: Tensor, highest: int) -> Tensor:
        """E4M3 numbers times the unit."""
        unit = self.unit(magnitude, highest)
        whole = unit * 512
        t = (divided(magnitude, highest * self.room) / whole) * 512
        gap = E4M3.gap(t)
        step = E4M3.nearest(t)
        if self.clips:
            step = torch.where(magnitude > 0, step.clamp(min=1), step)
        else:
            step = torch.where(step * whole * highest < magnitude * 512, step + gap, step)
        return step.clamp(max=E4M3.high) * unit


@dataclass(frozen=True)
class HeadRoom(SmallFloat):
    """With head-room 16/17, which is what rounding s may take away (NVFP4 as Quartet II has it).

    Below the least normal number of E4M3 rounding may take more: there s is rounded up where it would clip.
    """

    name: ClassVar[str] = "e4m3"
    largest: ClassVar[int] = 448
    room: ClassVar[float] = 16 / 17
    clips: ClassVar[bool] = False

    def packed(self, step: Tensor) -> Tensor:
        """The largest step as float32, then each as an E4M3 number: to two roundings of float32."""
        largest = step.amax() if step.numel() else step.new_zeros(())
        small = (step.reshape(-1) / self._whole(largest)).to(torch.float8_e4m3fn)
        return torch.cat([largest.view(1).view(torch.uint8), small.view(torch.uint8)])

    def unpacked(self, data: Tensor, shape: torch.Size) -> Tensor:
        """The numbers times what 1 stands for."""
        whole = self._whole(data[:4].clone().view(torch.float32)[0])
        return (data[4:].view(torch.float8_e4m3fn).float() * whole).view(shape)

    def bytes_packed(self, count: int) -> int:
        """One each, and 4 of the tensor."""
        return count + 4

    def _whole(self, largest: Tensor) -> Tensor:
        """The step that E4M3's 1 stands for: the largest step is its largest number, or all are about the least."""
        return divided(largest, self.largest).clamp(min=LEAST_STEP)


@dataclass(frozen=True)
class Correctable(SmallFloat):
    """For rounding that corrects steps afterwards (MS-EDEN): 7 % smaller, so that the largest values of a block may
    be clipped, and at most 256 in E4M3, so that a correction may raise them."""

    name: ClassVar[str] = "correctable"
    largest: ClassVar[int] = 256
    room: ClassVar[float] = 16 / 17 / 0.93
    clips: ClassVar[bool] = True


@dataclass(frozen=True)
class Shift(Store):
    """M/highest · 2^(−k), M the tensor's largest value, k from 0 to 15 the largest that clips nothing (ShiftQuant).

    Its steps are less than twice as large as they had to be, down to 2⁻¹⁵ of the largest.
    """

    name: ClassVar[str] = "shift"
    few: ClassVar[bool] = True
    bits: ClassVar[int] = 4
    common: ClassVar[int] = 32

    def steps(self, magnitude: Tensor, highest: int) -> Tensor:
        """Power-of-two parts of one step."""
        whole = magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())
        (most, exponent), (mine, below) = torch.frexp(whole), torch.frexp(magnitude)
        shift = (exponent - below - (mine > most).int()).clamp(0, (1 << self.bits) - 1)
        return torch.ldexp(divided(whole, highest).expand(magnitude.shape), -shift).clamp(min=LEAST_STEP)


@dataclass(frozen=True)
class Fallback(Store):
    """Two codes for the quarter of the blocks (rounded up) with the largest values, one for all others.

    The levels are those of pairs of codes ±c, high = c·(2c + 1): a block with one code has 2c + 1 times the step,
    and reaches no further than c. Published is a threshold that follows a target share of 0.1 to 0.3 over the steps
    of training; here the share is kept exactly, and nothing between calls.
    """

    name: ClassVar[str] = "fallback"
    bits: ClassVar[int] = 33  # and whether the block has two codes

    def steps(self, magnitude: Tensor, highest: int) -> Tensor:
        """max|x| over c·(2c + 1) or over c."""
        coarse = (1 + math.isqrt(8 * highest + 1)) // 2
        order = magnitude.flatten().argsort(descending=True, stable=True)
        two = torch.zeros_like(order, dtype=torch.bool)
        two[order[: -(-order.numel() // 4)]] = True
        factor = torch.where(two.view(magnitude.shape), 1.0, float(coarse)).to(magnitude.dtype)
        return (divided(magnitude, highest) * factor).clamp(min=LEAST_STEP)

    def code_share(self, blocks: int) -> float:
        """The first code of all, the second of a quarter."""
        return (1 + -(-blocks // 4) / blocks) / 2 if blocks else 1.0


STORES: dict[str, Store] = {
    store.name: store for store in (Float32(), Power(), HeadRoom(), Correctable(), Shift(), Fallback())
}


def stored_step(lo: Tensor, hi: Tensor, highest: int, store: str) -> Tensor:
    """The steps of symmetric blocks as a format stores them.

    Args:
        lo, hi: the blocks' ranges.
        highest: the highest level.
        store: a name in `STORES`, not "float32".

    Returns:
        Of lo's shape and dtype; 0 where a block is zero; NaN where its range is not finite, and everywhere if one
        is not and all steps are parts of one.
    """
    magnitude, way = torch.maximum(lo.abs(), hi.abs()), STORES[store]
    finite = torch.isfinite(magnitude)
    if way.common:
        finite = finite & finite.all()
    step = way.steps(magnitude, highest)
    return torch.where(finite, torch.where(magnitude == 0, 0.0, step), torch.nan)
