"""Transforms of rows by the C++ kernels, alone and with guard, ranges and codes of the mixed rows in one call.

What the calls in one compute is defined step by step in `fqt.kernels.mixing`: parameters, codes and the guard's
choice are equal to that bit for bit. In one call mixed rows stay in the cache, and some sixty small operations are
saved.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from fqt.kernels import mixing, ops
from fqt.kernels.codes import ROW, Dither, Entries, Findings, Quantized, Scales
from fqt.kernels.cpu.library import BACKEND, call, expect, key_of, takes
from fqt.kernels.cpu.memory import empty
from fqt.kernels.cpu.quantize import ROUNDINGS
from fqt.kernels.cpu.source import OUT_TYPES, per_row, source_of, takes_entries, takes_source
from fqt.kernels.mixing import Butterflies, Mixing, Reflections
from fqt.kernels.reference import Scaling, Unscaling
from fqt.kernels.rounding import DITHERED, Coding

_P, _I = ctypes.c_void_p, ctypes.c_int32


@lru_cache(maxsize=64)
def _block_sizes(blocks: tuple[int, ...]) -> ctypes.Array:
    """In C's form; keep a reference during the call."""
    return (ctypes.c_int64 * len(blocks))(*blocks)


def _takes_rows(x: Tensor, index: Tensor, before: Scaling | None, after: Unscaling | None, *more: Tensor) -> bool:
    """Whether the kernels can transform these rows."""
    floats = [*more] if before is None else [*more, before.half, before.offset, before.scale]
    if after is not None:
        floats += [after.scale, after.offset, *(() if after.right is None else (after.right,))]
    writes = after is None or after.dtype in (torch.float32, torch.bfloat16)
    return writes and takes_source(x) and takes(*floats, integers=index)


@ops.hadamard.on(
    BACKEND,
    when=lambda x, order, blocks, before=None, keep=None, after=None: _takes_rows(x, order, before, after),
)
def _hadamard(
    x: Tensor,
    order: Tensor,
    blocks: tuple[int, ...],
    before: Scaling | None = None,
    keep: Tensor | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    order = order.contiguous()
    expect("order", order, x.shape[:1], torch.int64)
    held = _block_sizes(blocks)
    sizes = (ctypes.addressof(held), len(blocks))
    work = _RowWork(x, before, after)
    kept = None if keep is None else keep.contiguous()
    arguments = (
        order.data_ptr(),
        *sizes,
        *work.before,
        None if kept is None else per_row(kept, len(x), torch.bool),
        *work.after,
    )
    call("fqt_hadamard", work.source, *x.shape, *arguments)
    return work.out


@ops.reflect.on(
    BACKEND,
    when=lambda x, group, normal, beta, before=None, after=None: _takes_rows(x, group, before, after, normal, beta),
)
def _reflect(
    x: Tensor,
    group: Tensor,
    normal: Tensor,
    beta: Tensor,
    before: Scaling | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    group, normal, beta = group.contiguous(), normal.contiguous(), beta.contiguous()
    work = _RowWork(x, before, after)
    pointers = (expect("group", group, x.shape[:1], torch.int64), *(per_row(t, len(x)) for t in (normal, beta)))
    call("fqt_reflect", work.source, *x.shape, *pointers, *work.before, *work.after)
    return work.out


@ops.rotate.on(
    BACKEND,
    when=lambda x, before, after, blocks: takes_source(x, before) and (after is None or takes(after)),
)
def _rotate(x: Tensor, before: Tensor, after: Tensor | None, blocks: tuple[int, ...]) -> Tensor:
    period = before.numel()
    if not x.numel():
        return torch.empty(x.shape, dtype=torch.float32, device="cpu")
    if after is not None and after.shape != before.shape:
        raise ValueError(f"factors of shape {tuple(after.shape)} for runs of {period}")
    source, _alive = source_of(x, before)
    out, held = empty(x.shape, torch.float32), _block_sizes(blocks)
    last = None if after is None else after.contiguous()
    pointers = (None if last is None else last.data_ptr(), out.data_ptr())
    call(
        "fqt_rotate",
        ctypes.addressof(source),
        x.numel() // period,
        period,
        ctypes.addressof(held),
        len(blocks),
        *pointers,
    )
    return out


class _RowWork:
    """The arguments of a transform of rows that are scaled on the way in or out."""

    def __init__(self, x: Tensor, before: Scaling | None, after: Unscaling | None) -> None:
        self._source, held = source_of(x)
        alive: list[Tensor | None] = [*held]
        self.source = ctypes.addressof(self._source)
        self.before: tuple[int | None, ...] = (None,) * 3
        if before is not None:
            parts = [p.contiguous() for p in (before.half, before.offset, before.scale)]
            self.before = tuple(per_row(p, len(x)) for p in parts)
            alive += parts
        dtype = torch.float32 if after is None else after.dtype
        self.out = empty(x.shape, dtype)
        pointers: tuple[int | None, ...] = (None,) * 3
        if after is not None:
            parts = [after.scale.contiguous(), after.offset.contiguous()]
            right = None if after.right is None else after.right.contiguous()
            if right is not None and right.shape != x.shape[1:]:
                raise ValueError(f"a right factor of shape {tuple(right.shape)} for rows of {x.shape[1]}")
            pointers = (
                *(per_row(p, len(x)) for p in parts),
                None if right is None else expect("right", right, x.shape[1:]),
            )
            alive += [*parts, right]
        self.after = (*pointers, OUT_TYPES[dtype], self.out.data_ptr())
        self._alive = alive


@ops.replace_rows_.on(
    BACKEND,
    when=lambda y, keep, x: takes(y) and takes_source(x) and y.is_contiguous() and x.shape == y.shape,
)
def _replace_rows_(y: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    source, _alive = source_of(x)
    keep = keep.contiguous()
    target = expect("y", y, x.shape)
    call("fqt_replace_rows", target, *y.shape, per_row(keep, len(y), torch.bool), ctypes.addressof(source))
    return y


class _Mixed(ctypes.Structure):
    """`Mixed` of csrc/transform/mixed.h."""

    _fields_ = [
        ("seed", _P),
        ("guard", _I),
        ("levels", _I),
        ("high", _I),
        ("rounding", _I),
        ("inverse", _P),
        ("middle", _P),
        ("cost", _P),
        ("step", _P),
        ("offset", _P),
        ("row_dither", _P),
        ("column_dither", _P),
        ("keep", _P),
        ("codes", _P),
        ("finite", _I),
        ("lo", ctypes.c_float),
        ("hi", ctypes.c_float),
    ]


def _takes_codes(x: Entries, guard: bool | str, coding: Coding, seed: Tensor | None) -> bool:
    affine = coding.mode == "affine" and coding.levels.uniform and coding.levels.low == 0
    fits = affine and coding.levels.dtype == torch.uint8 and guard in (True, False)
    drawn = coding.rounding.name in ROUNDINGS and (seed is not None or not coding.rounding.draws)
    return fits and drawn and x.matrix.numel() > 0 and takes_entries(x) and takes(integers=seed)


class _CodesWork:
    """The arguments of a call that mixes and encodes, and its results."""

    def __init__(self, x: Entries, guard: bool, coding: Coding, seed: Tensor | None, more: int) -> None:
        n, d = x.shape
        self._source, self._alive = source_of(x.matrix, x.factor)
        self._seed = seed
        dithered = coding.rounding == DITHERED
        self._parts = torch.empty((5 + more, n, 1), dtype=torch.float32, device="cpu").unbind(0)
        inverse, offset_back, step, offset, row_dither = self._parts[:5]
        self.more = self._parts[5:]
        self._column = torch.empty((1, d if dithered else 0), dtype=torch.float32, device="cpu")
        self._cost = torch.empty(n, dtype=torch.float64, device="cpu")
        self.keep = torch.empty((n, 1), dtype=torch.bool, device="cpu")
        self._codes = empty(x.shape, torch.uint8)
        self._how = _Mixed(
            key_of(seed, coding.rounding),
            int(guard),
            mixing.WIDEST,
            coding.levels.high,
            ROUNDINGS[coding.rounding.name],
            *(t.data_ptr() for t in (inverse, offset_back, self._cost, step, offset, row_dither, self._column)),
            self.keep.data_ptr(),
            self._codes.data_ptr(),
        )
        self._dither = Dither(row_dither, self._column) if dithered else None
        self.arguments = (ctypes.addressof(self._source), n, d)
        self.how = ctypes.addressof(self._how)

    @property
    def finite(self) -> bool:
        """Whether there are results: all entries were finite."""
        return bool(self._how.finite)

    def result(self, matrix: Reflections | Butterflies, known: Findings | None) -> tuple[Quantized, Mixing]:
        """The results, once the call is over."""
        inverse, offset_back, step, offset, _ = self._parts[:5]
        if known is not None:
            known = Findings((self._how.lo, self._how.hi), known.sums, known.channels)
        quantized = Quantized(self._codes, Scales(step, offset, ROW), self._dither, known)
        return quantized, Mixing(inverse, offset_back, matrix, self._cost)


@mixing.hadamard_codes.on(
    BACKEND,
    when=lambda x, block, guard, coding, seed, known=None: (
        seed is not None and _takes_codes(x, guard, coding, seed)
    ),
)
def _hadamard_codes(
    x: Entries, block: int, guard: bool | str, coding: Coding, seed: Tensor, known: Findings | None = None
) -> tuple[Quantized, Mixing]:
    work = _CodesWork(x, bool(guard), coding, seed, more=0)
    order = torch.empty(x.shape[0], dtype=torch.int64, device="cpu")
    blocks, deal = mixing.hadamard_blocks(x.shape[0], block)
    sizes = _block_sizes(blocks)
    lists = (expect("deal", deal, x.matrix.shape[:1], torch.int64), ctypes.addressof(sizes), len(blocks))
    call("fqt_hadamard_codes", *work.arguments, *lists, work.how, order.data_ptr())
    if not work.finite:
        return mixing.hadamard_codes.reference(x, block, guard, coding, seed, known)
    return work.result(Butterflies(order, blocks, work.keep), known)


@mixing.householder_codes.on(
    BACKEND,
    when=lambda x, small_rows, guard, coding, seed, known=None: _takes_codes(x, guard, coding, seed),
)
def _householder_codes(
    x: Entries,
    small_rows: str,
    guard: bool | str,
    coding: Coding,
    seed: Tensor | None,
    known: Findings | None = None,
) -> tuple[Quantized, Mixing]:
    work = _CodesWork(x, bool(guard), coding, seed, more=2)
    group = torch.empty(x.shape[0], dtype=torch.int64, device="cpu")
    normal, length = work.more
    pointers = (group.data_ptr(), normal.data_ptr(), length.data_ptr())
    call("fqt_householder_codes", *work.arguments, int(small_rows == "rigorous"), work.how, *pointers)
    if not work.finite:
        return mixing.householder_codes.reference(x, small_rows, guard, coding, seed, known)
    return work.result(Reflections(group, normal, length), known)
