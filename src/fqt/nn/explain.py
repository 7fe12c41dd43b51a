"""What a converted model computes on integers, what it simulates, what stays float, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fqt.nn import patched
from fqt.nn.arithmetic import OPERANDS, machine_obstacle, obstacle
from fqt.nn.convert import is_converted, select
from fqt.nn.layers import linear_map
from fqt.nn.recipe import Recipe, dump_recipe, load_recipe


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
        hidden = patched.hidden(module)
        if hidden:
            rows.append(Product(name, "all", "float", "", hidden))
            continue
        recipe: Recipe = module.fqt_recipe  # type: ignore[assignment]
        rows += [_product(name, module, recipe, product) for product in OPERANDS]
        if isinstance(module, nn.MultiheadAttention):
            why = "products of two activations have no weight to quantize"
            rows.append(Product(name, "query·keyᵀ, weights·value", "float", "", why))
    return Explanation(tuple(rows))


def _product(layer: str, module: nn.Module, recipe: Recipe, product: str) -> Product:
    names = OPERANDS[product]
    left, right = (recipe.operand(name) for name in names)
    words = dump_recipe(recipe)
    operands = " × ".join(_words(words[name]) for name in names)
    if left is None or right is None:
        exact = "grad_output" if product != "output" else "an operand"
        return Product(layer, product, "float", operands, f"{exact if left is None else 'an operand'} stays float")
    why = obstacle(product, linear_map(module), recipe) or _machine(module)
    if why:
        return Product(layer, product, "simulated", operands, why)
    return Product(layer, product, "integer", operands, "both operands are integer codes")


def _machine(module: nn.Module) -> str:
    """What keeps the products of this module's parameters off integer units."""
    weight = next(module.parameters())
    if weight.device.type != "cpu":
        return f"no integer kernels for {weight.device.type}"
    if weight.dtype == torch.float64:
        return "float64 is computed in float64"
    return machine_obstacle()


def _words(entry: str | dict[str, Any]) -> str:
    """An operand's entry of `dump_recipe`, on one line."""
    if isinstance(entry, str):
        return "float" if entry == "none" else entry
    return "{" + ", ".join(f"{key}={value}" for key, value in entry.items()) + "}"
