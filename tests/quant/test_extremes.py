"""The ends of the float range: denormals, ±3e38, rows from 1e-30 to 1e30, and the largest values of each dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fqt import Quantizer

from .cases import METHODS, build, gaussian, gen, plain
from .estimators import draws

ROUNDINGS = [f"{m}{b}{s}" for m in METHODS for b in (2, 8) for s in ("", "d")]
ROUNDINGS += ["psq3d", "psq2x", "psq4x", "bhq4x", "shq4x"]
ZERO = {f"zero{b}": plain("zero", bits=b) for b in (2, 3, 4, 8)}
SYMMETRIC = {f"symmetric{b}": plain("symmetric", bits=b) for b in (2, 3, 4, 8)}
QUANTIZERS: dict[str, Quantizer] = {n: build(n) for n in ROUNDINGS} | ZERO | SYMMETRIC


@pytest.fixture(params=QUANTIZERS)
def q(request: pytest.FixtureRequest) -> Quantizer:
    return QUANTIZERS[request.param]


def full_range(magnitude: float, small: float = 1e-3) -> Tensor:
    """Two rows that span ±magnitude, six small ones."""
    x = (torch.rand(8, 24, generator=gen(0)) * 2 - 1) * magnitude
    x[:, 0], x[:, 1] = magnitude, -magnitude
    x[2:] *= small
    return x


def mean_error(q: Quantizer, x: Tensor, copies: int = 128) -> tuple[Tensor, Tensor]:
    """Mean error, and the spread of one draw, both relative to the largest entry; float64."""
    y = draws(q, x, copies)
    assert torch.isfinite(y).all()
    scale = float(x.double().abs().max())
    y = y / scale
    return y.mean(1) - x.double() / scale, y.std(1)


@pytest.mark.parametrize("magnitude", [1e30, 3e38, 3.4028234663852886e38])
def test_the_widest_ranges(q: Quantizer, magnitude: float) -> None:
    """max − min beyond the largest float. Finite and right: where noise cannot cross the largest float every
    mean is x (6.5σ with a floor of a last bit; 192 entries, false alarms 2e-8); elsewhere it is only finite.
    """
    x = full_range(magnitude)
    error, spread = mean_error(q, x)
    room = torch.finfo(torch.float32).max / magnitude  # in units of the largest entry
    inside = x.double().abs() / magnitude + 6.5 * spread < room  # no draw comes near the largest float
    step = 2 / (2**q.grid.bits - 2)
    biased = (
        error.abs() > 6.5 * spread / 128**0.5 + 0.1 * step
    ) & inside  # what is rarer than 1 in 10 may not show
    assert not biased.any(), f"{int(biased.sum())} biased, worst {error[biased].abs().max():.3g} of the largest"


@pytest.mark.parametrize("name", ["bhq8", "shq8", "bhq8d", "shq8d"])
def test_a_transform_does_not_clip_a_range_beyond_the_largest_float(name: str) -> None:
    """At 8 bits noise is a few 1/255 of the range: no entry may move further than that, mixed or not."""
    x = full_range(1.5e38)
    near = (build(name).quantize(x, 0).dequantize(torch.float64) - x.double()).abs().max() / 3e38
    x = full_range(3e38)
    far = (build(name).quantize(x, 0).dequantize(torch.float64) - x.double()).abs().max() / 6e38
    assert float(far) <= 2 * float(near)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-39, 1.2e-38, 1e-36])
def test_denormals(q: Quantizer, magnitude: float) -> None:
    """Finite, in range, and no further from x than a few of the least step."""
    x = gaussian(8, 16) * magnitude
    for seed in range(2):
        qx = q.quantize(x, seed)
        y = qx.dequantize(torch.float64)
        assert torch.isfinite(y).all()
        reach = 16 * max(float(x.abs().max()), 2.0**-126)
        assert ((y - x.double()).abs() <= reach).all()


def test_rows_from_1e_minus_30_to_1e30(q: Quantizer) -> None:
    """Each plain row keeps its own scale; mixed rows keep the sum of squares, which the largest rule."""
    x = gaussian(13, 32, 1) * torch.logspace(-30, 30, 13)[:, None]
    y = q.quantize(x, 0).dequantize(torch.float64)
    assert torch.isfinite(y).all()
    error = (y - x.double()).abs()
    if q.scale.group == "row" and type(q.transform).__name__ == "Identity":
        span = (x.amax(1) - x.amin(1)).double().clamp(min=1e-36)[:, None]
        assert (error <= span * 1.01).all()
    total = float(error.square().sum())
    assert total <= 20 * float(q.variance_bound(x, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["psq4", "psq4d", "ptq4d", "psq4x", "bhq4", "shq4", "bhq4d", "shq4d"])
def test_finite_in_finite_out_in_the_own_dtype(name: str, dtype: torch.dtype) -> None:
    """Noise may step past the largest value of a short dtype; the result is that value, not infinity (which
    a loss scaler would take for an overflow)."""
    x = gaussian(8, 64)
    x = (x / x.abs().max() * torch.finfo(dtype).max).to(dtype)
    assert torch.isfinite(x).all()
    for seed in range(4):
        assert torch.isfinite(build(name).quantize(x, seed).dequantize()).all()


@pytest.mark.parametrize("name", ["psq4", "psq4d", "bhq4", "shq4", "ptq4"])
def test_float64_beyond_float32(name: str) -> None:
    """float64 data are quantized in float64."""
    for magnitude in (1e-30, 1e100, 1e300):
        x = gaussian(8, 9, dtype=torch.float64) * magnitude
        q = build(name)
        y = q.quantize(x, 0).dequantize()
        assert torch.isfinite(y).all()
        assert float(((y - x) / magnitude).abs().max()) < 2
        if name.startswith("p"):
            base = q.quantize(gaussian(8, 9, dtype=torch.float64), 0)
            assert (q.quantize(x, 0).codes.int() - base.codes.int()).abs().max() <= 1


def test_large_offset_small_range() -> None:
    """A row far from zero is as good as one at zero, up to the last bit of its values."""
    base = gaussian(4, 32)
    for name in ("psq4", "psq8d", "bhq4", "shq4"):
        for shift in (1e3, 1e6):
            x = (base + shift).float()
            error = (build(name).quantize(x, 0).dequantize() - x).abs().max()
            plain_error = (build(name).quantize(base, 0).dequantize() - base).abs().max()
            assert float(error) <= 3 * float(plain_error) + 4 * shift * 2**-23
