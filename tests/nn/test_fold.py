"""Scale folding: a step on a contracted axis moves into grad_output. Unbiased always; kept only where it pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import Quantizer, Recipe
from fqt.quant import Scale

from . import checks
from .cases import LAYERS, Case, converted, gradients, ids

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
RECIPE = Recipe(input="psq8@token", weight="psq8", grad_input="psq4", grad_weight="psq4@channel")
N, FEATURES, CHANNELS = 16, 6, 8
DRAWS = 100


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ramp(n: int, decades: float) -> Tensor:
    return torch.logspace(-decades / 2, decades / 2, n)


def spike(n: int, height: float) -> Tensor:
    return torch.ones(n).index_fill_(0, torch.tensor([n // 2]), height)


def column(scale: Tensor) -> Tensor:
    return scale[:, None]


SPIKE_N, SPIKE_C = column(spike(N, 1e3)), column(spike(CHANNELS, 1e3))
WEIGHT_RAMP = column(ramp(CHANNELS, 1))
# From Gaussian input (N, features), weight (channels, features) and grad_output (N, channels).
SITUATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "even": lambda x, w, g: (x, w, g),
    "one token 1000 times larger": lambda x, w, g: (x * SPIKE_N, w, g),
    "one channel 1000 times larger": lambda x, w, g: (x, w * SPIKE_C, g),
    "both": lambda x, w, g: (x * SPIKE_N, w * SPIKE_C, g),
    "against the gradient": lambda x, w, g: (x * column(ramp(N, 3)), w, g / column(ramp(N, 3))),
    "with the gradient": lambda x, w, g: (x * column(ramp(N, 2)), w, g * column(ramp(N, 2))),
    "channels against": lambda x, w, g: (x, w * column(ramp(CHANNELS, 3)), g / ramp(CHANNELS, 3)),
    "one gradient row": lambda x, w, g: (x * column(ramp(N, 2)), w, g * column(spike(N, 100))),
    "constant tokens": lambda x, w, g: (x * column(torch.arange(N) % 2), w, g),
    "constant channels": lambda x, w, g: (x, w * column(torch.arange(CHANNELS) % 2), g),
    "constant gradient": lambda x, w, g: (x * column(ramp(N, 2)), w, torch.full_like(g, 0.3)),
    "two-valued gradient": lambda x, w, g: (x * column(ramp(N, 1)), w * WEIGHT_RAMP, (g > 0).float()),
    "sparse gradient": lambda x, w, g: (x * column(ramp(N, 1)), w, g * (randn(N, CHANNELS, seed=9) > 1)),
}


class Setting:
    """One situation's gradients, for each way to fold."""

    def __init__(self, name: str, recipe: Recipe = RECIPE) -> None:
        gaussian = randn(N, FEATURES, seed=0), randn(CHANNELS, FEATURES, seed=1), randn(N, CHANNELS, seed=2)
        x, w, g = SITUATIONS[name](*gaussian)
        self.x, self.g, self.recipe = x, g, recipe
        self.layer = nn.Linear(FEATURES, CHANNELS, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(w)

    def gradients(self) -> dict[str, Tensor]:
        names = ("output", "grad_input", "grad_weight")
        found = zip(names, gradients(self.layer, self.x, upstream=self.g), strict=True)
        return {n: t.double().flatten() for n, t in found if n != "output"}

    def exact(self) -> dict[str, Tensor]:
        fqt.quantize_(self.layer, checks.qat_of(self.recipe))
        return self.gradients()

    def sample(self, fold: str, count: int = DRAWS) -> checks.Sample:
        fqt.quantize_(self.layer, replace(self.recipe, fold=fold))
        torch.manual_seed(3)
        found = [self.gradients() for _ in range(count)]
        return {n: torch.stack([f[n] for f in found]) for n in found[0]}


def energy(sample: checks.Sample, exact: checks.Gradients, product: str) -> tuple[float, float]:
    """Measured variance and its standard error, from repeated draws."""
    e = (sample[product] - exact[product]).square().sum(1)
    return float(e.mean()), float(e.std()) / math.sqrt(len(e))


@pytest.mark.parametrize("name", SITUATIONS)
def test_auto_is_never_worse_and_all_are_unbiased(name: str) -> None:
    """Variance: above 'never' by less than 5 standard errors of the difference, and 2 % (26 tests, 1e-5 in all)."""
    setting = Setting(name)
    exact = setting.exact()
    samples = {fold: setting.sample(fold) for fold in ("never", "auto", "always")}
    for sample in samples.values():
        checks.assert_mean_is(sample, exact)
    for product in exact:
        (never, e1), (auto, e2) = (energy(samples[f], exact, product) for f in ("never", "auto"))
        tiny = checks.slack(exact[product]) ** 2 * exact[product].numel()
        assert auto <= 1.02 * never + 5 * math.hypot(e1, e2) + tiny, f"{product}: {auto:.3g} against {never:.3g}"


def test_always_can_cost() -> None:
    """Four of 300 tokens a thousand times larger: what "auto" is there for, and what the comparison would see."""
    setting = Setting("even")
    setting.x, setting.g = randn(300, FEATURES, seed=3), randn(300, CHANNELS, seed=4)
    setting.x[::80] *= 1e3
    exact = setting.exact()
    found = {fold: setting.sample(fold, 40) for fold in ("never", "auto", "always")}
    never, auto, always = (energy(sample, exact, "grad_weight")[0] for sample in found.values())
    assert always > 2 * never
    assert auto < 1.2 * never


@pytest.mark.parametrize("name", ["against the gradient", "channels against"])
def test_auto_folds_where_it_pays(name: str) -> None:
    setting = Setting(name)
    exact = setting.exact()
    found = {f: [energy(setting.sample(f, 40), exact, p)[0] for p in exact] for f in ("never", "auto", "always")}
    gains = [n / a for n, a in zip(found["never"], found["auto"], strict=True)]
    assert max(gains) > 3
    assert min(gains) > 0.9


def test_a_wrong_factor_is_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor leaves the weight but never reaches the gradient."""
    real = Quantizer.quantize_knowing
    monkeypatch.setattr(
        Quantizer, "quantize_knowing", lambda self, x, *a, factor=None, **kw: real(self, x, *a, **kw)
    )
    setting = Setting("even")
    exact = setting.exact()
    with pytest.raises(AssertionError):
        checks.assert_mean_is(setting.sample("always", 40), exact)


FORWARD = {
    "rows": Recipe(input="psq8", weight="psq8"),
    "sample": Recipe(input="psq8@sample", weight="psq4"),
    "token": Recipe(input="psq8@token"),
}


@pytest.mark.parametrize("case", LAYERS, ids=ids)
@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("fold", ["always", "auto"])
def test_the_factor_cancels(case: Case, forward: str, fold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With identity quantizers folding changes nothing but float64 rounding: every layer, every axis."""
    x = case.input()
    qat = FORWARD[forward]
    truth = gradients(converted(case, qat), x)
    recipe = replace(qat, grad_input="psq4", grad_weight="psq4@channel", fold=fold)
    layer = converted(case, recipe)
    checks.plant(monkeypatch)
    for a, b in zip(gradients(layer, x), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1e-3, float(b.abs().max())))


@pytest.mark.parametrize("size", [1, 3])
def test_a_step_per_token_stays_in_a_convolution(size: int) -> None:
    """Also where there are as many positions as channels, so that shapes would fit."""
    symmetric = Quantizer(scale=Scale("row", "symmetric", "token"), rounding="nearest")
    recipe = Recipe(input=symmetric, grad_input="psq4", grad_weight="psq4@channel", fold="always")
    layer, x = nn.Conv2d(18, 4, size), randn(2, 18, 3, 3, seed=5) * ramp(18, 1).view(1, 18, 1, 1)
    exact = gradients(fqt.quantize_(layer, checks.qat_of(recipe)), x)
    fqt.quantize_(layer, recipe)
    torch.manual_seed(6)
    found = [gradients(layer, x) for _ in range(100)]
    sample = {"weight": torch.stack([f[2].double().flatten() for f in found])}
    checks.assert_mean_is(sample, {"weight": exact[2].double().flatten()})


@pytest.mark.parametrize("name", ["conv2d_groups", "transposed1d_groups", "conv2d", "linear_tokens"])
def test_layers_are_unbiased_when_folded(name: str) -> None:
    case = next(c for c in LAYERS if c.name == name)
    recipe = Recipe(input="psq8", weight="psq8", grad_input="psq4", grad_weight="psq4@channel", fold="always")
    layer, x = converted(case, recipe, torch.float32), case.input(torch.float32)
    exact = gradients(converted(case, checks.qat_of(recipe), torch.float32), x)
    found = [gradients(layer, x) for _ in range(100)]
    sample = {str(i): torch.stack([f[i].double().flatten() for f in found]) for i in range(1, len(exact))}
    checks.assert_mean_is(sample, {str(i): exact[i].double().flatten() for i in range(1, len(exact))})
