"""Recipes with a name of their own: the default, and each paper's operands of all three products.

What a paper has beside quantizers of training products (learned scales, optimizers, schedules, other layers) is
left out, and where a paper's operand would bias the gradient ours mostly does not: docs/recipes.md says both.
"""

from __future__ import annotations

from typing import Any

from fqt.nn.product import Product
from fqt.quant.grid import E2M1, Integers
from fqt.quant.keep import ByRange, Leverage, LowSequency, Sequency
from fqt.quant.quantizer import Quantizer
from fqt.quant.scale import Scale
from fqt.quant.transform import BlockHouseholder

DEFAULT = "default"
_BYTES = {"input": "psq8", "weight": "psq8@channel", "fold": "always"}
_SQUARE = Scale((128, 128), "symmetric")


def _hlq(keep: LowSequency) -> dict[str, Any]:
    return {
        "input": None,
        "weight": None,
        "grad_input": Product("hlq4", "ptq8", rotate=16),
        "grad_weight": Product("ptq8", "ptq8", keep=keep),
    }


def _lbp(keep: LowSequency) -> dict[str, Any]:
    return {**_BYTES, "grad_input": Product("psq8", keep=keep), "grad_weight": Product("psq8@channel", keep=keep)}


RECIPES: dict[str, dict[str, Any]] = {
    "none": {"input": None, "weight": None},
    "qat": {},
    # Chosen by measured gradient variance: see the table in docs/recipes.md.
    DEFAULT: {**_BYTES, "grad_input": "psq8x", "grad_weight": "psq8x@channel"},
    # Every operand of all three products in four bits; the gradient stays unbiased. Not thq4d: it has the right
    # operand in eight bits, and in four it loses in every kind of layer (docs/recipes.md).
    "int4all": {
        "input": "psq4",
        "weight": "psq4@channel",
        "grad_input": "shq4d",
        "grad_weight": "shq4d@channel",
        "fold": "always",
    },
    # For AVX2 without VNNI, where narrow codes are multiplied faster: see docs/recipes.md.
    "narrow": {
        "input": "psq7",
        "weight": "psq8@channel",
        "grad_input": "psq4d",
        "grad_weight": "psq4d@channel",
        "fold": "always",
    },
    # StatQuant (2010.14298), its released code: Householder without our guard, a step per feature for grad_weight.
    "statquant": {
        "grad_input": Quantizer(transform=BlockHouseholder(guard=False), scale=Scale("row"), grid=Integers(5)),
        "grad_weight": Quantizer(scale=Scale("column", axis="sample"), grid=Integers(8)),
    },
    # LUQ (2112.10769).
    "luq": {"input": "ptq4", "weight": "ptq4", "grad_input": "luq4", "grad_weight": "luq4"},
    # INT4 training (2306.11987); whole rows are kept, where the paper keeps the two halves of a row apart.
    "int4": {
        "output": Product("ptq4", "ptq4", rotate=32),
        "grad_input": Product("split4", keep=Leverage(0.5)),
        "grad_weight": Product("split4", keep=Leverage(0.5)),
    },
    # Jetfire (2403.12422).
    "jetfire": dict.fromkeys(("input", "weight", "grad_input", "grad_weight"), "tile8"),
    # HLQ (2406.15102), and its grad_weight sampled without bias.
    "hlq": _hlq(LowSequency(8, 16)),
    "hlq_sampled": _hlq(Sequency(8, 16)),
    # LBP-WHT (2309.15275), 21 of 64 tokens, which lie in a line here and in 8 × 8 patches there; and sampled
    # without bias.
    "lbp": _lbp(LowSequency(21, 64)),
    "lbp_sampled": _lbp(Sequency(21, 64)),
    # 1-bit FQT (2408.14267): a quarter of the rows in four bits. The forward pass has two bits, where the paper has
    # signs and one scale: a grid of two levels without a zero is none of ours.
    "onebit": {
        "input": "psq2",
        "weight": "psq2@channel",
        "grad_input": Product("psq4", keep=ByRange(0.25)),
        "grad_weight": Product("psq4@channel", keep=ByRange(0.25)),
        "fold": "always",
    },
    # ShiftQuant (2411.10948).
    "shiftquant": {"input": "ptq4", "weight": "ptq4", "grad_input": "shift4", "grad_weight": "shift4"},
    # TetraJet (2502.20853).
    "tetrajet": {
        "input": "mxfp4",
        "weight": "mxfp4",
        "grad_input": Product("mxfp4", "mxfp4"),
        "grad_weight": Product("mxfp4", "mxfp4"),
    },
    # Dynamic block-level fallback (2503.08040).
    "fallback": {
        "input": "fallback8",
        "weight": Quantizer(scale=_SQUARE, grid=Integers(8), rounding="nearest"),
        "grad_input": Quantizer(scale=_SQUARE, grid=Integers(8)),
        "grad_weight": Quantizer(scale=_SQUARE, grid=Integers(8)),
    },
    # NVFP4 (2509.25149); the name nvfp4 is its quantizer's.
    "nvfp4all": {
        "input": "nvfp4",
        "weight": Quantizer(scale=Scale((16, 16), "symmetric", store="e4m3"), grid=E2M1, rounding="nearest"),
        "grad_input": "nvfp4",
        "grad_weight": Product("nvfp4", "nvfp4", rotate=16),
    },
    # UFP4 (2606.20381).
    "ufp4": {
        "output": Product("psq4", "psq4@channel", rotate=128),
        "grad_input": Product("psq4", "ptq4", rotate=128),
        "grad_weight": Product("psq4@channel", "ptq4", rotate=128),
    },
}
"""The words of each, as `Recipe` takes them; all other recipes are named after their `grad_input`."""
