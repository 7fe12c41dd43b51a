"""Rows and columns mixed: butterflies, stage by stage as the reference has them, and reflections.

Butterflies and scalings are the reference's to the last bit. A reflection's sum over a block's rows is added up in
another order, the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.codes import Entries
from fqt.kernels.reference import Scaling, Unscaling, equal_runs
from fqt.kernels.triton.device import launch, takes, written
from fqt.kernels.triton.encode import TILE, programs_of, tile
from fqt.kernels.triton.source import VALUES, source_of, values

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_WIDEST = 4096  # rows of a Hadamard block that a tile can hold
_ROWS = 32  # of a tile of rotated columns
_REFLECTED = {"R": 16, "C": 128}
_PROGRAMS = 2048


@triton.jit
def _before(x, before, rows, inside):
    """(x · half − offset · half) · scale; x itself without."""
    if before[0] is not None:
        half = tl.load(before[0] + rows, mask=inside, other=0.0)
        offset = tl.load(before[1] + rows, mask=inside, other=0.0)
        x = (x * half - offset * half) * tl.load(before[2] + rows, mask=inside, other=0.0)
    return x


@triton.jit
def _after(y, after, rows, columns, inside_rows, inside_columns):
    """y · scale + offset · right, clamped to the finite floats; NaN stays; y itself without."""
    if after[0] is not None:
        offset = tl.load(after[1] + rows, mask=inside_rows, other=0.0)
        if after[2] is not None:
            offset = offset * tl.load(after[2] + columns, mask=inside_columns, other=0.0)
        y = y * tl.load(after[0] + rows, mask=inside_rows, other=0.0) + offset
        y = tl.where(y > _LARGEST, _LARGEST, y)
        y = tl.where(y < -_LARGEST, -_LARGEST, y)
    return y


def _scalings(before: Scaling | None, after: Unscaling | None) -> tuple[tuple, tuple, torch.dtype]:
    """The arguments of `_before` and `_after`, of None where there is nothing to do, and the dtype of the result.

    Triton 3.6 cannot ask of a tuple that holds None whether it is None itself.
    """
    parts = () if before is None else (before.half, before.offset, before.scale)
    first = tuple(p.contiguous() for p in parts) or (None,) * 3
    if after is None:
        return first, (None,) * 3, torch.float32
    right = None if after.right is None else after.right.contiguous()
    return first, (after.scale.contiguous(), after.offset.contiguous(), right), after.dtype


def _takes_rows(x: Tensor, before: Scaling | None, after: Unscaling | None, *more: Tensor) -> bool:
    floats = list(more) if before is None else [*more, before.half, before.offset, before.scale]
    if after is not None:
        floats += [p for p in (after.scale, after.offset, after.right) if p is not None]
    return takes(x, dtypes=VALUES) and takes(*floats) and (after is None or after.dtype in VALUES)


@triton.jit
def _butterflies(y, OUTER: tl.constexpr, M: tl.constexpr, INNER: tl.constexpr):
    """Walsh–Hadamard along the middle of the axes (OUTER, M, INNER) of a tile, as (OUTER·M·INNER,)."""
    for stage in tl.static_range(_stages(M)):
        pairs = tl.reshape(y, (OUTER * (M >> (stage + 1)), 2, INNER << stage)).permute(0, 2, 1)
        a, b = tl.split(pairs)
        y = tl.reshape(tl.join(a + b, a - b).permute(0, 2, 1), (OUTER * M * INNER,))
    return y


@triton.constexpr_function
def _stages(m):
    return m.bit_length() - 1


@triton.jit
def _hadamard(out, source, order, before, keep, after, first, D, M: tl.constexpr, C: tl.constexpr):
    tiles = tl.cdiv(D, C)
    program = tl.program_id(0).to(tl.int64)
    rows = tl.load(order + first + program // tiles * M + tl.arange(0, M))[:, None]
    columns = program % tiles * C + tl.arange(0, C)[None, :]
    inside = columns < D
    x = _before(values(source, rows, columns, inside & (rows >= 0)), before, rows, rows >= 0)
    y = tl.reshape(_butterflies(tl.reshape(x, (M * C,)), 1, M, C), (M, C))
    if keep is not None:
        y = tl.where(tl.load(keep + rows) != 0, y, x)
    y = _after(y, after, rows, columns, rows >= 0, inside)
    tl.store(out + rows * D + columns, y, mask=inside & (rows >= 0))


def takes_hadamard(
    x: Tensor,
    order: Tensor,
    blocks: tuple[int, ...],
    before: Scaling | None = None,
    keep: Tensor | None = None,
    after: Unscaling | None = None,
) -> bool:
    """Blocks that a tile can hold."""
    others = takes(order, dtypes=(torch.int64,)) and takes(keep, dtypes=(torch.bool,))
    return max(blocks, default=1) <= _WIDEST and others and _takes_rows(x, before, after)


def hadamard(
    x: Tensor,
    order: Tensor,
    blocks: tuple[int, ...],
    before: Scaling | None = None,
    keep: Tensor | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """As the reference, bit for bit."""
    first, last, dtype = _scalings(before, after)
    out = torch.empty(x.shape, dtype=written(dtype), device=x.device)
    keep = None if keep is None else keep.contiguous().view(torch.uint8)
    start = 0
    for size, count in equal_runs(blocks):
        width = min(128, max(4, 4096 // size))
        arguments = (out, source_of(Entries(x)), order.contiguous(), first, keep, last, start, x.shape[1])
        how = {"M": size, "C": width, "warps": max(4, size * width // 1024)}
        launch(_hadamard, count * triton.cdiv(x.shape[1], width), *arguments, on=out, **how)
        start += size * count
    return out.to(dtype)


@triton.jit
def _rotate(out, source, before, after, runs, across, D, period, first, count, R: tl.constexpr, M: tl.constexpr):
    """`across` runs of `period` columns lie in a row; in each, blocks of M begin at `first`."""
    program = tl.program_id(0).to(tl.int64)
    run = program // count * R + tl.arange(0, R)[:, None]
    place = first + program % count * M + tl.arange(0, M)[None, :]
    rows, columns = run // across, run % across * period + place
    inside = (run < runs) & (place < period)
    x = values(source, rows, columns, inside) * tl.load(before + place)
    y = tl.reshape(_butterflies(tl.reshape(x, (R * M,)), R, M, 1), (R, M))
    if after is not None:
        y = y * tl.load(after + place)
    tl.store(out + rows * D + columns, y, mask=inside)


def takes_rotate(x: Tensor, before: Tensor, after: Tensor | None, blocks: tuple[int, ...]) -> bool:
    """Blocks that a tile can hold."""
    return max(blocks, default=1) <= _WIDEST and takes(x, dtypes=VALUES) and takes(before, after)


def rotate(x: Tensor, before: Tensor, after: Tensor | None, blocks: tuple[int, ...]) -> Tensor:
    """As the reference, bit for bit."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if not x.numel():
        return out
    if after is not None and after.shape != before.shape:
        raise ValueError(f"factors of shape {tuple(after.shape)} for runs of {before.numel()}")
    period, columns = before.numel(), x.shape[1]
    across, start = columns // period, 0
    runs = x.shape[0] * across
    factors = (before.contiguous(), None if after is None else after.contiguous())
    for size, count in equal_runs(blocks):
        tall = min(_ROWS, max(1, 4096 // size))
        arguments = (out, source_of(Entries(x)), *factors, runs, across, columns, period, start, count)
        launch(_rotate, count * triton.cdiv(runs, tall), *arguments, on=out, R=tall, M=size)
        start += size * count
    return out


@triton.jit
def _reflect(
    out, source, order, bounds, normal, factor, before, after, N, D, workers, R: tl.constexpr, C: tl.constexpr
):
    """Worker w takes the blocks w, w + workers, …: how many there are, the device alone knows."""
    program = tl.program_id(0).to(tl.int64)
    columns = program // workers * C + tl.arange(0, C)[None, :]
    inside = columns < D
    for block in range(program % workers, N, workers):
        begin, end = tl.load(bounds + block), tl.load(bounds + block + 1)
        total = tl.zeros((1, C), tl.float32)
        for start in range(begin, end, R):
            place = start + tl.arange(0, R)[:, None]
            there = place < end
            rows = tl.load(order + place, mask=there, other=0)
            x = _before(values(source, rows, columns, there & inside), before, rows, there)
            product = x * tl.load(normal + rows, mask=there, other=0.0)
            total += tl.sum(tl.where(there, product, 0.0), 0)[None, :]
        total = total * tl.load(factor + block)
        for start in range(begin, end, R):
            place = start + tl.arange(0, R)[:, None]
            there = place < end
            rows = tl.load(order + place, mask=there, other=0)
            x = _before(values(source, rows, columns, there & inside), before, rows, there)
            y = x - tl.load(normal + rows, mask=there, other=0.0) * total
            tl.store(out + rows * D + columns, _after(y, after, rows, columns, there, inside), mask=there & inside)


def takes_reflect(
    x: Tensor,
    group: Tensor,
    normal: Tensor,
    factor: Tensor,
    before: Scaling | None = None,
    after: Unscaling | None = None,
) -> bool:
    """Any blocks."""
    return takes(group, dtypes=(torch.int64,)) and _takes_rows(x, before, after, normal, factor)


def reflect(
    x: Tensor,
    group: Tensor,
    normal: Tensor,
    factor: Tensor,
    before: Scaling | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """As the reference, but for the order in which a block's rows are added."""
    n, d = x.shape
    first, last, dtype = _scalings(before, after)
    out = torch.empty(x.shape, dtype=written(dtype), device=x.device)
    ordered, order = torch.sort(group, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(n + 1, device=x.device))
    tiles = triton.cdiv(d, _REFLECTED["C"])
    workers = min(n, triton.cdiv(_PROGRAMS, max(tiles, 1)))
    vectors = (normal.contiguous(), factor.contiguous())
    arguments = (out, source_of(Entries(x)), order, bounds, *vectors, first, last, n, d, workers)
    launch(_reflect, tiles * workers, *arguments, on=out, **_REFLECTED)
    return out.to(dtype)


@triton.jit
def _replace_rows(y, row_stride, column_stride, keep, source, N, D, R: tl.constexpr, C: tl.constexpr):
    rows, _, columns, inside = tile(N, D, R, C)
    inside &= tl.load(keep + rows, mask=rows < N, other=1) == 0
    tl.store(y + rows * row_stride + columns * column_stride, values(source, rows, columns, inside), mask=inside)


def takes_replace_rows_(y: Tensor, keep: Tensor, x: Tensor) -> bool:
    """Any strides."""
    return takes(y) and takes(keep, dtypes=(torch.bool,)) and takes(x, dtypes=VALUES) and x.shape == y.shape


def replace_rows_(y: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """As the reference."""
    arguments = (y, *y.stride(), keep.contiguous().view(torch.uint8), source_of(Entries(x)), *y.shape)
    launch(_replace_rows, programs_of((y.shape[0], y.shape[1])), *arguments, on=y, **TILE)
    return y
