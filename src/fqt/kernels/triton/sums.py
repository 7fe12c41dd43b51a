"""Sums over rows, columns and blocks, the same in every run: programs leave partial sums, and none is atomic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.codes import Entries, Findings, Levels, Scales
from fqt.kernels.triton.device import launch, takes
from fqt.kernels.triton.encode import CODES, takes_code_variance, variance
from fqt.kernels.triton.levels import even, levels_of, near, position, whole
from fqt.kernels.triton.source import VALUES, parameter, parameter_of, source_of, values
from fqt.kernels.triton.tiling import Tiling, entries, place, result

_TILE = {"R": 32, "C": 128}
_PROGRAMS = 1024
_LONGEST = 256  # values that are added in float32, and codes in int32


def _spans(shape: tuple[int, int]) -> tuple[int, int]:
    """How many programs share the rows of a matrix, and how many rows each has: whole tiles."""
    tiles, rows = triton.cdiv(shape[1], _TILE["C"]), _TILE["R"]
    parts = max(1, min(triton.cdiv(_PROGRAMS, max(tiles, 1)), triton.cdiv(shape[0], 4 * rows)))
    parts = max(parts, triton.cdiv(shape[0], _LONGEST * rows))
    span = max(1, triton.cdiv(triton.cdiv(shape[0], parts), rows)) * rows
    return triton.cdiv(shape[0], span), span


@triton.jit
def _stripe(D, span, C: tl.constexpr):
    """This program's columns, its first row, and where it leaves what."""
    tiles = tl.cdiv(D, C)
    program = tl.program_id(0).to(tl.int64)
    columns = program % tiles * C + tl.arange(0, C)
    return columns, program // tiles * span, program // tiles * D + columns


@triton.jit
def _code_sums(plain, weighted, source, weights, N, D, span, R: tl.constexpr, C: tl.constexpr):
    columns, first, out = _stripe(D, span, C)
    x, _, row_stride, column_stride, _ = source
    # Entry by entry, and across a tile's rows only at the end: that waits for other warps.
    total = tl.zeros((R, C), tl.int32)
    heavy = tl.zeros((R, C), tl.int64)
    for row in range(0, span, R):
        rows = first + row + tl.arange(0, R)
        there = rows[:, None] * row_stride + columns[None, :] * column_stride
        code = tl.load(x + there, mask=(rows < N)[:, None] & (columns < D)[None, :], other=0).to(tl.int32)
        total += code
        if weights is not None:
            weight = tl.load(weights + rows, mask=rows < N, other=0).to(tl.int64)
            heavy += code * weight[:, None]
    tl.store(plain + out, tl.sum(total.to(tl.int64), 0), mask=columns < D)
    if weights is not None:
        tl.store(weighted + out, tl.sum(heavy, 0), mask=columns < D)


def takes_column_sums(codes: Tensor, weights: Tensor | None = None) -> bool:
    """Codes that fit a byte."""
    return takes(codes, dtypes=CODES) and takes(weights, dtypes=(torch.int32,))


def column_sums(codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """As the reference."""
    shape = (codes.shape[0], codes.shape[1])
    parts, span = _spans(shape)
    asked = 1 if weights is None else 2
    sums = torch.empty if shape[0] and shape[1] else torch.zeros  # a program per column and part writes them all
    found = sums((asked, parts, shape[1]), dtype=torch.int64, device=codes.device)
    weights = None if weights is None else weights.contiguous()
    arguments = (found[0], found[-1], source_of(Entries(codes)), weights, *shape, span)
    launch(_code_sums, parts * triton.cdiv(shape[1], _TILE["C"]), *arguments, on=codes, **_TILE)
    found = found[:, 0] if parts == 1 else found.sum(1)
    return found[0], None if weights is None else found[1]


@triton.jit
def _row_sums(out, source, N, D, R: tl.constexpr, C: tl.constexpr):
    x, _, row_stride, column_stride, _ = source
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    total = tl.zeros((R, C), tl.int64)
    for start in range(0, D, C):
        columns = (start + tl.arange(0, C)).to(tl.int64)
        there = rows[:, None] * row_stride + columns[None, :] * column_stride
        total += tl.load(x + there, mask=(rows < N)[:, None] & (columns < D)[None, :], other=0).to(tl.int64)
    tl.store(out + rows, tl.sum(total, 1), mask=rows < N)


def takes_row_sums(codes: Tensor) -> bool:
    """Codes that fit a byte."""
    return takes(codes, dtypes=CODES)


def row_sums(codes: Tensor) -> Tensor:
    """As the reference."""
    n, d = codes.shape
    out = codes.new_empty(n, dtype=torch.int64)
    launch(_row_sums, triton.cdiv(n, 8), out, source_of(Entries(codes)), n, d, on=codes, R=8, C=512)
    return out


@triton.jit
def _value_sums(sums, source, N, D, span, R: tl.constexpr, C: tl.constexpr):
    columns, first, out = _stripe(D, span, C)
    total = tl.zeros((R, C), tl.float32)
    for row in range(0, span, R):
        rows = first + row + tl.arange(0, R)[:, None]
        total += values(source, rows, columns[None, :], (rows < N) & (columns < D)[None, :])
    tl.store(sums + out, tl.sum(total.to(tl.float64), 0), mask=columns < D)


def takes_value_sums(x: Tensor) -> bool:
    """Any strides."""
    return takes(x, dtypes=VALUES)


def value_sums(x: Tensor) -> Tensor:
    """As the reference; every 32nd row, at most 256 of them, is added in float32."""
    shape = (x.shape[0], x.shape[1])
    parts, span = _spans(shape)
    sums = x.new_zeros((parts, shape[1]), dtype=torch.float64)
    programs = parts * triton.cdiv(shape[1], _TILE["C"])
    launch(_value_sums, programs, sums, source_of(Entries(x)), *shape, span, on=x, **_TILE)
    return sums.sum(0)


@triton.jit
def _scaled_rows(scaled, sums, source, factor, weight, N, D, span, R: tl.constexpr, C: tl.constexpr):
    columns, first, out = _stripe(D, span, C)
    total = tl.zeros((C,), tl.float64)
    for row in range(0, span, R):
        rows = first + row + tl.arange(0, R)[:, None]
        inside = (rows < N) & (columns < D)[None, :]
        value = values(source, rows, columns[None, :], inside)
        times = tl.load(factor + rows, mask=rows < N, other=0.0)
        tl.store(scaled + rows * D + columns[None, :], value * times, mask=inside)
        if weight is not None:
            heavy = tl.load(weight + rows, mask=rows < N, other=0.0).to(tl.float64)
            total += tl.sum(value.to(tl.float64) * heavy, 0)
    if weight is not None:
        tl.store(sums + out, total, mask=columns < D)


def takes_scaled_rows(x: Tensor, factor: Tensor, weight: Tensor | None, known: Findings) -> bool:
    """Any strides."""
    return takes(x, dtypes=VALUES) and takes(factor, weight)


def scaled_rows(
    x: Tensor, factor: Tensor, weight: Tensor | None, known: Findings
) -> tuple[Tensor, Tensor | None, Findings]:
    """As the reference."""
    shape = (x.shape[0], x.shape[1])
    parts, span = _spans(shape)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    sums = None if weight is None else x.new_zeros((parts, shape[1]), dtype=torch.float64)
    weight = None if weight is None else weight.contiguous()
    arguments = (out, sums, source_of(Entries(x)), factor.contiguous(), weight, *shape, span)
    launch(_scaled_rows, parts * triton.cdiv(shape[1], _TILE["C"]), *arguments, on=x, **_TILE)
    return out, None if sums is None else sums.sum(0), known


@triton.jit
def _variance_sums(
    sums,
    source,
    step,
    offset,
    shape,
    block,
    count,
    splits,
    spans,
    TALL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MANTISSA: tl.constexpr,
    TABLE: tl.constexpr,
):
    down, across, row_split, column_split = place(count, splits, TALL, WIDE)
    total = tl.zeros((TALL, ROWS, WIDE, COLUMNS), tl.int64)
    for row in range(0, spans[0], ROWS):
        for column in range(0, spans[1], COLUMNS):
            first = row_split * spans[0] + row, column_split * spans[1] + column
            rows, columns, inside = entries(shape, block, down, across, first[0], first[1], ROWS, COLUMNS)
            value = values(source, rows, columns, inside)
            steps = parameter(step, rows, columns, rows < shape[0], columns < shape[1])
            offsets = parameter(offset, rows, columns, rows < shape[0], columns < shape[1])
            t = position(value, steps, offsets, LOW, HIGH)
            shares = tl.where(inside, variance(t, MANTISSA, TABLE) * 16777216.0, 0.0)
            # At most 2²² where levels are one apart: by additions, without the slow conversion to int64.
            counts = whole(near(shares)) if MANTISSA < 0 and len(TABLE) == 0 else even(shares)
            total += counts.to(tl.int64)
    where, there = result(down, across, row_split, column_split, count, splits)
    tl.store(sums + where, tl.sum(tl.sum(total, 3), 1), mask=there)


def takes_variance_sums(x: Entries, scales: Scales, levels: Levels) -> bool:
    """Entries that there are, levels that fit a byte."""
    return x.matrix.numel() > 0 and takes_code_variance(x, scales, levels)


def variance_sums(x: Entries, scales: Scales, levels: Levels) -> Tensor:
    """As the reference."""
    tiling = Tiling.of(scales.blocks, x.shape)
    sums = torch.empty(tiling.partial, dtype=torch.int64, device=x.matrix.device)
    step, offset = (parameter_of(p, scales.blocks, x.shape) for p in (scales.step, scales.offset))
    arguments = (sums, source_of(x), step, offset, *tiling.arguments)
    launch(_variance_sums, tiling.programs, *arguments, on=sums, **tiling.constants, **levels_of(levels))
    return sums.sum((1, 3))
