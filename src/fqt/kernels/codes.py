"""What the operations take and give: a matrix's entries, the numbers they become, and what turns these back."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fqt.errors import FqtError

DITHER_LEVELS = 1 << 24
LEAST_STEP = 2.0**-126


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which steps and codes are computed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_power_of_two(n: object) -> bool:
    """Whether it is an int that a Hadamard matrix can have as its size."""
    return type(n) is int and n > 0 and not n & (n - 1)


def at_hand(x: Tensor) -> bool:
    """Whether asking for x's values costs nothing: it is on the CPU, and neither traced nor batched."""
    return type(x) is Tensor and x.is_cpu and torch._C._functorch.maybe_current_level() is None


@dataclass(frozen=True)
class Entries:
    """What is quantized.

    Attributes:
        matrix: (N, D), any real floating dtype.
        factor: (P,) in the compute dtype, P a divisor of D: column j is multiplied by factor[j mod P] on the way;
            None is 1.
        transposed: whether the matrix lies on its side: its columns are the quantizer's rows.
        period: the last axis' length of the tensor whose matrix it is: the runs of neighbours within a row; 0 is
            the whole row.
    """

    matrix: Tensor
    factor: Tensor | None = None
    transposed: bool = False
    period: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def wide(self) -> Tensor:
        """The matrix in its compute dtype."""
        return self.matrix.to(compute_dtype(self.matrix.dtype))

    def values(self) -> Tensor:
        """(N, D) in the compute dtype, the factor applied."""
        x = self.wide()
        if self.factor is None or not self.factor.numel():  # no factors: no columns
            return x
        return x * self.factor.repeat(x.shape[1] // self.factor.numel())


@dataclass(frozen=True)
class Blocks:
    """Who shares a step: the entries of a block of `rows` × `columns` of the matrix; 0 stands for all of them.

    Blocks begin at the first row and column; the last of an axis are shorter where their size does not divide it.
    """

    rows: int
    columns: int

    @property
    def plain(self) -> bool:
        """Whether a parameter per block broadcasts against the matrix: one for all, per row or per column."""
        return self in (TENSOR, ROW, COLUMN)

    @property
    def turned(self) -> Blocks:
        """The blocks of the transposed matrix."""
        return Blocks(self.columns, self.rows)

    def count(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many blocks there are along each axis of a matrix of this shape."""
        (n, d), count = shape, lambda length, size: -(-length // size) if size else 1
        return count(n, self.rows), count(d, self.columns)

    def spread(self, parameter: Tensor, shape: tuple[int, int]) -> Tensor:
        """A parameter per block so that it broadcasts against a matrix of this shape."""
        for axis, size in enumerate((self.rows, self.columns)):
            if size > 1:
                parameter = parameter.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
        return parameter

    def sizes(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """How many entries each block has, float64, of a parameter's shape or broadcasting to it."""
        each = []
        for length, size, count in zip(shape, (self.rows, self.columns), self.count(shape), strict=True):
            part = torch.full((count,), float(size or length), dtype=torch.float64, device=device)
            if size and count:
                part[-1:].fill_(length - size * (count - 1))
            each.append(part)
        return each[0][:, None] * each[1]

    def sums(self, x: Tensor) -> Tensor:
        """Σ over each block of a matrix (N, D), of a parameter's shape."""
        if not self.plain:
            return self.cut(x, 0).sum((1, 3))
        dims = [d for d, size in enumerate((self.rows, self.columns)) if size == 0]
        return x.sum(dims, keepdim=True)

    def cut(self, x: Tensor, fill: float) -> Tensor:
        """(blocks down, rows, blocks across, columns) of a matrix (N, D), short blocks filled up."""
        down, across = self.count((x.shape[0], x.shape[1]))
        rows, columns = self.rows or x.shape[0], self.columns or x.shape[1]
        more = (0, across * columns - x.shape[1], 0, down * rows - x.shape[0])
        if not x.numel():  # torch 2.8 pads nothing that is empty
            x = x.new_full((down * rows, across * columns), fill)
        elif any(more):
            x = torch.nn.functional.pad(x, more, value=fill)
        return x.reshape(down, rows, across, columns)


TENSOR, ROW, COLUMN = Blocks(0, 0), Blocks(1, 0), Blocks(0, 1)


@dataclass(frozen=True)
class Levels:
    """The numbers that can be stored, in units of a step: a code is its number.

    Attributes:
        low, high: the least and the greatest.
        mantissa: None if every integer between is one. Else those that a float with so many bits after its leading
            one holds: every integer up to 2^(mantissa + 1), then twice as far apart with every power of two.
        table: instead of either, the magnitudes themselves, from 0 up to `high` and mirrored: a tuple of float32
            numbers whose differences are float32 numbers too. Integers that fit a byte are multiplied as such.

    Raises:
        FqtError: says what is wrong with them.
    """

    low: int
    high: int
    mantissa: int | None = None
    table: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if type(self.low) is not int or type(self.high) is not int or not self.low < self.high:
            raise FqtError(f"levels go from an integer up to a larger one, not from {self.low!r} to {self.high!r}")
        if self.table is not None:
            self._check(self.table)

    def _check(self, table: tuple[float, ...]) -> None:
        numbers = isinstance(table, tuple) and all(isinstance(x, int | float) for x in table) and len(table) > 1
        if not numbers or table[0] != 0 or any(a >= b for a, b in pairwise(table)):
            raise FqtError(f"a table of levels is a tuple of rising magnitudes from 0 on, not {table!r}")
        if (table[-1], -table[-1]) != (self.high, self.low):
            raise FqtError(
                f"a table up to {table[-1]} has levels from {self.low} to {self.high}: make them ± its last"
            )
        if not all(map(_is_float32, (*table, *(b - a for a, b in pairwise(table))))):
            raise FqtError("a table's levels and their differences must be float32 numbers: round them")

    @property
    def uniform(self) -> bool:
        """Whether neighbours are one apart everywhere."""
        return self.mantissa is None and self.table is None

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: a byte where they fit one; else float32, which holds each of them exactly."""
        if self.table is not None and any(level % 1 for level in self.table):
            return torch.float32
        if self.low >= 0 and self.high <= 255:
            return torch.uint8
        return torch.int8 if self.low >= -128 and self.high <= 127 else torch.float32

    @property
    def numbers(self) -> tuple[float, ...]:
        """All of them, the least first."""
        if self.uniform:
            return tuple(range(self.low, self.high + 1))
        above = self.table or self._magnitudes()
        return (*(-number for number in reversed(above[1:])), *above)

    def _magnitudes(self) -> tuple[float, ...]:
        """Of a float's numbers, from 0 up."""
        assert self.mantissa is not None
        found = [0]
        while found[-1] < self.high:
            found.append(found[-1] + (1 << max(found[-1].bit_length() - 1 - self.mantissa, 0)))
        return tuple(found)

    def gap(self, t: Tensor) -> Tensor | float:
        """How far apart the neighbours of a position are, t between them; at a level those further from zero.

        At the last level those that are there.
        """
        if self.table is not None:
            return self._looked_up(t)[1]
        if self.mantissa is None:
            return 1.0
        _, exponent = torch.frexp(t)  # |t| in [2^(exponent − 1), 2^exponent)
        last = (self.high - 1).bit_length()  # of the numbers below the highest
        return torch.ldexp(torch.ones_like(t), (exponent.clamp(max=last) - 1 - self.mantissa).clamp(min=0))

    def split(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """The level at or below t, the fraction of the way to the next one, and the gap between the two."""
        if self.table is not None:
            level, apart = self._looked_up(t)
            return level, (t - level) / apart, apart
        gap = self.gap(t)
        below = t.floor() if self.mantissa is None else (t / gap).floor() * gap
        return below, (t - below) / gap, gap

    def nearest(self, t: Tensor) -> Tensor:
        """The nearer of t's neighbours; of two as near the even number, of a table's the one below."""
        if self.table is not None:
            below, fraction, apart = self.split(t)
            return below + apart * (fraction > 0.5)
        gap = self.gap(t)
        return (t / gap).round() * gap

    def _looked_up(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The level of the table at or below t, and the gap as `gap` has it."""
        assert self.table is not None
        # Not torch.tensor: a GPU would make the host wait for the copy.
        levels = torch.stack([torch.full((), level, dtype=t.dtype, device=t.device) for level in self.table])
        size = t.abs()
        place = (torch.searchsorted(levels, size.contiguous(), right=True) - 1).clamp(0, levels.numel() - 2)
        inner, outer = levels[place], levels[place + 1]
        below = torch.where((size == inner) | (size == outer), t, torch.where(t < 0, -outer, inner))
        return below, outer - inner


def _is_float32(x: float) -> bool:
    try:
        return struct.unpack("f", struct.pack("f", x))[0] == x
    except OverflowError:
        return False


def range_of(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the greatest code that a byte of this dtype holds."""
    return (-128, 127) if dtype == torch.int8 else (0, 255)


@dataclass(frozen=True)
class Scales:
    """What turns codes into values: value = step · code + offset.

    Attributes:
        step, offset: one number per block, in the compute dtype. A step of 0 marks a constant block, NaN one that
            holds a value that is not finite.
        blocks: which entries share them.
    """

    step: Tensor
    offset: Tensor
    blocks: Blocks

    def spread(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Step and offset so that they broadcast against a matrix of this shape."""
        if self.blocks.plain:
            return self.step, self.offset
        return self.blocks.spread(self.step, shape), self.blocks.spread(self.offset, shape)


@dataclass(frozen=True)
class Dither:
    """What dithered rounding added to the positions before it rounded down, in steps.

    `value = step · (code + centre − row − column) + offset`, whose errors have mean zero.

    Attributes:
        row: (N, 1), one number in [0, 1) per row of the matrix, a multiple of 2⁻²⁴.
        column: (1, D), one per column.
        half: ½; or a scalar tensor that is ½ where dithered rounding was taken, and 0, like row and column, where
            another was.
    """

    row: Tensor
    column: Tensor
    half: float | Tensor = 0.5

    @property
    def centre(self) -> float | Tensor:
        """½ less half a level of the noise."""
        return self.half * (1.0 - 1.0 / DITHER_LEVELS)

    def where(self, taken: Tensor) -> Dither:
        """The same if `taken`, else none."""
        half = torch.where(taken, 0.5, 0.0).to(self.row.dtype)
        return Dither(torch.where(taken, self.row, 0.0), torch.where(taken, self.column, 0.0), half)


@dataclass(frozen=True)
class Findings:
    """What a quantizer's pass over a tensor found out for others that read the same tensor.

    Attributes:
        range: the least and the greatest of all entries; None if no pass found them.
        sums: (channels,) float64, the sums of the values over all but the last axis, as `ops.value_sums`; None if
            no pass found them.
        channels: the length of the last axis if its sums are wanted, else 0.
        parts: (parts,) float32 each, the least and the greatest entries of parts that cover the tensor, where a
            range is not to be waited for; None if no pass found them.
    """

    range: tuple[float, float] | None = None
    sums: Tensor | None = None
    channels: int = 0
    parts: tuple[Tensor, Tensor] | None = None


class Quantized(NamedTuple):
    """A matrix as codes.

    Attributes:
        codes: (N, D).
        scales: what they mean.
        dither: what is taken off a code before that; None without.
        findings: what was known, and what the pass found out beside it.
    """

    codes: Tensor
    scales: Scales
    dither: Dither | None = None
    findings: Findings | None = None
