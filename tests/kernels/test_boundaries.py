"""No native call trusts a length: what does not fit is refused before a pointer goes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fqt import quantize_, quantizer
from fqt.kernels import choice, ops
from fqt.kernels.codes import ROW, TENSOR, Blocks, Entries, Findings, Levels, Scales
from fqt.kernels.cpu import library, quantized
from fqt.kernels.cpu.products import Conv
from fqt.kernels.cpu.quantized import Coded, Fold
from fqt.kernels.op import Op
from fqt.kernels.reference import Scaling, Unscaling
from fqt.kernels.rounding import DITHERED, NEAREST, STOCHASTIC, Coding, Rounding
from tests.backends import reference_only, same

pytestmark = pytest.mark.skipif(library.status().level == "reference", reason="no native kernels here")

R = TypeVar("R")
X, CODES, SEED = torch.randn(4, 6), torch.ones(4, 6, dtype=torch.uint8), torch.tensor(1)
BYTES = (0, 255)
ONE, ROWS, ROW_CODES = torch.ones(1, 1), torch.ones(4, 1), torch.arange(4)


def operand(rows: int, columns: int, steps: int = 1, noise: bool = False, codes: tuple[int, int] = BYTES) -> Coded:
    dither = (torch.zeros(rows, 1), torch.zeros(1, columns)) if noise else None
    tensors = (torch.zeros(rows, columns, dtype=torch.uint8), torch.ones(steps), torch.zeros(steps))
    made = Coded.of(*tensors, dither, codes)
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


def run(op: Op[..., R], *args: object, **kwargs: object) -> R:
    """The C++ kernel's call, whatever its condition says of these arguments."""
    return next(i.run for i in op.implementations if i.backend == "cpu")(*args, **kwargs)


def encode(step: Tensor, offset: Tensor, rounding: Rounding = NEAREST, seed: Tensor | None = None) -> object:
    return run(ops.encode, Entries(X), Scales(step, offset, ROW), FOUR_BITS, rounding, seed)


def rows(step: Tensor, offset: Tensor, blocks: Blocks = ROW) -> Scales:
    return Scales(step, offset, blocks)


FOUR_BITS = Levels(0, 15)
CENTRES = torch.ones(3, dtype=torch.int32)
FOLDED, PLAIN = Fold.of(True, None, None), Fold.of(False, None, None)
F32 = torch.float32
REFUSED: dict[str, Callable[[], object]] = {
    "range of nothing": lambda: run(ops.value_range, Entries(X[:, :0]), ROW),
    "range of another dtype": lambda: run(ops.value_range, Entries(X.double()), ROW),
    "factor of another dtype": lambda: run(ops.value_range, Entries(X, torch.ones(6, dtype=torch.float64)), ROW),
    "factor of another length": lambda: run(ops.value_range, Entries(X, torch.ones(4)), ROW),
    "ranges of two lengths": lambda: run(ops.parameters, ROWS, ONE, "affine", 15),
    "no steps": lambda: run(ops.parameters, ROWS, ROWS, "affine", 0),
    "sums of a vector": lambda: run(ops.value_sums, X[0]),
    "scaled by fewer": lambda: run(ops.scaled_rows, X, ROWS[:3, 0], None, Findings()),
    "weighed by fewer": lambda: run(ops.scaled_rows, X, ROWS[:, 0], ROWS[:3, 0], Findings()),
    "offsets fewer than steps": lambda: encode(ROWS, ONE),
    "steps of other rows": lambda: encode(ROWS[:3], ROWS[:3]),
    "steps in float64": lambda: encode(ROWS.double(), ROWS.double()),
    "no seed": lambda: encode(ONE, ONE, STOCHASTIC),
    "seeds": lambda: encode(ONE, ONE, STOCHASTIC, ROW_CODES),
    "a seed in int32": lambda: encode(ONE, ONE, STOCHASTIC, SEED.int()),
    "codes beyond a byte": lambda: ops.encode(Entries(X), Scales(ONE, ONE, TENSOR), Levels(0, 255), DITHERED, SEED),
    "quantize nothing": lambda: run(ops.quantize, Entries(X[:0]), ROW, Coding("affine", FOUR_BITS, NEAREST), None),
    "quantize without seed": lambda: run(choice.quantize_best, Entries(X), ROW, quantizer("psq4x").codings, None),
    "variance of offsets": lambda: run(ops.variance_sums, Entries(X), rows(ROWS, ONE), FOUR_BITS),
    "variance of steps": lambda: run(ops.code_variance, Entries(X), rows(ROWS[:2], ROWS[:2]), FOUR_BITS),
    "weights of other rows": lambda: run(ops.column_sums, CODES, torch.ones(3, dtype=torch.int32)),
    "weights of no rows": lambda: run(ops.column_sums, CODES[:0], torch.ones(8, dtype=torch.int32)),
    "weights in int64": lambda: run(ops.column_sums, CODES, torch.ones(4, dtype=torch.int64)),
    "column sums of floats": lambda: run(ops.column_sums, X),
    "row sums of a vector": lambda: run(ops.row_sums, CODES[0]),
    "decode with offsets": lambda: run(ops.decode, CODES, rows(ONE, ROWS[:3]), None),
    "decode with dither": lambda: run(ops.decode, CODES, rows(ROWS, ROWS), torch.ones(1, 5)),
    "order of other rows": lambda: run(ops.hadamard, X, ROW_CODES[:3], (4,)),
    "keep as floats": lambda: run(ops.hadamard, X, ROW_CODES, (4,), keep=ROWS),
    "scaling of other rows": lambda: run(ops.hadamard, X, ROW_CODES, (4,), Scaling(ROWS[:2], ROWS, ROWS)),
    "unscaling in float64": lambda: run(ops.hadamard, X, ROW_CODES, (4,), after=Unscaling(ROWS.double(), ROWS)),
    "groups of other rows": lambda: run(ops.reflect, X, ROW_CODES[:2], ROWS, ROWS),
    "normals of other rows": lambda: run(ops.reflect, X, ROW_CODES, ROWS[:2], ROWS),
    "factors after a rotation": lambda: run(ops.rotate, X[:, :4], ROWS[:, 0], ROWS[:3, 0], (4,)),
    "rotated runs that do not fit": lambda: run(ops.rotate, X, ROWS[:, 0], None, (4,)),
    "rows replaced by fewer": lambda: run(ops.replace_rows_, X.clone(), ROWS.bool(), X[:, :3]),
    "rows kept by floats": lambda: run(ops.replace_rows_, X.clone(), ROWS, X),
    "operand of floats": lambda: Coded.of(X, ONE, ONE, None, BYTES),
    "operand with strides": lambda: Coded.of(CODES.T, ONE, ONE, None, BYTES),
    "operand's dither": lambda: Coded.of(CODES, ONE, ONE, (ROWS[:2], torch.ones(1, 6)), BYTES),
    "dense: tokens": lambda: quantized.dense_output(operand(3, 6), operand(5, 6), None, (4, 6, 5), 4, F32),
    "dense: steps": lambda: quantized.dense_output(operand(4, 6, 3), operand(5, 6), None, (4, 6, 5), 1, F32),
    "dense: bias": lambda: quantized.dense_output(operand(4, 6), operand(5, 6), ROWS, (4, 6, 5), 4, F32),
    "dense: weight": lambda: quantized.dense_grad_input(operand(4, 5), operand(5, 7), (4, 6, 5), True, F32, False),
    "dense: dither": lambda: quantized.dense_grad_input(
        operand(2, 10, noise=True), operand(5, 6), (4, 6, 5), True, F32, False
    ),
    "dense: input": lambda: quantized.dense_grad_weight(operand(4, 5), operand(3, 6), (4, 6, 5), FOLDED),
    "dense: input's steps": lambda: quantized.dense_grad_weight(operand(4, 5), operand(4, 6, 4), (4, 6, 5), PLAIN),
    "dense: centres": lambda: quantized.dense_grad_weight(
        operand(4, 5), operand(4, 6, 4), (4, 6, 5), Fold.of(True, CENTRES, None)
    ),
    "centres as floats": lambda: Fold.of(True, ROWS, None),
    "conv: input": lambda: quantized.conv_output(operand(2, 47), operand(5, 27), None, conv(), F32),
    "conv: weight": lambda: quantized.conv_output(operand(2, 48), operand(5, 26), None, conv(), F32),
    "conv: output": lambda: quantized.conv_output(operand(2, 48), operand(5, 27), None, conv(out_height=9), F32),
    "conv: groups": lambda: quantized.conv_output(operand(2, 48), operand(5, 27), None, conv(groups=2), F32),
    "conv: gradient": lambda: quantized.conv_grad_input(operand(2, 79), operand(5, 27), conv(), True, F32, False),
    "conv: samples": lambda: quantized.conv_grad_input(
        operand(4, 40, noise=True), operand(5, 27), conv(), True, F32, False
    ),
    "conv: channels": lambda: quantized.conv_grad_weight(operand(16, 10, 10), operand(2, 48), conv(), FOLDED),
    "conv: shares": lambda: quantized.conv_grad_weight(
        operand(32, 5, 5), operand(2, 48), conv(), Fold.of(True, None, torch.ones(9, 4))
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"shape|steps|codes|seed|matrix|pixels|channels|nothing|rounding|factors|centres|runs"
    ):
        REFUSED[name]()


def test_what_fits_is_taken() -> None:
    """The operands of the refusals above, whole: so each is refused for its one fault."""
    sizes = (4, 6, 5)
    quantized.dense_output(operand(4, 6, 4), operand(5, 6, 5), torch.ones(5), sizes, 1, F32)
    quantized.dense_grad_input(operand(4, 5, noise=True), operand(5, 6), sizes, True, F32, False)
    quantized.dense_grad_weight(operand(4, 5), operand(4, 6, 4), sizes, FOLDED)
    filters = operand(5, 27, codes=(-127, 127))
    quantized.conv_output(operand(2, 48), filters, None, conv(), F32)
    quantized.conv_grad_input(operand(2, 80, noise=True), filters, conv(), True, F32, False)
    quantized.conv_grad_weight(operand(32, 5, 5), operand(2, 48), conv(), FOLDED)


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    codes = torch.zeros(shape, dtype=torch.uint8)
    plain, weighted = run(ops.column_sums, codes, torch.ones(shape[0], dtype=torch.int32))
    assert weighted is not None
    assert same(plain, torch.zeros(shape[1], dtype=torch.int64))
    assert same(weighted, plain)
    assert same(run(ops.row_sums, codes), torch.zeros(shape[0], dtype=torch.int64))
    assert same(run(ops.value_sums, torch.zeros(shape)), torch.zeros(shape[1], dtype=torch.float64))


BYTE, WIDE = Levels(0, 255), Levels(0, 256)


def asked(x: Tensor, step: Tensor, levels: Levels, rounding: Rounding, seed: Tensor | None = None) -> None:
    ops.encode(Entries(x), Scales(step, step, ROW), levels, rounding, seed)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x, s: asked(x, s[:2], BYTE, NEAREST), "parameters of shape"),
        (lambda x, s: asked(x, s, WIDE, DITHERED, SEED), "fit a byte"),
        (lambda x, s: asked(x, s, BYTE, DITHERED, SEED), "fit a byte"),
        (lambda x, s: asked(x, s, Levels(-12, 12, 1), DITHERED, SEED), "one apart"),
        (lambda x, s: asked(x, s, BYTE, STOCHASTIC), "seed"),
        (lambda x, s: asked(x, s, BYTE, DITHERED), "seed"),
        (lambda x, s: ops.value_range(Entries(x, torch.ones(3)), ROW), r"factors .*of shape"),
        (
            lambda x, s: ops.hadamard(x, torch.arange(4), (4,), after=Unscaling(s, s, torch.ones(3))),
            "right factor of shape",
        ),
    ],
)
def test_bad_arguments_are_named(call, names: str) -> None:
    x, step = torch.randn(4, 5), torch.ones(4, 1)
    with pytest.raises(ValueError, match=names):
        call(x, step)


def test_codes_that_fit_no_byte_are_floats_by_the_reference() -> None:
    x, scales = Entries(torch.randn(4, 5)), Scales(torch.full((4, 1), 0.01), torch.zeros(4, 1), ROW)
    for levels in (WIDE, Levels(-129, 3)):
        assert ops.encode.backend(x, scales, levels, NEAREST, None) == "reference"
        assert ops.encode(x, scales, levels, NEAREST, None).dtype == torch.float32


def test_bad_indices_raise() -> None:
    x, ones = torch.randn(4, 5), torch.ones(4, 1)
    with pytest.raises(IndexError, match="outside"):
        ops.hadamard(x, torch.tensor([0, 1, 2, 4]), (4,))
    with pytest.raises(IndexError, match="powers of two"):
        ops.hadamard(x, torch.arange(4), (3, 1))
    with pytest.raises(IndexError, match="outside"):
        ops.reflect(x, torch.tensor([0, 1, 2, -1]), ones, ones)


def test_what_torch_fakes_is_not_kept() -> None:
    # Sizes of no other test: what is kept between calls is made here first, while tensors are faked.
    conv = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1))
    quantize_(conv, {"base": "psq8", "grad_weight": "psq8d@channel"})
    x, image = torch.randn(83, 7), torch.randn(1, 16, 29, 23)
    with FakeTensorMode() as mode:
        quantizer("shq4").quantize(mode.from_tensor(x), 0, nonfinite="propagate")
        torch.func.functional_call(
            conv, {name: mode.from_tensor(p) for name, p in conv.named_parameters()}, (mode.from_tensor(image),)
        ).sum().backward()
    codes = quantizer("shq4").quantize(x, 0).codes
    conv(image).square().sum().backward()
    with reference_only():
        assert torch.equal(codes, quantizer("shq4").quantize(x, 0).codes)
    assert all(bool(p.grad.isfinite().all()) for p in conv.parameters())


def test_a_faked_tensor_has_no_address() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="FakeTensor"):
        library.expect("x", torch.zeros(3), (3,))
