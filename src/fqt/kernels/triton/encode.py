"""Codes of values, values of codes, and the variance that rounding adds, entry by entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.codes import Entries, Levels, Scales
from fqt.kernels.rounding import DITHERED, Rounding
from fqt.kernels.triton.device import launch, takes
from fqt.kernels.triton.levels import (
    ROUNDINGS,
    how_of,
    levels_of,
    narrowing,
    position,
    rounded,
    split,
    takes_levels,
)
from fqt.kernels.triton.noise import dither_of, takes_seed
from fqt.kernels.triton.source import parameter, parameter_of, source_of, takes_entries, takes_scales, values

CODES = (torch.uint8, torch.int8)
TILE = {"R": 32, "C": 128}
"""32 rows, so that transposed codes are written in whole sectors of 32 bytes."""
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


def programs_of(shape: tuple[int, int]) -> int:
    """How many tiles a matrix has."""
    return triton.cdiv(shape[0], TILE["R"]) * triton.cdiv(shape[1], TILE["C"])


@triton.jit
def tile(N, D, R: tl.constexpr, C: tl.constexpr):
    """Rows (R, 1), first column, columns (1, C), int64, and whether an entry of this program's tile is inside."""
    across = tl.cdiv(D, C)
    place = tl.program_id(0).to(tl.int64)
    rows, start = place // across * R + tl.arange(0, R)[:, None], place % across * C
    columns = start + tl.arange(0, C)[None, :]
    return rows, start, columns, (rows < N) & (columns < D)


@triton.jit
def _encode(
    codes,
    turned,
    sums,  # (tiles down, D) of the values, or None
    source,
    step,
    offset,
    noise,
    N,
    D,
    R: tl.constexpr,
    C: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MANTISSA: tl.constexpr,
    TABLE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    rows, start, columns, inside = tile(N, D, R, C)
    value = values(source, rows, columns, inside)
    if sums is not None:
        column = start + tl.arange(0, C)
        band = tl.program_id(0).to(tl.int64) // tl.cdiv(D, C)
        tl.store(sums + band * D + column, tl.sum(value, 0), mask=column < D)
    step = parameter(step, rows, columns, rows < N, columns < D)
    offset = parameter(offset, rows, columns, rows < N, columns < D)
    t = position(value, step, offset, LOW, HIGH)
    code = rounded(t, noise, rows, start, N, D, C, ROUNDING, ALIGNED, MANTISSA, TABLE)
    code = code.to(codes.dtype.element_ty)
    tl.store(codes + rows * D + columns, code, mask=inside)
    if turned is not None:
        tl.store(turned + columns * N + rows, code, mask=inside)


def takes_encode(x: Entries, scales: Scales, levels: Levels, rounding: Rounding, seed: Tensor | None) -> bool:
    """Codes that fit a byte, any blocks, any rounding."""
    known = rounding.name in ROUNDINGS and takes_levels(levels)
    return known and takes_entries(x) and takes_scales(scales) and takes_seed(seed)


def encode(x: Entries, scales: Scales, levels: Levels, rounding: Rounding, seed: Tensor | None) -> Tensor:
    """As the reference, bit for bit."""
    return encoded(x, scales, levels, rounding, noise_of(x, rounding, seed))[0]


def noise_of(x: Entries, rounding: Rounding, seed: Tensor | None) -> Tensor | None:
    """What rounding x draws from: the seed; where it is dithered, the dither of rows and columns."""
    if rounding != DITHERED:
        return seed
    assert seed is not None
    return dither_of(seed, x.shape, x.transposed)


def encoded(
    x: Entries,
    scales: Scales,
    levels: Levels,
    rounding: Rounding,
    noise: Tensor | None,
    turn: bool = False,
    sum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The codes (N, D) and, of the same pass, what is asked for beside them.

    Args:
        x, scales, levels, rounding: as for `ops.encode`.
        noise: of `noise_of`.
        turn: whether the same codes are wanted transposed, (D, N) contiguous.
        sum: whether the sums of the columns' values are wanted, (D,) float64; runs of 32 rows are added in float32.
    """
    shape, device = x.shape, x.matrix.device
    codes = torch.empty(shape, dtype=levels.dtype, device=device)
    turned = torch.empty(shape[::-1], dtype=levels.dtype, device=device) if turn else None
    sums = codes.new_empty((triton.cdiv(shape[0], TILE["R"]), shape[1]), dtype=torch.float32) if sum else None
    step, offset = (parameter_of(p, scales.blocks, shape) for p in (scales.step, scales.offset))
    arguments = (codes, turned, sums, source_of(x), step, offset, noise, *shape)
    launch(_encode, programs_of(shape), *arguments, on=codes, **TILE, **how_of(levels, rounding, shape[1]))
    return codes, turned, None if sums is None else sums.sum(0, dtype=torch.float64)


@triton.jit
def _decode(out, source, step, offset, dither, N, D, R: tl.constexpr, C: tl.constexpr):
    rows, _, columns, inside = tile(N, D, R, C)
    value = values(source, rows, columns, inside)
    step = parameter(step, rows, columns, rows < N, columns < D)
    offset = parameter(offset, rows, columns, rows < N, columns < D)
    half = narrowing(step)
    if dither[0] is not None:
        value = value - parameter(dither, rows, columns, rows < N, columns < D)
    value = (value * (step * half) + offset * half) * tl.where(half == 1.0, 1.0, 16.0)
    value = tl.where(value > _LARGEST, _LARGEST, value)
    value = tl.where(value < -_LARGEST, -_LARGEST, value)  # NaN stays
    tl.store(out + rows * D + columns, value, mask=inside)


def takes_decode(codes: Tensor, scales: Scales, dither: Tensor | None) -> bool:
    """Codes that fit a byte."""
    return takes(codes, dtypes=CODES) and takes_scales(scales) and takes(dither)


def decode(codes: Tensor, scales: Scales, dither: Tensor | None) -> Tensor:
    """As the reference."""
    shape = (codes.shape[0], codes.shape[1])
    out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    step, offset = (parameter_of(p, scales.blocks, shape) for p in (scales.step, scales.offset))
    # Triton 3.6 cannot ask of a tuple that holds None whether it is None itself.
    noise = (None,) if dither is None else parameter_of(dither, scales.blocks, shape)
    arguments = (out, source_of(Entries(codes)), step, offset, noise, *shape)
    launch(_decode, programs_of(shape), *arguments, on=out, **TILE)
    return out


@triton.jit
def variance(t, MANTISSA: tl.constexpr, TABLE: tl.constexpr):
    """f(1 − f)·gap² at positions t."""
    _, fraction, gap = split(t, MANTISSA, TABLE)
    return fraction * (1 - fraction) * gap * gap


@triton.jit
def _code_variance(
    out,
    source,
    step,
    offset,
    N,
    D,
    R: tl.constexpr,
    C: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MANTISSA: tl.constexpr,
    TABLE: tl.constexpr,
):
    rows, _, columns, inside = tile(N, D, R, C)
    value = values(source, rows, columns, inside)
    step = parameter(step, rows, columns, rows < N, columns < D)
    offset = parameter(offset, rows, columns, rows < N, columns < D)
    t = position(value, step, offset, LOW, HIGH)
    tl.store(out + rows * D + columns, variance(t, MANTISSA, TABLE), mask=inside)


def takes_code_variance(x: Entries, scales: Scales, levels: Levels) -> bool:
    """Levels that fit a byte."""
    return takes_levels(levels) and takes_entries(x) and takes_scales(scales)


def code_variance(x: Entries, scales: Scales, levels: Levels) -> Tensor:
    """As the reference."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.matrix.device)
    step, offset = (parameter_of(p, scales.blocks, x.shape) for p in (scales.step, scales.offset))
    arguments = (out, source_of(x), step, offset, *x.shape)
    launch(_code_variance, programs_of(x.shape), *arguments, on=out, **TILE, **levels_of(levels))
    return out
