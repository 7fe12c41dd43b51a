"""A recipe survives a real TOML file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tomli_w

from fqt import Quantizer, Recipe, Rule
from fqt.nn import dump_recipe, load_recipe
from fqt.quant import BlockHouseholder, Identity, Integers, Scale, ScaledHadamard
from fqt.quant.catalog import rounded

METHODS = ("ptq", "psq", "bhq", "shq")
AXES = ("", "@sample", "@token", "@channel")
NAMES = [f"{m}{b}{s}{a}" for m, b, s, a in itertools.product(METHODS, range(2, 9), ("", "d", "x", "n"), AXES)]


def through_a_file(recipe: Recipe, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(dump_recipe(recipe)), encoding="utf-8")
    return load_recipe(path)


def test_every_name(tmp_path: Path) -> None:
    for name in ["none", "qat", "default", *NAMES]:
        recipe = load_recipe(name)
        loaded = through_a_file(recipe, tmp_path)
        assert loaded == recipe, name
        assert str(loaded) == str(recipe) == name


def test_every_quantizer(tmp_path: Path) -> None:
    transforms = [Identity(), BlockHouseholder(), ScaledHadamard()]
    transforms += [BlockHouseholder(guard=False, small_rows="rigorous"), ScaledHadamard(guard=False, block=16)]
    transforms += [ScaledHadamard(guard="exact")]
    count = 0
    for transform, group, mode, axis, rounding in itertools.product(
        transforms,
        ("tensor", "row", "column"),
        ("affine", "zero", "symmetric"),
        (None, "sample", "token", "channel"),
        ("nearest", "stochastic", "dithered", "best"),
    ):
        if mode == "symmetric" and rounding in ("dithered", "best"):
            continue
        if group != "row" and not isinstance(transform, Identity):
            continue
        if rounding == "best" and getattr(transform, "guard", None) == "exact":
            continue
        quantizer = rounded(transform, Scale(group, mode, axis), Integers(3), rounding)
        forward = rounding == "nearest" and isinstance(transform, Identity)
        recipe = Recipe(
            input=quantizer if forward and axis != "channel" else "psq4@token",
            weight=quantizer if forward and axis in (None, "channel") else None,
            grad_input=quantizer,
            grad_weight=quantizer,
            fold="always",
        )
        assert through_a_file(recipe, tmp_path) == recipe, quantizer
        count += 1
    assert count == 312


def test_rules(tmp_path: Path) -> None:
    own = Quantizer(transform=ScaledHadamard(block=8), scale=Scale("row", axis="sample"), grid=Integers(5))
    rules = [
        Rule("encoder.*.é[0-9]", "none"),
        Rule("head", Recipe(grad_input=own, input=None, fold="auto")),
        Rule('quo"ted\\', "psq4"),
        Rule("*", "default"),
    ]
    recipe = Recipe(grad_weight="ptq4d", rules=rules)
    loaded = through_a_file(recipe, tmp_path)
    assert loaded == recipe
    assert [r.pattern for r in loaded.rules] == [r.pattern for r in rules]


@pytest.mark.parametrize("name", ["input", "weight", "grad_input", "grad_weight"])
def test_none_is_written_and_read(name: str, tmp_path: Path) -> None:
    recipe = Recipe(**{"grad_input": "bhq4", "grad_weight": "psq8@channel", name: None})
    assert through_a_file(recipe, tmp_path) == recipe


def test_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "hand.toml"
    path.write_text(
        """
        base = "default"
        grad_input = { transform = "householder", guard = false, bits = 4, axis = "token" }
        weight = "none"
        [[rules]]
        pattern = "first"
        recipe = { base = "none", weight = "ptq4" }
        """
    )
    recipe = load_recipe(path)
    base = load_recipe("default")
    assert recipe.grad_input == Quantizer(
        transform=BlockHouseholder(guard=False), scale=Scale("row", axis="token"), grid=Integers(4)
    )
    assert (recipe.weight, recipe.fold, recipe.grad_weight) == (None, base.fold, base.grad_weight)
    assert recipe.rules == (Rule("first", Recipe(input=None, weight="ptq4")),)
