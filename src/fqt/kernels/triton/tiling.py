"""How a pass that leaves one number per block is cut into programs.

A tile has four axes: blocks down, rows of a block, blocks across, columns of a block; so ranges and sums of any
blocks, from (1, 16) to the whole matrix, are one kernel each. Where there are few blocks their rows and columns are
split among programs, and what these leave is put together by a second, small pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from fqt.kernels.codes import Blocks

_ENTRIES = 4096  # of a tile
_WIDTH = 256  # columns that a tile spans at least, if there are as many: whole cache lines
_PROGRAMS = 1024  # enough for every GPU; below that, blocks are split
_LEAST = 4  # tiles along an axis that are worth a program of their own


@dataclass(frozen=True)
class Tiling:
    """How a matrix is cut.

    Attributes:
        shape: the matrix's.
        block: rows and columns of a block.
        count: blocks down and across.
        tile: blocks down, rows, blocks across, columns of a tile, powers of two.
        splits: programs along the rows and along the columns of a block.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    count: tuple[int, int]
    tile: tuple[int, int, int, int]
    splits: tuple[int, int]

    @staticmethod
    @lru_cache(maxsize=256)
    def of(blocks: Blocks, shape: tuple[int, int]) -> Tiling:
        """For a matrix that is not empty."""
        block = (blocks.rows or shape[0], blocks.columns or shape[1])
        down, across = count = blocks.count(shape)
        columns = _power(block[1], 2 * _WIDTH)
        wide = _power(across, max(1, _WIDTH // columns))
        rows = _power(block[0], min(16, _ENTRIES // (columns * wide)))
        tall = _power(down, _ENTRIES // (columns * wide * rows))
        wanted = triton.cdiv(_PROGRAMS, triton.cdiv(down, tall) * triton.cdiv(across, wide))
        by_rows = min(wanted, triton.cdiv(block[0], _LEAST * rows))
        by_columns = min(triton.cdiv(wanted, by_rows), triton.cdiv(block[1], _LEAST * columns))
        return Tiling(shape, block, count, (tall, rows, wide, columns), (by_rows, by_columns))

    @property
    def partial(self) -> tuple[int, int, int, int]:
        """The shape of what the programs leave: splits are its axes 1 and 3."""
        return (self.count[0], self.splits[0], self.count[1], self.splits[1])

    @property
    def spans(self) -> tuple[int, int]:
        """Rows and columns of a block that a program goes through, multiples of its tile's."""
        pairs = zip(self.block, self.splits, self.tile[1::2], strict=True)
        rows, columns = (triton.cdiv(triton.cdiv(length, parts), size) * size for length, parts, size in pairs)
        return rows, columns

    @property
    def programs(self) -> int:
        """How many."""
        down, across = (triton.cdiv(n, size) for n, size in zip(self.count, self.tile[::2], strict=True))
        return down * across * self.splits[0] * self.splits[1]

    @property
    def arguments(self) -> tuple[tuple[int, ...], ...]:
        """For `place`."""
        return self.shape, self.block, self.count, self.splits, self.spans

    @property
    def constants(self) -> dict[str, int]:
        """The tile."""
        return dict(zip(("TALL", "ROWS", "WIDE", "COLUMNS"), self.tile, strict=True))


def _power(n: int, most: int) -> int:
    """The least power of two that is not below n, but at most the greatest not above `most`."""
    return int(min(1 << (n - 1).bit_length(), 1 << (most.bit_length() - 1)))


@triton.jit
def place(count, splits, TALL: tl.constexpr, WIDE: tl.constexpr):
    """This program's blocks, (TALL, 1, 1, 1) and (1, 1, WIDE, 1) int64, and its split along the two axes."""
    program = tl.program_id(0).to(tl.int64)
    column_split, program = program % splits[1], program // splits[1]
    tiles = tl.cdiv(count[1], WIDE)
    across, program = program % tiles * WIDE + tl.arange(0, WIDE)[None, None, :, None], program // tiles
    row_split, program = program % splits[0], program // splits[0]
    down = program * TALL + tl.arange(0, TALL)[:, None, None, None]
    return down, across, row_split, column_split


@triton.jit
def entries(shape, block, down, across, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns and whether they are inside, of the tile that begins at this row and column of its blocks."""
    of_block, along = (
        row + tl.arange(0, ROWS)[None, :, None, None],
        column + tl.arange(0, COLUMNS)[None, None, None, :],
    )
    rows, columns = down * block[0] + of_block, across * block[1] + along
    inside = (of_block < block[0]) & (rows < shape[0]) & (along < block[1]) & (columns < shape[1])
    return rows, columns, inside


@triton.jit
def result(down, across, row_split, column_split, count, splits):
    """Where a program leaves its numbers, (TALL, WIDE), and which of them there are."""
    down, across = tl.reshape(down, (down.shape[0], 1)), tl.reshape(across, (1, across.shape[2]))
    where = ((down * splits[0] + row_split) * count[1] + across) * splits[1] + column_split
    return where, (down < count[0]) & (across < count[1])
