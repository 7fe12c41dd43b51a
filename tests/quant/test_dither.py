"""Dithered rounding in the large: half the variance of stochastic rounding, in every direction one may look.

Each direction w gives ⟨w, error⟩ over many draws, whose mean square must be what independent uniform errors
would give, Σ w² step²/12. Relative standard error of a mean square over M draws is at most about √(2/M): 4000
draws, 2.2 %; allowed 13 %, 6σ, 2e-9 per test. Copies of x along both axes share no dither between the blocks on
the diagonal: TILES draws from one seed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fqt import Quantizer
from fqt.kernels.rounding import dither_noise

from . import mutants
from .cases import FAMILIES, build, gaussian, gen, plain
from .estimators import inverse_of

N, D, DRAWS, TILES, TOLERANCE = 6, 9, 4000, 25, 0.13


def directions(n: int, d: int) -> dict[str, Tensor]:
    g = gen(77)
    one_column = torch.zeros(n, d)
    one_column[:, 2] = 1
    one_row = torch.zeros(n, d)
    one_row[1] = 1
    return {
        "random": torch.randn(n, d, generator=g),
        "positive": torch.rand(n, d, generator=g) + 0.1,
        "ones": torch.ones(n, d),
        "column": one_column,
        "row": one_row,
        "outer": torch.randn(n, 1, generator=g) * torch.randn(1, d, generator=g),
        "low-rank positive": torch.rand(n, 1, generator=g) * torch.rand(1, d, generator=g),
    }


def errors(q: Quantizer, x: Tensor) -> Tensor:
    """(DRAWS, N, D) float64; for quantizers without transform."""
    n, d = x.shape
    out = []
    for seed in range(DRAWS // TILES):
        wide = q.quantize(x.repeat(TILES, TILES), seed).dequantize(torch.float64).view(TILES, n, TILES, d)
        out.append(wide.diagonal(dim1=0, dim2=2).permute(2, 0, 1) - x.double())
    return torch.cat(out)


def check_projections(q: Quantizer, x: Tensor) -> None:
    noise = errors(q, x)
    step = q.quantize(x, 0).matrix_step.double().expand(x.shape)
    for name, w in directions(*x.shape).items():
        expected = float((w.double() * step).square().sum()) / 12
        measured = float((noise * w).sum((1, 2)).square().mean())
        assert abs(measured / expected - 1) < TOLERANCE, f"{name}: {measured / expected:.3f} of independent errors"


@pytest.mark.parametrize("name", ["psq4d", "ptq8d"])
def test_projections_vary_like_independent_errors(name: str) -> None:
    check_projections(build(name), FAMILIES["heavy_rows"](N, D, 3))


def test_column_scales_too() -> None:
    check_projections(plain("affine", "column", 3, "dithered"), FAMILIES["gaussian"](N, D, 3))


def test_a_shared_dither_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry alone is still right; sums over a column are not."""
    mutants.dither_shared_by_rows(monkeypatch)
    with pytest.raises(AssertionError, match="of independent errors"):
        check_projections(build("psq4d"), FAMILIES["heavy_rows"](N, D, 3))


@pytest.mark.parametrize("method", ["bhq", "shq"])
def test_projections_through_a_left_transform(method: str) -> None:
    """⟨w, S⁻¹e⟩ = ⟨S⁻ᵀw, e⟩ with independent e. SHQ redraws its signs: the mean of the seeds' own variances."""
    q, x = build(f"{method}4d", guard=False), FAMILIES["one_large"](8, 5, 3)
    square, expected = {}, {}
    for seed in range(600):  # 5.8 %; allowed 35 %
        qx = q.quantize(x, seed)
        error = qx.dequantize(torch.float64) - x.double()
        inverse, step = inverse_of(qx), qx.matrix_step.double()
        for name, w in directions(*x.shape).items():
            square[name] = square.get(name, 0.0) + float((error * w).sum() ** 2)
            pulled = inverse.T @ w.double() * step
            expected[name] = expected.get(name, 0.0) + float(pulled.square().sum()) / 12
    for name in square:
        assert abs(square[name] / expected[name] - 1) < 0.35, name


@pytest.mark.parametrize("bits", range(2, 9))
def test_entries_have_variance_one_twelfth(bits: int) -> None:
    """Whatever the data: at codes, between them, at both ends. 20000 columns share a position: 6σ = 4 %."""
    top = 2**bits - 2
    t = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0, top - 0.5, float(top)]).clamp(max=top)
    x = torch.cat([t[:, None].expand(7, 20000), torch.tensor([[0.0, top]]).expand(7, 2)], dim=1)
    qx = plain("affine", "tensor", bits, "dithered").quantize(x, 5)
    assert float(qx.step) == 1
    assert qx.codes.max() == 2**bits - 1
    error = (qx.dequantize(torch.float64) - x)[:, :20000]
    assert (error.abs() <= 0.5 + 1e-6).all()
    assert ((error.square().mean(1) * 12 - 1).abs() < 0.04).all()
    assert (error.mean(1).abs() < 6 / (12 * 20000) ** 0.5).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gain_over_stochastic_rounding(bits: int) -> None:
    """½ (B/(B − 1))² of the mean 1/6, on data that falls anywhere between codes."""
    x = gaussian(64, 512, 8)
    top = 2**bits - 1
    gain = float(build(f"psq{bits}d").variance(x) / build(f"psq{bits}").variance(x))
    assert gain == pytest.approx(0.5 * (top / (top - 1)) ** 2, rel=0.03)


def test_variance_and_bound_are_step_squared_over_twelve() -> None:
    x = FAMILIES["heavy_rows"](9, 7, 0)
    q = build("psq5d")
    size = (x.amax(1) - x.amin(1)).double() / 30
    expected = float(7 * size.square().sum() / 12)
    assert float(q.variance(x)) == pytest.approx(expected, rel=1e-6)
    assert float(q.variance_bound(x)) == float(q.variance(x))


def test_noise_costs_n_plus_d_numbers() -> None:
    row, column = dither_noise(torch.tensor(3), 5, 11)
    assert (tuple(row.shape), tuple(column.shape)) == ((5, 1), (1, 11))
    assert int(row.min()) >= 0
    assert int(row.max()) < 1 << 24
