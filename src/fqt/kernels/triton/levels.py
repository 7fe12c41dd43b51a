"""Positions on the axis of codes and their rounding, as `reference.position`, `Levels` and `Rounding` define them.

How levels and rounding are passed: `how_of` gives compile-time constants, for a grid's kernels are few.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fqt.kernels.codes import DITHER_LEVELS, Levels
from fqt.kernels.rounding import Rounding
from fqt.kernels.triton.noise import high_bits, low_bits

# What the codes themselves are rounded by: "corrected" changes steps only, after the codes are known.
ROUNDINGS = {"nearest": 0, "corrected": 0, "stochastic": 1, "dithered": 2}
_NEAREST, _STOCHASTIC = tl.constexpr(0), tl.constexpr(1)
_CHANCES, _CHANCE = tl.constexpr(DITHER_LEVELS), tl.constexpr(1.0 / DITHER_LEVELS)
_WIDE = tl.constexpr(2.0**100)
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # floats about it are one apart
_LONGEST_TABLE = 64  # it is searched by as many comparisons


def takes_levels(levels: Levels) -> bool:
    """Whether the codes fit a byte and the kernels know the levels."""
    return levels.dtype != torch.float32 and (levels.table is None or len(levels.table) <= _LONGEST_TABLE)


def levels_of(levels: Levels) -> dict[str, Any]:
    """Levels as compile-time constants: MANTISSA is −1 for none, TABLE is empty for none."""
    mantissa = -1 if levels.mantissa is None else levels.mantissa
    return {"LOW": levels.low, "HIGH": levels.high, "MANTISSA": mantissa, "TABLE": levels.table or ()}


def how_of(levels: Levels, rounding: Rounding, columns: int) -> dict[str, Any]:
    """Levels, rounding and the order of the noise of a matrix of so many columns, as compile-time constants."""
    how = {"ROUNDING": ROUNDINGS[rounding.name], "ALIGNED": columns % 8 == 0}
    return {**levels_of(levels), **how}


@triton.jit
def narrowing(step):
    """As the reference's."""
    return tl.where(step > _WIDE, 0.0625, 1.0)


@triton.jit
def position(value, step, offset, LOW: tl.constexpr, HIGH: tl.constexpr):
    """t = (value − offset)/step between LOW and HIGH; LOW for NaN."""
    half = narrowing(step)
    divisor = tl.where(step == 0.0, 1.0, step) * half
    t = tl.div_rn(value * half - offset * half, divisor)
    t = tl.where(t >= LOW, t, LOW)
    return tl.where(t <= HIGH, t, HIGH)


@triton.jit
def floor(t):
    """⌊t⌋ of subnormal numbers too: NVIDIA's instruction takes a negative one for −0."""
    below = tl.floor(t)
    return tl.where(below > t, below - 1.0, below)


@triton.jit
def near(t):
    """The nearest whole number, of two as near the even one, for |t| ≤ 2²²: the addition rounds.

    Instructions that round or convert run at an eighth of the rate of an addition on NVIDIA's; four of them for
    every entry took more time than its memory.
    """
    return (t + _MAGIC) - _MAGIC


@triton.jit
def near_floor(t):
    """⌊t⌋ for |t| ≤ 2²²."""
    nearest = near(t)
    return nearest - tl.where(nearest > t, 1.0, 0.0)


@triton.jit
def whole(t):
    """int32, of a whole number with |t| ≤ 2²²."""
    return (t + _MAGIC).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def even(t):
    """The nearest whole number, of two as near the even one, by operations that every backend rounds alike."""
    below = floor(t)
    rest = t - below
    odd = below - 2.0 * floor(below * 0.5)
    return below + tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), 1.0, 0.0)


@triton.jit
def _gaps(t, MANTISSA: tl.constexpr):
    """The gap between small floats about t, a power of two, and its inverse; the highest is a multiple of any."""
    exponent = ((t.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126  # |t| in [2^(exponent − 1), 2^exponent)
    power = tl.maximum(exponent - 1 - MANTISSA, 0)
    return ((127 + power) << 23).to(tl.float32, bitcast=True), ((127 - power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(t, MANTISSA: tl.constexpr, TABLE: tl.constexpr):
    """As `Levels.split`: the level at or below t, the fraction of the way to the next one, and the gap."""
    if len(TABLE) > 0:
        size = tl.abs(t)
        inner, outer = tl.zeros_like(t) + TABLE[0], tl.zeros_like(t) + TABLE[1]
        for place in tl.static_range(1, len(TABLE) - 1):
            beyond = size >= TABLE[place]
            inner, outer = tl.where(beyond, TABLE[place], inner), tl.where(beyond, TABLE[place + 1], outer)
        below = tl.where((size == inner) | (size == outer), t, tl.where(t < 0, -outer, inner))
        gap = outer - inner
        return below, tl.div_rn(t - below, gap), gap
    elif MANTISSA >= 0:
        gap, inverse = _gaps(t, MANTISSA)
        below = near_floor(t * inverse) * gap
        return below, (t - below) * inverse, gap
    else:
        below = near_floor(t)
        return below, t - below, tl.full(t.shape, 1.0, tl.float32)


@triton.jit
def _nearest(t, MANTISSA: tl.constexpr, TABLE: tl.constexpr):
    if len(TABLE) > 0:
        below, fraction, gap = split(t, MANTISSA, TABLE)
        return below + tl.where(fraction > 0.5, gap, 0.0)
    elif MANTISSA >= 0:
        gap, inverse = _gaps(t, MANTISSA)
        return near(t * inverse) * gap
    else:
        return near(t)


@triton.jit
def _stochastic(
    t,
    seed,
    first,
    C: tl.constexpr,
    ALIGNED: tl.constexpr,
    MANTISSA: tl.constexpr,
    TABLE: tl.constexpr,
):
    """The level above where the noise is below the fraction; its low bits are made only where they decide."""
    below, fraction, gap = split(t, MANTISSA, TABLE)
    noise = high_bits(seed, first, C, ALIGNED) << 8
    up = (noise | 0xFF).to(tl.float32) * _CHANCE < fraction
    undecided = up != (noise.to(tl.float32) * _CHANCE < fraction)
    if tl.max(undecided.to(tl.int32)) > 0:
        up = (noise | low_bits(seed, first, C, ALIGNED)).to(tl.float32) * _CHANCE < fraction
    return below + tl.where(up, gap, 0.0)


@triton.jit
def _dithered(t, dither, rows, columns, N, D):
    """⌊t + (a + b)/2²⁴⌋ in exact arithmetic."""
    row = tl.load(dither + rows, rows < N, 0.0) * _CHANCES
    column = tl.load(dither + N + columns, columns < D, 0.0) * _CHANCES
    k = row.to(tl.int32) + column.to(tl.int32)
    below = near_floor(t)
    threshold = (-(k & (_CHANCES - 1)) + _CHANCES).to(tl.float32) * _CHANCE
    return below + (k >> 24).to(tl.float32) + tl.where(t - below >= threshold, 1.0, 0.0)


@triton.jit
def rounded(
    t,
    source,  # of the noise: the seed, or the dither of N rows and D columns
    rows,
    start,
    N,
    D,
    C: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    MANTISSA: tl.constexpr,
    TABLE: tl.constexpr,
):
    """int32 codes for positions t (R, C) of `rows` (R, 1) and C columns from `start` of a matrix (N, D)."""
    if ROUNDING == _NEAREST:
        code = _nearest(t, MANTISSA, TABLE)
    elif ROUNDING == _STOCHASTIC:
        code = _stochastic(t, tl.load(source), rows * D + start, C, ALIGNED, MANTISSA, TABLE)
    else:
        code = _dithered(t, source, rows, start + tl.arange(0, C)[None, :], N, D)
    return whole(code)
