"""Which products can run on integer codes: one answer for the layers and for `explain`."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fqt.kernels import integer
from fqt.kernels.blocked import GATHERED, MOST_TERMS, common_block
from fqt.kernels.codes import range_of
from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.kernels.narrow_groups import GROUP_CHANNELS
from fqt.kernels.rounding import DITHERED
from fqt.nn.product import AGAIN, PRODUCTS, SAVED
from fqt.nn.recipe import Recipe
from fqt.quant.quantizer import Quantizer
from fqt.quant.transform import Identity, Rotated

LEAST_BLOCK = 16
"""Of the blocks along a contracted axis that are summed as integers: every length is a multiple of it."""


FEWEST_TERMS, FEWEST_TERMS_OF_VOLUMES, FEWEST_TAPS, DEARER = 256, 2048, 49, 1.5
"""From which on a training step of a layer takes no longer on integers than in float, on a CPU.

What quantizing takes per number does not depend on how often it is multiplied. Terms are those of an entry of the
output and of the input's gradient, in the harmonic mean; taps those of a filter for every channel, at which torch's
own kernels are slower. Measured with AVX-512 VNNI, in CPU time against fp32 with psq8 (csrc/LOG.md): 64 terms 2.0,
128 terms 1.8, 256 terms 1.0; 3 × 3 taps 3.0, 7 × 7 taps 1.0; in three dimensions 432 terms 4.3, 864 terms
1.8, and more were not measured. Without VNNI integers gain less: the bound is higher. Convolutions whose gradients
are rotated or choose their coding ask for more by a factor: with `default` 288 terms 1.2, 432 terms 0.96 (`psq8`:
0.8, 0.7), 7 × 7 taps 1.2 to 1.6; a Linear with 256 terms takes 0.9 all the same.
"""


def is_slower(map: LinearMap, weight: torch.Size, recipe: Recipe) -> bool:
    """Whether a training step of a layer with such a weight takes longer on a CPU's integers than in float."""
    taps = weight[2:].numel()
    gradients = [q for q in (recipe.operand("grad_input"), recipe.operand("grad_weight")) if q is not None]
    dearer = any(len(q.codings) > 1 or not isinstance(q.transform, Identity) for q in gradients)
    factor = DEARER if dearer and not isinstance(map, DenseMap) else 1
    if isinstance(map, DenseMap):
        terms = (weight[1], weight[0])
    elif map.groups > 1 and map.group_channels == 1:
        return taps < factor * FEWEST_TAPS
    else:  # weight (O, C/groups, *), or of a transposed convolution (C, O/groups, *): the strided side has fewer
        terms = (weight[1] * taps, weight[0] // map.groups * taps // math.prod(map.stride))
    fewest = FEWEST_TERMS_OF_VOLUMES if len(weight) > 4 else FEWEST_TERMS
    return not min(terms) or 2 / (1 / terms[0] + 1 / terms[1]) < factor * fewest


def on_integers(product: str, map: LinearMap, recipe: Recipe, values: Tensor) -> bool:
    """Whether this product of these values runs on integer codes.

    Below float64, on devices for which a backend says that it multiplies codes. Where this one has no integer
    units for it, it does too, through exact sums in float64, so that every installation computes the same numbers.
    """
    if values.dtype == torch.float64 or not integer.serves(values.device.type):
        return False
    if None in operands(product, map, recipe):
        return False
    return not obstacle(product, map, recipe) and not untried(map, values.device.type)


def untried(map: LinearMap, device: str) -> str:
    """Why products of this map are not multiplied as integers on such devices, though they could be; else empty."""
    if device == "cpu" or isinstance(map, DenseMap):
        return ""
    narrow = map.groups > 1 and map.group_channels < GROUP_CHANNELS
    if not (map.transposed or narrow or len(map.stride) > 2):
        return ""
    return "transposed and three-dimensional convolutions and narrow groups have integer kernels on the CPU only"


def operands(product: str, map: LinearMap, recipe: Recipe) -> tuple[Quantizer | None, Quantizer | None]:
    """What this product's two operands are quantized by when they are multiplied; None for float."""
    left = recipe.operand(PRODUCTS[product][0])
    return left, again(product, map, recipe) or recipe.operand(PRODUCTS[product][1])


def again(product: str, map: LinearMap, recipe: Recipe) -> Quantizer | None:
    """What the forward operand of a backward product is quantized by for it alone; None if its codes serve."""
    if product == "output":
        return None
    unit = recipe.product(product)
    if unit.right != SAVED:
        assert isinstance(unit.right, Quantizer)
        return unit.right
    if recipe.operand(PRODUCTS[product][1]) is None:
        return None  # a float operand is turned as it is
    keep = unit.keep if product == "grad_weight" else None
    return AGAIN if (keep is not None and keep.turns) or rotates(product, map, recipe) else None


def misfit(map: LinearMap, recipe: Recipe) -> str:
    """Why a layer of this map cannot have the recipe at all; empty if it can."""
    keeps = (recipe.product(name).keep for name in ("grad_input", "grad_weight"))
    if isinstance(map, DenseMap) or not any(keep is not None and keep.turns for keep in keeps):
        return ""
    return "the recipe keeps neighbouring tokens by their sequency, and a convolution has none: give it a rule"


@lru_cache(maxsize=512)
def folds(product: str, map: LinearMap, recipe: Recipe) -> bool:
    """Whether steps of this product's forward operand move into grad_output, where there are several."""
    q = recipe.operand(PRODUCTS[product][1])
    if product == "output" or q is None or q.scale.group != "row" or again(product, map, recipe) is not None:
        return False
    return not _stays(product, map, recipe, q)


def rotates(product: str, map: LinearMap, recipe: Recipe) -> bool:
    """Whether what a backward product contracts is rotated in both operands, the other quantized again."""
    unit = recipe.product(product)
    quantized = unit.right != SAVED or recipe.operand(PRODUCTS[product][1]) is not None
    return unit.rotate is not None and quantized and not _rotation(product, map, recipe)


@lru_cache(maxsize=512)
def obstacle(product: str, map: LinearMap, recipe: Recipe) -> str:
    """Why two quantized operands cannot be multiplied as integers; empty if they can.

    A step that varies along a contracted axis does not pull out of the sum; it can only be folded into the other
    operand before that one is quantized. If it is constant over blocks of the axis, it pulls out of their sums
    (`fqt.kernels.blocked`).
    """
    name, other = PRODUCTS[product]
    left, right = operands(product, map, recipe)
    assert left is not None
    assert right is not None
    return (
        _unsupported(map)
        or _mixes_groups(product, map, left)
        or _rotation(product, map, recipe)
        or _fits_no_byte(left, name)
        or _fits_no_byte(right, other)
        or _steps_obstacle(product, map, recipe)
    )


def summed_in_blocks(product: str, map: LinearMap, recipe: Recipe) -> int:
    """In blocks of how many terms a product without obstacle is summed; 0 for one sum."""
    both = operands(product, map, recipe)
    if None in both or not _by_blocks(product, map, recipe):
        return 0
    if gathers(product, map, recipe):
        return GATHERED
    runs = [_run(product, map, recipe, name) for name in PRODUCTS[product]]
    return common_block(*runs) if any(runs) else 0


def kernel(product: str, map: LinearMap, recipe: Recipe, device: str) -> str:
    """What multiplies the codes of a product without obstacle, where that depends on them; else empty."""
    left, right = operands(product, map, recipe)
    assert left is not None
    assert right is not None
    if _by_blocks(product, map, recipe):
        return ""
    # Mixed channels of grad_weight, and signed ones of a convolution, are multiplied as bytes of any code.
    signed = isinstance(map, ConvMap) and left.code_dtype != torch.uint8
    if product == "grad_weight" and (left.transform.mixes_rows or signed):
        return integer.kernel_of(device, range_of(left.code_dtype), range_of(right.code_dtype))
    return integer.kernel_of(device, left.code_range, right.code_range)


def gathers(product: str, map: LinearMap, recipe: Recipe) -> bool:
    """Whether terms of a Linear's product are gathered: its left operand has a step for each, of few values."""
    name = PRODUCTS[product][0]
    q = recipe.operand(name)
    few = q is not None and q.scale.group == "column" and q.scale.stored.few
    return few and isinstance(map, DenseMap) and _run(product, map, recipe, name) == 1


def _by_blocks(product: str, map: LinearMap, recipe: Recipe) -> bool:
    """Whether steps are shared otherwise than by one for all or one per row."""
    return any(q.scale.group not in ("tensor", "row") for q in operands(product, map, recipe) if q is not None)


def _steps_obstacle(product: str, map: LinearMap, recipe: Recipe) -> str:
    """Why the steps of two operands do not come out of the product's sums."""
    name, other = PRODUCTS[product]
    left, right = operands(product, map, recipe)
    assert left is not None
    assert right is not None
    if isinstance(map, DenseMap) and _by_blocks(product, map, recipe):
        return _blocks_obstacle(product, map, recipe)
    return (
        _column(left, name)
        or _column(right, other)
        or _contracted(product, map, left)
        or _other(product, map, recipe, right)
        or _codes(product, right)
    )


def _blocks_obstacle(product: str, map: LinearMap, recipe: Recipe) -> str:
    """Why a Linear's product is not summed in blocks."""
    runs, fold = [], recipe.product(product).fold
    for name, q in zip(PRODUCTS[product], operands(product, map, recipe), strict=True):
        assert q is not None
        if any(coding.mode != "symmetric" for coding in q.codings):
            return f"{name} has an offset, which sums in blocks do not take"
        if q.transform.mixes_rows:
            return f"the transform of {name} mixes rows, which sums in blocks do not undo"
        if q.scale.row_axis == "sample":
            return f"{_what(q)} of {name} lies across a sample's tokens: give it the axis 'token'"
        if isinstance(q.transform, Rotated) and q.scale.row_axis == "channel" and product == "grad_input":
            return f"{name} is rotated along tokens, which sums in blocks do not undo"
        run = _run(product, map, recipe, name)
        if name == PRODUCTS[product][0] and gathers(product, map, recipe):
            run = 0
        if run % LEAST_BLOCK or run > MOST_TERMS:
            moves = name == PRODUCTS[product][1] and product != "output" and q.scale.group == "row"
            why = _stays(product, map, recipe, q) if moves else ""
            along = "" if run == 1 else f" in runs of {run}, not of a multiple of {LEAST_BLOCK} up to {MOST_TERMS}"
            return f"a step per {_what(q)} of {name} varies along a contracted axis{along}{why and f', and {why}'}"
        runs.append(run)
    if gathers(product, map, recipe) and runs[1]:
        left, right = PRODUCTS[product]
        return f"terms are gathered by their steps in {left}, across {right}'s blocks of {runs[1]}"
    if not common_block(*runs):
        return f"blocks of {runs[0]} and of {runs[1]} meet on the contracted axis: neither length divides the other"
    q = recipe.operand(PRODUCTS[product][1])
    if fold == "auto" and folds(product, map, recipe) and q is not None:
        return f"{_steps(product, map, q)}, on the contracted axis, and fold is 'auto', not 'always'"
    return ""


def _run(product: str, map: LinearMap, recipe: Recipe, name: str) -> int:
    """Over how many terms of a Linear's product a step of this operand is constant; 0 for all of them."""
    q, right = recipe.operand(name), again(product, map, recipe)
    if name == PRODUCTS[product][1] and right is not None:
        return right.scale.blocks().columns  # its rows are not contracted
    assert q is not None
    if name == PRODUCTS[product][1] and folds(product, map, recipe):
        return 0  # what is multiplied has one step
    blocks, axis = q.scale.blocks(), q.scale.row_axis or ("channel" if name == "grad_weight" else map.habit)
    # The rows of an operand are contracted where they are the product's sum: the weight's in grad_input, tokens in
    # grad_weight, channels of a grad_output whose rows are asked to be channels in grad_input.
    contracted = {"output": "input", "grad_input": "channel", "grad_weight": "token"}[product]
    rows = "channel" if name == "weight" else axis
    return blocks.rows if rows == contracted else blocks.columns


def _what(q: Quantizer) -> str:
    group = q.scale.group
    return group if isinstance(group, str) else "block of {} × {}".format(*group)


def _fits_no_byte(q: Quantizer, name: str) -> str:
    return "" if q.code_dtype in (torch.uint8, torch.int8) else f"codes of {name} do not fit a byte"


def _unsupported(map: LinearMap) -> str:
    if isinstance(map, DenseMap):
        return ""
    if any(more >= stride for more, stride in zip(map.output_padding, map.stride, strict=False)):
        return "output padding of a whole stride has no integer kernel"
    return "padding that differs from side to side has no integer kernel" if map.extra else ""


def _mixes_groups(product: str, map: LinearMap, q: Quantizer) -> str:
    grouped = isinstance(map, ConvMap) and map.groups > 1
    if product != "grad_weight" or not grouped or isinstance(q.transform, Identity):
        return ""
    return "the transform of grad_weight mixes channels of different groups"


def _rotation(product: str, map: LinearMap, recipe: Recipe) -> str:
    """Why the rotation of the left operand does not cancel in the right one; empty if it does, or there is none."""
    q = recipe.operand(PRODUCTS[product][0])
    if q is None or not isinstance(q.transform, Rotated):
        return ""
    if product == "grad_weight":
        if recipe.product(product).rotate is None:
            return "grad_weight's features are rotated along tokens, and input is not"
        return (
            ""
            if isinstance(map, DenseMap)
            else "a convolution's input has other positions than its output to rotate"
        )
    if map.transposed:
        return "the rotation of features is along another axis than a transposed convolution's output channels"
    grouped = isinstance(map, ConvMap) and map.groups > 1
    return "the rotation of features mixes channels of different groups" if grouped else ""


def _column(q: Quantizer, name: str) -> str:
    if q.scale.group in ("tensor", "row"):
        return ""
    return f"a step per {_what(q)} of {name} varies along a contracted axis"


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
    name = PRODUCTS[product][1]
    if again(product, map, recipe) is not None and any(coding.rounding == DITHERED for coding in q.codings):
        return f"{name} is quantized again with dither, which products take in grad_output only"
    if product == "output" or q.scale.group == "tensor":
        return ""
    if again(product, map, recipe) is not None:
        return f"{name} is quantized again with a step per {_what(q)}, which only sums in blocks take"
    why = _stays(product, map, recipe, q)
    if not why and recipe.product(product).fold == "auto":
        why = "fold is 'auto', not 'always'"
    return f"{_steps(product, map, q)}, on the contracted axis, and {why}" if why else ""


def _steps(product: str, map: LinearMap, q: Quantizer) -> str:
    axis = "channel" if product == "grad_input" else q.scale.axis or map.habit
    return f"{PRODUCTS[product][1]} has a step per {axis}"


def _stays(product: str, map: LinearMap, recipe: Recipe, q: Quantizer) -> str:
    """Why steps per row of the second operand cannot move into grad_output; empty if they can."""
    if recipe.product(product).fold == "never":
        return "fold is 'never', not 'always'"
    if product == "grad_weight" and (q.scale.axis or map.habit) == "token" and not map.aligned_tokens:
        return "a convolution's input has other positions than its output"
    return ""


def _codes(product: str, weight: Quantizer) -> str:
    return "" if product == "grad_weight" or weight.scale.mode == "symmetric" else "weight has an offset"
