"""A recipe survives a real TOML file."""

from __future__ import annotations

import itertools
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli_w
from torch import nn

from fqt import FqtError, Quantizer, Recipe, RecipeWarning, Rule, quantize_, quantizer, recipe_of
from fqt.nn import dump_recipe, load_recipe
from fqt.quant import METHODS as CATALOG
from fqt.quant import (
    Best,
    BlockHouseholder,
    Floats,
    Identity,
    Integers,
    Logarithmic,
    Pairs,
    Rotated,
    Scale,
    ScaledHadamard,
    Stochastic,
)
from fqt.quant.best import rounded
from fqt.quant.grid import E5M2

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


@dataclass(frozen=True)
class Own(Integers):
    """A grid of somebody's own, which is not the one that it extends."""

    marks: tuple[float, ...] = (0.5, 2.0)


class Fewer(Integers):
    """One without fields of its own."""


class Coin(Stochastic):
    """A rounding of somebody's own, under the name of the one that it extends."""


class Counted(Quantizer):
    """A quantizer of somebody's own."""


OWN = {
    "grid with fields": Quantizer(grid=Own(4, (0.25, 3.0))),
    "grid": Quantizer(grid=Fewer(5)),
    "rounding": Quantizer(rounding=Coin()),
    "quantizer": Counted(grid=Integers(4)),
    "float": Quantizer(scale=Scale("row", "symmetric"), grid=Floats(4, 3)),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_own_classes_go_by_their_import_path(own: Quantizer, tmp_path: Path) -> None:
    recipe = Recipe(grad_input=own, grad_weight=own)
    read = through_a_file(recipe, tmp_path)
    assert read == recipe
    assert type(read.grad_input) is type(own)
    assert Recipe.of_text(recipe.text) == recipe
    layer = quantize_(nn.Linear(3, 2), recipe)
    assert recipe_of(layer.state_dict()) == recipe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(nn.Linear(3, 2), recipe).load_state_dict(layer.state_dict())


def test_an_own_class_at_another_width(tmp_path: Path) -> None:
    table = {**dump_recipe(Recipe(grad_input=OWN["grid"]))["grad_input"], "bits": 5}
    assert load_recipe({"grad_input": table}).operand("grad_input").bits == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "grid", ["os:system", {"class": "elsewhere:Own", "bits": 4}, {"class": f"{__name__}:Own", "colour": 3}], ids=str
)
def test_a_class_that_is_not_there_is_refused_and_nothing_is_imported(grid: object) -> None:
    with pytest.raises(FqtError, match=r"import its module first|cannot be made of colour") as error:
        load_recipe({"grad_input": {"grid": grid}})
    assert "\n" not in str(error.value)
    assert "elsewhere" not in sys.modules


def test_what_has_no_words_is_saved_and_not_read_as_something_else() -> None:
    """So that its layers' weights can be saved, and whoever loads them is told; the same recipe fits silently."""
    halves = Quantizer(grid=Integers(4)), Quantizer(grid=Integers(4), rounding="dithered")
    for own in (Quantizer(grid=Own(4, nn.Identity())), Best(candidates=halves[::-1])):  # type: ignore[arg-type]
        recipe = Recipe(grad_input=own)
        layer = quantize_(nn.Linear(3, 2), recipe)
        state = layer.state_dict()
        assert state["weight"].shape == (2, 3)
        with pytest.raises(FqtError, match=r"unknown (grid 'Own|rounding 'best of 2')") as error:
            recipe_of(state)
        assert "\n" not in str(error.value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer.load_state_dict(state)
        with pytest.warns(RecipeWarning, match="quantized with psq4"):
            quantize_(nn.Linear(3, 2), "psq4").load_state_dict(state)
