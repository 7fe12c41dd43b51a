"""No native call trusts a length: what does not fit is refused before a pointer goes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fqt.kernels.native_products import Conv
from fqt.kernels.native_quantized import Operand
from torch import Tensor

from fqt.kernels import mixed, native, native_quantized
from fqt.kernels.reference import Scaling, Unscaling

pytestmark = pytest.mark.skipif(native.status().level == "reference", reason="no native kernels here")

X, CODES, SEED = torch.randn(4, 6), torch.ones(4, 6, dtype=torch.uint8), torch.tensor(1)
ONE, ROWS, ROW_CODES = torch.ones(1, 1), torch.ones(4, 1), torch.arange(4)


def operand(rows: int, columns: int, steps: int = 1, noise: bool = False) -> Operand:
    dither = (torch.zeros(rows, 1), torch.zeros(1, columns)) if noise else None
    tensors = (torch.zeros(rows, columns, dtype=torch.uint8), torch.ones(steps), torch.zeros(steps))
    made = Operand.of(*tensors, dither)
    made.alive = (*tensors, dither)  # type: ignore[attr-defined]
    return made


def conv(**changed: int) -> Conv:
    sizes = {
        "samples": 2,
        "height": 4,
        "width": 4,
        "channels": 3,
        "out_height": 4,
        "out_width": 4,
        "out_channels": 5,
    }
    taps = {"kernel_height": 3, "kernel_width": 3, "padding_height": 1, "padding_width": 1, "groups": 1}
    ones = dict.fromkeys(("stride_height", "stride_width", "dilation_height", "dilation_width"), 1)
    return Conv(**{**sizes, **taps, **ones, **changed})


HOW = mixed.Rounding(True, 255, 15, "stochastic", SEED)
F32 = torch.float32
REFUSED: dict[str, Callable[[], object]] = {
    "range of nothing": lambda: native.value_range(X[:, :0], "row"),
    "range of another dtype": lambda: native.value_range(X.double(), "row"),
    "factor of another dtype": lambda: native.value_range(X, "row", torch.ones(6, dtype=torch.float64)),
    "ranges of two lengths": lambda: native.parameters(ROWS, ONE, "affine", 15),
    "no steps": lambda: native.parameters(ROWS, ROWS, "affine", 0),
    "sums of a vector": lambda: native.value_sums(X[0]),
    "offsets fewer than steps": lambda: native.encode(X, ROWS, ONE, 0, 15, "nearest", None),
    "steps of other rows": lambda: native.encode(X, ROWS[:3], ROWS[:3], 0, 15, "nearest", None),
    "steps in float64": lambda: native.encode(X, ROWS.double(), ROWS.double(), 0, 15, "nearest", None),
    "no seed": lambda: native.encode(X, ONE, ONE, 0, 15, "stochastic", None),
    "seeds": lambda: native.encode(X, ONE, ONE, 0, 15, "stochastic", ROW_CODES),
    "a seed in int32": lambda: native.encode(X, ONE, ONE, 0, 15, "stochastic", SEED.int()),
    "codes beyond a byte": lambda: native.encode(X, ONE, ONE, 0, 255, "dithered", SEED),
    "quantize nothing": lambda: native.quantize(X[:0], "row", "affine", 0, 15, "nearest", None),
    "quantize without seed": lambda: native.quantize(X, "row", "affine", 0, 15, "best", None),
    "variance of offsets": lambda: native.variance_sums(X, ROWS, ONE, 0, 15),
    "variance of steps": lambda: native.code_variance(X, ROWS[:2], ROWS[:2], 0, 15),
    "weights of other rows": lambda: native.column_sums(CODES, torch.ones(3, dtype=torch.int32)),
    "weights of no rows": lambda: native.column_sums(CODES[:0], torch.ones(8, dtype=torch.int32)),
    "weights in int64": lambda: native.column_sums(CODES, torch.ones(4, dtype=torch.int64)),
    "column sums of floats": lambda: native.column_sums(X),
    "row sums of a vector": lambda: native.row_sums(CODES[0]),
    "decode with offsets": lambda: native.decode(CODES, ROWS, ONE, None),
    "decode with dither": lambda: native.decode(CODES, ROWS, ROWS, torch.ones(1, 5)),
    "order of other rows": lambda: native.hadamard(X, ROW_CODES[:3], (4,)),
    "keep as floats": lambda: native.hadamard(X, ROW_CODES, (4,), keep=ROWS),
    "scaling of other rows": lambda: native.hadamard(X, ROW_CODES, (4,), Scaling(ROWS[:2], ROWS, ROWS)),
    "unscaling in float64": lambda: native.hadamard(X, ROW_CODES, (4,), after=Unscaling(ROWS.double(), ROWS)),
    "groups of other rows": lambda: native.reflect(X, ROW_CODES[:2], ROWS, ROWS),
    "normals of other rows": lambda: native.reflect(X, ROW_CODES, ROWS[:2], ROWS),
    "rows replaced by fewer": lambda: native.replace_rows_(X.clone(), ROWS.bool(), X[:, :3]),
    "rows kept by floats": lambda: native.replace_rows_(X.clone(), ROWS, X),
    "deal of other rows": lambda: mixed.hadamard_codes(X, None, ROW_CODES[:2], (4,), HOW),
    "operand of floats": lambda: Operand.of(X, ONE, ONE, None),
    "operand with strides": lambda: Operand.of(CODES.T, ONE, ONE, None),
    "operand's dither": lambda: Operand.of(CODES, ONE, ONE, (ROWS[:2], torch.ones(1, 6))),
    "dense: tokens": lambda: native_quantized.dense_output(operand(3, 6), operand(5, 6), None, (4, 6, 5), 4, F32),
    "dense: steps": lambda: native_quantized.dense_output(operand(4, 6, 3), operand(5, 6), None, (4, 6, 5), 1, F32),
    "dense: bias": lambda: native_quantized.dense_output(operand(4, 6), operand(5, 6), ROWS, (4, 6, 5), 4, F32),
    "dense: weight": lambda: native_quantized.dense_grad_input(
        operand(4, 5), operand(5, 7), (4, 6, 5), True, F32, False
    ),
    "dense: dither": lambda: native_quantized.dense_grad_input(
        operand(2, 10, noise=True), operand(5, 6), (4, 6, 5), True, F32, False
    ),
    "dense: input": lambda: native_quantized.dense_grad_weight(operand(4, 5), operand(3, 6), (4, 6, 5), True),
    "dense: input's steps": lambda: native_quantized.dense_grad_weight(
        operand(4, 5), operand(4, 6, 4), (4, 6, 5), False
    ),
    "conv: input": lambda: native_quantized.conv_output(operand(2, 47), operand(5, 27), None, conv(), F32),
    "conv: weight": lambda: native_quantized.conv_output(operand(2, 48), operand(5, 26), None, conv(), F32),
    "conv: output": lambda: native_quantized.conv_output(
        operand(2, 48), operand(5, 27), None, conv(out_height=9), F32
    ),
    "conv: groups": lambda: native_quantized.conv_output(operand(2, 48), operand(5, 27), None, conv(groups=2), F32),
    "conv: gradient": lambda: native_quantized.conv_grad_input(
        operand(2, 79), operand(5, 27), conv(), True, F32, False
    ),
    "conv: samples": lambda: native_quantized.conv_grad_input(
        operand(4, 40, noise=True), operand(5, 27), conv(), True, F32, False
    ),
    "conv: channels": lambda: native_quantized.conv_grad_weight(operand(16, 10, 10), operand(2, 48), conv(), True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"shape|steps|codes|seed|matrix|pixels|channels|nothing|rounding"):
        REFUSED[name]()


def test_what_fits_is_taken() -> None:
    """The operands of the refusals above, whole: so each is refused for its one fault."""
    sizes = (4, 6, 5)
    native_quantized.dense_output(operand(4, 6, 4), operand(5, 6, 5), torch.ones(5), sizes, 1, F32)
    native_quantized.dense_grad_input(operand(4, 5, noise=True), operand(5, 6), sizes, True, F32, False)
    native_quantized.dense_grad_weight(operand(4, 5), operand(4, 6, 4), sizes, True)
    native_quantized.conv_output(operand(2, 48), operand(5, 27), None, conv(), F32)
    native_quantized.conv_grad_input(operand(2, 80, noise=True), operand(5, 27), conv(), True, F32, False)
    native_quantized.conv_grad_weight(operand(32, 5, 5), operand(2, 48), conv(), True)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    codes = torch.zeros(shape, dtype=torch.uint8)
    plain, weighted = native.column_sums(codes, torch.ones(shape[0], dtype=torch.int32))
    assert weighted is not None
    assert _same(plain, torch.zeros(shape[1], dtype=torch.int64))
    assert _same(weighted, plain)
    assert _same(native.row_sums(codes), torch.zeros(shape[0], dtype=torch.int64))
    assert _same(native.value_sums(torch.zeros(shape)), torch.zeros(shape[1], dtype=torch.float64))
