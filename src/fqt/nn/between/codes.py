"""What is kept of a tensor for backward: flags as bits, numbers as stochastic codes in groups.

A tensor is kept in the order of its memory, in groups of 256 neighbours that share a step and an offset (float32),
as ActNN does (Chen et al. 2021, arXiv 2104.14129). Rounding is dithered: the error of an entry is uniform on one
step whatever the entry, so its variance, step²/12, is known when the codes are read. That is what makes a backward
unbiased that multiplies a kept tensor by a sum over the same tensor (`Numbers.variance`). The errors of any two
entries are independent. Steps are kept as the codes were made with them: rounding them afterwards, as ActNN, EXACT
and DIVISION do to bfloat16, biases every value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.kernels import ops
from fqt.kernels.codes import ROW, Dither, Entries, Levels, Scales, compute_dtype
from fqt.kernels.packing import pack, unpack
from fqt.kernels.rounding import DITHERED, Coding
from fqt.kernels.tensor import QuantizedTensor, RowView

GROUP = 256
"""Neighbours that share a step: 8 bytes for 256 numbers are a quarter of a bit each."""
WIDTHS = (2, 4, 8)
"""Bits of a code; dithered rounding needs two levels beside the one it rounds up to."""

_library = torch.library.Library("fqt", "FRAGMENT")
_library.define("keep_numbers(Tensor x, Tensor seed, int bits) -> (Tensor, Tensor, Tensor)")
_library.define(
    "kept_numbers(Tensor codes, Tensor step, Tensor offset, Tensor seed, int bits, SymInt n, ScalarType dtype) -> Tensor"
)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory.

    Attributes:
        shape: of the tensor.
        order: its axes from the outermost to the innermost.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Layout:
        """That of x if its memory has neither gaps nor overlaps, else row-major."""
        order = tuple(sorted(range(x.ndim), key=lambda d: -x.stride(d)))
        dense = x.permute(order).is_contiguous()
        return Layout(tuple(x.shape), order if dense else tuple(range(x.ndim)))

    def flat(self, x: Tensor) -> Tensor:
        """(numel,): a tensor of this shape in this order; a copy where it lies otherwise."""
        return x.permute(self.order).reshape(-1)

    def shaped(self, flat: Tensor) -> Tensor:
        """The inverse of `flat`."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.view([self.shape[d] for d in self.order]).permute(back)


@dataclass(frozen=True)
class Flags:
    """A boolean tensor as bits; `tensor` is (⌈numel/8⌉,) uint8."""

    layout: Layout
    tensor: Tensor

    @staticmethod
    def of(flags: Tensor) -> Flags:
        """The bits of a boolean tensor."""
        layout = Layout.of(flags)
        return Flags(layout, pack(layout.flat(flags), 1))

    def values(self) -> Tensor:
        """The boolean tensor."""
        return self.layout.shaped(unpack(self.tensor, 1, _count(self.layout)).view(torch.bool))


@dataclass(frozen=True)
class Numbers:
    """A tensor as stochastic codes of `bits` bits in groups of 256, unbiased.

    Attributes:
        layout: of the tensor.
        bits: of a code: 2, 4 or 8.
        dtype: of the values: float64 of float64, else float32.
        tensors: packed codes, step and offset of each group, seed of the dither.
    """

    layout: Layout
    bits: int
    dtype: torch.dtype
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]

    @staticmethod
    def of(x: Tensor, bits: int, seed: Tensor) -> Numbers:
        """The codes of x. A group that holds a value that is not finite comes back as NaN."""
        layout = Layout.of(x)
        make = torch.ops.fqt.keep_numbers if torch.compiler.is_compiling() else _keep
        return Numbers(layout, bits, compute_dtype(x.dtype), (*make(layout.flat(x), seed, bits), seed))

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The estimate: mean x, variance `variance()`; in a shorter dtype rounded to it."""
        read = torch.ops.fqt.kept_numbers if torch.compiler.is_compiling() else _kept
        flat = read(*self.tensors, self.bits, _count(self.layout), self.dtype)
        return self.layout.shaped(flat).to(dtype or self.dtype)

    def variance(self) -> Tensor:
        """step²/12 of each entry, of the tensor's shape: what an entry's square exceeds its estimand's by."""
        each = self.tensors[1].square().div(12).expand(-1, GROUP).reshape(-1)
        return self.layout.shaped(each[: _count(self.layout)])


def _count(layout: Layout) -> int:
    return torch.Size(layout.shape).numel()


def _coding(bits: int) -> Coding:
    return Coding("affine", Levels(0, 2**bits - 2), DITHERED)  # a code may round up once more


def _keep(flat: Tensor, seed: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    rest = -flat.numel() % GROUP
    whole = F.pad(flat, (0, rest)) if rest else flat
    if rest:
        whole[flat.numel() :] = flat[-1]  # no zero that would widen the last group's range
    found = ops.quantize(Entries(whole.view(-1, GROUP)), ROW, _coding(bits), seed.to(flat.device))
    return pack(found.codes.view(-1), bits), found.scales.step, found.scales.offset


def _kept(
    packed: Tensor, step: Tensor, offset: Tensor, seed: Tensor, bits: int, n: int, dtype: torch.dtype
) -> Tensor:
    shape = torch.Size((step.shape[0], GROUP))
    codes = unpack(packed, bits, shape.numel()).view(shape)
    entries = Entries(codes)
    noise: Dither = ops.dither(seed.to(packed.device), entries, dtype)
    view = RowView(shape, (0,))
    return QuantizedTensor(view, dtype, codes, Scales(step, offset, ROW), noise).decode().view(-1)[:n]


def _keep_shape(flat: Tensor, seed: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-flat.numel() // GROUP)
    parameters = [flat.new_empty((groups, 1), dtype=compute_dtype(flat.dtype)) for _ in range(2)]
    return flat.new_empty((groups * GROUP * bits // 8,), dtype=torch.uint8), *parameters


def _kept_shape(packed: Tensor, step: Tensor, offset: Tensor, *rest: Any) -> Tensor:
    return packed.new_empty((rest[2],), dtype=rest[3])


_library.impl("keep_numbers", _keep, "CompositeExplicitAutograd")
_library.impl("kept_numbers", _kept, "CompositeExplicitAutograd")
torch.library.register_fake("fqt::keep_numbers", _keep_shape, lib=_library)
torch.library.register_fake("fqt::kept_numbers", _kept_shape, lib=_library)
