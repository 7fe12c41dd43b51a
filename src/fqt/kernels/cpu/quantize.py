"""Ranges, codes, values and sums by the C++ kernels: of float32 and bfloat16, in integers that fit a byte."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fqt.kernels import choice, ops
from fqt.kernels.codes import COLUMN, ROW, TENSOR, Blocks, Dither, Entries, Findings, Levels, Quantized, Scales
from fqt.kernels.cpu.library import BACKEND, call, expect, key_of, takes, takes_codes
from fqt.kernels.cpu.memory import empty
from fqt.kernels.cpu.source import (
    grouped,
    matrix_codes,
    source_of,
    takes_entries,
    takes_scales,
    takes_source,
    varies,
)
from fqt.kernels.rounding import DITHERED, STOCHASTIC, Coding, Rounding

ROUNDINGS = {"nearest": 0, "stochastic": 1, "dithered": 2}
_BEST = 3
_BLOCKS = {TENSOR: 0, ROW: 1, COLUMN: 2}
_MODES = {"affine": 0, "symmetric": 1, "zero": 2}


@ops.random_u24.on(BACKEND, when=lambda seed, stream, n: takes(integers=seed))
def _random_u24(seed: Tensor, stream: int, n: int) -> Tensor:
    out = torch.empty(n, dtype=torch.int32, device="cpu")
    call("fqt_random", key_of(seed), stream, 8, n, out.data_ptr())
    return out


@ops.value_range.on(BACKEND, when=lambda x, blocks: blocks.plain and x.matrix.numel() > 0 and takes_entries(x))
def _value_range(x: Entries, blocks: Blocks) -> tuple[Tensor, Tensor]:
    source, _alive = source_of(x.matrix, x.factor)
    if not x.matrix.numel():
        raise ValueError(f"no range of nothing: values of shape {x.shape}")
    lo, hi = (torch.empty(blocks.count(x.shape), dtype=torch.float32, device="cpu") for _ in range(2))
    address, results = ctypes.addressof(source), (lo.data_ptr(), hi.data_ptr())
    if blocks == TENSOR:
        call("fqt_range_tensor", address, x.matrix.numel(), *results)
    else:
        call("fqt_range_rows" if blocks == ROW else "fqt_range_columns", address, *x.shape, *results)
    return lo, hi


@ops.parameters.on(
    BACKEND, when=lambda lo, hi, mode, steps: takes(lo, hi) and lo.shape == hi.shape and steps < 2**31
)
def _parameters(lo: Tensor, hi: Tensor, mode: str, steps: int) -> tuple[Tensor, Tensor]:
    lo, hi = lo.contiguous(), hi.contiguous()
    if steps < 1:
        raise ValueError(f"a range in {steps} steps; give at least 1")
    ranges = (expect("lo", lo, tuple(lo.shape)), expect("hi", hi, tuple(lo.shape)))
    step, offset = torch.empty_like(lo), torch.empty_like(lo)
    call("fqt_parameters", *ranges, lo.numel(), _MODES[mode], steps, step.data_ptr(), offset.data_ptr())
    return step, offset


@ops.value_sums.on(BACKEND, when=takes_source)
def _value_sums(x: Tensor) -> Tensor:
    source, _alive = source_of(x)
    sums = torch.empty(x.shape[1], dtype=torch.float64, device="cpu")
    call("fqt_value_sums", ctypes.addressof(source), *x.shape, sums.data_ptr())
    return sums


@ops.scaled_rows.on(
    BACKEND,
    when=lambda x, factor, weight, known: takes_source(x) and takes(factor, *(() if weight is None else (weight,))),
)
def _scaled_rows(
    x: Tensor, factor: Tensor, weight: Tensor | None, known: Findings
) -> tuple[Tensor, Tensor | None, Findings]:
    source, _alive = source_of(x)
    rows, columns = x.shape
    if any(v.shape != (rows,) for v in (factor, *(() if weight is None else (weight,)))):
        raise ValueError(f"factors and weights must have the shape ({rows},)")
    factor, weight = factor.contiguous(), None if weight is None else weight.contiguous()
    out = empty(x.shape, torch.float32)
    sums = None if weight is None else torch.empty(columns, dtype=torch.float64, device="cpu")
    wants = known.sums is None and known.channels > 0 and columns % known.channels == 0
    plain = torch.empty(known.channels, dtype=torch.float64, device="cpu") if wants else None
    pointers = [None if t is None else t.data_ptr() for t in (factor, weight, out, sums, plain)]
    call("fqt_scaled_rows", ctypes.addressof(source), rows, columns, *pointers, max(known.channels, 1))
    return out, sums, known if plain is None else replace(known, sums=plain)


def _takes_levels(levels: Levels) -> bool:
    return levels.uniform and levels.dtype != torch.float32


@ops.encode.on(
    BACKEND,
    when=lambda x, scales, levels, rounding, seed: (
        rounding.name in ROUNDINGS
        and _takes_levels(levels)
        and takes_entries(x)
        and takes_scales(scales)
        and takes(integers=seed)
    ),
)
def _encode(x: Entries, scales: Scales, levels: Levels, rounding: Rounding, seed: Tensor | None) -> Tensor:
    source, _alive = source_of(x.matrix, x.factor)
    pointers, groups, _held = grouped(ctypes.addressof(source), x.shape, scales)
    codes = empty(x.shape, levels.dtype)
    rest = (ROUNDINGS[rounding.name], key_of(seed, rounding), int(x.transposed), codes.data_ptr())
    call("fqt_encode", *pointers, *groups, levels.low, levels.high, *rest)
    return codes


class _Findings(ctypes.Structure):
    """`Findings` of csrc/quantize/quantize.cpp."""

    _fields_ = [
        ("lo", ctypes.c_float),
        ("hi", ctypes.c_float),
        ("known", ctypes.c_int32),
        ("has_sums", ctypes.c_int32),
        ("pointer", ctypes.c_void_p),
        ("period", ctypes.c_int64),
    ]


class _Work:
    """The arguments of `fqt_quantize`, and its results."""

    def __init__(self, x: Entries, blocks: Blocks, dtype: torch.dtype, noise: bool, known: Findings | None) -> None:
        self._x, self._blocks, self._known = x, blocks, known if x.factor is None else None
        counts = blocks.count(x.shape)
        self._step, self._offset = (torch.empty(counts, dtype=torch.float32, device="cpu") for _ in range(2))
        self._codes = empty(x.shape, dtype)
        both = torch.empty(sum(x.shape) if noise else 0, dtype=torch.float32, device="cpu")
        self._noise = (both[: x.shape[0]].view(-1, 1), both[x.shape[0] :].view(1, -1)) if noise else None
        self._sums: Tensor | None = None
        self._found = _Findings()
        if self._known is not None and self._known.range is not None:
            self._found.lo, self._found.hi = self._known.range
            self._found.known = 1
        if self._known is not None and self._known.channels and self._known.sums is None:
            self._sums = torch.empty(self._known.channels, dtype=torch.float64, device="cpu")
            self._found.pointer, self._found.period = self._sums.data_ptr(), self._known.channels

    def run(self, coding: Coding, rounding: int, seed: Tensor | None) -> Quantized:
        """Calls the kernel."""
        x, levels = self._x, coding.levels
        if not x.matrix.numel():
            raise ValueError(f"no steps of nothing: values of shape {tuple(x.shape)}")
        source, _alive = source_of(x.matrix, x.factor)
        key, dithered = key_of(seed, coding.rounding), ctypes.c_int32()
        how = (_BLOCKS[self._blocks], _MODES[coding.mode], levels.high, levels.low, levels.high, rounding, key)
        results = [t.data_ptr() for t in (self._step, self._offset, self._codes)]
        noise = (None, None) if self._noise is None else tuple(n.data_ptr() for n in self._noise)
        found = None if self._known is None else ctypes.addressof(self._found)
        rest = (*results, *noise, ctypes.addressof(dithered), found)
        call("fqt_quantize", ctypes.addressof(source), *x.shape, *how, int(x.transposed), *rest)
        scales = Scales(self._step, self._offset, self._blocks)
        dither = Dither(*self._noise) if self._noise is not None and dithered.value else None
        return Quantized(self._codes, scales, dither, self._findings())

    def _findings(self) -> Findings | None:
        if self._known is None:
            return None
        range = (self._found.lo, self._found.hi) if self._found.known else None
        return Findings(range, self._sums if self._found.has_sums else self._known.sums, self._known.channels)


def _takes_quantize(
    x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None = None
) -> bool:
    fits = blocks.plain and _takes_levels(coding.levels) and coding.store == "float32" and x.matrix.numel() > 0
    drawn = coding.rounding.name in ROUNDINGS and (seed is not None or not coding.rounding.draws)
    return fits and drawn and takes_entries(x) and takes(integers=seed)


@ops.quantize.on(BACKEND, when=_takes_quantize)
def _quantize(
    x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None = None
) -> Quantized:
    work = _Work(x, blocks, coding.levels.dtype, coding.rounding == DITHERED, known)
    return work.run(coding, ROUNDINGS[coding.rounding.name], seed)


def _takes_best(
    x: Entries,
    blocks: Blocks,
    codings: Sequence[Coding],
    seed: Tensor | None,
    cost: Tensor | None = None,
    known: Findings | None = None,
) -> bool:
    """Whether the choice is between stochastic rounding, on the affine scale too, and dithered on that, unmixed."""
    if cost is not None or not _takes_quantize(x, blocks, codings[0], seed):
        return False
    first = codings[0]
    stochastic = [Coding(mode, first.levels, STOCHASTIC) for mode in dict.fromkeys((first.mode, "affine"))]
    dithered = Coding("affine", replace(first.levels, high=first.levels.high - 1), DITHERED)
    return first.levels.low == 0 and list(codings) == [*stochastic, dithered]


@choice.quantize_best.on(BACKEND, when=_takes_best)
def _quantize_best(
    x: Entries,
    blocks: Blocks,
    codings: Sequence[Coding],
    seed: Tensor | None,
    cost: Tensor | None = None,
    known: Findings | None = None,
) -> Quantized:
    return _Work(x, blocks, codings[0].levels.dtype, True, known).run(codings[0], _BEST, seed)


@ops.variance_sums.on(
    BACKEND, when=lambda x, scales, levels: _takes_levels(levels) and takes_entries(x) and takes_scales(scales)
)
def _variance_sums(x: Entries, scales: Scales, levels: Levels) -> Tensor:
    source, _alive = source_of(x.matrix, x.factor)
    pointers, groups, _held = grouped(ctypes.addressof(source), x.shape, scales)
    sums = torch.empty(scales.step.shape, dtype=torch.int64, device="cpu")
    call("fqt_variance_sums", *pointers, *groups, levels.low, levels.high, sums.data_ptr())
    return sums


@ops.code_variance.on(
    BACKEND,
    when=lambda x, scales, levels: levels.uniform and x.factor is None and takes(x.matrix) and takes_scales(scales),
)
def _code_variance(x: Entries, scales: Scales, levels: Levels) -> Tensor:
    matrix = x.matrix.contiguous()
    pointers, groups, _held = grouped(expect("x", matrix, x.shape), x.shape, scales)
    out = torch.empty_like(matrix)
    call("fqt_code_variance", *pointers, *groups, levels.low, levels.high, out.data_ptr())
    return out


@ops.column_sums.on(
    BACKEND,
    when=lambda codes, weights=None: takes_codes(codes) and (weights is None or weights.dtype == torch.int32),
)
def _column_sums(codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    codes = codes.contiguous()
    matrix = matrix_codes(codes)
    plain, weighted = torch.empty((2, codes.shape[1]), dtype=torch.int64, device="cpu")
    pointers: tuple[int | None, ...] = (None, plain.data_ptr(), None)
    if weights is not None:
        weights = weights.contiguous()
        pointers = (expect("weights", weights, codes.shape[:1], torch.int32), plain.data_ptr(), weighted.data_ptr())
    call("fqt_column_sums", *matrix, *pointers)
    return plain, None if weights is None else weighted


@ops.row_sums.on(BACKEND, when=lambda codes: takes_codes(codes))
def _row_sums(codes: Tensor) -> Tensor:
    codes = codes.contiguous()
    matrix = matrix_codes(codes)
    sums = torch.empty(codes.shape[0], dtype=torch.int64, device="cpu")
    call("fqt_row_sums", *matrix, sums.data_ptr())
    return sums


def _takes_decode(codes: Tensor, scales: Scales, dither: Tensor | None) -> bool:
    more = () if dither is None else (dither,)
    plain = scales.blocks.plain and takes(scales.step, scales.offset, *more, integers=codes)
    return plain and (scales.step.shape == scales.offset.shape or scales.step.numel() == 1)


@ops.decode.on(BACKEND, when=_takes_decode)
def _decode(codes: Tensor, scales: Scales, dither: Tensor | None) -> Tensor:
    # One step may meet a dither per row in the offset.
    step, offset = scales.step.expand(scales.offset.shape).contiguous(), scales.offset.contiguous()
    codes = codes.contiguous()
    matrix, shape = matrix_codes(codes), (codes.shape[0], codes.shape[1])
    pointers = (expect("step", step, tuple(step.shape)), expect("offset", offset, tuple(step.shape)))
    out = empty(codes.shape, step.dtype)
    noise: tuple[int | None, int, int] = (None, 0, 0)
    if dither is not None:
        dither = dither.contiguous()
        noise = (expect("dither", dither, tuple(dither.shape)), *varies(dither, shape))
    call("fqt_decode", *matrix, *pointers, *varies(step, shape), *noise, out.data_ptr())
    return out
