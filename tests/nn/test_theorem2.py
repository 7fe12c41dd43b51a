"""Theorem 2 on a real network: the gradient's variance is the sum of what each layer's quantizers add.

Layer l adds the difference between the gradient with layers l … L quantized and that with l+1 … L, on common random
numbers: its own noise on the noisy gradient from above, exact below. Turning on one layer alone is not the theorem.
Uncertainty comes from repeated draws: ‖noise‖² of dithered or transformed codes does not follow χ².
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import Recipe

from . import checks

DEPTH, WIDTH, DRAWS = 4, 6, 80


def network() -> nn.Sequential:
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, std=(3 / WIDTH) ** 0.5)
    return nn.Sequential(*layers[:-1])


class Gradients:
    """Weight gradients by layer, with chosen layers noisy and every layer's noise its own for each draw."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.draw = recipe, 0
        self.models: dict[tuple[int, ...], nn.Sequential] = {}
        self.x, self.y = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1))

    def _model(self, noisy: tuple[int, ...]) -> nn.Sequential:
        if noisy not in self.models:
            model = self.models[noisy] = network()
            for number, layer in enumerate(model[::2]):
                fqt.quantize_(layer, self.recipe if number in noisy else checks.qat_of(self.recipe))
                layer.register_forward_pre_hook(lambda *_, n=number: self._seed(n))
        return self.models[noisy]

    def _seed(self, number: int) -> None:
        torch.manual_seed(self.draw * 100 + number)

    def __call__(self, noisy: Iterable[int], draw: int) -> list[Tensor]:
        self.draw, model = draw, self._model(tuple(noisy))
        model.zero_grad()
        (model(self.x) - self.y).square().mean().backward()
        return [layer.weight.grad.double().clone() for layer in model[::2]]


@lru_cache(maxsize=1)
def measured(recipe: Recipe) -> tuple[Tensor, Tensor]:
    return energies(recipe)


def energies(recipe: Recipe, nested: bool = True, count: int = DRAWS) -> tuple[Tensor, Tensor]:
    """(draws, k) ‖total noise of layer k‖² and (draws, l, k) ‖what layer l adds to k‖²."""
    gradients = Gradients(recipe)
    exact = gradients([], 0)
    total, parts = [], []
    for draw in range(count):
        all_noisy = gradients(range(DEPTH), draw)
        if nested:
            levels = [all_noisy, *(gradients(range(first, DEPTH), draw) for first in range(1, DEPTH)), exact]
        else:
            levels = [gradients([layer], draw) for layer in range(DEPTH)]
        rows = []
        for layer in range(DEPTH):
            a, b = levels[layer], levels[layer + 1] if nested else exact
            rows.append([float((x - y).square().sum()) for x, y in zip(a, b, strict=True)])
        parts.append(rows)
        total.append([float((x - y).square().sum()) for x, y in zip(all_noisy, exact, strict=True)])
    return torch.tensor(total, dtype=torch.float64), torch.tensor(parts, dtype=torch.float64)


def check(total: Tensor, parts: Tensor) -> None:
    """The cross terms, total less the sum of parts, have mean zero: |z| < 5.5 for each of 4 layers.

    False alarms below 2e-7 for a normal mean of 80; zero where nothing is above the layer.
    """
    for layer in range(DEPTH):
        assert not parts[:, layer, layer + 1 :].any(), f"layer {layer} adds noise to a later layer"
        assert (parts[:, layer, : layer + 1].mean(0) > 0).all(), f"layer {layer} adds nothing"
    for k in range(DEPTH):
        cross = total[:, k] - parts[:, :, k].sum(1)
        if float(cross.abs().max()) <= 1e-9 * float(total[:, k].max()):
            continue  # the last layer: its own noise is all there is
        z = checks.z_of(cross)
        ratio = float(total[:, k].mean() / parts[:, :, k].sum(1).mean())
        assert abs(z) < 5.5, f"layer {k}: total over parts {ratio:.3f}, z {z:.1f}"


RECIPES = {
    "psq3": Recipe(grad_input="psq3", grad_weight="ptq4"),
    "bhq3": Recipe(grad_input="bhq3", grad_weight="ptq8"),
    "shq3d": Recipe(grad_input="shq3d", grad_weight="psq4d@channel"),
    "folded": Recipe(weight="psq8", input="psq8", grad_input="psq3x", grad_weight="psq3x", fold="always"),
    "ptq2": Recipe(grad_input="ptq2", grad_weight="ptq8"),  # last: two more tests use what it measured
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_sum_of_parts_is_the_variance(name: str) -> None:
    check(*measured(RECIPES[name]))


def test_one_layer_at_a_time_is_not_the_theorem() -> None:
    """At 2 bits noise begets noise: the true total is well over the sum of one-at-a-time terms."""
    with pytest.raises(AssertionError, match="total over parts"):
        check(*energies(RECIPES["ptq2"], nested=False))


@pytest.mark.parametrize("defect", ["nearest", "wrong step", "clipped"])
def test_a_biased_quantizer_breaks_it(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.plant(monkeypatch, checks.DEFECTS[defect])
    with pytest.raises(AssertionError, match=r"total over parts|adds nothing"):
        check(*energies(RECIPES["psq3"], count=32))


def test_fresh_draws_have_that_variance() -> None:
    """The same variance from unrelated draws, about their own mean: |z| < 5.5, as above."""
    recipe = RECIPES["ptq2"]
    _, parts = measured(recipe)
    gradients = Gradients(recipe)
    fresh = [gradients(range(DEPTH), 10_000 + draw) for draw in range(2 * DRAWS)]
    for k in range(DEPTH):
        a, b = (torch.stack([g[k] for g in half]).flatten(1) for half in (fresh[::2], fresh[1::2]))
        pairs = (a - b).square().sum(1) / 2
        z = checks.z_of(pairs - parts[:, :, k].sum(1))
        assert abs(z) < 5.5
