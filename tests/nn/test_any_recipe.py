"""A recipe that is accepted runs: any quantizers on any layer and any shape of input, forward and backward.

Drawn at random, since the product of all choices is too large; what is on integers must equal the products of the
values that the codes stand for.
"""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from torch import nn

import fqt
from fqt import FqtError, Product, Quantizer, Recipe
from fqt.nn import load_recipe
from fqt.quant import ByRange, Integers, Leverage, LowSequency, Rotated, Scale, Sequency
from fqt.quant.catalog import METHODS
from fqt.quant.method import ROUNDING_SUFFIX
from fqt.quant.scale import AXES, GROUPS, MODES

from .cases import LAYERS, Case, equal, gradients, simulate
from .test_fused import MORE, by_formulas

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel", "ignore:Initializing zero")
TOLERANCE = 4e-5  # of the largest entry: a product of codes and of values differ by roundings
ROTATED = 0.1  # there the integer product's weight is rotated and rounded again, to 8 bits
PER_LAYER = 8
AXES_OR_HABIT = (None, *AXES)


def quantizers(roundings: tuple[str, ...]) -> list[Quantizer]:
    """All that exist of one width, without transforms."""
    made = []
    for group, mode, axis, rounding in product(GROUPS, MODES, AXES_OR_HABIT, roundings):
        try:
            made.append(Quantizer(scale=Scale(group, mode, axis), rounding=rounding))
        except FqtError:
            continue
    return made


def accepted(operand: str, choices: list[Quantizer | str | None]) -> list[Quantizer | str | None]:
    """Those that a recipe takes for this operand."""
    found = []
    for choice in choices:
        try:
            Recipe(**{operand: choice})
        except FqtError:
            continue
        found.append(choice)
    return found


FORWARD = [None, *quantizers(("nearest",))]
NAMES = [
    f"{method}8{suffix}" + ("" if axis is None else f"@{axis}")
    for method, suffix, axis in product(METHODS, ROUNDING_SUFFIX, AXES_OR_HABIT)
    if not METHODS[method].scale.remembers  # no run is like the one before: test_ranges.py
]
BACKWARD = [None, *NAMES, *quantizers(tuple(ROUNDING_SUFFIX.values()))]
CHOICES = {
    "input": accepted("input", FORWARD),
    "weight": accepted("weight", FORWARD),
    "grad_input": accepted("grad_input", BACKWARD),
    "grad_weight": accepted("grad_weight", BACKWARD),
    "fold": ["never", "auto", "always", "always"],
}


def any_recipe(source: random.Random) -> Recipe:
    chosen = {name: source.choice(choices) for name, choices in CHOICES.items()}
    recipe = Recipe(**chosen)
    bits = source.choice([2, 3, 4, 8, 8])
    changed = {}
    for name in ("input", "weight", "grad_input", "grad_weight"):
        q = recipe.operand(name)
        if q is not None:
            grid = Integers(bits) if isinstance(q.grid, Integers) else q.grid
            changed[name] = Quantizer(transform=q.transform, scale=q.scale, grid=grid, rounding=q.rounding)
    return Recipe(**{**chosen, **changed})


def check(
    layer: nn.Module, x: torch.Tensor, recipe: Recipe, patch: pytest.MonkeyPatch, tolerance: float | None = None
) -> None:
    expected = [t.shape for t in gradients(layer, x)]
    fqt.quantize_(layer, recipe)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return gradients(layer, x)

    found = run()
    with patch.context() as context:
        simulate(context)
        simulated = run()
    assert [t.shape for t in found] == expected
    assert equal(found, by_formulas(patch, run))
    q = recipe.operand("grad_input")
    if tolerance is None:
        tolerance = ROTATED if q is not None and isinstance(q.transform, Rotated) else TOLERANCE
    for mine, truth in zip(found, simulated, strict=True):
        assert bool(torch.isfinite(mine).all())
        if truth.numel():
            assert float((mine - truth).abs().max()) <= tolerance * float(truth.abs().max()) + 1e-30


@pytest.mark.parametrize("case", [*LAYERS, *MORE], ids=lambda case: case.name)
def test_any_recipe_on_any_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(case.name)
    for number in range(PER_LAYER):
        recipe = load_recipe("none")
        while recipe.is_float:
            recipe = any_recipe(source)
        check(case.layer(torch.float32), case.input(torch.float32, seed=number), recipe, monkeypatch)


def any_product(source: random.Random, left: list[Quantizer | str | None], turns: bool) -> Product | None:
    """One that a recipe takes for a gradient; `turns` where neighbouring tokens can be transformed."""
    keeps = [None, None, Leverage(0.5), ByRange(0.5), *([Sequency(2, 4), LowSequency(2, 4)] if turns else [])]
    return Product(
        source.choice(left),
        source.choice(["saved", "ptq4", "ptq8d", "psq4", "mxfp4", "tile8", "mxint8n"]),
        rotate=source.choice([None, 4, 128]),
        keep=source.choice(keeps),
        fold=source.choice([None, "never", "auto", "always"]),
    )


def any_recipe_of_products(source: random.Random, turns: bool) -> Recipe:
    while True:
        try:
            return Recipe(
                output=Product(source.choice(FORWARD), source.choice(FORWARD), rotate=source.choice([None, 4, 64])),
                grad_input=any_product(source, CHOICES["grad_input"], turns),
                grad_weight=any_product(source, CHOICES["grad_weight"], turns),
                fold=source.choice(CHOICES["fold"]),
            )
        except FqtError:
            continue


@pytest.mark.parametrize("case", [*LAYERS, *MORE], ids=lambda case: case.name)
def test_any_products_on_any_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are the values of codes to the bit of roundings: right operands have the same codes either way."""
    source = random.Random(case.name + " in full")
    for number in range(PER_LAYER):
        layer = case.layer(torch.float32)
        recipe = any_recipe_of_products(source, turns=isinstance(layer, nn.Linear))
        check(layer, case.input(torch.float32, seed=number), recipe, monkeypatch, TOLERANCE)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 8), (5, 8), (0, 3, 8)])
def test_any_recipe_on_attention(shape: tuple[int, ...]) -> None:
    """What the projections multiply is what `test_any_recipe_on_any_layer` compares."""
    source = random.Random(str(shape))
    for _ in range(12):
        layer, x = SelfAttention(), torch.randn(shape)
        expected = [t.shape for t in gradients(layer, x)]
        found = gradients(fqt.quantize_(layer, any_recipe(source)), x)
        assert [t.shape for t in found] == expected
        assert all(bool(torch.isfinite(t).all()) for t in found)


EMPTY = {
    "no samples": (lambda: nn.Linear(16, 2), (0, 16)),
    "no tokens": (lambda: nn.Linear(16, 2), (3, 0, 16)),
    "no samples of tokens": (lambda: nn.Linear(16, 2), (0, 3, 16)),
    "no inputs": (lambda: nn.Linear(0, 3), (4, 0)),
    "no outputs": (lambda: nn.Linear(3, 0), (2, 2, 3)),
    "one token": (lambda: nn.Linear(5, 4), (1, 5)),
    "no axis of tokens": (lambda: nn.Linear(5, 4), (5,)),
    "no images": (lambda: nn.Conv2d(3, 4, 3, padding=1), (0, 3, 5, 5)),
    "one pixel": (lambda: nn.Conv2d(3, 4, 1), (1, 3, 1, 1)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_any_recipe_on_empty_and_single(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(name)
    make, shape = EMPTY[name]
    for _ in range(12):
        recipe = load_recipe("none")
        while recipe.is_float:
            recipe = any_recipe(source)
        check(make(), torch.randn(shape), recipe, monkeypatch)
