"""Recipes of papers: their names, what they compute, which of them estimate the gradient without bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import FqtError, Product, Recipe
from fqt.nn import dump_recipe, load_recipe
from fqt.nn.named import RECIPES
from fqt.quant import Leverage, LowSequency, quantizer
from fqt.stats import diagnose, quantization_variance

from . import checks

NAMES = [name for name in RECIPES if name not in ("none", "qat")]
BIASED = {"hlq": ("weight",), "lbp": ("input", "weight")}  # of which gradients, as published
KEPT = [name for name in NAMES if any(load_recipe(name).product(p).keep for p in ("grad_input", "grad_weight"))]
DRAWS = 300


def test_names_are_nobody_elses() -> None:
    for name in RECIPES:
        recipe = load_recipe(name)
        assert str(recipe) == name
        assert load_recipe(dump_recipe(recipe)) == Recipe.of_text(recipe.text) == recipe
        with pytest.raises(FqtError):
            quantizer(name)
    assert str(load_recipe("nvfp4")) == "nvfp4"
    assert load_recipe("nvfp4") == Recipe(grad_input="nvfp4", grad_weight="ptq8")


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, an input of two samples of tokens, a gradient of its output whose rows differ up to threefold."""
    torch.manual_seed(4)
    upstream = torch.randn(2, 64, 12) * (0.5 + torch.rand(2, 64, 1))
    return nn.Linear(20, 12), torch.randn(2, 64, 20, requires_grad=True), upstream


def gradients(layer: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(layer(x), (x, layer.weight), upstream)
    return {name: g.double() for name, g in zip(("input", "weight"), found, strict=True)}


def worst(sample: list[dict[str, Tensor]], truth: dict[str, Tensor], name: str) -> float:
    """The mean square of the entries' z-scores, 1 up to chance."""
    values = torch.stack([g[name] for g in sample])
    error = values.std(0) / DRAWS**0.5 + 1e-6 * truth[name].abs().max()
    return float(((values.mean(0) - truth[name]) / error).square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_unbiased_but_where_the_paper_biases_it(name: str) -> None:
    """Mean square z of 2,560 and of 240 entries over 300 draws.

    A row is kept or not as a whole, which makes entries dependent, 20 at a time: its standard deviation about 1 is
    at most √(2 · 20/240) = 0.41, and 3 a false alarm below 1e-5. A bias of √2 standard errors reaches it; those
    published are beyond 100.
    """
    layer, x, upstream = problem()
    recipe = load_recipe(name)
    exact = gradients(fqt.quantize_(layer, checks.qat_of(recipe)).eval(), x, upstream)
    fqt.quantize_(layer.train(), recipe)
    sample = [gradients(layer, x, upstream) for _ in range(DRAWS)]
    for gradient in exact:
        found = worst(sample, exact, gradient)
        assert found > 100 if gradient in BIASED.get(name, ()) else found < 3, (gradient, found)


def test_the_published_bias_is_that_of_the_rows_that_are_dropped() -> None:
    """The mean of both gradients is that of the low rows, tested as above."""
    layer, x, upstream = problem()
    low = LowSequency(21, 64)
    exact = gradients(fqt.quantize_(layer, checks.qat_of(load_recipe("lbp"))).eval(), x, upstream)
    through = low.back(low.turned(upstream), 64)
    kept = gradients(layer, x, through)
    assert not torch.allclose(kept["weight"], exact["weight"], rtol=0.1)
    fqt.quantize_(layer.train(), "lbp")
    sample = [gradients(layer, x, upstream) for _ in range(DRAWS)]
    for gradient in kept:
        assert worst(sample, kept, gradient) < 3


@pytest.mark.parametrize("name", NAMES)
def test_explain_says_what_runs(name: str) -> None:
    layer = fqt.quantize_(nn.Linear(64, 64), name)
    said, ran = fqt.explain(layer).products, fqt.explain(layer, torch.randn(2, 64, 64, requires_grad=True)).products
    assert [row.arithmetic for row in said] == [row.arithmetic for row in ran]
    kept = [product for product in ("grad_input", "grad_weight") if load_recipe(name).product(product).keep]
    assert [row.product for row in said if "rows kept by" in row.why] == kept


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_the_values_of_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, upstream = problem()
    fqt.quantize_(layer, name)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return gradients(layer, x, upstream)

    found = run()
    checks.simulate(monkeypatch)
    for gradient, b in run().items():
        torch.testing.assert_close(found[gradient], b, rtol=0, atol=4e-6 * float(b.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 20), (1, 20), (3, 0, 20), (20,), (2, 3, 5, 20)])
def test_any_shape_of_tokens(name: str, shape: tuple[int, ...]) -> None:
    layer = fqt.quantize_(nn.Linear(20, 12), name)
    x = torch.randn(shape, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == shape
    assert bool(torch.isfinite(x.grad).all() & torch.isfinite(layer.weight.grad).all())


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_run_or_are_refused_in_one_line(name: str) -> None:
    conv = nn.Conv2d(4, 6, 3)
    if any(getattr(load_recipe(name).product(p).keep, "turns", False) for p in ("grad_input", "grad_weight")):
        with pytest.raises(FqtError, match="neighbouring tokens"):
            fqt.quantize_(conv, name)
        return
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    fqt.quantize_(conv, name)(x).square().sum().backward()
    assert bool(torch.isfinite(x.grad).all() & torch.isfinite(conv.weight.grad).all())


def test_the_bias_gradient_is_exact_whatever_rows_are_kept() -> None:
    layer, x, upstream = problem()
    for name in KEPT:
        fqt.quantize_(layer, name)
        (found,) = torch.autograd.grad(layer(x), layer.bias, upstream)
        torch.testing.assert_close(found, upstream.sum((0, 1)))


def test_the_two_gradients_keep_different_rows() -> None:
    layer, x, upstream = problem()
    keep = Product(None, keep=Leverage(0.5))
    fqt.quantize_(layer, Recipe(input=None, weight=None, grad_input=keep, grad_weight=keep))
    eye = torch.eye(128).view(2, 64, 128)  # the weight's gradient is then the rows themselves
    wide = fqt.quantize_(nn.Linear(128, 12), layer.fqt_recipe)
    x = eye.clone().requires_grad_()
    by_input, by_weight = torch.autograd.grad(wide(x), (x, wide.weight), upstream)
    rows = by_input.flatten(0, 1).abs().amax(1) > 0, by_weight.abs().amax(0) > 0
    agree = float((rows[0] == rows[1]).double().mean())
    assert 0.2 < agree < 0.8  # 128 rows: 0.5 but for 7 standard deviations


def test_statistics_measure_a_kept_whole_or_refuse() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "int4")
    batches = [torch.randn(6, 8) for _ in range(2)]
    loss = lambda model, batch: model(batch).square().mean()
    with pytest.raises(FqtError, match=r"keeps a part of grad_output's rows.*quantization_variance") as error:
        diagnose(model, loss, batches, draws=2)
    assert "\n" not in str(error.value)
    assert quantization_variance(model, loss, batches, draws=4) is not None
    rotated = fqt.quantize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "ufp4")
    assert len(diagnose(rotated, loss, batches, draws=2).operands) == 3  # the first layer has no grad_input
