"""Codes and parameters of a matrix, and its transposed codes of the same pass.

Integer tensor cores want both operands with the contracted axis last. A product over rows (a weight's gradient,
or a weight in grad_input) reads the codes transposed, which cost the least where the codes are written. Where
rows have a step of their own and there are enough of them, ranges, parameters and codes are one kernel: a band
of rows is read once from memory, and a second time from the cache.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.codes import ROW, Blocks, Dither, Entries, Findings, Quantized, Scales
from fqt.kernels.rounding import DITHERED, Coding
from fqt.kernels.triton.device import launch
from fqt.kernels.triton.encode import encoded
from fqt.kernels.triton.levels import ROUNDINGS, how_of, position, rounded, takes_levels
from fqt.kernels.triton.noise import dither_of, takes_seed
from fqt.kernels.triton.ranges import MODES, high, low, step_and_offset, steps_of, value_range
from fqt.kernels.triton.source import source_of, takes_entries, values

# Rows and columns of a band's tile, without and with transposed codes, which are written in runs of 32 bytes.
_TILES = {False: {"R": 8, "C": 512}, True: {"R": 32, "C": 128}}
_BANDS = 128  # about a GPU's multiprocessors: with fewer bands a matrix is read by tiles, twice
_SHORT = 2048  # or rows no longer than this


def takes_quantize(
    x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None = None
) -> bool:
    """Codes that fit a byte, any blocks, any rounding; what none may take is left to the reference to refuse."""
    levels, rounding = coding.levels, coding.rounding
    if x.matrix.numel() == 0 or rounding.name not in ROUNDINGS or not takes_levels(levels):
        return False
    fits = levels.uniform and replace(levels, high=levels.high + rounding.headroom).dtype == levels.dtype
    drawn = takes_seed(seed) and (seed is not None or not rounding.draws)
    return takes_entries(x) and drawn and (fits or rounding != DITHERED)


def quantize(
    x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None = None
) -> Quantized:
    """As the reference, bit for bit."""
    return _quantized(x, blocks, coding, seed, known, turn=False)[0]


def codes_and_transposed(
    x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None = None
) -> tuple[Quantized, Tensor]:
    """`ops.quantize` of a matrix (N, D) on a GPU, and its codes transposed, (D, N) contiguous."""
    if not takes_quantize(x, blocks, coding, seed, known):
        found = ops.quantize(x, blocks, coding, seed, known)
        return found, found.codes.T.contiguous()
    found, turned = _quantized(x, blocks, coding, seed, known, turn=True)
    assert turned is not None
    return found, turned


def _quantized(
    x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None, turn: bool
) -> tuple[Quantized, Tensor | None]:
    if blocks == ROW and coding.store == "float32" and _worth_bands(x.shape, turn):
        codes, turned, scales = _by_bands(x, coding, seed, turn)
    else:
        if coding.store == "float32":
            scales = Scales(*steps_of(x, blocks, coding.mode, coding.levels.high), blocks)
        else:
            scales = ops.scales_of(*value_range(x, blocks), coding, blocks)
        codes, turned = encoded(x, scales, coding.levels, coding.rounding, seed, turn)
    scales = coding.rounding.settled(x, codes, scales, coding.levels.high, seed)
    dither = None
    if seed is not None and coding.rounding == DITHERED:
        dither = Dither(*dither_of(seed, x.shape, x.transposed))
    return Quantized(codes, scales, dither, known), turned


def _worth_bands(shape: tuple[int, int], turn: bool) -> bool:
    return shape[0] >= _BANDS * _TILES[turn]["R"] or shape[1] <= _SHORT


def _by_bands(x: Entries, coding: Coding, seed: Tensor | None, turn: bool) -> tuple[Tensor, Tensor | None, Scales]:
    shape, device, dtype = x.shape, x.matrix.device, coding.levels.dtype
    codes = torch.empty(shape, dtype=dtype, device=device)
    turned = torch.empty(shape[::-1], dtype=dtype, device=device) if turn else None
    step, offset = (torch.empty((shape[0], 1), dtype=torch.float32, device=device) for _ in range(2))
    arguments = (codes, turned, step, offset, source_of(x), seed, *shape)
    how = {**how_of(coding.levels, coding.rounding, shape[1], x.transposed), "MODE": MODES[coding.mode]}
    launch(_bands, triton.cdiv(shape[0], _TILES[turn]["R"]), *arguments, on=codes, **_TILES[turn], **how)
    return codes, turned, Scales(step, offset, ROW)


@triton.jit
def _bands(
    codes,
    turned,
    steps,
    offsets,
    source,
    seed,
    N,
    D,
    R: tl.constexpr,
    C: tl.constexpr,
    MODE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MANTISSA: tl.constexpr,
    TABLE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    band = tl.program_id(0).to(tl.int64) * R
    rows = band + tl.arange(0, R)[:, None]
    least = tl.full((R, C), float("inf"), tl.float32)
    most = -least
    for start in range(0, D, C):
        columns = (start + tl.arange(0, C)).to(tl.int64)[None, :]
        inside = (rows < N) & (columns < D)
        value = values(source, rows, columns, inside)
        least = low(least, tl.where(inside, value, float("inf")))
        most = high(most, tl.where(inside, value, float("-inf")))
    bad = tl.max((least != least).to(tl.int32), 1) > 0
    lo, hi = tl.where(bad, float("nan"), tl.min(least, 1)), tl.where(bad, float("nan"), tl.max(most, 1))
    step, offset = step_and_offset(lo, hi, HIGH, MODE)
    row = band + tl.arange(0, R)
    tl.store(steps + row, step, mask=row < N)
    tl.store(offsets + row, offset, mask=row < N)
    step, offset = step[:, None], offset[:, None]
    for start in range(0, D, C):
        columns = (start + tl.arange(0, C)).to(tl.int64)[None, :]
        inside = (rows < N) & (columns < D)
        t = position(values(source, rows, columns, inside), step, offset, LOW, HIGH)
        code = rounded(t, seed, rows, start, D, C, ROUNDING, ALIGNED, TRANSPOSED, MANTISSA, TABLE)
        code = code.to(codes.dtype.element_ty)
        tl.store(codes + rows * D + columns, code, mask=inside)
        if turned is not None:
            tl.store(turned + columns * N + rows, code, mask=inside)
