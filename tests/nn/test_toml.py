"""A recipe survives a real TOML file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tomli_w
from torch import nn

from fqt import FqtError, Quantizer, Recipe, Rule, quantize_, quantizer
from fqt.nn import dump_recipe, load_recipe
from fqt.quant import METHODS as CATALOG
from fqt.quant import (
    BlockHouseholder,
    Floats,
    Identity,
    Integers,
    Logarithmic,
    Pairs,
    Rotated,
    Scale,
    ScaledHadamard,
)
from fqt.quant.catalog import rounded
from fqt.quant.grid import E5M2, Grid

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


def test_every_method(tmp_path: Path) -> None:
    """As gradients' quantizer, and, where it is deterministic, as that of input and weight."""
    for method in CATALOG.values():
        for name in method.names:
            forward = "nearest" in method.roundings and isinstance(method.transform, Identity)
            forward = forward and not method.scale.remembers
            recipe = Recipe(
                grad_input=name,
                grad_weight=name + "@token",
                input=name if forward else None,
                weight=name if forward else None,
            )
            assert through_a_file(recipe, tmp_path) == recipe, name


def test_every_word_of_a_quantizer_without_a_name(tmp_path: Path) -> None:
    block = Scale((4, 16), "symmetric", "channel", "correctable")
    for own in (
        Quantizer(transform=Rotated(ScaledHadamard(block=16), block=64), grid=Integers(5)),
        Quantizer(transform=Rotated(BlockHouseholder(guard=False), block=32), rounding="dithered"),
        Quantizer(transform=Rotated(Identity()), scale=Scale((1, 8), "symmetric"), grid=Floats(2, 3)),
        Quantizer(scale=block, grid=Floats(3, 0), rounding="corrected"),
        Quantizer(scale=Scale("row", "symmetric", store="shift"), grid=Pairs(3)),
        Quantizer(scale=Scale("row", "symmetric", store="power"), grid=Logarithmic(7)),
        Quantizer(scale=Scale((4, 4), "symmetric", store="fallback"), grid=Pairs(5)),
        Quantizer(scale=Scale("row", "symmetric"), grid=E5M2),
        Quantizer(scale=Scale("tensor", "zero", range="hindsight"), grid=Integers(3)),
        Quantizer(scale=Scale("tensor", "symmetric", range="steered"), grid=E5M2),
    ):
        recipe = Recipe(grad_input=own, grad_weight=own)
        assert isinstance(dump_recipe(recipe)["grad_input"], dict)
        assert through_a_file(recipe, tmp_path) == recipe, own


def test_blocks_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "blocks.toml"
    path.write_text(
        """
        grad_input = { group = [1, 32], mode = "symmetric", store = "power", grid = "e2m1", rotate = 128 }
        grad_weight = { group = [1, 32], mode = "symmetric", store = "power", grid = "e2m1" }
        weight = { group = [1, 16], mode = "symmetric", store = "e4m3", grid = "e2m1", rounding = "nearest" }
        """
    )
    recipe = load_recipe(path)
    mx = Scale((1, 32), "symmetric", store="power")
    assert recipe.grad_input == Quantizer(transform=Rotated(Identity()), scale=mx, grid=Floats(2, 1))
    assert recipe.grad_weight == quantizer("mxfp4")
    assert recipe.weight == quantizer("nvfp4n")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"grid": "e9m1"}, "exponent"),
        ({"grid": "ternary"}, "known: integers"),
        ({"grid": "e2m1", "bits": 8, "mode": "symmetric"}, "4 bits"),
        ({"grid": "pairs", "bits": 9, "mode": "symmetric"}, "2 to 8"),
        ({"grid": "log8", "bits": 4, "mode": "symmetric"}, "6 to 8"),
        ({"store": "double"}, "known: float32"),
        ({"rotate": 12}, "power of two"),
        ({"group": [1, 32, 4]}, "group"),
    ],
)
def test_wrong_words_are_said_in_one_line(table: dict, says: str) -> None:
    with pytest.raises(FqtError, match=says) as error:
        load_recipe({"grad_input": table})
    assert "\n" not in str(error.value)


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


class Own(Integers):
    """A grid of somebody's own."""

    @property
    def words(self) -> dict:
        return Grid.words.fget(self)  # type: ignore[attr-defined]


def test_a_grid_that_no_table_knows_is_written_and_refused_by_name() -> None:
    """So that its layers' weights can be saved, and whoever loads them is told."""
    recipe = Recipe(grad_input=Quantizer(grid=Own(4)))
    layer = quantize_(nn.Linear(3, 2), recipe)
    assert layer.state_dict()["weight"].shape == (2, 3)
    with pytest.raises(FqtError, match="unknown grid 'Own") as error:
        load_recipe(dump_recipe(recipe))
    assert "\n" not in str(error.value)
