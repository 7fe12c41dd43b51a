"""Products of codes of few bits, which AVX2 adds up in 16 bits: as many as fit, and not one more."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels import integer
from fqt.kernels.codes import DITHER_LEVELS, ROW, TENSOR, Dither, Scales
from fqt.kernels.cpu import library
from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.kernels.tensor import QuantizedTensor, RowView
from tests.backends import compare

Bounds = tuple[int, int]
U8, U7, U6, U4, U2 = (0, 255), (0, 127), (0, 63), (0, 15), (0, 3)
S8, S7, S4, S2 = (-127, 127), (-63, 63), (-7, 7), (-1, 1)
STEPS = [
    # left, right, how many products of four terms fit 16 bits: 32767 ÷ (2 · greatest · greatest)
    (U7, S8, 1),
    (U7, S7, 2),
    (U6, S8, 2),
    (U4, S8, 8),
    (U4, S4, 156),
    (U4, U7, 8),
    (U4, U8, 4),  # the right one unsigned
    (U7, U7, 1),
    (U7, U8, 1),  # the right one lowered
    (U8, U7, 1),  # the left one lowered
    (U8, U4, 4),
    (U8, S7, 1),
    (S7, S8, 1),  # the left one lifted
    (S8, S7, 1),
    (S4, U8, 9),
    (S8, U7, 1),
    (S2, S2, 8191),
    (U2, U2, 1820),
    (U8, S8, 0),
    (U8, U8, 0),
    (S8, S8, 0),
    (S8, U8, 0),
]
BACKWARD = [pair[:2] for pair in STEPS if pair[0][0] == 0]
needs_narrow = pytest.mark.skipif(
    library.status().level != "avx2", reason="these kernels are AVX2's; test_processes runs this file on them"
)


def codes(bounds: Bounds, shape: torch.Size, kind: str, seed: int) -> torch.Tensor:
    """Codes of a matrix: "greatest" and "least" everywhere, both by turns along each axis, or any."""
    low, high = bounds
    if kind == "random":
        found = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))
    else:
        found = torch.full(shape, high if kind != "least" else low)
    if kind == "by turns":
        found[::3] = low
        found[:, ::5] = low
    return found.to(torch.int8 if low < 0 else torch.uint8)


def tensor(
    bounds: Bounds, shape: tuple[int, ...], kind: str, seed: int, axis: int = 0, dithered: bool = False
) -> QuantizedTensor:
    """One with such codes; a step for each index of `axis`, or one for all if it is negative."""
    draw = torch.Generator().manual_seed(seed)
    view = RowView.of(torch.Size(shape), (max(axis, 0),), may_transpose=True)
    rows, columns = view.size
    blocks = TENSOR if axis < 0 else ROW.turned if view.transposed else ROW
    size = {TENSOR: (1, 1), ROW: (rows, 1)}.get(blocks, (1, columns))
    scales = Scales(torch.rand(size, generator=draw) + 0.1, torch.zeros(size), blocks)
    noise = None
    if bounds[0] == 0:
        scales = Scales(scales.step, torch.randn(size, generator=draw), blocks)
    if dithered:
        of = lambda *size: torch.randint(0, DITHER_LEVELS, size, generator=draw).float() / DITHER_LEVELS
        noise = Dither(of(rows, 1), of(1, columns))
    matrix = codes(bounds, torch.Size(view.size), kind, seed)
    return QuantizedTensor(view, torch.float32, matrix, scales, noise, bounds=bounds)


@needs_narrow
@pytest.mark.parametrize(("left", "right", "steps"), STEPS)
def test_how_many_products_fit(left: Bounds, right: Bounds, steps: int) -> None:
    assert library.narrow_steps(left, right) == steps


def test_other_levels_have_no_such_kernels() -> None:
    if library.status().level == "avx2":
        assert library.narrow_steps(U8, S8) == 0
    else:
        assert {library.narrow_steps(left, right) for left, right, _ in STEPS} == {0}


KINDS = ("greatest", "least", "by turns", "random")
SIZES = [(1, 1, 1), (5, 3, 2), (7, 9, 17), (13, 70, 33), (98, 40, 1100)]
"""Rows, columns and terms of a product: less than a tile, tails of all, more than a slice of terms."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [pair[:2] for pair in STEPS if pair[1][0] < 0], ids=str)
def test_outputs_and_input_gradients(left: Bounds, right: Bounds, kind: str) -> None:
    """x · wᵀ and g · w, whose right operands lie differently."""
    for m, n, k in SIZES:
        x, w = tensor(left, (m, k), kind, 1, axis=-1), tensor(right, (n, k), kind, 2)
        compare(integer.output, DenseMap(), x, w, None, torch.float32)
        g, w = tensor(left, (m, k), kind, 3), tensor(right, (k, n), kind, 4, axis=-1)
        compare(integer.grad_input, DenseMap(), g, w, False, torch.Size((m, n)), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [pair[:2] for pair in STEPS], ids=str)
def test_weight_gradients(left: Bounds, right: Bounds, kind: str) -> None:
    """gᵀ · x, of which both operands lie on their sides."""
    for m, n, k in SIZES:
        g, x = tensor(left, (k, m), kind, 5, axis=1), tensor(right, (k, n), kind, 6, axis=-1)
        compare(integer.grad_weight, DenseMap(), g, x, None, torch.Size((m, n)))


IMAGES: list[tuple[tuple[int, ...], int, int, LinearMap]] = [
    # input (N, H, W, C), output channels, taps per axis, how
    ((2, 5, 6, 3), 5, 3, ConvMap((1, 1), (1, 1), (1, 1), 1)),
    ((1, 9, 8, 20), 18, 3, ConvMap((2, 1), (1, 2), (1, 2), 1)),
    ((2, 4, 19, 64), 34, 1, ConvMap((1, 1), (0, 0), (1, 1), 1)),
    ((2, 7, 5, 36), 34, 3, ConvMap((1, 1), (1, 1), (1, 1), 2)),
]


@pytest.mark.parametrize("dithered", [False, True], ids=["", "dithered"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [(U7, S8), (U4, S8), (S7, S8), (U8, S7), (U4, S4), (S4, S4)], ids=str)
def test_convolutions(left: Bounds, right: Bounds, kind: str, dithered: bool) -> None:
    """Codes beyond the padding count as 0, shifted or not; noise is multiplied beside the gradient's codes."""
    for (n, h, w, c), o, taps, map in IMAGES:
        weight = tensor(right, (o, taps, taps, c // map.groups), kind, 1, axis=-1)
        x = tensor(left, (n, h, w, c), kind, 2)
        out = integer.output(map, x, weight, None, torch.float32)
        compare(integer.output, map, x, weight, None, torch.float32)
        size = (n, *out.shape[2:], o)
        if left[0] == 0:
            g = tensor(left, size, kind, 3, dithered=dithered)
            compare(integer.grad_input, map, g, weight, False, torch.Size((n, c, h, w)), torch.float32)


@pytest.mark.parametrize("dithered", [False, True], ids=["", "dithered"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), BACKWARD, ids=str)
def test_weight_gradients_of_convolutions(left: Bounds, right: Bounds, kind: str, dithered: bool) -> None:
    for (n, h, w, c), o, taps, map in IMAGES[: 4 if kind == "random" else 2]:
        x = tensor(right, (n, h, w, c), kind, 4, axis=-1)
        weight = tensor(S8, (o, taps, taps, c // map.groups), kind, 1, axis=-1)
        size = integer.output(map, x, weight, None, torch.float32).shape[2:]
        g = tensor(left, (n, *size, o), kind, 5, axis=3, dithered=dithered)
        compare(integer.grad_weight, map, g, x, None, torch.Size((o, c // map.groups, taps, taps)))
