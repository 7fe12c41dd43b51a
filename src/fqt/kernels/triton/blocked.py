"""Products of codes whose steps vary by blocks: `fqt.kernels.blocked` on integer tensor cores.

A block's sum is taken in int32 and turned to float; blocks are added in ascending order in one program, each
operation rounded on its own. So the bits are the reference's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.blocked import Stepped, block_length, steps_by_block
from fqt.kernels.triton import device, tune
from fqt.kernels.triton.epilogue import ROUNDED
from fqt.kernels.triton.products import NEIGHBOURS, Side, tile_of
from fqt.kernels.triton.tune import Tiles

_LEAST_STEP = 32  # terms: the least that tensor cores take; a shorter block leaves the rest empty
_LONGEST_STEP = 128


@triton.jit
def _blocked(
    a,
    b,
    a_step,  # (row blocks, blocks)
    b_step,  # (column blocks, blocks)
    bias,
    out,
    rows,
    columns,
    terms,
    length,  # terms of a block
    a_rows,  # rows that share a step
    b_columns,
    a_row,
    a_term,
    b_term,
    b_column,
    WHOLE: tl.constexpr,  # whether a block is one step: loads run ahead across blocks then
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP)
    row = row_tile * BM + tl.arange(0, BM)
    column = column_tile * BN + tl.arange(0, BN)
    row_in, column_in = row < rows, column < columns
    blocks = tl.cdiv(terms, length)
    term = tl.arange(0, BK).to(tl.int64)
    from_a = a + (tl.where(row_in, row, 0).to(tl.int64) * a_row)[:, None]
    from_b = b + (tl.where(column_in, column, 0).to(tl.int64) * b_column)[None, :]
    from_a_step = a_step + tl.where(row_in, row // a_rows, 0).to(tl.int64) * blocks
    from_b_step = b_step + tl.where(column_in, column // b_columns, 0).to(tl.int64) * blocks
    total = tl.zeros((BM, BN), tl.float32)
    for block in range(blocks):
        sums = tl.zeros((BM, BN), tl.int32)
        start = block * length
        stop = tl.minimum(start + length, terms)
        if WHOLE:
            at = start + term
            x = tl.load(from_a + (at * a_term)[None, :], (at < stop)[None, :], 0)
            y = tl.load(from_b + (at * b_term)[:, None], (at < stop)[:, None], 0)
            sums = tl.dot(x, y, sums, out_dtype=tl.int32)
        else:
            for first in range(start, stop, BK):
                at = first + term
                x = tl.load(from_a + (at * a_term)[None, :], (at < stop)[None, :], 0)
                y = tl.load(from_b + (at * b_term)[:, None], (at < stop)[:, None], 0)
                sums = tl.dot(x, y, sums, out_dtype=tl.int32)
        scale = tl.load(from_a_step + block)[:, None] * tl.load(from_b_step + block)[None, :]
        total = total + sums.to(tl.float32) * scale
    if bias is not None:
        total = total + tl.load(bias + column, column_in, 0.0)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), row_in[:, None] & column_in[None, :])


def takes_blocked_matmul(
    a: Stepped, b: Stepped, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether the kernel can run on these."""
    filled = a.codes.numel() > 0 and b.codes.numel() > 0
    return filled and device.takes(a.codes, b.codes, a.step, b.step, bias, dtypes=(torch.int8, torch.float32))


def blocked_matmul(
    a: Stepped,
    b: Stepped,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
) -> Tensor:
    """`fqt.kernels.blocked.matmul`.

    tiles: how the kernel cuts its work; None for the fastest.
    """
    left, right = Side(a.codes), Side(b.codes.T)
    left, right = (side if side.codes.stride(1) == 1 else side.turned(False) for side in (left, right))
    with torch.cuda.device_of(a.codes):
        if tiles is None:
            choices = _choices(a.codes, min(block_length(a, b), a.codes.shape[1]))
            key = ("blocked", tune.bucket(a.codes.shape[0]), *b.codes.shape, block_length(a, b), dtype)
            run = lambda each: _run(left, right, a, b, bias, dtype, each)
            tiles = tune.fastest(key, a.codes, choices, run, a.codes.numel() * b.codes.shape[1])
        return _run(left, right, a, b, bias, dtype, tiles)


def _choices(x: Tensor, length: int) -> list[Tiles]:
    """For blocks of so many terms."""
    terms = max(_LEAST_STEP, min(_LONGEST_STEP, 1 << (length - 1).bit_length()))
    return tiles_of(terms) if x.is_cuda else [Tiles(tune.TINY.rows, tune.TINY.columns, terms, 4, 1)]


def tiles_of(terms: int) -> list[Tiles]:
    """With so many terms to a step. A tile holds a sum in int32 and one in float32: twice a plain product's."""
    return [Tiles(128, 128, terms, 8, 3), Tiles(64, 128, terms, 4, 3)]


def _run(
    left: Side, right: Side, a: Stepped, b: Stepped, bias: Tensor | None, dtype: torch.dtype, tiles: Tiles
) -> Tensor:
    (m, terms), n = left.codes.shape, right.codes.shape[0]
    length = block_length(a, b)
    out = torch.empty(m, n, dtype=dtype, device=left.codes.device)
    grid = (-(-m // tiles.rows) * -(-n // tiles.columns),)
    bias = None if bias is None else bias.detach().contiguous()
    _blocked[grid](
        left.codes, right.codes, steps_by_block(a, length), steps_by_block(b.T, length), bias, out, m, n, terms,
        length, a.blocks.rows or m, b.blocks.columns or n, *left.codes.stride(), *reversed(right.codes.stride()),
        WHOLE=min(length, terms) <= tiles.terms, GROUP=NEIGHBOURS,
        **tiles.blocks(), **tiles.launch(), **ROUNDED,
    )  # fmt: skip
    return out
