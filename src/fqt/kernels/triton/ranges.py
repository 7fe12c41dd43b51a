"""Least and greatest values of blocks, and the steps and offsets that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.codes import LEAST_STEP, Blocks, Entries
from fqt.kernels.triton.device import launch, takes
from fqt.kernels.triton.levels import floor
from fqt.kernels.triton.source import source_of, takes_entries, values
from fqt.kernels.triton.tiling import Tiling, entries, place, result

MODES = {"affine": 0, "symmetric": 1, "zero": 2}
_AFFINE, _SYMMETRIC = tl.constexpr(0), tl.constexpr(1)
_LEAST = tl.constexpr(LEAST_STEP)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_WIDEST = tl.constexpr(float(torch.tensor(torch.finfo(torch.float32).max * (1 - 2**-15), dtype=torch.float32)))
_SIZE = 256
_MOST_SPLITS = 1 << 14


@triton.jit
def _range(
    lo,
    hi,
    source,
    shape,
    block,
    count,
    splits,
    spans,
    TALL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    down, across, row_split, column_split = place(count, splits, TALL, WIDE)
    least = tl.full((TALL, ROWS, WIDE, COLUMNS), float("inf"), tl.float32)
    most = -least
    for row in range(0, spans[0], ROWS):
        for column in range(0, spans[1], COLUMNS):
            first = row_split * spans[0] + row, column_split * spans[1] + column
            rows, columns, inside = entries(shape, block, down, across, first[0], first[1], ROWS, COLUMNS)
            value = values(source, rows, columns, inside)
            least = low(least, tl.where(inside, value, float("inf")))
            most = high(most, tl.where(inside, value, float("-inf")))
    where, there = result(down, across, row_split, column_split, count, splits)
    bad = tl.max(tl.max((least != least).to(tl.int32), 3), 1) > 0
    tl.store(lo + where, tl.where(bad, float("nan"), tl.min(tl.min(least, 3), 1)), mask=there)
    tl.store(hi + where, tl.where(bad, float("nan"), tl.max(tl.max(most, 3), 1)), mask=there)


@triton.jit
def low(a, b):
    """The lesser; NaN if one is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def high(a, b):
    """The greater; NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


def takes_value_range(x: Entries, blocks: Blocks) -> bool:
    """Entries that there are, in any blocks."""
    return x.matrix.numel() > 0 and takes_entries(x)


def value_range(x: Entries, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """As the reference."""
    lo, hi, tiling = _partial_ranges(x, blocks)
    if tiling.splits == (1, 1):
        return lo.view(tiling.count), hi.view(tiling.count)
    return lo.amin((1, 3)), hi.amax((1, 3))


def _partial_ranges(x: Entries, blocks: Blocks) -> tuple[Tensor, Tensor, Tiling]:
    """(blocks down, splits, blocks across, splits): what each program found."""
    tiling = Tiling.of(blocks, x.shape)
    lo, hi = torch.empty((2, *tiling.partial), dtype=torch.float32, device=x.matrix.device)
    launch(_range, tiling.programs, lo, hi, source_of(x), *tiling.arguments, on=lo, **tiling.constants)
    return lo, hi, tiling


@triton.jit
def _affine_step(lo, hi, STEPS: tl.constexpr):
    wide = hi * 0.5 - lo * 0.5 > _LARGEST * 0.25
    half = tl.where(wide, 0.5, 1.0)
    step = tl.div_rn(hi * half - lo * half, tl.zeros_like(lo) + STEPS)
    return tl.maximum(tl.where(wide, step * 2.0, step), _LEAST)


@triton.jit
def _widened(lo, hi, z, STEPS: tl.constexpr):
    below = tl.where(lo < 0.0, tl.div_rn(-lo, z), 0.0)
    above = tl.where(hi > 0.0, tl.div_rn(hi, -z + STEPS), 0.0)
    return tl.maximum(below, above)


@triton.jit
def _zero_on_code(lo, hi, STEPS: tl.constexpr):
    lo, hi = tl.minimum(lo, 0.0), tl.maximum(hi, 0.0)
    below = floor(tl.div_rn(-lo, _affine_step(lo, hi, STEPS)))
    least, most = tl.where(lo < 0.0, 1.0, 0.0), tl.where(hi > 0.0, STEPS - 1.0, STEPS * 1.0)
    above = tl.minimum(tl.maximum(below + 1.0, least), most)
    below = tl.minimum(tl.maximum(below, least), most)
    z = tl.where(_widened(lo, hi, below, STEPS) <= _widened(lo, hi, above, STEPS), below, above)
    step = tl.minimum(tl.maximum(_widened(lo, hi, z, STEPS), _LEAST), _WIDEST)
    step = ((step.to(tl.int32, bitcast=True) + 0xFF) & -0x100).to(tl.float32, bitcast=True)
    return step, tl.where(z == 0.0, 0.0, tl.maximum(-z * step, -_LARGEST))


@triton.jit
def step_and_offset(lo, hi, STEPS: tl.constexpr, MODE: tl.constexpr):
    """As `reference.parameters`, operation by operation."""
    constant = lo == hi
    if MODE == _SYMMETRIC:
        magnitude = tl.maximum(tl.abs(lo), tl.abs(hi))
        step = tl.maximum(tl.div_rn(magnitude, tl.zeros_like(lo) + STEPS), _LEAST)
        step, offset = tl.where(constant, magnitude, step), tl.zeros_like(lo)
    else:
        if MODE == _AFFINE:
            step, offset = _affine_step(lo, hi, STEPS), lo
        else:
            step, offset = _zero_on_code(lo, hi, STEPS)
        step, offset = tl.where(constant, 0.0, step), tl.where(constant, lo, offset)
    finite = (tl.abs(lo) <= _LARGEST) & (tl.abs(hi) <= _LARGEST)
    return tl.where(finite, step, float("nan")), tl.where(finite, offset, 0.0)


@triton.jit
def _parameters(step, offset, lo, hi, n, STEPS: tl.constexpr, MODES: tl.constexpr, SIZE: tl.constexpr):
    """On each of some grids: (grids, n)."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    n = tl.full((), 1, tl.int64) * n
    inside = place < n
    lo, hi = tl.load(lo + place, mask=inside, other=0.0), tl.load(hi + place, mask=inside, other=0.0)
    for grid in tl.static_range(len(STEPS)):
        found_step, found_offset = step_and_offset(lo, hi, STEPS[grid], MODES[grid])
        tl.store(step + grid * n + place, found_step, mask=inside)
        tl.store(offset + grid * n + place, found_offset, mask=inside)


@triton.jit
def _merged(
    step, offset, lo, hi, count, splits,
    STEPS: tl.constexpr, MODE: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parameters of SIZE blocks, from the ranges that SPLITS or fewer programs found in each."""
    block = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)[:, None]
    split = tl.arange(0, SPLITS)[None, :]
    inside = block < count[0] * count[1]
    from_rows, from_columns = split // splits[1], split % splits[1]
    where = ((block // count[1] * splits[0] + from_rows) * count[1] + block % count[1]) * splits[1] + from_columns
    there = inside & (from_rows < splits[0])
    least = tl.load(lo + where, mask=there, other=float("inf"))
    most = tl.load(hi + where, mask=there, other=float("-inf"))
    bad = tl.max((least != least).to(tl.int32), 1) > 0
    lo, hi = tl.where(bad, float("nan"), tl.min(least, 1)), tl.where(bad, float("nan"), tl.max(most, 1))
    found_step, found_offset = step_and_offset(lo, hi, STEPS, MODE)
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(step + place, found_step, mask=place < count[0] * count[1])
    tl.store(offset + place, found_offset, mask=place < count[0] * count[1])


def steps_of(x: Entries, blocks: Blocks, mode: str, steps: int) -> tuple[Tensor, Tensor]:
    """`parameters` of `value_range`, in two launches."""
    lo, hi, tiling = _partial_ranges(x, blocks)
    return _put_together(lo, hi, tiling.count, tiling.splits, mode, steps)


def merged(lo: Tensor, hi: Tensor, mode: str, steps: int) -> tuple[Tensor, Tensor]:
    """`parameters` (1, 1) of a matrix, from the ranges (parts,) of parts that cover it."""
    if lo.numel() > _MOST_SPLITS:  # a tile holds no more
        lo, hi = lo.amin(0, keepdim=True), hi.amax(0, keepdim=True)
    return _put_together(lo, hi, (1, 1), (lo.numel(), 1), mode, steps)


def _put_together(
    lo: Tensor, hi: Tensor, count: tuple[int, int], splits: tuple[int, int], mode: str, steps: int
) -> tuple[Tensor, Tensor]:
    step, offset = torch.empty((2, *count), dtype=torch.float32, device=lo.device)
    wide = triton.next_power_of_2(splits[0] * splits[1])
    how = {"STEPS": steps, "MODE": MODES[mode], "SIZE": max(1, 1024 // wide), "SPLITS": wide}
    programs, warps = triton.cdiv(step.numel(), how["SIZE"]), 4 if wide <= 4096 else 16
    launch(_merged, programs, step, offset, lo, hi, count, splits, on=lo, warps=warps, **how)
    return step, offset


def takes_parameters(lo: Tensor, hi: Tensor, mode: str, steps: int) -> bool:
    """Ranges in float32."""
    return takes(lo, hi) and lo.shape == hi.shape and 1 <= steps < 2**24


def parameters(lo: Tensor, hi: Tensor, mode: str, steps: int) -> tuple[Tensor, Tensor]:
    """As the reference on the CPU, bit for bit; torch on a GPU multiplies by 1/steps where it divides there."""
    step, offset = parameters_of(lo, hi, [(mode, steps)])
    return step[0], offset[0]


def parameters_of(lo: Tensor, hi: Tensor, grids: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    """`parameters` for each mode and number of steps, stacked, in one launch."""
    lo, hi = lo.contiguous(), hi.contiguous()
    step, offset = torch.empty((2, len(grids), *lo.shape), dtype=torch.float32, device=lo.device)
    modes, steps = tuple(MODES[mode] for mode, _ in grids), tuple(steps for _, steps in grids)
    arguments, programs = (step, offset, lo, hi, lo.numel()), triton.cdiv(lo.numel(), _SIZE)
    launch(_parameters, programs, *arguments, on=lo, STEPS=steps, MODES=modes, SIZE=_SIZE)
    return step, offset
