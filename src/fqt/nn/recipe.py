"""Recipes: which quantizer each operand of a layer's three products gets, and which layers get which recipe.

    output      = input · weightᵀ            operands `input`, `weight`: deterministic
    grad_input  = grad_output · weight       grad_output quantized by `grad_input`
    grad_weight = grad_outputᵀ · input       grad_output quantized by `grad_weight`

A recipe is named after what is quantized differently from QAT: `bhq4` sets `grad_input` and leaves the rest as
the paper has it (per-tensor 8 bits). One quantizer type serves all four operands; a table of knobs per operand
was rejected, since every new idea would then need four new fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.kernels.rounding import NEAREST, STOCHASTIC
from fqt.quant.catalog import METHODS, known_names, quantizer, quantizer_name, rounded
from fqt.quant.grid import Integers, grid_from
from fqt.quant.quantizer import Best, Quantizer
from fqt.quant.scale import Scale
from fqt.quant.transform import BlockHouseholder, Identity, Rotated, ScaledHadamard, Transform
from fqt.records import read_toml

OPERANDS = ("input", "weight", "grad_input", "grad_weight")
FOLDS = ("never", "auto", "always")


@dataclass(frozen=True)
class Rule:
    """Layers whose qualified name matches `pattern` get `recipe`; the first matching rule wins.

    Attributes:
        pattern: a shell-style pattern; `*` also spans dots. A name without wildcards also selects everything
            inside the module it names.
        recipe: a `Recipe` without rules of its own, or the name of one; "none" leaves the layer in float.
    """

    pattern: str
    recipe: Recipe | str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise FqtError(f"a rule's pattern must be a module name or a shell-style pattern, not {self.pattern!r}")
        resolved = load_recipe(self.recipe)
        if resolved.rules:
            raise FqtError(f"the recipe of rule {self.pattern!r} has rules of its own: write one flat list")
        object.__setattr__(self, "recipe", resolved)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The four operands' quantizers; a quantizer, its name, or None for float.

    Attributes:
        input, weight: nearest rounding, no transform; a name ("psq8") means that here, and symmetric codes for
            `weight`.
        grad_input, grad_weight: the two quantizers of the same grad_output. Stochastic, dithered or best: the
            gradient is then an unbiased estimate of the QAT gradient. Nearest (an explicit "…n") is biased and
            there for comparison. One with a remembered range is biased by what it clips.
        fold: whether a step on a contracted axis (of `weight` in grad_input, of `input` in grad_weight) moves
            into grad_output before that is quantized: "never"; "always"; "auto", where the closed-form bound of
            the product's variance does not rise. Unbiased either way; only "always" lets such a product run on
            integers.
        rules: exceptions by layer name, first match wins.
        text: the same without rules, as one line of JSON; `Recipe.of_text` gives an equal recipe back in any
            process. Compiled graphs and exported programs hold it. Empty if a transform has no words for it.
    """

    input: Quantizer | str | None = "ptq8"
    weight: Quantizer | str | None = "ptq8"
    grad_input: Quantizer | str | None = None
    grad_weight: Quantizer | str | None = None
    fold: str = "never"
    rules: tuple[Rule, ...] = ()
    text: str = field(init=False, compare=False, repr=False, default="")

    def __post_init__(self) -> None:
        for operand in OPERANDS:
            object.__setattr__(self, operand, _operand(operand, getattr(self, operand)))
        if self.fold not in FOLDS:
            raise FqtError(f"unknown fold {self.fold!r}; known: {', '.join(FOLDS)}")
        if not isinstance(self.rules, list | tuple):
            raise FqtError(f"rules must be a list of Rule(pattern, recipe), not {self.rules!r}")
        object.__setattr__(self, "rules", tuple(self.rules))
        wrong = next((rule for rule in self.rules if not isinstance(rule, Rule)), None)
        if wrong is not None:
            raise FqtError(f"rules must be Rule(pattern, recipe), not {wrong!r}")
        gradients = [(role, self.operand(role)) for role in ("grad_input", "grad_weight")]
        remembers = [role for role, q in gradients if q is not None and q.scale.remembers]
        if self.fold == "auto" and remembers:
            raise FqtError(
                f"fold 'auto' may change {remembers[0]}'s scale at any step: its range cannot be remembered"
            )
        self._derive()

    def _derive(self) -> None:
        """Sets the hash, which layers need at every call, and `text`, which a traced layer must only read."""
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self) if f.compare)))
        object.__setattr__(self, "text", _text(self))

    @staticmethod
    @lru_cache(maxsize=512)
    def of_text(text: str) -> Recipe:
        """The recipe, without rules, whose `text` this is."""
        return load_recipe(json.loads(text))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}  # the hash is this process's

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._derive()

    def operand(self, name: str) -> Quantizer | None:
        """The quantizer of one of the four operands, by field name."""
        value = getattr(self, name)
        assert value is None or isinstance(value, Quantizer)
        return value

    @property
    def is_float(self) -> bool:
        """Whether no operand is quantized."""
        return all(getattr(self, operand) is None for operand in OPERANDS)

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in dump_recipe(self).items() if k != "rules"]
        return recipe_name(self) or ", ".join([*words, f"{len(self.rules)} rules"] if self.rules else words)


def _operand(operand: str, value: Quantizer | str | None) -> Quantizer | None:
    """The quantizer an operand's entry stands for."""
    forward = operand in ("input", "weight")
    if isinstance(value, str):
        value = _named_operand(operand, value)
    if value is None:
        return None
    if not isinstance(value, Quantizer):
        raise FqtError(f"{operand} must be a Quantizer, its name or None, not {value!r}")
    if forward and (value.draws or not isinstance(value.transform, Identity)):
        raise FqtError(f"{operand} must be rounded to nearest without transform: the forward pass is deterministic")
    if forward and value.scale.remembers:
        raise FqtError(f"{operand} cannot have a remembered range: only quantizers of gradients remember")
    if operand == "input" and value.scale.axis == "channel":
        raise FqtError("input has no output channels: its axis is 'sample' or 'token'")
    if operand == "weight" and value.scale.axis not in (None, "channel"):
        raise FqtError(f"weight has no {value.scale.axis}s: its axis is 'channel'")
    return value


@lru_cache(maxsize=512)
def _named_operand(operand: str, name: str) -> Quantizer | None:
    if name in ("none", "float"):
        return None
    value = quantizer(name)
    if operand not in ("input", "weight"):
        return value
    if value.rounding == STOCHASTIC and not isinstance(value, Best):
        value = replace(value, rounding=NEAREST)  # a bare name: the forward pass has only one rounding
    if operand == "weight" and value.rounding == NEAREST:
        value = replace(value, scale=replace(value.scale, mode="symmetric"))
    return value


DEFAULT = "default"


_RECIPES: dict[str, dict[str, Any]] = {
    "none": {"input": None, "weight": None},
    "qat": {},
    # Chosen by measured gradient variance: see the table in docs/recipes.md.
    DEFAULT: {
        "input": "psq8",
        "weight": "psq8@channel",
        "grad_input": "psq8x",
        "grad_weight": "psq8x@channel",
        "fold": "always",
    },
    # Every operand of all three products in four bits; the gradient stays unbiased.
    "int4all": {
        "input": "psq4",
        "weight": "psq4@channel",
        "grad_input": "shq4d",
        "grad_weight": "shq4d@channel",
        "fold": "always",
    },
}
"""Recipes with a name of their own; all others are named after their `grad_input`."""


def _named(name: str) -> Recipe:
    """The recipe of that name."""
    if name in _RECIPES:
        return Recipe(**_RECIPES[name])
    try:
        return Recipe(grad_input=quantizer(name), grad_weight="ptq8")
    except FqtError:
        if any(name.startswith(method.name.partition("*")[0]) for method in METHODS.values()):
            raise
        raise FqtError(
            f"unknown recipe {name!r}; known: {', '.join(_RECIPES)}, a TOML file, or a quantizer: {known_names()}"
        ) from None


def recipe_name(recipe: Recipe) -> str | None:
    """The name that `load_recipe` would build this recipe from, or None."""
    candidates = list(_RECIPES)
    if isinstance(recipe.grad_input, Quantizer):
        candidates.append(quantizer_name(recipe.grad_input) or "qat")
    return next((name for name in candidates if _named(name) == recipe), None)


def load_recipe(source: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from its name, a TOML file, or a mapping with the same words.

    The mapping's keys are the fields of `Recipe`, and `base`, the name of the recipe to start from. An operand
    is a name ("psq8@channel", "none") or a table with the words of `Quantizer`: transform ("none",
    "householder", "hadamard"), guard, rotate (the block of a rotation of features), group, mode, axis, store,
    range, grid, bits, rounding. `rules` is a list of tables with `pattern` and `recipe`.

    Raises:
        FqtError: says what is unknown or wrong, and what is known.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith(".toml")):
        return _from_file(Path(source))
    if isinstance(source, str):
        return _named(source)
    if isinstance(source, Mapping):
        return _from_mapping(source)
    raise FqtError(f"a recipe is a Recipe, a name, a TOML file or a mapping, not {source!r}")


def _from_file(path: Path) -> Recipe:
    table = read_toml(path)
    try:
        return _from_mapping(table)
    except FqtError as error:
        raise FqtError(f"recipe {str(path)!r}: {error}") from None


def _from_mapping(table: Mapping[str, Any]) -> Recipe:
    known = {f.name for f in fields(Recipe) if f.init} | {"base"}
    _only(table, known, "recipe")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in OPERANDS and isinstance(value, Mapping):
            values[key] = _quantizer_from(value)
        elif key == "rules":
            values[key] = _rules_from(value)
        elif key != "base":
            values[key] = value
    base = table.get("base", "qat")
    if not isinstance(base, str):
        raise FqtError(f"base must be a recipe's name, not {base!r}")
    return replace(_named(base), **values)


def _rules_from(tables: Any) -> tuple[Rule, ...]:
    if not isinstance(tables, list | tuple) or not all(isinstance(table, Mapping | Rule) for table in tables):
        raise FqtError(f"rules must be a list of tables with a pattern and a recipe, not {tables!r}")
    return tuple(table if isinstance(table, Rule) else _rule_from(table) for table in tables)


def _rule_from(table: Mapping[str, Any]) -> Rule:
    _only(table, {"pattern", "recipe"}, "rule")
    if set(table) != {"pattern", "recipe"}:
        raise FqtError(f"a rule needs a pattern and a recipe; this one has {', '.join(table) or 'nothing'}")
    recipe = table["recipe"]
    return Rule(table["pattern"], _from_mapping(recipe) if isinstance(recipe, Mapping) else recipe)


_TRANSFORMS: dict[str, type[Transform]] = {
    "none": Identity,
    "householder": BlockHouseholder,
    "hadamard": ScaledHadamard,
}


def _quantizer_from(table: Mapping[str, Any]) -> Quantizer:
    words = {
        "transform": {"transform"},
        "options": {"guard", "small_rows", "block"},
        "rotation": {"rotate"},
        "scale": {"group", "mode", "axis", "store", "range"},
        "grid": {"grid", "bits"},
        "rounding": {"rounding"},
    }
    _only(table, set().union(*words.values()), "quantizer")
    name = table.get("transform", "none")
    if not isinstance(name, str) or name not in _TRANSFORMS:
        raise FqtError(f"unknown transform {name!r}; known: {', '.join(_TRANSFORMS)}")
    options = {k: table[k] for k in words["options"] if k in table}
    _only(options, {f.name for f in fields(_TRANSFORMS[name])}, f"transform {name!r}")
    transform = _TRANSFORMS[name](**options)
    return rounded(
        Rotated(transform, table["rotate"]) if "rotate" in table else transform,
        Scale(**{k: table[k] for k in words["scale"] if k in table}),
        grid_from(table),
        table.get("rounding", "stochastic"),
    )


def _transform_words(transform: Transform) -> dict[str, Any] | None:
    """What `_quantizer_from` builds it from; None if there are no words for it."""
    if type(transform) is Rotated:
        rows = _transform_words(transform.rows)
        return None if rows is None else {**rows, "rotate": transform.block}
    name = next((name for name, kind in _TRANSFORMS.items() if type(transform) is kind), None)
    return (
        None
        if name is None
        else {"transform": name, **{f.name: getattr(transform, f.name) for f in fields(transform)}}
    )


def _only(table: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise FqtError(f"unknown {what} key {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}")


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The mapping that `load_recipe` builds `recipe` from; every value is one TOML can hold."""
    table: dict[str, Any] = {
        operand: json.loads(_operand_text(operand, getattr(recipe, operand))) for operand in OPERANDS
    }
    table["fold"] = recipe.fold
    if recipe.rules:
        table["rules"] = [
            {"pattern": rule.pattern, "recipe": dump_recipe(load_recipe(rule.recipe))} for rule in recipe.rules
        ]
    return table


def _text(recipe: Recipe) -> str:
    operands = [(operand, recipe.operand(operand)) for operand in OPERANDS]
    if any(q is not None and _transform_words(q.transform) is None for _, q in operands):
        return ""
    words = [f'"{operand}":{_operand_text(operand, q)}' for operand, q in operands]
    return "{" + ",".join([*words, f'"fold":"{recipe.fold}"']) + "}"


@lru_cache(maxsize=512)  # naming a quantizer tries all names, and every recipe is written as it is made
def _operand_text(operand: str, value: Quantizer | None) -> str:
    return json.dumps(_dump_operand(operand, value), separators=(",", ":"))


def _dump_operand(operand: str, value: Quantizer | None) -> Any:
    if value is None:
        return "none"
    names = [quantizer_name(value)]
    if operand == "weight" and isinstance(value.grid, Integers) and value.scale.store == "float32":
        names.insert(0, quantizer_name(replace(value, scale=replace(value.scale, mode="affine"))))
    for name in names:
        if name is not None and _named_operand(operand, name) == value:
            return name
    table = _transform_words(value.transform) or {"transform": type(value.transform).__name__}
    group = value.scale.group
    table |= {"group": group if isinstance(group, str) else list(group), "mode": value.scale.mode}
    if value.scale.axis:
        table["axis"] = value.scale.axis
    if value.scale.store != "float32":
        table["store"] = value.scale.store
    if value.scale.remembers:
        table["range"] = value.scale.range
    return {**table, **value.grid.words, "rounding": value.rounding_name}
