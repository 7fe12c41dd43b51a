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
from fqt.kernels.codes import ROW, TENSOR, Blocks, Dither, Entries, Findings, Quantized, Scales
from fqt.kernels.rounding import DITHERED, Coding
from fqt.kernels.triton.device import launch
from fqt.kernels.triton.encode import encoded, noise_of
from fqt.kernels.triton.levels import ROUNDINGS, how_of, position, rounded, takes_levels
from fqt.kernels.triton.noise import takes_seed
from fqt.kernels.triton.ranges import MODES, high, low, merged, step_and_offset, steps_of, value_range
from fqt.kernels.triton.source import source_of, takes_entries, values

# Rows and columns of a band's tile, without and with transposed codes, which are written in runs of 32 bytes.
_TILES = {False: {"R": 8, "C": 512}, True: {"R": 32, "C": 128}}
_BANDS = 128  # about a GPU's multiprocessors: with fewer bands a matrix is read by tiles, twice
_SHORT = 2048  # or rows no longer than this
_WHOLE = 8192  # entries of a band that 16 warps hold in registers, to read them once


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
    noise, shape = noise_of(x, coding.rounding, seed), x.shape
    if blocks == ROW and coding.store == "float32" and _worth_bands(shape, turn):
        codes, turned, scales, known = _by_bands(x, coding, noise, known, turn)
    else:
        if coding.store != "float32":
            scales = ops.scales_of(*value_range(x, blocks), coding, blocks)
        elif blocks == TENSOR and known is not None and known.parts is not None:
            scales = Scales(*merged(*known.parts, coding.mode, coding.levels.high), blocks)
        else:
            scales = Scales(*steps_of(x, blocks, coding.mode, coding.levels.high), blocks)
        wanted = known is not None and known.sums is None and known.channels == shape[1]
        codes, turned, sums = encoded(x, scales, coding.levels, coding.rounding, noise, turn, wanted)
        if wanted and known is not None:
            known = replace(known, sums=sums)
    scales = coding.rounding.settled(x, codes, scales, coding.levels.high, seed)
    dither = None
    if noise is not None and coding.rounding == DITHERED:
        dither = Dither(noise[: shape[0], None], noise[None, shape[0] :])
    return Quantized(codes, scales, dither, known), turned


def _worth_bands(shape: tuple[int, int], turn: bool) -> bool:
    return shape[0] >= _BANDS * _TILES[turn]["R"] or shape[1] <= _SHORT


def _by_bands(
    x: Entries, coding: Coding, noise: Tensor | None, known: Findings | None, turn: bool
) -> tuple[Tensor, Tensor | None, Scales, Findings | None]:
    """Codes, transposed codes, scales, and what is known now: the bands' ranges are parts of the whole's."""
    shape, device, dtype = x.shape, x.matrix.device, coding.levels.dtype
    codes = torch.empty(shape, dtype=dtype, device=device)
    turned = torch.empty(shape[::-1], dtype=dtype, device=device) if turn else None
    step, offset = torch.empty((2, shape[0], 1), dtype=torch.float32, device=device)
    width = triton.next_power_of_2(shape[1])
    whole = not turn and width <= _WHOLE
    tile = {"R": max(1, min(_WHOLE // width, 8)), "C": width} if whole else _TILES[turn]
    programs = triton.cdiv(shape[0], tile["R"])
    lo, hi = torch.empty((2, programs), dtype=torch.float32, device=device) if known is not None else (None, None)
    arguments = (codes, turned, step, offset, lo, hi, source_of(x), noise, *shape)
    how = {**how_of(coding.levels, coding.rounding, shape[1]), "MODE": MODES[coding.mode]}
    launch(_bands, programs, *arguments, on=codes, warps=16 if whole else 4, WHOLE=whole, **tile, **how)
    if known is not None and lo is not None and hi is not None:
        known = replace(known, parts=(lo, hi))
    return codes, turned, Scales(step, offset, ROW), known


@triton.jit
def _bands(
    codes,
    turned,
    steps,
    offsets,
    least_of_bands,  # (programs,) or None
    most_of_bands,
    source,
    noise,
    N,
    D,
    R: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,  # whether a tile spans all columns, and is read once; it has no transposed codes
    MODE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MANTISSA: tl.constexpr,
    TABLE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    band = tl.program_id(0).to(tl.int64) * R
    rows = band + tl.arange(0, R)[:, None]
    row = band + tl.arange(0, R)
    if WHOLE:
        columns = tl.arange(0, C).to(tl.int64)[None, :]
        inside = (rows < N) & (columns < D)
        value = values(source, rows, columns, inside)
        least, most = tl.where(inside, value, float("inf")), tl.where(inside, value, float("-inf"))
    else:
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
    if least_of_bands is not None:
        any_bad = tl.max((bad & (row < N)).to(tl.int32), 0) > 0
        place = tl.program_id(0)
        tl.store(least_of_bands + place, tl.where(any_bad, float("nan"), tl.min(lo, 0)))
        tl.store(most_of_bands + place, tl.where(any_bad, float("nan"), tl.max(hi, 0)))
    step, offset = step_and_offset(lo, hi, HIGH, MODE)
    tl.store(steps + row, step, mask=row < N)
    tl.store(offsets + row, offset, mask=row < N)
    step, offset = step[:, None], offset[:, None]
    if WHOLE:
        t = position(value, step, offset, LOW, HIGH)
        code = rounded(t, noise, rows, 0, N, D, C, ROUNDING, ALIGNED, MANTISSA, TABLE)
        tl.store(codes + rows * D + columns, code.to(codes.dtype.element_ty), mask=inside)
    else:
        for start in range(0, D, C):
            columns = (start + tl.arange(0, C)).to(tl.int64)[None, :]
            inside = (rows < N) & (columns < D)
            t = position(values(source, rows, columns, inside), step, offset, LOW, HIGH)
            code = rounded(t, noise, rows, start, N, D, C, ROUNDING, ALIGNED, MANTISSA, TABLE)
            code = code.to(codes.dtype.element_ty)
            tl.store(codes + rows * D + columns, code, mask=inside)
            if turned is not None:
                tl.store(turned + columns * N + rows, code, mask=inside)
