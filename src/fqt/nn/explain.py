"""What a converted model computes on integers, what it simulates, what stays float, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fqt.nn.convert import is_converted, select
from fqt.nn.recipe import Recipe, dump_recipe, load_recipe
from fqt.quant.quantizer import Quantizer
from fqt.quant.transform import Identity

# What each product multiplies, by field of `Recipe`.
_OPERANDS = {
    "output": ("input", "weight"),
    "grad_input": ("grad_input", "weight"),
    "grad_weight": ("grad_weight", "input"),
}


@dataclass(frozen=True)
class Product:
    """One product of one layer.

    Attributes:
        layer: qualified name.
        product: "output", "grad_input", "grad_weight", or what else the layer computes.
        arithmetic: "integer", "simulated" (float arithmetic on integer codes) or "float".
        operands: what is multiplied, e.g. "ptq8 × ptq8".
        why: the reason for the arithmetic.
    """

    layer: str
    product: str
    arithmetic: str
    operands: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """All products of a model, as rows; prints as a table."""

    products: tuple[Product, ...]

    def __str__(self) -> str:
        header = ("layer", "product", "arithmetic", "operands", "why")
        rows = [header, *((p.layer, p.product, p.arithmetic, p.operands, p.why) for p in self.products)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Which of the model's products run on integers, and why the others do not.

    Args:
        model: any module, converted or not.

    Returns:
        A table with one row per product of every layer that has one.
    """
    rows: list[Product] = []
    for selection in select(model, load_recipe("none"))[0]:
        name, module = selection.name or "(model)", selection.module
        if not is_converted(module):
            reason = selection.reason or "not converted"
            rows.append(Product(name, "all", "float", "", reason))
            continue
        recipe: Recipe = module.fqt_recipe  # type: ignore[assignment]
        rows += [_product(name, module, recipe, product) for product in _OPERANDS]
        if isinstance(module, nn.MultiheadAttention):
            why = "products of two activations have no weight to quantize"
            rows.append(Product(name, "query·keyᵀ, weights·value", "float", "", why))
    return Explanation(tuple(rows))


def _product(layer: str, module: nn.Module, recipe: Recipe, product: str) -> Product:
    names = _OPERANDS[product]
    left, right = (recipe.operand(name) for name in names)
    words = dump_recipe(recipe)
    operands = " × ".join(_words(words[name]) for name in names)
    if left is None or right is None:
        exact = "grad_output" if product != "output" else "an operand"
        return Product(layer, product, "float", operands, f"{exact if left is None else 'an operand'} stays float")
    obstacle = _integer_obstacle(module, recipe, left, right, product)
    why = obstacle or "both operands are integer codes; this version multiplies them in float"
    return Product(layer, product, "simulated", operands, why)


def _integer_obstacle(module: nn.Module, recipe: Recipe, left: Quantizer, right: Quantizer, product: str) -> str:
    """Why two integer operands could not be multiplied as integers: steps that vary along a contracted axis."""
    dense = isinstance(module, nn.Linear | nn.MultiheadAttention)
    mixes = not isinstance(left.transform, Identity)
    if product == "grad_weight" and mixes and getattr(module, "groups", 1) > 1:
        return "a transform over output channels mixes groups, whose inputs differ"
    left_name, right_name = _OPERANDS[product]
    contracted = {
        "output": {"feature"} | (set() if dense else {"token"}),
        "grad_input": {"channel"} | (set() if dense else {"token", "tap"}),
        "grad_weight": {"sample", "token"},
    }[product]
    first = _varies(left, left_name, dense) & contracted
    if first:
        along = " and ".join(sorted(first))
        if left.scale.group == "column":
            return f"a step per column varies along a contracted axis: {along}"
        return f"a step per {along} lies on a contracted axis"
    second = _varies(right, right_name, dense) & contracted
    foldable = second <= {"channel", "sample"} or dense
    if second and not (recipe.fold != "never" and foldable and product != "output" and right.scale.group == "row"):
        along = " and ".join(sorted(second))
        return f"the {right_name}'s steps per {along} lie on the contracted axis and fold is {recipe.fold!r}"
    return ""


def _varies(q: Quantizer, operand: str, dense: bool) -> set[str]:
    """The axes along which an operand's steps vary."""
    if q.scale.group == "tensor":
        return set()
    if operand == "weight":
        return {"channel"} if q.scale.group == "row" else {"feature"} | (set() if dense else {"tap"})
    habit = "channel" if operand == "grad_weight" else "token" if dense else "sample"
    axis = q.scale.axis or habit
    if q.scale.group == "row":
        return {axis}
    everything = {"sample", "token", "feature" if operand == "input" else "channel"}
    return everything - ({"sample", "token"} if axis == "token" else {axis})


def _words(entry: str | dict[str, Any]) -> str:
    """An operand's entry of `dump_recipe`, on one line."""
    if isinstance(entry, str):
        return "float" if entry == "none" else entry
    return "{" + ", ".join(f"{key}={value}" for key, value in entry.items()) + "}"
