"""Random numbers on the device: the words of `fqt.kernels.philox`, each a function of seed, stream and index.

The seed is read where it lies. One Philox block holds the noise of eight neighbouring entries. Where a matrix's
columns are a multiple of eight, a tile makes each block once; else every entry makes its own, at eight times the
arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels import philox as words
from fqt.kernels.rounding import dither_streams
from fqt.kernels.triton.device import launch, takes

_ROUNDING = tl.constexpr(words.STREAM_ROUNDING)
_ROUNDING_LOW = tl.constexpr(words.STREAM_ROUNDING_LOW)
_BLOCKS = 256  # Philox blocks of a program that fills a vector


def takes_seed(seed: Tensor | None) -> bool:
    """Whether the kernels can read this seed."""
    return seed is None or (takes(seed, dtypes=(torch.int64,)) and seed.numel() == 1)


@triton.jit
def philox(seed, stream: tl.constexpr, block):
    """The four words, uint32, of blocks of a stream."""
    block = block.to(tl.int64)  # where it is int32, a shift by 32 is undefined
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tl.zeros_like(low) + stream, tl.zeros_like(low))


@triton.jit
def _pick(place, a, b, c, d):
    """Of four, the one at this place."""
    return tl.where(place < 2, tl.where(place == 0, a, b), tl.where(place == 2, c, d))


@triton.jit
def u24(seed, stream: tl.constexpr, index):
    """int32: the 24-bit integers of a stream at these indices."""
    a, b, c, d = philox(seed, stream, index >> 2)
    return (_pick(index & 3, a, b, c, d) >> 8).to(tl.int32)


@triton.jit
def high_bits(seed, first, C: tl.constexpr, ALIGNED: tl.constexpr):
    """int32: the upper 16 of an entry's 24 bits, for runs of C entries that begin at `first` (R, 1)."""
    if ALIGNED:
        a, b, c, d = philox(seed, _ROUNDING, (first >> 3) + tl.arange(0, C // 8)[None, :])
        word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        half = tl.interleave(word & 0xFFFF, word >> 16)
    else:
        index = first + tl.arange(0, C)[None, :]
        a, b, c, d = philox(seed, _ROUNDING, index >> 3)
        word = _pick((index >> 1) & 3, a, b, c, d)
        half = tl.where((index & 1) == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32)


@triton.jit
def low_bits(seed, first, C: tl.constexpr, ALIGNED: tl.constexpr):
    """int32: the lower 8 of an entry's 24 bits, as above."""
    if ALIGNED:
        eighth = (first >> 3) + tl.arange(0, C // 8)[None, :]
        a, b, c, d = philox(seed, _ROUNDING_LOW, eighth >> 1)
        even = (eighth & 1) == 0
        word = tl.interleave(tl.where(even, a, c), tl.where(even, b, d))
        byte = tl.interleave(tl.interleave(word, word >> 16), tl.interleave(word >> 8, word >> 24))
    else:
        index = first + tl.arange(0, C)[None, :]
        a, b, c, d = philox(seed, _ROUNDING_LOW, index >> 4)
        byte = _pick((index >> 2) & 3, a, b, c, d) >> ((index & 3) * 8).to(tl.uint32)
    return (byte & 0xFF).to(tl.int32)


@triton.jit
def _random_u24(out, seed, n, STREAM: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    a, b, c, d = philox(tl.load(seed), STREAM, block)
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    place = tl.program_id(0).to(tl.int64) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(out + place, (word >> 8).to(tl.int32), mask=place < n)


def takes_random_u24(seed: Tensor, stream: int, n: int) -> bool:
    """Whether the kernel can read the seed."""
    return takes_seed(seed)


def random_u24(seed: Tensor, stream: int, n: int) -> Tensor:
    """As the reference."""
    out = torch.empty(n, dtype=torch.int32, device=seed.device)
    launch(_random_u24, triton.cdiv(n, 4 * _BLOCKS), out, seed, n, on=out, STREAM=stream, BLOCKS=_BLOCKS)
    return out


@triton.jit(do_not_specialize=["index"])
def _fork(out, seed, index, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    z = (tl.zeros((1,), tl.int64) + index + 1).to(tl.uint64, bitcast=True) * GOLDEN
    z += tl.load(seed).to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    z = z ^ (z >> 31)
    tl.store(out + tl.arange(0, 1), z.to(tl.int64, bitcast=True))


def takes_fork_seed(seed: Tensor, index: int) -> bool:
    """Whether the kernel can read the seed, and the index is an int64."""
    return takes_seed(seed) and 0 <= index < 2**63 - 1


def fork_seed(seed: Tensor, index: int) -> Tensor:
    """As the reference, in one launch."""
    out = torch.empty((), dtype=torch.int64, device=seed.device)
    golden, first, second = words.SPLITMIX
    launch(_fork, 1, out, seed, index, on=out, GOLDEN=golden, FIRST=first, SECOND=second, warps=1)
    return out


@triton.jit
def dither_at(seed, place, rows, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """The dither of the rows, and behind them that of the columns."""
    key = tl.load(seed)
    along = tl.where(place < rows, u24(key, ROW, place), u24(key, COLUMN, tl.maximum(place - rows, 0)))
    return along.to(tl.float32) * (1.0 / 16777216)


@triton.jit
def _dither(out, seed, n, rows, ROW: tl.constexpr, COLUMN: tl.constexpr, SIZE: tl.constexpr):
    """The dither of all rows, then that of all columns: both streams are made, and one is kept."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(out + place, dither_at(seed, place, rows, ROW, COLUMN), mask=place < n)


def dither_of(seed: Tensor, shape: tuple[int, int], transposed: bool) -> Tensor:
    """(N + D,) float32: the dither of `fqt.kernels.codes.Dither`, of the rows and then of the columns."""
    rows, columns = shape
    out = torch.empty(rows + columns, dtype=torch.float32, device=seed.device)
    row, column = dither_streams(transposed)
    programs = triton.cdiv(out.numel(), _BLOCKS)
    launch(_dither, programs, out, seed, out.numel(), rows, on=out, ROW=row, COLUMN=column, SIZE=_BLOCKS)
    return out
