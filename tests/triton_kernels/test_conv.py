"""Convolutions on Triton's kernels: exact sums, and the reference's bits of every epilogue."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from fqt.kernels import products as declared
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.products import Geometry
from tests.backends import moved
from tests.triton_kernels.machine import BYTES, DEVICE, INTERPRETED, QUIET, SHORT, codes

from fqt.kernels.triton import conv  # isort: skip
from fqt.kernels.triton.tune import Tiles  # isort: skip

pytestmark = QUIET
U8, S8 = BYTES
NOTHING = (None,) * 8


class Case(NamedTuple):
    """An input (N, C, H, W), a weight (O, C/groups, kh, kw) and how they meet."""

    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    geometry: Geometry

    @property
    def output(self) -> tuple[int, int, int, int]:
        size = self.geometry.output_size(self.input[2:], self.weight[2:])
        return (self.input[0], self.weight[0], *size)


CASES = {
    "3×3": Case((2, 5, 7, 6), (4, 5, 3, 3), Geometry((1, 1), (1, 1))),
    "stride 2": Case((2, 3, 9, 8), (6, 3, 3, 3), Geometry((2, 2), (1, 1))),
    "many channels, uneven": Case((1, 36, 6, 7), (8, 36, 3, 2), Geometry((2, 3), (1, 0))),
    "dilated, strided, grouped": Case((2, 4, 9, 9), (4, 2, 3, 3), Geometry((2, 1), (2, 1), (2, 1), 2)),
    "dilated": Case((1, 3, 9, 9), (4, 3, 3, 3), Geometry((1, 1), (2, 2), (2, 2))),
    "groups of many channels": Case((1, 70, 4, 4), (6, 35, 2, 2), Geometry((1, 1), (1, 1), (1, 1), 2)),
    "one pixel": Case((2, 8, 5, 5), (6, 8, 1, 1), Geometry()),
    "one pixel, stride 2": Case((2, 8, 5, 5), (6, 8, 1, 1), Geometry((2, 2))),
    "a line": Case((2, 4, 1, 12), (3, 4, 1, 5), Geometry((1, 2), (0, 2))),
    "more padding than kernel": Case((1, 2, 3, 3), (2, 2, 2, 2), Geometry((2, 2), (3, 3))),
}


def epilogue(rows: int, columns: int, place: tuple[int, ...], dtype: torch.dtype) -> Epilogue:
    draw = torch.Generator().manual_seed(7)
    return Epilogue(
        row_scale=torch.rand(rows, generator=draw) * 1e-3,
        column_scale=torch.rand(columns, generator=draw),
        left=torch.randn(rows, 2, generator=draw),
        right=torch.randn(2, *place, generator=draw),
        bias=torch.randn(columns, generator=draw),
        zero=torch.randint(0, 256, (rows,), generator=draw, dtype=torch.int32),
        ones=torch.randint(-(2**20), 2**20, place, generator=draw, dtype=torch.int64),
        dtype=dtype,
    )


def operands(
    case: Case, product: str, left: torch.dtype, right: torch.dtype = S8
) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = {"output": (case.input, case.weight), "grad_input": (case.output, case.weight)}
    a, b = shapes.get(product, (case.output, case.input))
    return codes(a, left, 1).to(memory_format=torch.channels_last), codes(b, right, 2)


def check(
    case: Case,
    product: str,
    a: torch.Tensor,
    b: torch.Tensor,
    dtype: torch.dtype | None,
    tiles: Tiles | None = None,
) -> None:
    n, c, h, w = case.input
    o, depth, kh, kw = case.weight
    rows, columns, place = {
        "output": (n, o, (*case.output[2:], o)),
        "grad_input": (n, c, (h, w, c)),
        "grad_weight": (o, depth * kh * kw, (depth * kh * kw,)),
    }[product]
    arguments = NOTHING if dtype is None else epilogue(rows, columns, place, dtype).arguments()
    rest = (*case.geometry.arguments(), *arguments)
    checked, op, run = {
        "output": (lambda: declared._check_conv2d(a, b, rest), declared.conv2d_of, conv.conv2d_of),
        "grad_input": (
            lambda: declared._check_grad_input(a, b, [h, w], rest),
            declared.conv2d_grad_input_of,
            conv.conv2d_grad_input_of,
        ),
        "grad_weight": (
            lambda: declared._check_grad_weight(a, b, [kh, kw], rest),
            declared.conv2d_grad_weight_of,
            conv.conv2d_grad_weight_of,
        ),
    }[product]
    known = checked()
    wanted = op.reference(a, b, *known)
    found = run(a.to(DEVICE), b.to(DEVICE), *moved(known, DEVICE), tiles)
    assert found.dtype == wanted.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("product", ["output", "grad_input"])
def test_images(product: str, name: str) -> None:
    check(CASES[name], product, *operands(CASES[name], product, U8), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_filters(name: str) -> None:
    """Unsigned on both sides is the case with every correction."""
    check(CASES[name], "grad_weight", *operands(CASES[name], "grad_weight", U8, U8), torch.float32)


@pytest.mark.parametrize("product", ["output", "grad_input", "grad_weight"])
def test_sums_alone_and_signed_codes(product: str) -> None:
    for name in ("3×3", "one pixel"):
        check(CASES[name], product, *operands(CASES[name], product, S8), None)


@pytest.mark.parametrize("signs", [(U8, S8), (S8, U8)], ids=str)
def test_filters_of_mixed_signs(signs: tuple[torch.dtype, torch.dtype]) -> None:
    for name in ("3×3", "dilated, strided, grouped"):
        check(CASES[name], "grad_weight", *operands(CASES[name], "grad_weight", *signs), None)


@pytest.mark.parametrize("dtype", SHORT)
def test_short_results(dtype: torch.dtype) -> None:
    check(CASES["stride 2"], "grad_input", *operands(CASES["stride 2"], "grad_input", U8), dtype)


def test_more_pixels_than_int32_sums() -> None:
    """All codes at the end of their range: parts meet in int64."""
    case = Case((1, 1, 200, 200), (1, 1, 1, 2), Geometry((1, 1), (0, 1)))
    a, b = (torch.full(shape, 255, dtype=U8) for shape in (case.output, case.input))
    assert a.numel() > declared.most_terms(U8, U8)
    tiles = Tiles(64, 64, 4096, 4, 1) if INTERPRETED else None  # fewer steps, each of which takes it a while
    check(case, "grad_weight", a, b, None, tiles)


def test_empty_operands_are_the_references() -> None:
    case = Case((0, 2, 4, 4), (2, 2, 3, 3), Geometry())
    a, b = codes(case.input, U8), codes(case.weight, S8)
    known = declared._check_conv2d(a, b, (*case.geometry.arguments(), *NOTHING))
    assert not conv.takes_conv2d_of(a, b, *known)
