"""Scale modes: zero on a code costs nothing and keeps zeros exact; symmetric codes; nothing is clipped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import oracles
from .cases import BITS, FAMILIES, gaussian, plain

ROUNDINGS = ("stochastic", "nearest", "dithered", "best")
magnitudes = st.floats(1e-30, 1e30).map(float)


def ends(lo: float, hi: float) -> torch.Tensor:
    """A row that spans [lo, hi] and holds zeros and points between."""
    inner = torch.linspace(0, 1, 9, dtype=torch.float64) * (hi - lo) + lo
    row = torch.cat([torch.tensor([lo, hi, 0.0], dtype=torch.float64), inner.clamp(lo, hi)])
    return row.clamp(min(lo, 0.0), max(hi, 0.0)).float()[None]


@given(lo=magnitudes, hi=magnitudes, bits=st.integers(2, 8))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_step_is_the_least_that_puts_zero_on_a_code(lo: float, hi: float, bits: int) -> None:
    """Against a search over all zero codes; the step may be widened by 2⁻¹⁵ to make zero exact."""
    x = ends(-lo, hi)
    qx = plain("zero", bits=bits).quantize(x, 0)
    least = oracles.zero_scale(float(x.min()), float(x.max()), 2**bits - 1)
    assert least * (1 - 1e-6) <= float(qx.step) <= least * (1 + 2**-14)


@pytest.mark.parametrize("tiny", [1e-3, 1e-6, 1e-9, 1e-12, 1e-30])
@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("bits", BITS)
def test_almost_one_sided(bits: int, side: float, tiny: float) -> None:
    """Zero must not be pushed onto the last code while something lies beyond it."""
    x = torch.tensor([[-side, tiny * side, -0.3 * side, 0.0]])
    qx = plain("zero", bits=bits).quantize(x, 0)
    assert torch.isfinite(qx.dequantize()).all()
    assert float(qx.step) <= 1.01 / (2**bits - 2)
    assert ((qx.dequantize() - x).abs() <= qx.step * 1.0001).all()


@pytest.mark.parametrize("group", ["tensor", "row", "column"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_stay_zero_and_cost_nothing(family: str, group: str) -> None:
    x = FAMILIES[family](12, 10, 0)
    x[2, :] = 0
    x[:, 4] = 0  # now every group holds a zero, so that more zeros change no range
    for bits in (2, 4, 8):
        for rounding in ("stochastic", "nearest"):
            q = plain("zero", group, bits, rounding)
            qx = q.quantize(x, 1)
            assert torch.equal(qx.dequantize()[x == 0], torch.zeros(int((x == 0).sum())))
    wide = torch.cat([x, torch.zeros_like(x)], dim=1 if group == "row" else 0)
    q = plain("zero", group, 4)
    assert float(q.variance(wide)) == pytest.approx(float(q.variance(x)), rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["affine", "zero", "symmetric"])
def test_nothing_is_clipped(mode: str, family: str) -> None:
    x = FAMILIES[family](12, 10, 0)
    for bits in BITS:
        qx = plain(mode, "row", bits).quantize(x, 1)
        error = (qx.dequantize(torch.float64) - x.double()).abs()
        assert (error <= qx.step.double() * (1 + 1e-4) + 1e-6 * x.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_price_of_zero_is_bounded(family: str) -> None:
    """Over the affine step on the range with zero in it: at most B/(B − 1) · (1 + 2⁻¹⁵)… and 1 where one-sided."""
    x = FAMILIES[family](12, 10, 0)
    for bits in BITS:
        top = 2**bits - 1
        lo, hi = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
        affine = (hi - lo) / top
        step = plain("zero", "row", bits).quantize(x, 1).step[:, 0]
        moving = x.amin(1) < x.amax(1)
        assert (step >= affine * (1 - 1e-6))[moving].all()
        assert (step <= affine * top / (top - 1) * (1 + 2**-14))[moving].all()
        one_sided = moving & ((lo == 0) | (hi == 0))
        assert (step <= affine * (1 + 2**-14))[one_sided].all()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_codes(bits: int) -> None:
    """int8, ±(2^(b−1) − 1) and no further, zero on zero, and an odd function of x in nearest."""
    x = gaussian(6, 20, 3)
    q = plain("symmetric", "row", bits, "nearest")
    qx = q.quantize(x)
    last = 2 ** (bits - 1) - 1
    assert qx.codes.dtype == torch.int8
    assert int(qx.codes.abs().max()) == last
    assert (qx.codes.abs().amax(1) == last).all()
    assert (qx.offset == 0).all()
    assert torch.equal(q.quantize(-x).codes, -qx.codes)
    assert qx.step[:, 0] == pytest.approx(x.abs().amax(1) / last, rel=1e-6)


def test_affine_codes_are_unsigned() -> None:
    for rounding in ROUNDINGS:
        assert plain("affine", rounding=rounding).quantize(gaussian(3, 3), 0).codes.dtype == torch.uint8
