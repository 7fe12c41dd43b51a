"""Linear layers whose steps vary by blocks along a contracted axis: integers give what the codes' values give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import Quantizer, Recipe
from fqt.kernels import blocked, integer
from fqt.nn.arithmetic import obstacle, summed_in_blocks
from fqt.nn.layers import linear_map
from fqt.nn.product import PRODUCTS as OPERANDS
from fqt.quant import Integers, Scale
from fqt.quant.grid import E2M1, E4M3, Floats
from fqt.quant.transform import Rotated

from .cases import both, gradients, q

PRODUCTS = ("output", "grad_input", "grad_weight")
TOLERANCE = 1e-5  # of the largest entry: float32 sums of fewer than a hundred terms, in two orders


def blocks(rows: int, columns: int, rounding: str = "stochastic", **more: object) -> Quantizer:
    how: dict = {"axis": None, "store": "float32", "grid": Integers(8), **more}
    scale = Scale((rows, columns), "symmetric", how["axis"], how["store"])
    return Quantizer(scale=scale, grid=how["grid"], rounding=rounding)


def tiles(n: int) -> Recipe:
    once = blocks(n, n, "nearest")
    return Recipe(input=once, weight=once, grad_input=blocks(n, n), grad_weight=blocks(n, n))


ROWS = q("row", "symmetric", rounding="nearest")
RECIPES = {  # with the length of the blocks of each product, 0 for one sum, None where it is not on integers
    "mxint8": (Recipe(grad_input=blocks(1, 32)), (0, 32, None)),
    "mxfp4": (Recipe(grad_input=blocks(1, 32, grid=E2M1, store="power")), (0, 32, None)),
    "nvfp4": (Recipe(grad_input=blocks(1, 16, grid=E2M1, store="e4m3")), (0, 16, None)),
    "powers of two": (Recipe(grad_input=blocks(1, 32, grid=Floats(3, 0))), (0, 32, None)),
    "tile32": (tiles(32), (32, 32, 32)),
    "tile16": (tiles(16), (16, 16, 16)),
    "tile128": (tiles(128), (128, 128, 128)),
    "forward rows": (
        Recipe(input=blocks(1, 32, "nearest"), weight=blocks(1, 32, "nearest"), grad_weight="ptq8"),
        (32, None, None),
    ),
    "folded": (Recipe(weight="psq8", grad_input=blocks(1, 32), fold="always"), (0, 32, None)),
    "both folded": (
        Recipe(input=ROWS, weight="psq8", grad_input=blocks(1, 32), grad_weight=blocks(1, 32), fold="always"),
        (0, 32, 32),
    ),
    "along tokens": (
        Recipe(input=q("tensor", "symmetric", rounding="nearest"), grad_weight=blocks(1, 32)),
        (0, None, 32),
    ),
    "rows said": (
        Recipe(
            input=q("tensor", "symmetric", rounding="nearest"),
            grad_input=blocks(32, 1, axis="channel"),
            grad_weight=blocks(64, 1, axis="token"),
        ),
        (0, 32, 64),
    ),
    "columns of the weight": (
        Recipe(weight=q("column", "symmetric", rounding="nearest"), grad_input=blocks(1, 32)),
        (None, 32, None),
    ),
    "shifted columns": (
        Recipe(
            input=q("tensor", "symmetric", rounding="nearest"),
            weight="ptq8",
            grad_input="shift4",
            grad_weight="shift4",
        ),
        (0, 32, 32),
    ),
    "shifted columns, a folded weight": (
        Recipe(weight="psq8", grad_input="shift4", fold="always"),
        (0, 32, None),
    ),
    "two lengths": (Recipe(weight=blocks(16, 1, "nearest"), grad_input=blocks(1, 64)), (None, 16, None)),
}
SHAPES = [(70, 100, 90), (3, 5, 7), (64, 32, 128)]


def lengths(layer: nn.Module) -> tuple[int | None, ...]:
    map, recipe = linear_map(layer), layer.fqt_recipe
    each = {name: any(recipe.operand(o) is None for o in OPERANDS[name]) for name in PRODUCTS}
    return tuple(
        None if each[name] or obstacle(name, map, recipe) else summed_in_blocks(name, map, recipe)
        for name in PRODUCTS
    )


@pytest.mark.parametrize("name", RECIPES)
def test_integers_give_what_the_values_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, wanted = RECIPES[name]
    for tokens, inputs, outputs in SHAPES:
        torch.manual_seed(0)
        layer = fqt.quantize_(nn.Linear(inputs, outputs), recipe)
        assert lengths(layer) == wanted
        for x in (torch.randn(tokens, inputs) + 0.3, torch.randn(2, tokens, inputs)):
            for mine, truth in both(layer, x, monkeypatch):
                assert (mine - truth).abs().max() <= TOLERANCE * truth.abs().max()


def test_all_three_products_of_tiles_run_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = blocked.matmul
    monkeypatch.setattr(integer.blocked, "matmul", lambda *a: seen.append(a[0].codes.shape) or real(*a))
    layer = fqt.quantize_(nn.Linear(48, 80), tiles(32))
    gradients(layer, torch.randn(40, 48))
    assert seen == [(40, 48), (40, 80), (80, 40)]


def test_explain_says_so() -> None:
    layer = fqt.quantize_(nn.Linear(48, 80), tiles(32))
    for explained in (fqt.explain(layer), fqt.explain(layer, torch.randn(40, 48, requires_grad=True))):
        rows = {p.product: p for p in explained.products}
        assert {rows[name].arithmetic for name in PRODUCTS} == {"integer"}
        assert all("between blocks of 32" in rows[name].why for name in PRODUCTS)


@pytest.mark.parametrize(
    ("recipe", "product", "word"),
    [
        (Recipe(grad_input=blocks(1, 20)), "grad_input", "runs of 20, not of a multiple of 16"),
        (Recipe(grad_input=blocks(1, 32, axis="channel")), "grad_input", "varies along a contracted axis"),
        (Recipe(grad_input=blocks(1, 32, axis="sample")), "grad_input", "across a sample's tokens"),
        (Recipe(grad_weight=blocks(1, 32)), "grad_weight", "input has an offset"),
        (Recipe(grad_input=q((1, 32))), "grad_input", "grad_input has an offset"),  # type: ignore[arg-type]
        (Recipe(weight="psq8", grad_input=blocks(1, 32)), "grad_input", "fold is 'never'"),
        (Recipe(weight="psq8", grad_input=blocks(1, 32), fold="auto"), "grad_input", "fold is 'auto'"),
        (Recipe(weight=blocks(48, 1, "nearest"), grad_input=blocks(1, 32)), "grad_input", "neither length divides"),
        (Recipe(weight="psq8", grad_input="shift4"), "grad_input", "fold is 'never'"),
        (Recipe(weight="ptq8", grad_weight="shift4"), "grad_weight", "input has an offset"),
        (
            Recipe(weight=blocks(32, 1, "nearest"), grad_input="shift4"),
            "grad_input",
            "across weight's blocks of 32",
        ),
        (Recipe(grad_input=blocks(1, 32, grid=E4M3)), "grad_input", "do not fit a byte"),
        (Recipe(grad_input=Quantizer(scale=Scale("tensor", "symmetric"), grid=E4M3)), "grad_input", "fit a byte"),
    ],
)
def test_reasons(recipe: Recipe, product: str, word: str) -> None:
    layer = fqt.quantize_(nn.Linear(64, 64), recipe)
    row = next(p for p in fqt.explain(layer).products if p.product == product)
    assert row.arithmetic == "simulated"
    assert word in row.why
    gradients(layer, torch.randn(3, 64))


def test_a_convolution_simulates_blocks() -> None:
    layer = fqt.quantize_(nn.Conv2d(16, 16, 3), tiles(16))
    assert {p.arithmetic for p in fqt.explain(layer).products} == {"simulated"}
    gradients(layer, torch.randn(2, 16, 6, 6))


@pytest.mark.parametrize("name", ["mxfp4", "tile32", "both folded"])
def test_gradients_are_unbiased(name: str) -> None:
    """z-scores of the mean gradient of 400 seeds, by entry: their mean square is 1 without bias.

    Entries are correlated, as those of a row or column share noise; at least 60 of 2500 being independent, the mean
    square passes 2 with probability below 1e-5 (χ²₆₀ > 120).
    """
    recipe = RECIPES[name][0]
    torch.manual_seed(1)
    layer, seeds = nn.Linear(50, 60), 400
    x, upstream = torch.randn(40, 50, requires_grad=True), torch.randn(40, 60)
    exact = Recipe(input=recipe.input, weight=recipe.weight)

    def run(recipe: Recipe, seed: int) -> list[Tensor]:
        fqt.quantize_(layer, recipe)
        torch.manual_seed(seed)
        found = torch.autograd.grad(layer(x), [x, layer.weight], upstream)
        fqt.restore_(layer)
        return [g.double() for g in found]

    draws = [run(recipe, seed) for seed in range(seeds)]
    for place, truth in enumerate(run(exact, 0)):
        values = torch.stack([draw[place] for draw in draws])
        if not values.std(0).any():
            continue  # this gradient is not quantized
        z = (values.mean(0) - truth) / (values.std(0) / seeds**0.5)
        assert float(z.square().mean()) < 2


def test_a_rotated_gradient_meets_a_weight_of_one_step() -> None:
    """The mean of 400 seeds; the entries' mean square z as in the test above, the weight's own noise included."""
    rotated = Quantizer(transform=Rotated(), scale=Scale((1, 32), "symmetric"), grid=E2M1)
    torch.manual_seed(1)
    x, upstream, layer = torch.randn(40, 50, requires_grad=True), torch.randn(40, 96), nn.Linear(50, 96)
    layer = fqt.quantize_(layer, Recipe(weight=blocks(32, 32, "nearest"), grad_input=rotated))
    assert lengths(layer) == (None, 32, None)
    draws = torch.stack([torch.autograd.grad(layer(x), x, upstream)[0].double() for _ in range(400)])
    truth = torch.autograd.grad(layer.eval()(x), x, upstream)[0]
    z = (draws.mean(0) - truth) / (draws.std(0) / 20)
    assert float(z.square().mean()) < 2


def test_bfloat16() -> None:
    layer = fqt.quantize_(nn.Linear(64, 96), tiles(32))
    x = torch.randn(33, 64)
    with torch.autocast("cpu", torch.bfloat16):
        short = layer(x)
    assert short.dtype == torch.bfloat16
    assert torch.equal(short, layer(x).bfloat16())
