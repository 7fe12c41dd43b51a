"""Sums over rows, columns and blocks: integers exactly, floats to their rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fqt.kernels import ops
from fqt.kernels.codes import Entries, Findings, Levels
from fqt.kernels.triton import sums
from tests.triton_kernels.cases import BLOCKS, KINDS, check, matrix, scales_over

SHAPES = [(1, 1), (3, 130), (200, 33), (0, 5), (5, 0)]


def codes(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    ends = torch.iinfo(dtype)
    return torch.randint(ends.min, ends.max + 1, shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_sums_of_codes(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = codes(shape, dtype)
        weights = torch.randint(2**24, shape[:1], generator=torch.Generator().manual_seed(4), dtype=torch.int32)
        for view, heavy in [(x, weights), (x.T.contiguous().T, weights)]:
            check(sums, ops.column_sums, view)
            check(sums, ops.column_sums, view, heavy)
            check(sums, ops.row_sums, view)


def test_sums_that_leave_int32() -> None:
    """600 codes of 255 times weights of 2²⁴ − 1."""
    x, weights = torch.full((600, 2), 255, dtype=torch.uint8), torch.full((600,), 2**24 - 1, dtype=torch.int32)
    assert int(check(sums, ops.column_sums, x, weights)[1][0]) == 600 * 255 * (2**24 - 1)


def close(a: Any, b: Any) -> bool:
    """To float32's rounding of runs of 32 rows of numbers of about 1."""
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=32 * 2.0**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_values(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = matrix(shape).to(dtype) if 0 not in shape else torch.empty(shape, dtype=dtype)
        check(sums, ops.value_sums, x, equal=close)
        check(sums, ops.value_sums, x.T, equal=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_rows(dtype: torch.dtype) -> None:
    """The rows to the last bit, their sum to float64's rounding."""

    def alike(a: Any, b: Any) -> bool:
        sums_alike = b[1] is None if a[1] is None else torch.allclose(a[1], b[1], rtol=1e-13, atol=1e-13)
        return torch.equal(a[0], b[0]) and sums_alike and a[2] == b[2]

    for shape in SHAPES:
        x = matrix(shape).to(dtype) if 0 not in shape else torch.empty(shape, dtype=dtype)
        factor, weight = torch.randn(2, shape[0], generator=torch.Generator().manual_seed(5))
        for heavy in (weight, None):
            check(sums, ops.scaled_rows, x, factor, heavy, Findings(channels=1), equal=alike)


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_variance_sums(blocks: Any) -> None:
    for levels in (Levels(0, 255), Levels(-12, 12, 1), Levels(-8, 8, table=(0, 1, 2, 4, 8))):
        x = Entries(matrix((33, 70)))
        check(sums, ops.variance_sums, x, scales_over(x, blocks, levels), levels)


@pytest.mark.parametrize("kind", KINDS)
def test_variance_sums_of_kinds(kind: str) -> None:
    x = Entries(matrix((5, 2300), kind))
    check(sums, ops.variance_sums, x, scales_over(x, BLOCKS["tensor"], Levels(0, 255)), Levels(0, 255))
