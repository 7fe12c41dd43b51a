"""What a recipe's entries stand for: an operand's quantizer or its name, a product, and both in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from fqt.errors import FqtError
from fqt.kernels.rounding import DITHERED, NEAREST, STOCHASTIC
from fqt.nn.named import RECIPES
from fqt.nn.product import INPUT_AGAIN, SAVED, WEIGHT_AGAIN, Product
from fqt.quant.best import Best
from fqt.quant.grid import Integers
from fqt.quant.keep import keep_from
from fqt.quant.names import quantizer, quantizer_name
from fqt.quant.quantizer import Quantizer
from fqt.quant.transform import Identity, Rotated
from fqt.quant.words import check_keys, quantizer_from, quantizer_words


def turned_by(operand: str, left: Quantizer | None) -> int | None:
    """The block of the rotation that a product's left operand brings with it: of grad_input, whose features are
    contracted, unless its rows are channels: along these are tokens then."""
    if operand != "grad_input" or left is None or not isinstance(left.transform, Rotated):
        return None
    return None if left.scale.row_axis == "channel" else left.transform.block


def entry(operand: str, value: Any) -> Quantizer | Product | None:
    """What an attribute's entry stands for: a product that says no more than its left operand is that."""
    if not isinstance(value, Product) or operand in ("input", "weight"):
        return _operand(operand, value)
    left = _operand(operand, value.left)
    if value.rotate is not None:
        left = _turned(operand, left, value.rotate)
    rotate = turned_by(operand, left) if value.rotate is None else value.rotate
    right = value.right if value.right == SAVED else _again(operand, value.right)
    found = replace(value, left=left, right=right, rotate=rotate)
    return left if found == Product(left, SAVED, turned_by(operand, left)) else found


def _turned(operand: str, left: Quantizer | None, block: int) -> Quantizer:
    """The left operand of a backward product whose contraction is rotated."""
    if left is None:
        raise FqtError(f"rotate is there for the quantizer of {operand}, and it has none: give rotate=None")
    if left.scale.row_axis is not None and (left.scale.axis == "channel") != (operand == "grad_weight"):
        raise FqtError(
            f"{operand} is rotated along what it contracts, and {left.scale.axis}s are not its rows then"
        )
    if not isinstance(left.transform, Rotated):
        return left.with_transform(Rotated(left.transform, block))
    if left.transform.block != block:
        raise FqtError(f"{operand} is rotated in blocks of {left.transform.block} and of {block}: say one")
    return left


def _again(operand: str, value: Quantizer | str | None) -> Quantizer:
    """The quantizer of a backward product's right operand that is not the saved one."""
    name = WEIGHT_AGAIN if operand == "grad_input" else INPUT_AGAIN
    found = _operand(name, value)
    if found is None:
        raise FqtError(f"{name} is {SAVED!r} or a quantizer, not {value!r}")
    if not isinstance(found.transform, Identity):
        raise FqtError(f"{name} takes no transform of its own: give the product rotate=128")
    if found.scale.axis is not None:
        raise FqtError(f"the rows of {name} are what the product does not contract: give no axis")
    if found.scale.remembers:
        raise FqtError(f"{name} is quantized in its own range: layers remember those of grad_output only")
    return found


def _operand(operand: str, value: Quantizer | str | None) -> Quantizer | None:
    """The quantizer an operand's entry stands for."""
    forward = operand in ("input", "weight")
    if isinstance(value, str):
        value = named_operand(operand, value)
    if value is None:
        return None
    if not isinstance(value, Quantizer):
        raise FqtError(f"{operand} must be a Quantizer, its name or None, not {described(value)}")
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
def named_operand(operand: str, name: str) -> Quantizer | None:
    """The quantizer that a name means for an operand."""
    if name in ("none", "float"):
        return None
    if name in RECIPES:
        raise FqtError(f"{name!r} is a recipe, and {operand} takes a quantizer, such as 'psq8'")
    value = quantizer(name)
    if operand == WEIGHT_AGAIN and value.rounding != DITHERED and not isinstance(value, Best):
        return replace(value, scale=replace(value.scale, mode="symmetric"))
    if operand not in ("input", "weight"):
        return value
    if value.rounding == STOCHASTIC and not isinstance(value, Best):
        value = replace(value, rounding=NEAREST)  # a bare name: the forward pass has only one rounding
    if operand == "weight" and value.rounding == NEAREST:
        value = replace(value, scale=replace(value.scale, mode="symmetric"))
    return value


def described(value: object) -> str:
    """What somebody gave, in words; of a function, what to do."""
    if not callable(value) or isinstance(value, type):
        return repr(value)
    return (
        f"the function {getattr(value, '__qualname__', type(value).__name__)}: a layer needs codes; write it as "
        "fqt.Quantizer(transform=, scale=, grid=, rounding=), a function can only be certified; one that chooses "
        "layers is given as filter_fn="
    )


def entry_from(key: str, table: Mapping[str, Any]) -> Quantizer | Product:
    """What a table stands for in the place of an operand or of the output: a product if it says more than a
    quantizer."""
    product = key == "output" or not {"left", "right", "fold"}.isdisjoint(table)
    return _product_from(key, table) if product else quantizer_from(table)


def _product_from(key: str, table: Mapping[str, Any]) -> Product:
    wanted = {"left": "grad_output"} if key != "output" else {"left": "input", "right": "weight"}
    lacking = [f"{name} (the quantizer of {what}, or 'none')" for name, what in wanted.items() if name not in table]
    if lacking:
        raise FqtError(f"{key} is a product's table, and lacks {' and '.join(lacking)}")
    check_keys(table, {f.name for f in fields(Product)}, "product")
    values = dict(table)
    for name in ("left", "right"):
        if isinstance(values.get(name), Mapping):
            values[name] = quantizer_from(values[name])
    if "keep" in values:
        values["keep"] = keep_from(values["keep"])
    return Product(**values)


@lru_cache(maxsize=512)  # naming a quantizer tries all names, and every recipe is written as it is made
def operand_text(operand: str, value: Quantizer | Product | None) -> str:
    """An entry as one line of JSON."""
    dumped = _dump_product(operand, value) if isinstance(value, Product) else dump_operand(operand, value)
    return json.dumps(dumped, separators=(",", ":"))


def _dump_product(operand: str, unit: Product) -> dict[str, Any]:
    table = {f.name: getattr(unit, f.name) for f in fields(unit)}
    again = WEIGHT_AGAIN if operand == "grad_input" else INPUT_AGAIN
    table |= {"left": dump_operand(operand, unit.left), "right": dump_operand(again, unit.right)}
    table["keep"] = None if unit.keep is None else unit.keep.words
    return {k: v for k, v in table.items() if v is not None}


def dump_operand(operand: str, value: Quantizer | str | None) -> Any:
    """What an operand's entry is written as: "none", a name, "saved", or a table.

    Args:
        operand: by field name of `Recipe`; a name means another quantizer in the forward pass than in the backward.
        value: its quantizer.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    names = [quantizer_name(value)]
    plain = isinstance(value.grid, Integers) and value.scale.store == "float32" and not isinstance(value, Best)
    if operand in ("weight", WEIGHT_AGAIN) and plain:
        names.insert(0, quantizer_name(replace(value, scale=replace(value.scale, mode="affine"))))
    for name in names:
        if name is not None and named_operand(operand, name) == value:
            return name
    return quantizer_words(value)


def shown(operand: str, value: Quantizer | Product | None) -> str:
    """An operand as it can be given to `Recipe`."""
    name = dump_operand(operand, value) if isinstance(value, Quantizer) else None
    return repr(name if isinstance(name, str) else value)
