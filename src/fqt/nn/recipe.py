"""Recipes: what each of a layer's three products multiplies, and which layers get which recipe.

    output      = input · weightᵀ            operands `input`, `weight`: deterministic
    grad_input  = grad_output · weight       grad_output quantized by `grad_input`
    grad_weight = grad_outputᵀ · input       grad_output quantized by `grad_weight`

The unit is the product (`fqt.nn.product`): `Recipe.product(name)` is what layers, `arithmetic` and `explain` ask. A
recipe is written operand by operand, since most say no more: a backward product that says more is a `Product` in
its place, the output's rotation stands beside its operands. Recipes that hold three products were rejected: one
operand could not be replaced without the rest of its product, and `grad_input="bhq4"` would have to guess a fold.

A recipe is named after what is quantized differently from QAT: `bhq4` sets `grad_input` and leaves the rest as
the paper has it (per-tensor 8 bits). One quantizer type serves all four operands; a table of knobs per operand
was rejected, since every new idea would then need four new fields.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fqt.errors import FqtError, UnknownName
from fqt.nn.entries import described, entry, entry_from, operand_text, shown, turned_by
from fqt.nn.named import DEFAULT as DEFAULT
from fqt.nn.named import RECIPES
from fqt.nn.product import OPERANDS, PRODUCTS, SAVED, Product, check_block, check_fold
from fqt.quant.keep import WORDS
from fqt.quant.names import name_meant, quantizer, quantizer_name, width_meant
from fqt.quant.quantizer import Quantizer
from fqt.quant.words import check_keys, transform_words
from fqt.records import read_toml


class _Unsaid:
    """What stands where nothing was given."""

    def __repr__(self) -> str:
        return "as base"


_UNSAID: Any = _Unsaid()
_QAT = {"input": "ptq8", "weight": "ptq8", "grad_input": None, "grad_weight": None, "rotate": None, "fold": "never"}
"""What fields are that neither are given nor have a base."""


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
    """What a layer's three products multiply: the four operands' quantizers, and what a product says beside them.

    >>> Recipe("shq4d") == Recipe(grad_input="shq4d", grad_weight="ptq8")
    True
    >>> Recipe(grad_input="shq4d").grad_weight is None
    True

    A quantizer, its name, or None for float; of a backward product also a `Product`. An attribute is what was
    written there; `operand(name)` is the quantizer of an operand, `product(name)` the whole of a product.

    Args:
        base: the name of the recipe that says what is not given here; the only argument by position. Without it
            that is "qat": 8 bits forward, and both gradients in float.

    Attributes:
        input, weight: nearest rounding, no transform; a name ("psq8") means that here, and symmetric codes for
            `weight`.
        grad_input, grad_weight: the two quantizers of the same grad_output. Stochastic, dithered or best: the
            gradient is then an unbiased estimate of the QAT gradient. Nearest (an explicit "…n") is biased and
            there for comparison. One with a remembered range is biased by what it clips. A `Product` instead says
            more of the product than its left operand.
        rotate: the largest block of the fixed rotation of input features that input and weight take before they are
            quantized, and which cancels in the output; a power of two, or None.
        fold: whether a step on a contracted axis (of `weight` in grad_input, of `input` in grad_weight) moves
            into grad_output before that is quantized: "never"; "always"; "auto", where the closed-form bound of
            the product's variance does not rise. Unbiased either way; only "always" lets such a product run on
            integers.
        rules: exceptions by layer name, first match wins.
        output: instead of `input`, `weight` and `rotate`, not beside them: the first product written out,
            `Product(left, right, rotate)`. It is taken apart, and reads None.
        text: the same without rules, as one line of JSON; `Recipe.of_text` gives an equal recipe back in any
            process. Compiled graphs and exported programs hold it. Empty if a transform has no words for it.
    """

    base: InitVar[str | None] = field(default=None, kw_only=False)
    input: Quantizer | str | None = _UNSAID
    weight: Quantizer | str | None = _UNSAID
    grad_input: Quantizer | Product | str | None = _UNSAID
    grad_weight: Quantizer | Product | str | None = _UNSAID
    rotate: int | None = _UNSAID
    fold: str = _UNSAID
    rules: tuple[Rule, ...] = ()
    output: Product | None = field(compare=False, repr=False, default=None)
    text: str = field(init=False, compare=False, repr=False, default="")

    def __post_init__(self, base: str | None) -> None:
        if self.output is not None:
            self._take_apart(self.output)
        self._begin_with(base)
        for operand in OPERANDS:
            object.__setattr__(self, operand, entry(operand, getattr(self, operand)))
        check_fold(self.fold)
        check_block(self.rotate)
        if self.rotate is not None and (self.input is None or self.weight is None):
            raise FqtError("rotate turns the features of both input and weight: quantize both, or give rotate=None")
        if not isinstance(self.rules, list | tuple):
            raise FqtError(f"rules must be a list of Rule(pattern, recipe), not {self.rules!r}")
        object.__setattr__(self, "rules", tuple(self.rules))
        wrong = next((rule for rule in self.rules if not isinstance(rule, Rule)), None)
        if wrong is not None:
            raise FqtError(f"rules must be Rule(pattern, recipe), not {wrong!r}")
        self._derive()
        for role in ("grad_input", "grad_weight"):
            q = self.operand(role)
            if q is not None and q.scale.remembers and self.product(role).fold == "auto":
                raise FqtError(f"fold 'auto' may change {role}'s scale at any step: its range cannot be remembered")

    def _take_apart(self, output: Product) -> None:
        unfit = not isinstance(output, Product) or output.right == SAVED
        if unfit or output.fold is not None or output.keep is not None:
            raise FqtError(f"output must be Product(left, right, rotate), of input and of weight, not {output!r}")
        twice = [name for name in ("input", "weight") if getattr(self, name) is not _UNSAID]
        twice += [] if self.rotate is _UNSAID or self.rotate is None else ["rotate"]
        if twice:
            raise FqtError(f"output says what {' and '.join(twice)} {'is' if len(twice) == 1 else 'are'}: say one")
        for name, value in (("input", output.left), ("weight", output.right), ("rotate", output.rotate)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "output", None)

    def _begin_with(self, base: str | None) -> None:
        if base is not None and not isinstance(base, str):
            raise FqtError(
                f"base must be a recipe's name, not a {type(base).__name__}: dataclasses.replace changes a Recipe, "
                "and fqt.quantize_ takes files and mappings"
            )
        start = _QAT if base is None else vars(_named(base))
        for name, value in start.items():
            if getattr(self, name, None) is _UNSAID:
                object.__setattr__(self, name, value)

    def _derive(self) -> None:
        """Sets what layers need at every call, and `text`, which a traced layer must only read."""
        object.__setattr__(self, "_products", {name: _product(self, name) for name in PRODUCTS})
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
        self.__dict__.update(_QAT | state)  # what was written before a field was there has its plain value
        self._derive()

    def operand(self, name: str) -> Quantizer | None:
        """The quantizer of one of the four operands, by field name."""
        value = getattr(self, name)
        value = value.left if isinstance(value, Product) else value
        assert value is None or isinstance(value, Quantizer)
        return value

    def with_operand(self, name: str, value: Quantizer | None) -> Recipe:
        """The recipe with another quantizer of one operand, and everything else that its product says."""
        before = getattr(self, name)
        changed: dict[str, Any] = {name: replace(before, left=value) if isinstance(before, Product) else value}
        return replace(self, **changed)

    def product(self, name: str) -> Product:
        """All there is to "output", "grad_input" or "grad_weight": no names, and nothing left to the recipe."""
        found: Product = self._products[name]  # type: ignore[attr-defined]
        return found

    @property
    def is_float(self) -> bool:
        """Whether no operand is quantized."""
        return all(getattr(self, operand) is None for operand in OPERANDS)

    def __repr__(self) -> str:
        """A call that makes an equal recipe, of names where there are."""
        name = recipe_name(replace(self, rules=()) if self.rules else self)
        if name is not None:
            words = [repr(name)]
        else:
            words = [f"{operand}={shown(operand, getattr(self, operand))}" for operand in OPERANDS]
            words += [
                f"{key}={getattr(self, key)!r}" for key in ("rotate", "fold") if getattr(self, key) != _QAT[key]
            ]
        return f"Recipe({', '.join([*words, *([f'rules={self.rules!r}'] if self.rules else [])])})"

    def __str__(self) -> str:
        base = replace(self, rules=()) if self.rules else self
        words = recipe_name(base) or ", ".join(f"{k}={v}" for k, v in dump_recipe(base).items())
        layers: dict[str, list[str]] = {}
        for rule in self.rules:
            layers.setdefault(str(rule.recipe), []).append(rule.pattern)
        return "; ".join([words, *(f"{recipe} for {', '.join(names)}" for recipe, names in layers.items())])


def _product(recipe: Recipe, name: str) -> Product:
    """The whole of a product, from what the recipe's attributes say."""
    if name == "output":
        return Product(recipe.input, recipe.weight, recipe.rotate, fold="never")
    said = getattr(recipe, name)
    if isinstance(said, Product):
        return replace(said, fold=said.fold or recipe.fold)
    return Product(said, SAVED, turned_by(name, said), fold=recipe.fold)


@lru_cache(maxsize=512)
def _named(name: str) -> Recipe:
    """The recipe of that name."""
    if name in RECIPES:
        return Recipe(**RECIPES[name])
    try:
        return _of_quantizer(quantizer(name))
    except UnknownName:
        raise UnknownName(f"unknown recipe {name!r}; {_meant(name)}") from None


def _meant(name: str) -> str:
    """What who wrote this name for a recipe probably wants, else what there is."""
    bits = width_meant(name)
    if bits:
        return "'default' is 8-bit training" if bits == "8" else f"'psq{bits}' has {bits} bits in grad_input, say"
    meant = name_meant(name, RECIPES)
    if meant is not None:
        return f"did you mean {meant!r}?"
    return f"known: {', '.join(RECIPES)}; a TOML file; or a quantizer, such as 'psq4' (fqt catalog lists them)"


def _of_quantizer(q: Quantizer) -> Recipe:
    """The recipe that goes by a quantizer's name: it for grad_input, the rest as the paper has it."""
    return Recipe(grad_input=q, grad_weight="ptq8")


def recipe_name(recipe: Recipe) -> str | None:
    """The name that `load_recipe` would build this recipe from, or None."""
    candidates = list(RECIPES)
    if isinstance(recipe.grad_input, Quantizer):
        candidates.append(quantizer_name(recipe.grad_input) or "qat")
    return next((name for name in candidates if _named(name) == recipe), None)


def load_recipe(source: Recipe | Quantizer | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from its name, a TOML file, or a mapping with the same words; from a quantizer as from its name.

    The mapping's keys are the fields of `Recipe`, and `base`, the name of the recipe to start from. An operand
    is a name ("psq8@channel", "none") or a table with the words of `Quantizer`: transform ("none",
    "householder", "hadamard"), guard, rotate (the block of a rotation of features), group, mode, axis, store,
    range, grid, bits, rounding. A table with `left` is a `Product`: left, right, rotate, keep, fold. `rules` is a
    list of tables with `pattern` and `recipe`.

    Raises:
        FqtError: says what is unknown or wrong, and what is known.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Quantizer):
        return _of_quantizer(source)
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith(".toml")):
        return _from_file(Path(source))
    if isinstance(source, str):
        return _named(source)
    if isinstance(source, Mapping):
        return _from_mapping(source)
    what = described(source) if inspect.isroutine(source) else type(source).__name__
    raise FqtError(f"a recipe is a Recipe, a Quantizer, a name, a TOML file or a mapping, not {what}")


def _from_file(path: Path) -> Recipe:
    table = read_toml(path)
    try:
        return _from_mapping(table)
    except FqtError as error:
        raise FqtError(f"recipe {str(path)!r}: {error}") from None


def _from_mapping(table: Mapping[str, Any]) -> Recipe:
    known = {f.name for f in fields(Recipe) if f.init} | {"base"}
    check_keys(table, known, "recipe")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and key in (*OPERANDS, "output"):
            values[key] = entry_from(key, value)
        elif key == "rules":
            values[key] = _rules_from(value)
        elif key != "base":
            values[key] = value
    return Recipe(table.get("base", "qat"), **values)


def _rules_from(tables: Any) -> tuple[Rule, ...]:
    if not isinstance(tables, list | tuple) or not all(isinstance(table, Mapping | Rule) for table in tables):
        raise FqtError(f"rules must be a list of tables with a pattern and a recipe, not {tables!r}")
    return tuple(table if isinstance(table, Rule) else _rule_from(table) for table in tables)


def _rule_from(table: Mapping[str, Any]) -> Rule:
    check_keys(table, {"pattern", "recipe"}, "rule")
    if set(table) != {"pattern", "recipe"}:
        raise FqtError(f"a rule needs a pattern and a recipe; this one has {', '.join(table) or 'nothing'}")
    recipe = table["recipe"]
    return Rule(table["pattern"], _from_mapping(recipe) if isinstance(recipe, Mapping) else recipe)


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The mapping that `load_recipe` builds `recipe` from; every value is one TOML can hold."""
    table: dict[str, Any] = {
        operand: json.loads(operand_text(operand, getattr(recipe, operand))) for operand in OPERANDS
    }
    if recipe.rotate is not None:
        table["rotate"] = recipe.rotate
    table["fold"] = recipe.fold
    if recipe.rules:
        table["rules"] = [
            {"pattern": rule.pattern, "recipe": dump_recipe(load_recipe(rule.recipe))} for rule in recipe.rules
        ]
    return table


def _text(recipe: Recipe) -> str:
    quantizers = [recipe.operand(operand) for operand in OPERANDS]
    if any(q is not None and transform_words(q.transform) is None for q in quantizers):
        return ""
    keeps = [recipe.product(name).keep for name in PRODUCTS]
    if any(keep is not None and type(keep) not in WORDS for keep in keeps):
        return ""
    words = [f'"{operand}":{operand_text(operand, getattr(recipe, operand))}' for operand in OPERANDS]
    more = [] if recipe.rotate is None else [f'"rotate":{recipe.rotate}']
    return "{" + ",".join([*words, *more, f'"fold":"{recipe.fold}"']) + "}"
