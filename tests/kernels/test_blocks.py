"""Steps shared by blocks of a matrix, against loops over its entries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fqt.kernels import ops
from fqt.kernels.codes import COLUMN, ROW, TENSOR, Blocks, Entries, Levels, Scales
from fqt.kernels.cpu import library
from fqt.kernels.rounding import NEAREST, STOCHASTIC
from tests.backends import compare

BLOCKS = [Blocks(32, 32), Blocks(1, 16), Blocks(4, 1), Blocks(3, 5), Blocks(0, 4), Blocks(4, 0), Blocks(1, 1)]
BLOCKS += [TENSOR, ROW, COLUMN]
SHAPES = [(32, 32), (33, 65), (1, 1), (5, 16), (7, 31), (4, 3), (2, 100)]
EMPTY = [(0, 5), (5, 0), (0, 0)]
SEED = torch.tensor(3)
by_blocks = pytest.mark.parametrize("blocks", BLOCKS, ids=str)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix(shape: tuple[int, int]) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return torch.where(x.abs() < 0.3, 0.0, x)


def block_of(blocks: Blocks, shape: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """The entries of every block, block after block along the rows of blocks; entry by entry."""
    rows, columns = blocks.rows or max(shape[0], 1), blocks.columns or max(shape[1], 1)
    across = math.ceil(shape[1] / columns)
    found: list[list[tuple[int, int]]] = [[] for _ in range(math.ceil(shape[0] / rows) * across)]
    for i in range(shape[0]):
        for j in range(shape[1]):
            found[i // rows * across + j // columns].append((i, j))
    return found


def scales_for(x: torch.Tensor, blocks: Blocks, levels: Levels) -> Scales:
    return Scales(*ops.parameters(*ops.value_range(Entries(x), blocks), "affine", levels.high), blocks)


@by_blocks
@by_shape
def test_ranges_codes_values_and_variances(shape: tuple[int, int], blocks: Blocks) -> None:
    x, levels = matrix(shape), Levels(0, 15)
    lo, hi = (p.flatten().tolist() for p in ops.value_range(Entries(x), blocks))
    scales = scales_for(x, blocks, levels)
    step, offset = (p.flatten().numpy() for p in (scales.step, scales.offset))
    codes = ops.encode(Entries(x), scales, levels, NEAREST, None).numpy()
    either = ops.encode(Entries(x), scales, levels, STOCHASTIC, SEED).numpy()
    values = ops.decode(torch.from_numpy(either), scales, None).numpy()
    unit = ops.code_variance(Entries(x), scales, levels).numpy()
    sums = ops.variance_sums(Entries(x), scales, levels).flatten().tolist()
    sizes = torch.broadcast_to(blocks.sizes(shape, x.device), blocks.count(shape)).flatten().tolist()
    entries = block_of(blocks, shape)
    assert len(entries) == len(lo) == math.prod(blocks.count(shape))
    for k, block in enumerate(entries):
        inside = [float(x[e]) for e in block]
        assert (lo[k], hi[k], sizes[k]) == (min(inside), max(inside), len(inside))
        total = 0
        for e, value in zip(block, inside, strict=True):
            one = np.float32(1) if step[k] == 0 else step[k]
            t = (np.float32(value) - offset[k]) / one
            p = t - np.floor(t)
            assert codes[e] == np.rint(t)
            assert either[e] in (np.floor(t), np.ceil(t))
            assert values[e] == pytest.approx(step[k] * either[e] + offset[k], rel=1e-6, abs=1e-6)
            assert unit[e] == pytest.approx(p * (1 - p), abs=1e-6)
            total += round(float(unit[e]) * 2**24)
        assert sums[k] == total


@by_blocks
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
def test_every_backend_gives_the_same(shape: tuple[int, int], blocks: Blocks) -> None:
    """The C++ kernels take blocks of whole rows, columns and matrices; the others wait for a backend that does."""
    takes = blocks in (TENSOR, ROW, COLUMN) and library.takes() and 0 not in shape
    by = "cpu" if takes else None
    for x in (Entries(matrix(shape)), Entries(matrix(shape).bfloat16(), torch.full((1,), 0.7))):
        levels = Levels(0, 15)
        scales = scales_for(x.values(), blocks, levels)
        compare(ops.value_range, x, blocks, by=by)
        compare(ops.encode, x, scales, levels, STOCHASTIC, SEED, by=by)
        compare(ops.decode, ops.encode(x, scales, levels, NEAREST, None), scales, None, by=by)
        compare(ops.code_variance, x, scales, levels, by=by if x.factor is None else None)
        compare(ops.variance_sums, x, scales, levels, by=by)


@by_blocks
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, int], blocks: Blocks) -> None:
    x, levels = matrix(shape), Levels(0, 15)
    scales = scales_for(x, blocks, levels)
    assert scales.step.shape == blocks.count(shape)
    codes = ops.encode(Entries(x), scales, levels, STOCHASTIC, SEED)
    assert ops.decode(codes, scales, None).shape == codes.shape == shape
    sums = ops.variance_sums(Entries(x), scales, levels)
    assert sums.shape == blocks.count(shape)
    assert int(sums.abs().sum()) == 0


def test_no_columns_take_no_factors() -> None:
    for matrix in (torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.float64)):
        assert Entries(matrix, torch.zeros(0)).values().shape == (3, 0)


def test_a_value_that_is_not_finite_spoils_its_block_alone() -> None:
    x = matrix((6, 10))
    x[4, 7] = torch.nan
    step = scales_for(x, Blocks(2, 4), Levels(0, 15)).step
    assert step.shape == (3, 3)
    assert torch.isnan(step).nonzero().tolist() == [[2, 1]]


def test_blocks_of_the_transposed_matrix() -> None:
    x = matrix((7, 31))
    for blocks in BLOCKS:
        for a, b in zip(
            ops.value_range(Entries(x), blocks), ops.value_range(Entries(x.T), blocks.turned), strict=True
        ):
            assert torch.equal(a, b.T)
