"""The streamed variance against the two-pass one, and its standard error against the spread of estimates."""

from __future__ import annotations

import math

import pytest
import torch

from fqt.errors import FqtError
from fqt.stats.passes import energy
from fqt.stats.spread import Estimate, Spread, ratio

GROUPS = {"a.weight": "a", "a.bias": "a", "b.weight": "b"}


def observe(spread: Spread, draws: list[dict[str, torch.Tensor]]) -> Spread:
    for draw in draws:
        for name, value in draw.items():
            spread.add(name, value.clone())
        spread.end()
    return spread


def draws(count: int, seed: int, mean: float = 0.0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    sizes = {"a.weight": 20, "a.bias": 4, "b.weight": 10}
    return [{name: mean + torch.randn(size, generator=g) for name, size in sizes.items()} for _ in range(count)]


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_variance_and_energy_are_those_of_two_passes(mean: float) -> None:
    data = draws(7, 0, mean)
    spread = observe(Spread(GROUPS), data)
    stacked = {name: torch.stack([d[name] for d in data]).double() for name in GROUPS}
    variances = {name: float(value.var(0).sum()) for name, value in stacked.items()}
    found = spread.variance()
    assert found["a"].value == pytest.approx(variances["a.weight"] + variances["a.bias"], rel=1e-5 + 1e-6 * mean)
    assert found["b"].value == pytest.approx(variances["b.weight"], rel=1e-5 + 1e-6 * mean)
    assert found[Spread.TOTAL].value == pytest.approx(sum(variances.values()), rel=1e-5 + 1e-6 * mean)
    energy = sum(float(value.square().sum(1).mean()) for value in stacked.values())
    assert spread.energy()[Spread.TOTAL].value == pytest.approx(energy, rel=1e-6)


def test_the_error_is_the_spread_of_the_estimate() -> None:
    """Over 300 sets of 5 observations the mean squared error reported is the estimates' variance, to 30 %.

    Each of the two has a relative standard deviation of about 8 %.
    """
    found = [observe(Spread(GROUPS), draws(5, seed)).variance()[Spread.TOTAL] for seed in range(300)]
    spread = torch.tensor([e.value for e in found]).var().item()
    reported = torch.tensor([e.error for e in found]).square().mean().item()
    assert 0.7 < reported / spread < 1.3


def test_short_dtypes_and_few_observations() -> None:
    half = [{name: value.bfloat16() for name, value in draw.items()} for draw in draws(3, 1)]
    exact = torch.stack([d["b.weight"] for d in half]).double().var(0).sum()
    assert observe(Spread(GROUPS), half).variance()["b"].value == pytest.approx(float(exact), rel=1e-5)
    assert math.isnan(observe(Spread(GROUPS), draws(2, 0)).variance()["a"].error)
    with pytest.raises(FqtError, match="at least 2 observations"):
        observe(Spread(GROUPS), draws(1, 0)).variance()


def test_ratio() -> None:
    found = ratio(Estimate(value=2.0, error=0.2), Estimate(value=4.0, error=0.4))
    assert found.value == 0.5
    assert found.error == pytest.approx(0.5 * math.hypot(0.1, 0.1))
    assert math.isnan(ratio(found, Estimate(value=0.0, error=0.0)).value)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e25])
def test_energy_of_large_tensors(scale: float) -> None:
    torch.manual_seed(0)
    for shape in ((2, 3, 50, 41), (5, 4096), (4096,)):
        x = torch.randn(shape) * scale
        for laid in (x, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.movedim(0, -1)):
            assert float(energy(laid)) == pytest.approx(float(laid.double().square().sum()), rel=1e-6)
    assert float(energy(torch.full((5000,), torch.inf))) == torch.inf
