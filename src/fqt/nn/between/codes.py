"""What is kept of a tensor for backward: flags as bits, numbers as stochastic codes in groups.

A tensor is kept in the order of its memory, in groups of 256 neighbours that share a step and an offset, as ActNN
does (Chen et al. 2021, arXiv 2104.14129). Rounding is dithered (`fqt.kernels.kept`): the variance of every entry is
known when the codes are read, which is what makes a backward unbiased that multiplies a kept tensor by a sum over
the same tensor. Steps stay as the codes were made with them: rounding them afterwards to bfloat16, as ActNN, EXACT
and DIVISION do, biases every value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fqt.kernels import kept
from fqt.kernels.codes import compute_dtype
from fqt.kernels.kept import GROUP, Codes
from fqt.kernels.packing import unpack

WIDTHS = (2, 4, 8)
"""Bits of a code; dithered rounding needs two levels beside the one it rounds up to."""

_library = torch.library.Library("fqt", "FRAGMENT")
_library.define("keep_numbers(Tensor x, Tensor seed, int bits) -> (Tensor, Tensor, Tensor)")
_library.define(
    "kept_numbers(Tensor packed, Tensor step, Tensor offset, Tensor seed, int bits, SymInt n) -> Tensor"
)
_library.define("pack(Tensor numbers, int bits) -> Tensor")
_library.define("unpack(Tensor packed, int bits, SymInt n) -> Tensor")


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
        order = tuple(sorted(range(x.ndim), key=lambda d: x.stride(d), reverse=True))
        dense = x.permute(order).is_contiguous()
        return Layout(tuple(x.shape), order if dense else tuple(range(x.ndim)))

    @property
    def count(self) -> int:
        """How many entries."""
        return torch.Size(self.shape).numel()

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
        return Flags(layout, packed(layout.flat(flags), 1))

    @staticmethod
    def positive(x: Tensor) -> Flags:
        """Where a ReLU of x lets the gradient through."""
        layout = Layout.of(x)
        if torch.compiler.is_compiling():
            return Flags.of(~(x <= 0))
        return Flags(layout, kept.positive(layout.flat(x)))

    def values(self) -> Tensor:
        """The boolean tensor."""
        return self.layout.shaped(unpacked(self.tensor, 1, self.layout.count).bool())

    def gate(self, grad: Tensor) -> Tensor:
        """The gradient where a flag is set, zeros elsewhere."""
        if torch.compiler.is_compiling():
            return torch.where(self.values(), grad, 0.0)
        return self.layout.shaped(kept.gate(self.layout.flat(grad), self.tensor))


@dataclass(frozen=True)
class Numbers:
    """A tensor as stochastic codes of `bits` bits in groups of 256, unbiased.

    Attributes:
        layout: of the tensor.
        codes: in the order of memory.
    """

    layout: Layout
    codes: Codes

    @staticmethod
    def of(x: Tensor, bits: int, seed: Tensor) -> Numbers:
        """The codes of x. A group that holds a value that is not finite comes back as NaN."""
        layout = Layout.of(x)
        if not torch.compiler.is_compiling():
            return Numbers(layout, Codes.of(layout.flat(x), bits, seed))
        packed, step, offset = torch.ops.fqt.keep_numbers(layout.flat(x), seed, bits)
        return Numbers(layout, _Traced(packed, step, offset, seed, bits, layout.count))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is to be saved."""
        return self.codes.packed, self.codes.step, self.codes.offset, self.codes.seed

    @staticmethod
    def again(layout: Layout, bits: int, *tensors: Tensor) -> Numbers:
        """From what was saved."""
        kind = _Traced if torch.compiler.is_compiling() else Codes
        return Numbers(layout, kind(*tensors, bits=bits, n=layout.count))  # type: ignore[arg-type,misc]

    @property
    def dtype(self) -> torch.dtype:
        """Of the values: float64 of float64, else float32."""
        return self.codes.step.dtype

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The estimate: mean x, variance `variance()`; in a shorter dtype rounded to it."""
        return self.layout.shaped(self.codes.values()).to(dtype or self.dtype)

    def variance(self) -> Tensor:
        """step²/12 of each entry, of the tensor's shape: what an entry's square exceeds its estimand's by."""
        return self.layout.shaped(self.codes.variance())

    def times(self, grad: Tensor) -> Tensor:
        """The product with a gradient, in its dtype."""
        return self.layout.shaped(chosen(kept.times)(self.layout.flat(grad), self.codes))

    def batch_norm(self, grad: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> kept.Gradients:
        """`fqt.kernels.kept.batch_norm` of an input (N, C, *)."""
        inner = torch.Size(
            self.layout.shape[d] for d in self.layout.order[self.layout.order.index(1) + 1 :]
        ).numel()
        d_x, *rest = chosen(kept.batch_norm)(self.layout.flat(grad), self.codes, mean, rstd, weight, inner)
        return self.layout.shaped(d_x), *rest

    def row_norm(self, grad: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None) -> kept.Gradients:
        """`fqt.kernels.kept.row_norm` of a contiguous input."""
        d_x, *rest = chosen(kept.row_norm)(self.layout.flat(grad), self.codes, mean, rstd, weight)
        return self.layout.shaped(d_x), *rest


class _Traced(Codes):
    """The same in a compiled graph, which holds an op in place of what makes the noise."""

    def values(self) -> Tensor:
        """As `Codes.values`."""
        return torch.ops.fqt.kept_numbers(self.packed, self.step, self.offset, self.seed, self.bits, self.n)


def packed(numbers: Tensor, bits: int) -> Tensor:
    """`fqt.kernels.packing.pack`; one op in a compiled graph, whose code for bytes is slow."""
    if torch.compiler.is_compiling():
        return torch.ops.fqt.pack(numbers.to(torch.uint8), bits)
    return kept.pack(numbers.view(torch.uint8), bits)


def unpacked(numbers: Tensor, bits: int, n: int) -> Tensor:
    """`fqt.kernels.packing.unpack`, in the same way."""
    return (torch.ops.fqt.unpack if torch.compiler.is_compiling() else unpack)(numbers, bits, n)


def chosen(operation: Any) -> Any:
    """What an operation means, where a compiler is to see it; else the fastest that there is."""
    return operation.reference if torch.compiler.is_compiling() else operation


def _keep(x: Tensor, seed: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    found = Codes.of(x, bits, seed)
    return found.packed, found.step, found.offset


def _kept(packed: Tensor, step: Tensor, offset: Tensor, seed: Tensor, bits: int, n: int) -> Tensor:
    return Codes(packed, step, offset, seed, bits, n).values()


def _keep_shape(x: Tensor, seed: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-x.numel() // GROUP)
    step, offset = (x.new_empty((groups, 1), dtype=compute_dtype(x.dtype)) for _ in range(2))
    return x.new_empty((groups * GROUP * bits // 8,), dtype=torch.uint8), step, offset


def _kept_shape(packed: Tensor, step: Tensor, offset: Tensor, seed: Tensor, bits: int, n: int) -> Tensor:
    return step.new_empty((n,))


def _unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    return unpack(packed, bits, n).clone()  # of 8 bits it is a part of what it is given


def _pack_shape(numbers: Tensor, bits: int) -> Tensor:
    return numbers.new_empty((-(-numbers.numel() * bits // 8),))


def _pack(numbers: Tensor, bits: int) -> Tensor:
    return kept.pack(numbers, bits).clone() if bits == 8 else kept.pack(numbers, bits)


def _unpack_shape(packed: Tensor, bits: int, n: int) -> Tensor:
    return packed.new_empty((n,))


for _name, _run, _shape in (
    ("keep_numbers", _keep, _keep_shape),
    ("kept_numbers", _kept, _kept_shape),
    ("pack", _pack, _pack_shape),
    ("unpack", _unpack, _unpack_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fqt::{_name}", _shape, lib=_library)
