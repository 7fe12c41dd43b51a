"""Shapes, constants and ends: everything that made earlier implementations crash, hang or return noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fqt import FqtError, Quantizer
from fqt.kernels.rounding import Rounding
from fqt.quant import Grid, Rotated
from fqt.quant.transform import Transform

from .cases import BITS, METHODS, NAMES_4BIT, PLAIN, SHAPES, build, gaussian, plain_id

QUANTIZERS = {n: build(n) for n in NAMES_4BIT} | {plain_id(q): q for q in PLAIN}
for _m in ("bhq", "shq"):
    QUANTIZERS |= {f"{_m}4{s} unguarded": build(f"{_m}4{s}", guard=False) for s in ("", "d")}
    QUANTIZERS |= {f"{_m}4{s} exact": build(f"{_m}4{s}", guard="exact") for s in ("", "d")}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONSTANTS = (0.0, 0.3, -7.3, 1e-45, -1e-40, 3e38, -3e38)


@pytest.fixture(params=QUANTIZERS)
def q(request: pytest.FixtureRequest) -> Quantizer:
    return QUANTIZERS[request.param]


def round_trip(q: Quantizer, x: Tensor, seed: int = 1) -> Tensor:
    """The dequantized tensor; shape, dtype, code range and finiteness are checked on the way."""
    qx = q.quantize(x, seed)
    assert qx.shape == qx.codes.shape == x.shape
    low, high = (-7, 7) if q.scale.mode == "symmetric" else (0, 15)
    if x.numel():
        assert low <= int(qx.codes.min())
        assert int(qx.codes.max()) <= high
    for parameter in (qx.step, qx.offset):
        torch.broadcast_shapes(parameter.shape, x.shape)
    y = qx.dequantize()
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.isfinite(y).all()
    exact, bound = q.variance(x, seed), q.variance_bound(x, seed)
    assert torch.isfinite(torch.stack([exact, bound])).all()
    assert 0 <= exact <= bound * (1 + 1e-12)
    return y


@pytest.mark.parametrize("shape", [*SHAPES, (0,), (1,), (6,), (2, 0, 3), (2, 3, 4), (3, 2, 2, 2)], ids=str)
def test_every_shape(q: Quantizer, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    round_trip(q, x)


@pytest.mark.parametrize("shape", [(1, 8), (9, 4)], ids=str)
def test_constant_tensors_come_back_bit_for_bit(q: Quantizer, shape: tuple[int, int]) -> None:
    for value in CONSTANTS:
        x = torch.full(shape, value)
        assert torch.equal(round_trip(q, x), x), value


def test_constant_rows_come_back_bit_for_bit_among_others(q: Quantizer) -> None:
    """Where rows share no step with others; with a transform they are mixed with the rest, and still exact."""
    if q.scale.group != "row":
        pytest.skip("not a group of this quantizer")
    for dtype in DTYPES:
        x = gaussian(9, 12).to(dtype)
        x[1], x[4], x[8] = 0.3, 0.0, -100.7
        for seed in range(2):
            y = round_trip(q, x, seed)
            assert torch.equal(y[[1, 4, 8]], x[[1, 4, 8]])


def test_all_rows_constant_but_different(q: Quantizer) -> None:
    if q.scale.group != "row":
        pytest.skip("not a group of this quantizer")
    x = torch.tensor([0.3, -2.0, 0.0, 1e10, 5e-41])[:, None].expand(5, 6)
    assert torch.equal(round_trip(q, x), x)
    assert float(q.variance(x)) == 0


def test_one_sided_and_one_hot(q: Quantizer) -> None:
    """Data that a zero-preserving scale turned into NaN: all of one sign, or a hair beyond zero."""
    for x in (
        torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) + 5,
        -torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) - 1e-6,
        torch.eye(7) - 0.001,
        0.001 - torch.eye(7),
        torch.tensor([[-0.07, 1.0, 0.2], [-1.0, 0.07, 0.0], [-1.0, 1e-9, 0.5], [-1e-9, 1.0, 0.5]]),
    ):
        y = round_trip(q, x)
        span = (x.max() - x.min().clamp(max=0)).clamp(min=x.abs().max())
        assert ((y - x).abs() <= span).all()


def test_ties(q: Quantizer) -> None:
    """Equal rows and equal entries: a defined result, the same each time."""
    x = gaussian(1, 6).expand(8, 6)
    assert torch.equal(round_trip(q, x), round_trip(q, x.clone()))
    y = torch.tensor([[1.0, 1.0, 2.0, 2.0]] * 5 + [[0.5, 0.5, 0.5, 1.5]] * 4)
    assert torch.equal(round_trip(q, y), round_trip(q, y.clone()))


def test_rows_of_two_values_are_exact_without_dither() -> None:
    """Both ends of a row lie on codes."""
    x = torch.tensor([[0.3, 1.7, 0.3], [-5.0, -5.0, 2.5], [1e-20, 3e-20, 3e-20]])
    for bits in BITS:
        for suffix in ("", "n"):
            assert torch.allclose(build(f"psq{bits}{suffix}").quantize(x, 0).dequantize(), x, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_follow_the_values_not_the_dtype(dtype: torch.dtype) -> None:
    """A short float is computed in float32, so its codes are those of the same values in float32."""
    x = gaussian(9, 17).to(torch.bfloat16).to(torch.float16).to(dtype)
    for method in METHODS:
        for suffix in ("", "d", "x"):
            q = build(f"{method}4{suffix}")
            qx = q.quantize(x, 3)
            assert qx.dequantize().dtype == dtype
            assert qx.dequantize(torch.float32).dtype == torch.float32
            if dtype != torch.float64:
                assert torch.equal(qx.codes, q.quantize(x.float(), 3).codes)
            else:
                assert (qx.codes.int() - q.quantize(x.float(), 3).codes.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Quantizer(transform="hadamard"), "transform is a Transform of fqt.quant, not 'hadamard'"),
        (lambda: Quantizer(scale="row"), "scale is a Scale of fqt.quant, not 'row'"),
        (lambda: Quantizer(grid=4), "grid is a Grid of fqt.quant, not 4"),
        (lambda: Quantizer(grid=Grid()), r"Grid\(\) leaves bits, levels to a subclass: give Integers"),
        (lambda: Quantizer(transform=Transform()), r"Transform\(\) leaves apply to a subclass: give Identity"),
        (lambda: Quantizer(rounding=Rounding()), r"unknown rounding Rounding\(\)"),
        (lambda: Rotated("hadamard"), "not 'hadamard'"),
    ],
)
def test_choices_that_are_none_are_refused_where_they_are_made(make: Callable[[], object], words: str) -> None:
    with pytest.raises(FqtError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "x", [torch.ones(3, 3, dtype=torch.int32), torch.ones(2, dtype=torch.bool), torch.tensor(1.0), [1.0, 2.0], None]
)
def test_what_cannot_be_quantized_is_said_in_one_line(x: object) -> None:
    for call in (lambda: build("psq4").quantize(x, 0), lambda: build("psq4").variance(x, 0)):  # type: ignore[arg-type]
        with pytest.raises(FqtError, match="cannot quantize") as error:
            call()
        assert "\n" not in str(error.value)
