"""Transforms of rows and columns: butterflies to the last bit, reflections to the rounding of a sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fqt.kernels import mixing, ops, reference
from fqt.kernels.codes import ROW, Entries, Levels
from fqt.kernels.mixing import Guard
from fqt.kernels.rounding import STOCHASTIC, Coding
from fqt.kernels.triton import transform
from tests.backends import moved, same
from tests.triton_kernels.cases import DEVICE, KINDS, SEED, check, matrix

BLOCKS = [(1,), (2,), (4, 1), (8, 2, 1), (16, 16, 16, 4), (128, 64, 2), (512,)]


def around(n: int, d: int) -> list[tuple[Any, Any]]:
    """What a transform may do to rows before and after."""
    generator = torch.Generator().manual_seed(4)
    scale, offset = torch.randn(2, n, 1, generator=generator)
    right, half = torch.randn(d, generator=generator), torch.where(scale > 0, 0.5, 1.0)
    before = reference.Scaling(half, offset, scale)
    return [
        (None, None),
        (before, None),
        (None, reference.Unscaling(scale, offset)),
        (before, reference.Unscaling(scale, offset, right, torch.bfloat16)),
        (None, reference.Unscaling(scale, offset, right, torch.float16)),
    ]


def permutation(n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_butterflies_over_rows(blocks: tuple[int, ...]) -> None:
    n = sum(blocks)
    keep = torch.rand(n, 1, generator=torch.Generator().manual_seed(3)) < 0.7
    for columns in (1, 150):
        for before, after in around(n, columns)[:: 1 if columns == 150 else 3]:
            x = matrix((n, columns))
            check(transform, ops.hadamard, x, permutation(n), blocks, before, None, after)
            check(transform, ops.hadamard, x, permutation(n), blocks, before, keep, after)


@pytest.mark.parametrize("kind", KINDS)
def test_butterflies_of_kinds_of_values(kind: str) -> None:
    for before, after in around(12, 20):
        check(transform, ops.hadamard, matrix((12, 20), kind), permutation(12), (8, 4), before, None, after)
        check(transform, ops.hadamard, -matrix((12, 20), kind), permutation(12), (8, 4), before, None, after)
    check(transform, ops.rotate, matrix((6, 36), kind), torch.linspace(-1, 1, 12), None, (8, 4))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_butterflies_over_columns(blocks: tuple[int, ...]) -> None:
    period = sum(blocks)
    before, after = torch.randn(2, period, generator=torch.Generator().manual_seed(5))
    for rows, runs in [(1, 1), (5, 3), (40, 1)]:
        check(transform, ops.rotate, matrix((rows, runs * period)), before, None, blocks)
        check(transform, ops.rotate, matrix((rows, runs * period)), before, after, blocks)


def test_dtypes_strides_and_nothing() -> None:
    x = matrix((24, 24))
    for view in (x.bfloat16(), x.half(), x.T, x[:, :0]):
        check(transform, ops.hadamard, view, permutation(24), (16, 8))
        check(
            transform,
            ops.rotate,
            view,
            torch.ones(24 if view.numel() else 0),
            None,
            (16, 8) if view.numel() else (),
        )
        check(transform, ops.reflect, view, torch.arange(24) // 2, torch.ones(24, 1), torch.ones(24, 1))
    check(transform, ops.hadamard, x[:0], permutation(0), ())
    check(transform, ops.reflect, x[:0], permutation(0), x[:0, :1], x[:0, :1])
    assert not transform.takes_hadamard(x.double(), permutation(24), (16, 8))
    assert not transform.takes_hadamard(torch.ones(8192, 1), permutation(8192), (8192,))


def close(a: Any, b: Any) -> bool:
    """To the rounding of a sum of 40 products of about 1, scaled."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    coarse = 2.0**-7 if a.dtype == torch.bfloat16 else 2.0**-10 if a.dtype == torch.float16 else 2.0**-16
    return alike and torch.allclose(a, b, rtol=coarse, atol=40 * 2.0**-21, equal_nan=True)


@pytest.mark.parametrize("groups", [1, 3, 40])
def test_reflections(groups: int) -> None:
    """Blocks of all sizes: all rows in one, as many as rows, and many blocks that are empty."""
    generator = torch.Generator().manual_seed(groups)
    group = torch.randint(groups, (40,), generator=generator)
    normal, factor = torch.randn(2, 40, 1, generator=generator)
    x = matrix((40, 130))
    for before, after in around(40, 130)[:: 1 if groups == 3 else 3]:
        check(transform, ops.reflect, x, group, normal, factor / 40, before, after, equal=close)


def test_reflections_of_two_rows_are_the_references_bits() -> None:
    group, normal = torch.arange(20) // 2 * 2, torch.randn(20, 1, generator=torch.Generator().manual_seed(1))
    check(transform, ops.reflect, matrix((20, 130)), group, normal, torch.ones(20, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_rows(kind: str) -> None:
    for shape in [(0, 5), (5, 0), (1, 1), (70, 300)]:
        x = matrix(shape, kind) if 0 not in shape else torch.empty(shape)
        keep = torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(6)) < 0.5
        for y, source in [(torch.ones(shape), x.half()), (torch.ones(shape[::-1]).T, x)]:
            wanted = reference.replace_rows_(y.clone(), keep, source)
            there = moved((y.clone(memory_format=torch.preserve_format), keep, source), DEVICE)
            assert transform.takes_replace_rows_(*there)
            found = transform.replace_rows_(*there)
            assert found is there[0]
            assert same(found.cpu(), wanted)


def test_codes_of_reflected_rows() -> None:
    """Of 8-bit codes fewer than one in 1000 move, each by one, to the reference's reflections.

    What moves them is the last bit of a sum: a code moves where a position comes so near to its noise.
    """
    x = matrix((96, 64)) * torch.logspace(0, 3, 96)[:, None]
    coding = Coding("affine", Levels(0, 255), STOCHASTIC)
    _, mix = mixing.householder(x, "released", Guard(False, coding))
    rows = mixing._Rows.of(x)
    inverse = mix.inverse_scale[:, 0].double()
    scale = torch.where(inverse == 0, 0.0, 1 / inverse)
    arguments = (x, mix.matrix.group, mix.matrix.normal, mix.matrix.beta, rows.scaling(scale))
    each = [reference.reflect(*arguments), moved(transform.reflect(*moved(arguments, DEVICE)), "cpu")]
    codes = [ops.quantize(Entries(y), ROW, coding, SEED).codes.int() for y in each]
    moves = (codes[0] - codes[1]).abs()
    assert moves.max() <= 1
    assert moves.float().mean() < 1e-3
