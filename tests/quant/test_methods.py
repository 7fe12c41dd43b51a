"""Every row of the catalog: its names, its estimate and variance, its bits, and any shape and axis."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from fqt import FqtError
from fqt.kernels import rounding
from fqt.kernels.philox import STREAM_STEP
from fqt.quant import (
    METHODS,
    Floats,
    Identity,
    Integers,
    Kept,
    Pairs,
    Quantizer,
    Rotated,
    Scale,
    quantizer,
    quantizer_name,
)
from fqt.quant.names import method_of
from tests.backends import reference_only

from .cases import FAMILIES, SHAPES, gaussian, gen

SHOWN = [name for method in METHODS.values() for name in method.shown]
by_name = pytest.mark.parametrize("name", SHOWN)


def test_every_name_round_trips_and_names_one_quantizer() -> None:
    seen = {}
    for method in METHODS.values():
        for bits, (suffix, how), axis in product(
            method.widths, method.suffixes.items(), ("", "@token", "@channel")
        ):
            stem, first = method.name.replace("*", str(bits)), how == method.roundings[0]
            name = stem + ("" if first else suffix) + axis
            q = quantizer(stem + suffix + axis)
            assert q.rounding_name == how
            assert quantizer_name(q) == name
            assert method_of(name) is method
            assert method.bits_of(name) == bits
            assert quantizer(method.stem + suffix + axis, bits=bits) == q
            assert seen.setdefault(q, name) == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mxfp4d", "no dithered rounding"),
        ("e4m3x", "no best rounding"),
        ("eden4n", "no nearest rounding"),
        ("luq5", "2 to 4"),
        ("nvfp8", "8 bits"),
        ("lns", "needs its bits"),
        ("int4", "unknown"),
        ("int9rht", "2 to 8"),
        ("e4m34", "unknown"),
        ("tile8@pixel", "axis"),
        ("sru4d", "no dithered rounding, but k1 to k16"),
        ("sruc4k17", "no k17 rounding, but k1 to k16"),
        ("psq4k8", "no k8 rounding, but stochastic"),
    ],
)
def test_what_there_is_not_is_said_in_one_line(name: str, says: str) -> None:
    with pytest.raises(FqtError, match=says) as error:
        quantizer(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "choices",
    [
        {"scale": Scale("row", "symmetric"), "rounding": "corrected", "grid": Floats(2, 1)},
        {"scale": Scale((1, 16), "symmetric", store="correctable"), "grid": Floats(2, 1)},
        {"scale": Scale((8, 8), "symmetric", store="fallback"), "grid": Integers(8)},
        {"scale": Scale("row"), "grid": Pairs(4)},
        {"scale": Scale("row", store="float32"), "grid": METHODS["lns"].grid(8)},
    ],
)
def test_choices_that_need_each_other(choices: dict) -> None:
    with pytest.raises(FqtError) as error:
        Quantizer(**choices)
    assert "\n" not in str(error.value)


@by_name
def test_mean_and_variance_of_draws(name: str) -> None:
    """The squared error is that stated, averaged over seeds; and no entry's mean is off but by what is stated.

    100 draws. The sum of squared errors has a relative spread far below 0.2 per draw, so that 10 % is 5σ. Of the
    largest of 1330 means, in standard errors of the row, 5.5σ has a chance of 1e-4 per name.
    """
    x = FAMILIES["heavy_rows"](19, 70, 3)
    q, seeds = quantizer(name), range(100)
    error = torch.stack([q.quantize(x, seed).dequantize().double() - x.double() for seed in seeds])
    stated = sum(float(q.variance(x, seed)) for seed in seeds) / len(seeds)
    if not q.coding.rounding.settles:
        error -= q.mean_error(x)
    assert float(error.square().sum((1, 2)).mean()) == pytest.approx(stated, rel=0.1)
    assert float(q.variance(x)) <= float(q.variance_bound(x)) * (1 + 1e-9)
    # Rows that are kept too rarely show nothing in 100 draws.
    seen = q.transform.rows.chances(x) > 0.15 if isinstance(q.transform, Kept) else torch.ones(19, dtype=torch.bool)
    assert int(seen.sum()) > 5
    if method_of(name).bias != "asymptotic":
        row = error.square().mean((0, 2)).sqrt()[:, None] + 1e-7 * x.abs().amax(1, keepdim=True)
        # Of a row that is kept as a whole or not, the error of a large entry is large.
        spread = torch.maximum(row, error.square().mean(0).sqrt())
        # A rare large error of a small entry: at most a gap, against the row's typical one.
        largest = error.abs().amax((0, 2))[:, None] / spread
        assert (error.mean(0).abs() / spread <= 5.5 / 10 + largest * 0.1)[seen].all()
    z = error.sum(2).mean(0) / (error.sum(2).std(0) / 10 + 1e-9 * x.abs().amax(1))
    assert float(z[seen].abs().max()) < 5.5


@by_name
def test_any_shape_and_axis(name: str) -> None:
    q = quantizer(name)
    for shape in SHAPES:
        x = gaussian(*shape)
        quantized = q.quantize(x, 1)
        assert quantized.dequantize().shape == x.shape
        assert bool(torch.isfinite(quantized.dequantize()).all())
        assert float(q.variance(x)) <= float(q.variance_bound(x)) * (1 + 1e-9) + 1e-30
        assert q.bits_stored(shape) >= q.bits * x.numel() / 2
    x = gaussian(24, 35).view(2, 12, 35)  # a rotation is one of the last axis
    flat = q.quantize(x.view(24, 35), 1)
    assert torch.equal(q.quantize(x, 1, axis=(0, 1)).dequantize(), flat.dequantize().view(x.shape))
    assert float(q.variance(x, 1, axis=(0, 1))) == pytest.approx(float(q.variance(x.view(24, 35), 1)), rel=1e-9)
    double = q.quantize(x.double(), 1, axis=-1)
    assert double.dequantize().dtype == torch.float64
    assert not q.quantize(torch.zeros(5, 40), 1).dequantize().any()


@by_name
def test_factors_and_what_is_not_finite(name: str) -> None:
    q, x = quantizer(name), gaussian(20, 40)
    factor = torch.linspace(0.5, 2, 40)
    mine, whole = q.quantize(x, 2, factor=factor), q.quantize(x * factor, 2)
    assert torch.equal(mine.codes, whole.codes)
    assert torch.equal(mine.dequantize(), whole.dequantize())
    for bad in (math.nan, math.inf):
        x[3, 7] = bad
        with pytest.raises(FqtError, match="NaN or Inf"):
            q.quantize(x, 2)
        assert bool(q.quantize(x, 2, nonfinite="propagate").dequantize()[3, 7].isnan())


def test_bits_stored_by_hand() -> None:
    """Of 100 × 70: codes, steps, offsets, and what is common."""
    entries = 7000
    wanted = {
        "ptq4": 4 * entries + 64,
        "psq3": 3 * entries + 100 * 64,
        "shq4": 4 * entries + 100 * 64 + 100 * 96,
        "thq4d": 4 * entries + 100 * 64 + 100 * 96,
        "int4rht": 4 * entries + 100 * 64,
        "luq4": 4 * entries + 32,
        "luqr4": 4 * entries + 100 * 32,
        "mxfp4": 4 * entries + 300 * 8,
        "nvfp4": 4 * entries + 500 * 8 + 32,
        "eden4": 4 * entries + 500 * 8 + 32,
        "tile8": 8 * entries + 12 * 32,
        "split4": 8 * entries + 32,
        "agp4": 4 * entries + 100 * 64,
        "shift4": 4 * entries + 70 * 4 + 32,
        "e4m3": 8 * entries + 32,
        "fallback8": 16 * entries + 33,  # one block, which has two codes
    }
    assert {name: quantizer(name).bits_stored((100, 70)) for name in wanted} == wanted
    assert quantizer("psq4").bits_stored((5, 7, 100), axis=-1) == 4 * 3500 + 100 * 64
    two_of_five = 8 * 600 * 128 * (1 + 2 / 5) + 5 * 33
    assert quantizer("fallback8").bits_stored((600, 128)) == pytest.approx(two_of_five)


def test_a_fallback_block_has_a_finer_step_and_the_others_small_codes() -> None:
    q = Quantizer(scale=Scale((8, 8), "symmetric", store="fallback"), grid=Pairs(8))
    x = gaussian(32, 32) * 0.01
    x[8:16, 16:24] *= 100
    quantized = q.quantize(x, 1)
    step, magnitude = quantized.scales.step, x.view(4, 8, 4, 8).abs().amax((1, 3))
    two = magnitude >= magnitude.flatten().sort().values[-4]
    assert torch.allclose(step * torch.where(two, 127.0 * 255, 127.0), magnitude)
    codes = quantized.codes.view(4, 8, 4, 8).abs().amax((1, 3))
    assert (codes[~two] == 127).all()
    assert (codes[two] == 127 * 255).all()


def test_the_levels_of_a_pair_are_those_of_a_coarse_code_and_a_fine_one() -> None:
    """What a pair stands for: 2c·h + l, both within ±c, meets every level: up to 2c² + c."""
    for bits, dtype in ((2, torch.int8), (3, torch.int8), (4, torch.int8), (8, torch.float32)):
        c = (1 << bits - 1) - 1
        one = torch.arange(-c, c + 1)
        levels = (2 * c * one[:, None] + one).unique()
        q = Quantizer(scale=Scale("tensor", "symmetric"), grid=Pairs(bits), rounding="stochastic")
        assert levels.tolist() == list(range(q.coding.levels.low, q.coding.levels.high + 1))
        assert q.code_dtype == dtype


def test_shifted_steps_are_parts_of_one_and_waste_less_than_half() -> None:
    x = gaussian(40, 30) * torch.exp2(-torch.arange(30.0) / 1.3)
    step = quantizer("shift4").quantize(x, 1).scales.step
    magnitude = x.abs().amax(0, keepdim=True)
    shift = (step.amax() / step).log2()
    assert torch.equal(shift, shift.round())
    assert (step * 7 >= magnitude * (1 - 1e-6)).all()
    deep = shift == 15
    assert (step * 7 < 2 * magnitude * (1 + 1e-6))[~deep].all()
    assert deep.any()


EDEN = quantizer("eden4")


def corrected_draws(x: Tensor, patch: pytest.MonkeyPatch, chances: int = 64) -> Tensor:
    """Estimates of x with one rotation and every value of a coarse noise of the steps, the same for all blocks."""
    whole, found = rounding.random_u24, []
    for k in range(chances):
        u = (2 * k + 1) * (1 << 23) // chances

        def noise(seed: Tensor, stream: int, n: int, u: int = u) -> Tensor:
            return torch.full((n,), u, dtype=torch.int32) if stream == STREAM_STEP else whole(seed, stream, n)

        patch.setattr(rounding, "random_u24", noise)
        found.append(EDEN.quantize(x, 5).dequantize(torch.float32).double())
    return torch.stack(found)


def test_corrected_steps_by_all_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean square error is the one stated; and the estimate's mean has the product ‖x‖² with x, row by row."""
    x = FAMILIES["heavy_rows"](9, 200, 2)
    draws = corrected_draws(x, monkeypatch)
    error = float((draws - x.double()).square().sum((1, 2)).mean())
    assert error == pytest.approx(float(EDEN.variance(x, 5)), rel=1e-3)
    along = (draws.mean(0) * x.double()).sum(1) / x.double().square().sum(1)
    assert torch.allclose(along, torch.ones_like(along), atol=2e-3)


def test_corrected_estimates_are_biased_where_few_entries_carry_a_row() -> None:
    """By some percent with three of 128, and not measurably on dense rows: asymptotically unbiased.

    250 draws, whose noise leaves the mean off by 0.7 % of the row.
    """
    dense, sparse = gaussian(1, 128, 4), torch.zeros(1, 128)
    sparse[0, [3, 50, 97]] = torch.tensor([1.0, -0.7, 0.45])
    off = {}
    for key, x in (("dense", dense), ("sparse", sparse)):
        mean = torch.stack([EDEN.quantize(x, seed).dequantize() for seed in range(250)]).double().mean(0)
        off[key] = float((mean - x).norm() / x.norm())
    assert off["dense"] < 0.01
    assert 0.03 < off["sparse"] < 0.1


def test_without_rotation_corrected_rounding_is_no_less_a_quantizer() -> None:
    """Its choices are values like others: any transform, any size of block, any grid about 0."""
    scale = Scale((2, 8), "symmetric", store="correctable")
    for grid, transform in product((Integers(4), Floats(3, 0)), (Identity(), Rotated(Identity(), block=16))):
        q = Quantizer(transform=transform, scale=scale, grid=grid, rounding="corrected")
        x = gaussian(13, 21)
        error = torch.stack([q.quantize(x, seed).dequantize() - x for seed in range(30)]).double()
        stated = sum(float(q.variance(x, seed)) for seed in range(30)) / 30
        assert float(error.square().sum((1, 2)).mean()) == pytest.approx(stated, rel=0.1)
        turned = replace(q, transform=Identity())
        assert float(turned.variance(x, 3)) == pytest.approx(float(turned.variance(x, 4)), rel=1e-9)


@pytest.mark.parametrize("group", ["tensor", "row", "column"])
def test_corrected_rounding_takes_any_group(group: str) -> None:
    scale = Scale(group, "symmetric", store="correctable")
    q, x = Quantizer(scale=scale, grid=Integers(4), rounding="corrected"), torch.randn(5, 8, generator=gen(0))
    fast = q.quantize(x, 1)
    with reference_only():
        assert torch.equal(fast.codes, q.quantize(x, 1).codes)


@pytest.mark.parametrize("name", ["int4rht", "thq4", "hlq4", "eden4"])
def test_a_rotation_of_nothing_has_no_variance(name: str) -> None:
    found = quantizer(name).variances(torch.zeros(3, 0), [4], 1, weight=torch.ones(3, 0))
    assert [float(f) for f in found] == [0.0, 0.0]
