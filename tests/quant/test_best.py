"""Rounding "best" takes the better of stochastic and dithered, exactly, and stays unbiased while it chooses."""

from __future__ import annotations

import pytest
import torch

from fqt import Quantizer
from fqt.quant import Integers, Scale

from .cases import FAMILIES, build, gaussian, gen, plain

CASES = [(f, n, b) for f in FAMILIES for n in (7, 16) for b in (2, 4, 8)]


def candidates(q: Quantizer) -> list[Quantizer]:
    """Stochastic in the quantizer's own mode, dithered on the affine grid."""
    own = Scale(q.scale.group, q.scale.mode)
    affine = Scale(q.scale.group, "affine")
    return [
        Quantizer(transform=q.transform, scale=own, grid=q.grid, rounding="stochastic"),
        Quantizer(transform=q.transform, scale=affine, grid=q.grid, rounding="dithered"),
    ]


@pytest.mark.parametrize("method", ["ptq", "psq", "bhq", "shq"])
@pytest.mark.parametrize(("family", "n", "bits"), CASES)
def test_variance_is_the_lower_of_the_two(method: str, family: str, n: int, bits: int) -> None:
    q, x = build(f"{method}{bits}x"), FAMILIES[family](n, 20, 1)
    lower = min(float(c.variance(x, 3)) for c in candidates(q))
    assert float(q.variance(x, 3)) == pytest.approx(lower, rel=1e-12)


@pytest.mark.parametrize("method", ["bhq", "shq"])
def test_exact_guard_never_loses_to_plain_rows_of_the_same_rounding(method: str) -> None:
    """The guard judges blocks by the rounding that the whole tensor will get."""
    worst = 0.0
    psq = Quantizer(scale=Scale("row"), grid=Integers(3), rounding="best")
    for seed in (0, 2, 26, 115):  # the last two are the ones that told
        x = gaussian(12, 8, seed) * torch.exp(1.5 * torch.randn(12, 1, generator=gen(seed)))
        x = x * (torch.rand(12, 8, generator=gen(seed + 5)) < 0.3)
        best = build(f"{method}3x", guard="exact")
        worst = max(worst, float(best.variance(x, seed) / psq.variance(x, seed)))
    assert worst <= 1 + 1e-9, f"{worst:.3f} times plain rows"


def test_both_sides_are_taken() -> None:
    """Mostly exact zeros: stochastic with zero on a code; generic data at 8 bits: dithered."""
    zeros = gaussian(16, 64) * (torch.rand(16, 64, generator=gen(1)) < 0.1)
    q = build("psq8x")
    assert q.scale.mode == "zero"
    assert q.quantize(gaussian(16, 64), 0).dither.abs().max() > 0
    taken = q.quantize(zeros, 0)
    assert torch.equal(taken.dequantize()[zeros == 0], torch.zeros(int((zeros == 0).sum())))
    assert float(plain("affine", "row", 8, "dithered").variance(zeros)) > 3 * float(q.variance(zeros))


@pytest.mark.parametrize("family", ["gaussian", "sparse"])
def test_codes_are_those_of_the_side_taken(family: str) -> None:
    q, x = build("psq6x"), FAMILIES[family](9, 30, 0)
    side = min(candidates(q), key=lambda c: float(c.variance(x, 4)))
    assert torch.equal(q.quantize(x, 4).codes, side.quantize(x, 4).codes)
    assert torch.equal(q.quantize(x, 4).dequantize(), side.quantize(x, 4).dequantize())
