"""Recipes and rules: frozen, validated in one place, with messages of one line that name what is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import fqt
from fqt import FqtError, Product, Recipe, Rule, quantizer
from fqt.nn import dump_recipe, load_recipe
from fqt.nn.named import RECIPES
from fqt.quant import Integers, Quantizer, Rotated, Scale, ScaledHadamard

from .cases import q


def test_frozen_hashable() -> None:
    recipe, rule = Recipe(grad_input="bhq4"), Rule("a", "psq4")
    for thing, field in ((recipe, "input"), (rule, "pattern")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)
    with pytest.raises(TypeError):
        Recipe("ptq8", "psq4")
    assert len({recipe, Recipe(grad_input="bhq4"), Recipe(grad_input="bhq5")}) == 2
    assert rule == Rule("a", load_recipe("psq4"))
    assert dataclasses.replace(recipe, fold="auto").fold == "auto"


def test_the_papers_recipes() -> None:
    for name in ("ptq8", "psq4", "bhq5", "shq2", "psq4d", "bhq4x", "ptq4n"):
        recipe = load_recipe(name)
        assert recipe == Recipe(input="ptq8", weight="ptq8", grad_input=name, grad_weight="ptq8", fold="never")
        assert recipe.grad_input == quantizer(name)
        assert recipe.grad_weight == quantizer("ptq8")
        assert (recipe.input.rounding_name, recipe.input.scale.mode) == ("nearest", "affine")
        assert (recipe.weight.rounding_name, recipe.weight.scale.mode) == ("nearest", "symmetric")
    qat, none = load_recipe("qat"), load_recipe("none")
    assert (qat.grad_input, qat.grad_weight) == (None, None)
    assert (qat.input, qat.weight) == (load_recipe("ptq8").input, load_recipe("ptq8").weight)
    assert none.is_float
    assert not qat.is_float


@pytest.mark.parametrize("name", ["none", "qat", "default", "jetfire", "hlq", "ufp4", "shq4d", "mxfp4"])
def test_a_base_says_what_is_not_given(name: str) -> None:
    base = load_recipe(name)
    assert Recipe(name) == Recipe(base=name) == base
    rules = (Rule("head", "none"),)
    assert (
        Recipe(name, rules=rules)
        == dataclasses.replace(base, rules=rules)
        == load_recipe({"base": name, "rules": [{"pattern": "head", "recipe": "none"}]})
    )
    changes = {"input": "psq8", "weight": None, "grad_input": None, "grad_weight": "psq4", "rotate": None}
    for field, value in changes.items():
        more = {"rotate": None} if field == "weight" else {}  # that of a rotated input cannot stay
        assert Recipe(name, **{**more, field: value}) == dataclasses.replace(base, **{**more, field: value})
    output = Product("psq4", "psq4@channel", rotate=32)
    assert Recipe(name, output=output).product("output").rotate == 32
    assert Recipe(name, output=output).grad_input == base.grad_input


def test_without_a_base_gradients_are_float() -> None:
    assert Recipe() == Recipe("qat") == load_recipe({})
    assert Recipe(grad_input="shq4d").grad_weight is None
    assert Recipe("shq4d", fold="always").grad_weight == quantizer("ptq8")


def test_the_default_is_unbiased_and_integer() -> None:
    recipe = load_recipe("default")
    assert {recipe.input.rounding_name, recipe.weight.rounding_name} == {"nearest"}
    assert recipe.grad_input.rounding_name in ("stochastic", "dithered", "best")
    assert recipe.grad_weight.rounding_name in ("stochastic", "dithered", "best")


@pytest.mark.parametrize("name", ["float", "fp32", "exact", "None", "QAT", "ptq8@channel@token", "bhq4 ", "bhq44"])
def test_a_name_never_means_something_else(name: str) -> None:
    """A name that is no recipe raises; above all one that sounds like "leave everything in float"."""
    with pytest.raises(FqtError):
        load_recipe(name)


SAYS = {
    "unknown name": (lambda: load_recipe("qta"), ("qta", "qat", "default", "none")),
    "unknown method bits": (lambda: load_recipe("psq9"), ("9", "2 to 8")),
    "no bits": (lambda: load_recipe("psq"), ("psq", "bits")),
    "unknown axis": (lambda: load_recipe("psq4@row"), ("row", "sample", "token", "channel")),
    "fold": (lambda: Recipe(fold="yes"), ("yes", "never", "auto", "always")),
    "operand type": (lambda: Recipe(grad_input=4), ("grad_input", "4")),
    "operand name": (lambda: Recipe(weight="int8"), ("int8", "psq8")),
    "input channel": (lambda: Recipe(input="psq8@channel"), ("input", "sample", "token")),
    "weight sample": (lambda: Recipe(weight="psq8@sample"), ("weight", "channel")),
    "input stochastic": (lambda: Recipe(input=q("tensor")), ("input", "nearest")),
    "weight dithered": (lambda: Recipe(weight="ptq8d"), ("weight", "nearest")),
    "weight transform": (lambda: Recipe(weight="bhq8n"), ("weight", "transform")),
    "pattern": (lambda: Rule(3, "psq4"), ("pattern", "3")),
    "nested rules": (lambda: Rule("a", Recipe(rules=[Rule("b", "psq4")])), ("a", "rules")),
    "rule recipe": (lambda: Rule("a", "int8"), ("int8", "8-bit training")),
    "key": (lambda: load_recipe({"grad": "psq4"}), ("grad", "grad_input", "base", "rules")),
    "base": (lambda: load_recipe({"base": "qta"}), ("qta", "qat")),
    "base of a recipe": (lambda: Recipe(Recipe()), ("not a Recipe", "dataclasses.replace")),
    "quantizer key": (lambda: load_recipe({"input": {"bit": 8}}), ("bit", "bits", "rounding")),
    "output twice": (
        lambda: load_recipe({"output": {"left": "psq4", "right": "psq4"}, "input": "ptq8"}),
        ("input",),
    ),
    "transform": (lambda: load_recipe({"grad_input": {"transform": "fourier"}}), ("fourier", "hadamard", "none")),
    "option": (lambda: load_recipe({"grad_input": {"guard": True}}), ("guard", "none")),
    "guard": (lambda: load_recipe({"grad_input": {"transform": "hadamard", "guard": "no"}}), ("no", "exact")),
    "block": (lambda: load_recipe({"grad_input": {"transform": "hadamard", "block": 3}}), ("3", "power of two")),
    "group": (lambda: load_recipe({"grad_input": {"group": "rows"}}), ("rows", "tensor", "column")),
    "mode": (lambda: load_recipe({"grad_input": {"mode": "sym"}}), ("sym", "symmetric")),
    "rounding": (lambda: load_recipe({"grad_input": {"rounding": "up"}}), ("up", "dithered")),
    "bits": (lambda: load_recipe({"grad_input": {"bits": "8"}}), ("8", "2 to 8")),
    "rule key": (lambda: load_recipe({"rules": [{"pattern": "a", "name": "b"}]}), ("name", "recipe")),
    "half a rule": (lambda: load_recipe({"rules": [{"pattern": "a"}]}), ("pattern", "recipe")),
    "not a recipe": (lambda: load_recipe(8), ("not int", "TOML")),
    "swapped letters": (lambda: load_recipe("bqh5"), ("unknown recipe 'bqh5'; did you mean 'bhq5'?",)),
    "a paper's": (lambda: load_recipe("jetfir"), ("did you mean 'jetfire'?",)),
    "with an axis": (lambda: load_recipe("PSQ8@channel"), ("did you mean 'psq8'?",)),
    "a width": (lambda: load_recipe("int8"), ("'default' is 8-bit training",)),
    "a narrow width": (lambda: load_recipe("5-bit"), ("'psq5' has 5 bits in grad_input",)),
    "a recipe for an operand": (lambda: Recipe(grad_input="default"), ("a recipe", "grad_input takes a quantizer")),
    "nothing near": (lambda: load_recipe("bf16"), ("none, qat, default", "TOML")),
    "no file": (lambda: load_recipe("missing.toml"), ("missing.toml",)),
}


@pytest.mark.parametrize("name", SAYS)
def test_messages(name: str) -> None:
    make, words = SAYS[name]
    with pytest.raises(FqtError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    assert all(word in message for word in words), message


# Things of the wrong type, as TOML or a slip of the hand would have them: one clear error, at once.
WRONG_TYPE = {
    "rules a string": lambda: load_recipe({"rules": "abc"}),
    "rules a number": lambda: load_recipe({"rules": 3}),
    "rules of numbers": lambda: load_recipe({"rules": [3]}),
    "rules a table": lambda: load_recipe({"rules": {"pattern": "a", "recipe": "psq4"}}),
    "base a number": lambda: load_recipe({"base": 3}),
    "base a list": lambda: load_recipe({"base": ["psq4"]}),
    "group a table": lambda: load_recipe({"grad_input": {"group": {}}}),
    "group a number": lambda: load_recipe({"grad_input": {"group": 1}}),
    "mode a list": lambda: load_recipe({"grad_input": {"mode": ["zero"]}}),
    "store a list": lambda: load_recipe({"grad_input": {"store": ["power"]}}),
    "range a list": lambda: load_recipe({"grad_input": {"range": ["own"]}}),
    "rounding a list": lambda: load_recipe({"grad_input": {"rounding": ["nearest"]}}),
    "rounding a number": lambda: load_recipe({"grad_input": {"rounding": 5}}),
    "keys of two types": lambda: load_recipe({"grad": "psq4", 5: "psq4"}),
    "transform a list": lambda: load_recipe({"input": {"transform": ["none"]}}),
    "block a string": lambda: load_recipe({"grad_input": {"transform": "hadamard", "block": "8"}}),
    "block a float": lambda: load_recipe({"grad_input": {"transform": "hadamard", "block": 8.0}}),
    "bits a float": lambda: load_recipe({"input": {"bits": 8.0, "rounding": "nearest"}}),
    "operand a list": lambda: load_recipe({"input": ["ptq8"]}),
    "operand true": lambda: load_recipe({"input": True}),
    "fold true": lambda: load_recipe({"fold": True}),
    "fold a list": lambda: load_recipe({"fold": ["auto"]}),
    "rules strings": lambda: Recipe(rules=("abc",)),
    "rules pairs": lambda: Recipe(rules=[("0", "psq4")]),
    "one rule": lambda: Recipe(rules=Rule("0", "psq4")),
    "rules none": lambda: Recipe(rules=None),
    "pattern a list": lambda: load_recipe({"rules": [{"pattern": ["a"], "recipe": "psq4"}]}),
    "recipe a number": lambda: load_recipe({"rules": [{"pattern": "a", "recipe": 3}]}),
}


@pytest.mark.parametrize("name", WRONG_TYPE)
def test_wrong_types(name: str) -> None:
    with pytest.raises(FqtError) as error:
        WRONG_TYPE[name]()
    assert "\n" not in str(error.value)


def test_files(tmp_path: Path) -> None:
    bad = {
        "syntax.toml": (b"input = [", "not a TOML file"),
        "binary.toml": (b"\xff\xfe", "not a TOML file"),
        "word.toml": (b'input = "int8"', "int8"),
    }
    for name, (content, word) in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FqtError, match=word) as error:
            load_recipe(path)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FqtError, match="cannot read"):
        load_recipe(tmp_path)


def test_rotated_features_in_words(tmp_path: Path) -> None:
    own = Quantizer(
        transform=Rotated(ScaledHadamard(block=8), block=16), scale=Scale("row", "zero"), grid=Integers(5)
    )
    for recipe in (
        load_recipe("thq4d"),
        Recipe(grad_input=own),
        Recipe(grad_weight=Quantizer(transform=Rotated(), grid=Integers(4))),
    ):
        assert load_recipe(dump_recipe(recipe)) == Recipe.of_text(recipe.text) == recipe
    path = tmp_path / "mine.toml"
    path.write_text(
        'grad_input = { transform = "hadamard", block = 8, rotate = 16, mode = "zero", group = "row", bits = 5 }'
    )
    assert load_recipe(path) == Recipe(grad_input=own)
    with pytest.raises(FqtError, match="power of two"):
        load_recipe({"grad_input": {"rotate": 3}})


def test_a_quantizer_of_ones_own_is_an_operand() -> None:
    own = Quantizer(
        transform=ScaledHadamard(guard=False, block=8),
        scale=Scale("row", "zero", "sample"),
        grid=Integers(5),
        rounding="dithered",
    )
    recipe = Recipe(grad_input=own)
    assert recipe.operand("grad_input") is own
    assert "hadamard" in str(recipe)
    assert str(load_recipe("bhq4")) == "bhq4"
    assert str(load_recipe("default")) == "default"


@pytest.mark.parametrize(
    "recipe",
    [
        *map(Recipe, RECIPES),
        Recipe("bhq5", rules=[Rule("head", "none"), Rule("*.conv", "psq8d")]),
        Recipe(input="psq8@token", grad_input="shq4d", grad_weight=None),
        Recipe("psq8", rotate=64, fold="never"),
        Recipe(grad_weight=Product(left="psq8d", right="psq4n", rotate=32)),
    ],
    ids=str,
)
def test_what_a_recipe_shows_makes_it_again(recipe: Recipe) -> None:
    names = {**vars(fqt), **vars(fqt.quant), "Product": Product}
    assert eval(repr(recipe), names) == recipe


def test_a_named_recipe_shows_its_name() -> None:
    assert repr(Recipe("default")) == "Recipe('default')"
    assert (
        repr(Recipe(grad_input="shq4d"))
        == "Recipe(input='ptq8n', weight='ptq8n', grad_input='shq4d', grad_weight=None)"
    )
