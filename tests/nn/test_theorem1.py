"""Theorem 1 on a real network: given the batch, the mean of the FQT gradients is the QAT gradient."""

from __future__ import annotations

import pytest
import torch

import fqt
from fqt import Recipe
from fqt.nn import load_recipe

from . import checks
from .cases import parameter_gradients, small_batch, small_net

WEIGHTS = ["0.weight", "3.weight", "6.weight"]
# The gradient quantizers compared: each also where only it can carry noise to every layer.
QUANTIZERS = [f"{m}4{s}" for m in ("ptq", "psq", "bhq", "shq") for s in ("", "d", "x")]
DRAWS = 128


def recipe_of(name: str) -> Recipe:
    """Four bits for both gradient quantizers, so that either's bias shows; the default as it is."""
    if name == "default":
        return load_recipe(name)
    return Recipe(grad_input=name, grad_weight=f"{name}@channel", fold="never")


def check(recipe: Recipe, count: int = DRAWS) -> None:
    """The network is in training mode, batch norm too; bias gradients of the last layer are exact sums."""
    model, batch = fqt.quantize_(small_net(), recipe), small_batch()
    exact = parameter_gradients(fqt.quantize_(small_net(), checks.qat_of(recipe)), batch)
    sample = checks.draws(model, batch, count)
    checks.assert_mean_is(sample, exact)
    checks.assert_error_falls_as_one_over_m(sample, exact, WEIGHTS)
    bias = exact["6.bias"].expand(count, -1)
    torch.testing.assert_close(sample["6.bias"], bias, rtol=1e-6, atol=1e-7)  # sums in other orders


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer(name: str) -> None:
    check(recipe_of(name))


def test_the_default() -> None:
    check(recipe_of("default"), 192)


@pytest.mark.parametrize("fold", ["always", "auto"])
def test_with_folding(fold: str) -> None:
    check(Recipe(input="psq8", weight="psq8", grad_input="psq4", grad_weight="psq4d", fold=fold))


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("psq4", "nearest"),
        ("bhq4", "wrong step"),
        ("bhq4", "dropped transform"),
        ("psq4d", "dropped dither"),
        ("ptq4", "clipped"),
        ("psq4", "same noise"),
        ("default", "wrong step"),
    ],
)
def test_the_check_sees_a_defect(name: str, defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.plant(monkeypatch, checks.DEFECTS[defect])
    with pytest.raises(AssertionError):
        check(recipe_of(name), 96)


@pytest.mark.parametrize("name", ["psq4n", "ptq4n", "bhq4n"])
def test_nearest_rounding_is_biased(name: str) -> None:
    with pytest.raises(AssertionError, match=r"slope|has no noise|>"):
        check(Recipe(grad_input=name, grad_weight="ptq8"), 32)
