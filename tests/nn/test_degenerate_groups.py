"""A group that is zero or constant must not add noise: its step, as a factor of grad_output, sets no range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import Recipe

from . import checks
from .cases import equal, gradients, q

ALL = {"grad_input": "psq8x", "grad_weight": "psq8x@channel", "fold": "always"}
RECIPES = {
    "default": fqt.nn.load_recipe("default"),
    "steps for both": Recipe(input="psq8", weight="psq8", **ALL),
    "symmetric input": Recipe(input=q("row", "symmetric", rounding="nearest"), weight="psq8", **ALL),
    "affine weight": Recipe(input="psq8", weight=q("row", "affine", rounding="nearest"), **ALL),
    "zero on a code": Recipe(input=q("row", "zero", rounding="nearest"), weight="psq4", **ALL),
    "auto": Recipe(**{**ALL, "input": "psq8", "weight": "psq8", "fold": "auto"}),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(48, 32), (48, 48)),
    "conv": (lambda: nn.Conv2d(8, 32, 3, padding=1), (16, 8, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 16, 3), (16, 8, 5, 5)),
}
DRAWS = 8


def degenerate(x: Tensor, kind: str) -> Tensor:
    """A quarter of the rows replaced; the last keep what they are."""
    x = x.clone()
    few = len(x) // 4
    values = {"zero": torch.zeros(few), "constant": torch.full((few,), 1.0), "signed": torch.arange(few) % 2 - 0.5}
    x[:few] = values[kind].view(-1, *[1] * (x.ndim - 1)) * float(x.std())
    return x


def noise(layer: nn.Module, x: Tensor, recipe: Recipe) -> list[float]:
    """Of the gradients of input and weight: measured variance over energy."""
    g = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(4))
    exact = gradients(fqt.quantize_(layer, checks.qat_of(recipe)), x, upstream=g)
    fqt.quantize_(layer, recipe)
    torch.manual_seed(0)
    found = [gradients(layer, x, upstream=g) for _ in range(DRAWS)]
    fqt.restore_(layer)
    errors = [sum(float((f[i] - exact[i]).square().sum()) for f in found) / DRAWS for i in (1, 2)]
    return [e / float(exact[i].square().sum()) for e, i in zip(errors, (1, 2), strict=True)]


@pytest.mark.parametrize("of", ["weight", "input"])
@pytest.mark.parametrize("kind", ["zero", "constant", "signed"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LAYERS)
def test_no_noise_from_them(name: str, recipe: str, kind: str, of: str) -> None:
    """Less than 3 times as much. Energies of noise over thousands of entries and eight draws vary by a few percent;
    a constant row, whose step is a choice, may have up to twice that of its neighbours.
    """
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    plain = noise(layer, x, RECIPES[recipe])
    with torch.no_grad():
        if of == "input":
            x = degenerate(x, kind)
        elif name == "transposed":
            layer.weight.copy_(degenerate(layer.weight.movedim(1, 0), kind).movedim(0, 1))
        else:
            layer.weight.copy_(degenerate(layer.weight, kind))
    for before, after in zip(plain, noise(layer, x, RECIPES[recipe]), strict=True):
        assert after < 3 * before + 1e-12


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_but_degenerate_groups(recipe: str) -> None:
    """A layer whose input and weight are zero, or constant, is exact to rounding, but for the gradient's noise.

    That meets the constant weight in the input's gradient, and the input in the weight's if its code is not 0.
    """
    layer, g = nn.Linear(16, 8), torch.randn(12, 8)
    for value in (0.0, 0.7):
        with torch.no_grad():
            layer.weight.fill_(value)
        x = torch.full((12, 16), value)
        exact = gradients(fqt.quantize_(layer, checks.qat_of(RECIPES[recipe])), x, upstream=g)
        found = gradients(fqt.quantize_(layer, RECIPES[recipe]), x, upstream=g)
        assert equal(found[:1], exact[:1])
        if value == 0:
            assert not any(bool(f.any()) for f in found[1:3])
        for number, (a, b) in enumerate(zip(found, exact, strict=True)):
            noisy = value != 0 and (number == 1 or (number == 2 and recipe == "symmetric input"))
            torch.testing.assert_close(a, b, rtol=0, atol=(0.01 if noisy else 1e-6) * float(b.abs().max()) + 1e-12)


def test_attention_with_pruned_heads_and_padding() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 32)
    plain = attention_noise(nn.MultiheadAttention(32, 4, batch_first=True), x)
    torch.manual_seed(0)
    pruned = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        pruned.in_proj_weight[64:72] = 0  # the first head's values
        pruned.out_proj.weight[:8] = 0
    x[:, -3:] = 0
    assert attention_noise(pruned, x) < 3 * plain


def attention_noise(layer: nn.MultiheadAttention, x: Tensor) -> float:
    torch.manual_seed(3)
    g = torch.randn(x.shape)

    def grad_input() -> Tensor:
        leaf = x.clone().requires_grad_()
        layer(leaf, leaf, leaf, need_weights=False)[0].backward(g)
        assert leaf.grad is not None
        return leaf.grad

    recipe = RECIPES["default"]
    fqt.quantize_(layer, checks.qat_of(recipe))
    exact = grad_input()
    fqt.quantize_(layer, recipe)
    return sum(float((grad_input() - exact).square().sum()) for _ in range(DRAWS)) / float(exact.square().sum())
