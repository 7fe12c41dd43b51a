"""What becomes of a product's sums, inside a kernel: `fqt.kernels.epilogue`, in its order.

A kernel that holds a tile of exact sums calls `complete`; `finish` does the same to sums that lie in memory.
Kernels are launched without contraction of multiply and add (`ROUNDED`), so that every operation is rounded on its
own and float results have the reference's bits.

Tensor cores multiply int8 only. An unsigned code is read as q − 128, and with a', b' what was multiplied

    a · b = a' · b' + 128 · (1 · b) [a unsigned] + 128 · (a' · 1) [b unsigned],

the sums over the contraction, so the terms by columns and by rows are added to a tile as integers. A sum that fits
int32 is right even where a step on the way to it wraps; the tensor cores saturate, so what they add up must fit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDED = {"enable_fp_fusion": False}
"""Launch options of every kernel with an epilogue."""
SHIFT = 128
LONGEST_PART = 1 << 16
"""Terms of a sum that the tensor cores add up in int32; 2¹⁷ − 1 fit."""


def wants(epilogue: tuple, columns: int, places: int = 1) -> dict[str, Any]:
    """The epilogue as kernels take it.

    Args:
        epilogue: as `Epilogue.arguments` has it.
        columns: of the result.
        places: how many of its rows share a number of `row_scale`, `left` and `zero`; each of them has a `right`
            and `ones` of its own.
    """
    parts = [None if x is None else x.detach().contiguous() for x in epilogue[:7]]
    row_scale, column_scale, left, right, bias, zero, ones = parts
    many = lambda x: int(x is not None and x.numel() > 1)
    return {
        "row_scale": row_scale,
        "column_scale": column_scale,
        "left": left,
        "right": right,
        "bias": bias,
        "zero": zero,
        "ones": ones,
        "rank": 0 if left is None else left.shape[1],
        "places": places,
        "width": columns,
        "ROW_STEP": many(row_scale),
        "COLUMN_STEP": many(column_scale),
        "ZERO_STEP": many(zero),
        "PLACED": places > 1,
        "FINISH": epilogue[7] is not None,
    }


@triton.jit
def complete(
    sums,  # (rows, columns) int32 or int64
    row,  # (rows,) of the result, or of the place (N, place) that it is
    row_in,
    column,
    column_in,
    row_shift,  # (result rows,) int64, or None: terms of the shift by 128
    column_shift,  # (columns,) int64, or None
    row_scale,
    column_scale,
    left,
    right,
    bias,
    zero,
    ones,
    rank,
    places,
    width,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    PLACED: tl.constexpr,
    FINISH: tl.constexpr,
):
    """The exact sums, or with FINISH the epilogue's float32."""
    if row_shift is not None:
        sums += tl.load(row_shift + row, row_in, 0).to(sums.dtype)[:, None]
    if column_shift is not None:
        sums += tl.load(column_shift + column, column_in, 0).to(sums.dtype)[None, :]
    if FINISH:
        sample = row
        at = column[None, :].to(tl.int64)
        at_in = column_in[None, :]
        if PLACED:
            sample = row // places
            at = (row % places).to(tl.int64)[:, None] * width + at
            at_in = row_in[:, None] & at_in
        if zero is not None:
            zeros = tl.load(zero + sample * ZERO_STEP, row_in, 0).to(tl.int64)[:, None]
            value = (sums.to(tl.int64) - zeros * tl.load(ones + at, at_in, 0)).to(tl.float32)
        else:
            value = sums.to(tl.float32)
        if row_scale is not None:
            value = value * tl.load(row_scale + sample * ROW_STEP, row_in, 0.0)[:, None]
        if column_scale is not None:
            value = value * tl.load(column_scale + column * COLUMN_STEP, column_in, 0.0)[None, :]
        if left is not None:
            size = tl.full((), 1, tl.int64) * places * width
            for r in range(rank):
                factor = tl.load(left + sample.to(tl.int64) * rank + r, row_in, 0.0)[:, None]
                value = value + factor * tl.load(right + r * size + at, at_in, 0.0)
        if bias is not None:
            value = value + tl.load(bias + column, column_in, 0.0)[None, :]
        return value
    else:
        return sums


@triton.jit
def _finish(
    sums,
    out,
    rows,
    columns,
    row_shift,
    column_shift,
    row_scale,
    column_scale,
    left,
    right,
    bias,
    zero,
    ones,
    rank,
    places,
    width,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    PLACED: tl.constexpr,
    FINISH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tiles = tl.cdiv(columns, BN)
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    column = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    row_in, column_in = row < rows, column < columns
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = row_in[:, None] & column_in[None, :]
    value = complete(
        tl.load(sums + at, inside, 0), row, row_in, column, column_in, row_shift, column_shift,
        row_scale, column_scale, left, right, bias, zero, ones, rank, places, width,
        ROW_STEP, COLUMN_STEP, ZERO_STEP, PLACED, FINISH,
    )  # fmt: skip
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


def finish(
    sums: Tensor,
    dtype: torch.dtype,
    row_shift: Tensor | None,
    column_shift: Tensor | None,
    finishing: dict[str, Any],
) -> Tensor:
    """The result of sums that lie in memory.

    Args:
        sums: (rows, columns) int32 or int64, contiguous.
        dtype: of the result.
        row_shift, column_shift: what is added first, int64; None is nothing.
        finishing: of `wants`.
    """
    if row_shift is None and column_shift is None and not finishing["FINISH"] and sums.dtype == dtype:
        return sums
    rows, columns = sums.shape
    out = torch.empty_like(sums, dtype=dtype)
    blocks = {"BM": 16, "BN": 128}
    grid = (-(-rows // blocks["BM"]) * -(-columns // blocks["BN"]),)
    _finish[grid](sums, out, rows, columns, row_shift, column_shift, **finishing, **blocks, **ROUNDED)
    return out
