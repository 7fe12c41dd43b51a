"""Which products can run on integer codes: one answer for the layers and for `explain`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fqt.kernels import integer
from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.nn.recipe import Recipe
from fqt.quant.quantizer import Quantizer
from fqt.quant.transform import Identity, Rotated

GROUP_CHANNELS = 16
"""Of a grouped convolution, from which on the integer kernels pay (measured: csrc/LOG.md)."""

OPERANDS = {
    "output": ("input", "weight"),
    "grad_input": ("grad_input", "weight"),
    "grad_weight": ("grad_weight", "input"),
}
"""What each product multiplies, by field of `Recipe`."""


def on_integers(product: str, map: LinearMap, recipe: Recipe, values: Tensor) -> bool:
    """Whether this product of these values runs on integer codes.

    Below float64, on devices for which a backend says that it multiplies codes. Where this one has no integer
    units for it, it does too, through exact sums in float64, so that every installation computes the same numbers.
    """
    if values.dtype == torch.float64 or not integer.serves(values.device.type):
        return False
    if any(recipe.operand(name) is None for name in OPERANDS[product]):
        return False
    return not obstacle(product, map, recipe)


@lru_cache(maxsize=512)
def folds(product: str, map: LinearMap, recipe: Recipe) -> bool:
    """Whether steps of this product's forward operand move into grad_output, where there are several."""
    q = recipe.operand(OPERANDS[product][1])
    if product == "output" or q is None or q.scale.group != "row" or rotates(product, map, recipe):
        return False
    return not _stays(product, map, recipe, q)


def rotates(product: str, map: LinearMap, recipe: Recipe) -> bool:
    """Whether the features that this product contracts are rotated in both operands, the other quantized again."""
    left, right = (recipe.operand(name) for name in OPERANDS[product])
    return (
        left is not None
        and right is not None
        and isinstance(left.transform, Rotated)
        and not _rotation(product, map, left)
    )


@lru_cache(maxsize=512)
def obstacle(product: str, map: LinearMap, recipe: Recipe) -> str:
    """Why two quantized operands cannot be multiplied as integers; empty if they can.

    A step that varies along a contracted axis does not pull out of the sum; it can only be folded into the other
    operand before that one is quantized.
    """
    name, other = OPERANDS[product]
    left, right = recipe.operand(name), recipe.operand(other)
    assert left is not None
    assert right is not None
    return (
        _unsupported(map)
        or _mixes_groups(product, map, left)
        or _rotation(product, map, left)
        or _column(left, name)
        or _column(right, other)
        or _contracted(product, map, left)
        or _other(product, map, recipe, right)
        or _codes(product, recipe)
    )


def _unsupported(map: LinearMap) -> str:
    if isinstance(map, DenseMap):
        return ""
    if map.transposed:
        return "transposed convolutions have no integer kernel"
    if map.groups > 1 and map.group_channels < GROUP_CHANNELS:
        return f"groups of fewer than {GROUP_CHANNELS} channels are slower on the integer kernels"
    if len(map.stride) > 2:
        return "three-dimensional convolutions have no integer kernel"
    return "padding that differs from side to side has no integer kernel" if map.extra else ""


def _mixes_groups(product: str, map: LinearMap, q: Quantizer) -> str:
    grouped = isinstance(map, ConvMap) and map.groups > 1
    if product != "grad_weight" or not grouped or isinstance(q.transform, Identity):
        return ""
    return "the transform of grad_weight mixes channels of different groups"


def _rotation(product: str, map: LinearMap, q: Quantizer) -> str:
    if not isinstance(q.transform, Rotated):
        return ""
    if product == "grad_weight":
        return "grad_weight's features are rotated along tokens, and input is not"
    if map.transposed:
        return "the rotation of features is along another axis than a transposed convolution's output channels"
    grouped = isinstance(map, ConvMap) and map.groups > 1
    return "the rotation of features mixes channels of different groups" if grouped else ""


def _column(q: Quantizer, name: str) -> str:
    if q.scale.group in ("tensor", "row"):
        return ""
    what = q.scale.group if isinstance(q.scale.group, str) else "block of {} × {}".format(*q.scale.group)
    return f"a step per {what} of {name} varies along a contracted axis"


def _contracted(product: str, map: LinearMap, q: Quantizer) -> str:
    """The first operand: `input` for the output, else grad_output."""
    if q.scale.group == "tensor":
        return ""
    dense = isinstance(map, DenseMap)
    axis = q.scale.axis or ("channel" if product == "grad_weight" else map.habit)
    along = {
        "output": () if dense else ("token",),
        # Rows of whole samples could be pulled out of a Linear's grad_input too, but for their dither.
        "grad_input": ("channel", "sample") if dense else ("channel", "token"),
        "grad_weight": ("sample", "token"),
    }[product]
    return f"a step per {axis} lies on a contracted axis" if axis in along else ""


def _other(product: str, map: LinearMap, recipe: Recipe, q: Quantizer) -> str:
    """The second operand: `weight`, or `input` for grad_weight."""
    if product == "output" or q.scale.group == "tensor" or rotates(product, map, recipe):
        return ""
    why = _stays(product, map, recipe, q)
    if not why and recipe.fold == "auto":
        why = "fold is 'auto', not 'always'"
    return f"{_steps(product, map, q)}, on the contracted axis, and {why}" if why else ""


def _steps(product: str, map: LinearMap, q: Quantizer) -> str:
    axis = "channel" if product == "grad_input" else q.scale.axis or map.habit
    return f"{OPERANDS[product][1]} has a step per {axis}"


def _stays(product: str, map: LinearMap, recipe: Recipe, q: Quantizer) -> str:
    """Why steps per row of the second operand cannot move into grad_output; empty if they can."""
    if recipe.fold == "never":
        return "fold is 'never', not 'always'"
    if product == "grad_weight" and (q.scale.axis or map.habit) == "token" and not map.aligned_tokens:
        return "a convolution's input has other positions than its output"
    return ""


def _codes(product: str, recipe: Recipe) -> str:
    for name in OPERANDS[product]:
        q = recipe.operand(name)
        if q is not None and q.code_dtype == torch.float32:
            return f"{name} has levels that fit no byte"
    weight = recipe.operand("weight")
    if product == "grad_weight" or (weight is not None and weight.scale.mode == "symmetric"):
        return ""
    return "weight has an offset"
