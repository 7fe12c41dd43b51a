"""Variances at all widths in one call: what `variance` says of each width, and with weights what samples say."""

from __future__ import annotations

import pytest
import torch

import fqt
from fqt.quant import Integers
from fqt.quant.best import rounded

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
NAMES = ("ptq8", "ptq4d", "psq8", "psq3x", "bhq4", "bhq4d", "shq4", "shq4d", "shq3x")
EXACT = fqt.Quantizer(transform=fqt.quantizer("shq4").transform.__class__(guard="exact"))


def matrix() -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    rows = torch.logspace(0, -2, 12)[:, None]
    x = torch.randn(12, 5, 4, generator=g) * rows[..., None]
    x[4] = 0.3
    return x


@pytest.mark.parametrize("axis", [0, (0, 2), 2])
@pytest.mark.parametrize("q", [*map(fqt.quantizer, NAMES), EXACT], ids=[*NAMES, "exact guard"])
def test_every_width_is_that_widths_variance(q: fqt.Quantizer, axis: int | tuple[int, ...]) -> None:
    x = matrix()
    variances, bounds = q.variances(x, WIDTHS, seed=5, axis=axis)
    members = [q.with_bits(bits) for bits in WIDTHS]
    expected = torch.stack([m.variance(x, 5, axis=axis) for m in members])
    limits = torch.stack([m.variance_bound(x, 5, axis=axis) for m in members])
    assert torch.allclose(variances, expected, rtol=1e-9)
    assert torch.allclose(bounds, limits, rtol=1e-9)
    assert variances.dtype == torch.float64
    assert (bounds >= variances * (1 - 1e-12)).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "dithered", "best"])
@pytest.mark.parametrize("mode", ["affine", "zero", "symmetric"])
@pytest.mark.parametrize("transform", [fqt.quant.Identity, fqt.quant.BlockHouseholder, fqt.quant.ScaledHadamard])
def test_widths_share_only_what_they_have_in_common(transform: type, mode: str, rounding: str) -> None:
    """Tiny and one-signed rows, duplicates and constants, where a guard's choice may turn on the width."""
    if mode == "symmetric" and rounding in ("dithered", "best"):
        pytest.skip("rounding of affine scales")
    identity = transform is fqt.quant.Identity
    g = torch.Generator().manual_seed(0)
    matrices = [torch.rand(2, 1, 5, generator=g) + shift for shift in (0.0, 0.1, 1.0) for _ in range(3)]
    matrices += [
        torch.rand(1, 6, generator=g).expand(4, 6),
        torch.ones(3, 4),
        torch.eye(5),
        torch.randn(9, 7, generator=g),
    ]
    for guard in (True,) if identity else (True, False, "exact"):
        if guard == "exact" and rounding == "best":
            continue
        chosen = transform() if identity else transform(guard=guard)
        q = rounded(chosen, fqt.quant.Scale("row", mode), Integers(8), rounding)
        for x in matrices:
            expected = torch.stack([q.with_bits(bits).variance(x, 5) for bits in WIDTHS])
            torch.testing.assert_close(q.variances(x, WIDTHS, seed=5)[0], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(4,), (12, 1, 1), (5, 1), (12, 5, 4)])
@pytest.mark.parametrize("name", ["psq3", "ptq3d", "bhq3", "shq3d"])
def test_weighted_variance_is_that_of_weighted_errors(name: str, shape: tuple[int, ...]) -> None:
    """300 draws of Σ w·error²; |z| < 5 (false alarm 6e-7 each for a normal mean)."""
    x, q = matrix().double(), fqt.quantizer(name)
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    key = 7
    if name == "shq3d":  # its signs belong to the seed: average over the transforms too
        exact = torch.stack([q.variances(x, (3,), seed, weight=weight)[0][0] for seed in range(300)])
    else:
        exact = q.variances(x, (3,), key, weight=weight)[0].expand(300)
    errors = torch.stack([(q.quantize(x, seed).dequantize() - x).square().mul(weight).sum() for seed in range(300)])
    gap = errors - exact
    assert abs(float(gap.mean() / gap.std() * 300**0.5)) < 5
    plain = q.variances(x, (3,), key)[0]
    assert not torch.allclose(exact.mean(), plain[0], rtol=1e-2)
    ones = q.variances(x, (3,), key, weight=torch.ones(shape))[0]
    assert torch.allclose(ones, plain, rtol=1e-6)


def test_no_widths_and_wrong_widths() -> None:
    q = fqt.quantizer("psq4")
    assert q.variances(matrix(), ())[0].shape == (0,)
    with pytest.raises(fqt.FqtError, match="9 bits"):
        q.variances(matrix(), (9,))
