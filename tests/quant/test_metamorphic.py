"""What a change of the input must do to the output."""

from __future__ import annotations

import pytest
import torch

from .cases import FAMILIES, build, gaussian, gen, plain

# Transforms scale rows by powers −1/2 and −1/3 of their size: factors whose power is exact in binary.
EXACT = {
    **{f"{m}4{s}": range(-40, 41, 7) for m in ("ptq", "psq") for s in ("", "d", "x", "n")},
    **{f"shq4{s}": range(-40, 41, 8) for s in ("", "d", "x")},
}


@pytest.mark.parametrize("family", ["gaussian", "heavy_rows", "sparse", "constant_rows"])
@pytest.mark.parametrize("name", EXACT)
def test_a_power_of_two_scales_everything_exactly(name: str, family: str) -> None:
    x, q = FAMILIES[family](16, 10, 2), build(name)
    base, variance = q.quantize(x, 3), float(q.variance(x, 3))
    for k in EXACT[name]:
        factor = 2.0**k
        scaled = q.quantize(x * factor, 3)
        assert torch.equal(scaled.codes, base.codes)
        assert torch.equal(scaled.dequantize(), base.dequantize() * factor)
        assert float(q.variance(x * factor, 3)) == variance * factor**2


@pytest.mark.parametrize("family", ["gaussian", "heavy_rows", "constant_rows"])
@pytest.mark.parametrize("name", ["bhq4", "shq4", "bhq4d", "shq8", "bhq8"])
def test_any_factor_scales_the_variance_by_its_square(name: str, family: str) -> None:
    x, q = FAMILIES[family](16, 10, 2), build(name)
    variance, bound = float(q.variance(x, 3)), float(q.variance_bound(x, 3))
    for factor in (2.0**-30, 0.37, 2.0, 8.0, 2.0**30):
        assert float(q.variance(x * factor, 3)) == pytest.approx(variance * factor**2, rel=2e-3)
        assert float(q.variance_bound(x * factor, 3)) == pytest.approx(bound * factor**2, rel=1e-5)


@pytest.mark.parametrize("name", ["ptq4n", "psq4n", "bhq4n"])
def test_permuting_features_permutes_codes(name: str) -> None:
    x, q = FAMILIES["heavy_rows"](9, 20, 1), build(name)
    order = torch.randperm(20, generator=gen(0))
    assert torch.equal(q.quantize(x[:, order]).codes, q.quantize(x).codes[:, order])


@pytest.mark.parametrize("name", ["ptq4n", "psq4n"])
def test_permuting_rows_permutes_codes(name: str) -> None:
    x, q = FAMILIES["heavy_rows"](9, 20, 1), build(name)
    order = torch.randperm(9, generator=gen(0))
    assert torch.equal(q.quantize(x[order]).codes, q.quantize(x).codes[order])


@pytest.mark.parametrize("name", ["ptq4", "psq4", "bhq4", "psq4d", "psq4x"])
def test_order_does_not_change_the_variance(name: str) -> None:
    x, q = FAMILIES["heavy_rows"](12, 20, 1), build(name)
    variance = float(q.variance(x))
    rows, columns = torch.randperm(12, generator=gen(0)), torch.randperm(20, generator=gen(1))
    assert float(q.variance(x[rows])) == pytest.approx(variance, rel=1e-3)
    assert float(q.variance(x[:, columns])) == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("name", ["ptq4", "psq4", "bhq4", "shq4", "psq4d"])
def test_twice_the_features_twice_the_variance(name: str) -> None:
    x, q = FAMILIES["heavy_rows"](16, 20, 1), build(name)
    assert float(q.variance(torch.cat([x, x], 1))) == pytest.approx(2 * float(q.variance(x)), rel=1e-9)


@pytest.mark.parametrize("name", ["psq4", "bhq4", "shq4", "psq8d", "bhq4d"])
def test_row_offsets_cost_nothing(name: str) -> None:
    """Adding a constant to a row moves its offset and no code; exact in steps of a power of two."""
    x = (gaussian(16, 20, 1) * 64).round() / 64
    shift = torch.arange(16.0)[:, None] * 4 - 20
    q = build(name)
    assert torch.equal(q.quantize(x + shift, 3).codes, q.quantize(x, 3).codes)
    assert float(q.variance(x + shift, 3)) == pytest.approx(float(q.variance(x, 3)), rel=1e-9)


def test_negation_mirrors_affine_codes_in_nearest() -> None:
    """t becomes B − t; ties to even do not mirror, so values stay off ties."""
    x = gaussian(8, 30, 2)
    q = plain("affine", "row", 4, "nearest")
    assert torch.equal(q.quantize(-x).codes, 15 - q.quantize(x).codes)


def test_quantizing_a_result_again_changes_nothing() -> None:
    """Values on the grid are on codes: idempotent without dither, up to the last bits."""
    x = gaussian(8, 30, 2)
    for mode in ("affine", "zero", "symmetric"):
        q = plain(mode, "row", 4, "nearest")
        once = q.quantize(x).dequantize()
        assert torch.allclose(q.quantize(once).dequantize(), once, rtol=1e-4, atol=1e-5)
