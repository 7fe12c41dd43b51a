"""One product of a layer: what its two operands are, and what both take along the contraction.

    product      left          right      contracted
    output       input         weight     input features
    grad_input   grad_output   weight     output features
    grad_weight  grad_output   input      tokens

An operand-wise recipe names left operands and the forward's two; a `Product` says the rest of one product.
"""

from __future__ import annotations

from dataclasses import dataclass

from fqt.errors import FqtError
from fqt.kernels.codes import is_power_of_two
from fqt.quant.grid import Integers
from fqt.quant.keep import Keep
from fqt.quant.quantizer import Quantizer
from fqt.quant.scale import Scale

OPERANDS = ("input", "weight", "grad_input", "grad_weight")
PRODUCTS = {
    "output": ("input", "weight"),
    "grad_input": ("grad_input", "weight"),
    "grad_weight": ("grad_weight", "input"),
}
"""What each product multiplies, by field of `Recipe`."""

WEIGHT_AGAIN = "the right operand of grad_input"
INPUT_AGAIN = "the right operand of grad_weight"
"""What the forward's operands are called where a backward product quantizes them again."""

SAVED = "saved"
"""The right operand of a backward product: the forward pass's own codes."""

AGAIN = Quantizer(scale=Scale("tensor", "symmetric"), grid=Integers(8))
"""What a saved operand is quantized by that is turned along the contraction, where its codes are of no use.

Unbiased, so that the product remains an unbiased estimate; it adds some 1e-4 of the product's energy, which
gradients of more than 5 bits notice.
"""

FOLDS = ("never", "auto", "always")


@dataclass(frozen=True)
class Product:
    """What one product of a layer multiplies.

    Attributes:
        left: the quantizer of `input`, or of grad_output for this product; its name; or None for float.
        right: that of `weight` in the output. In a backward product `SAVED`, the codes that the forward pass
            multiplied, or a quantizer (or its name): the forward's value is quantized again along another axis. Its
            rows are what the product does not contract, so that blocks of 1 × 32 lie along the contraction. With a
            rounding that draws the product stays an unbiased estimate; to nearest it is biased.
        rotate: the largest block, a power of two, of a randomized Hadamard matrix along the contraction, which both
            operands take and which cancels: 128; None for none. A saved right operand is then quantized again, to
            8 bits, stochastically. In the output the signs are always the same, in the others drawn.
        keep: what is kept of grad_output's rows before it is quantized, a Linear's tokens or a convolution's
            samples: a sample with weights 1/p, or a part of their spectrum (`fqt.quant.keep`); None for all.
        fold: as `Recipe.fold`, for this product; None for the recipe's.

    Raises:
        FqtError: says what is wrong, and what is known.
    """

    left: Quantizer | str | None = None
    right: Quantizer | str | None = SAVED
    rotate: int | None = None
    keep: Keep | None = None
    fold: str | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and not isinstance(self.keep, Keep):
            raise FqtError(f"keep must be a sampler of rows such as fqt.quant.Leverage(0.5), not {self.keep!r}")
        check_block(self.rotate)
        if self.fold is not None:
            check_fold(self.fold)


def check_block(block: int | None) -> None:
    """Raises FqtError for what is no size of a rotation."""
    if block is not None and not is_power_of_two(block):
        raise FqtError(f"rotate is the size of a Hadamard block, a power of two such as 128, not {block!r}")


def check_fold(fold: str) -> None:
    """Raises FqtError for an unknown fold."""
    if fold not in FOLDS:
        raise FqtError(f"unknown fold {fold!r}; known: {', '.join(FOLDS)}")
