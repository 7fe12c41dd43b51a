"""The quantizers of the paper's figures, as points of the four choices, and the cells of its variance sweep.

Against the catalog's, block Householder goes without its guard, which is ours; PTQ has its offset at the minimum,
as the paper has it (the released code puts zero on a code, which is weaker). Scaled Hadamard and dithered rounding
are not the paper's and are shown for reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fqt.nn import Recipe
from fqt.quant import Quantizer, quantizer
from fqt.quant.grid import Integers
from fqt.quant.scale import Scale
from fqt.quant.transform import BlockHouseholder

__all__ = ["METHODS", "Cell", "paper_quantizer", "paper_quantizers", "sweep"]

METHODS = ("ptq", "psq", "bhq", "shq")  # in the order, and with the colours, of all figures
# The released code's quantizer for the weight gradient in PSQ and BHQ runs: a step per feature (c, h, w), the range
# over the batch. No integer convolution can use it, since positions are summed; the paper says one per tensor.
_RELEASED_WEIGHT = Quantizer(scale=Scale("column", axis="sample"), grid=Integers(8))


def paper_quantizer(method: str, bits: int, rounding: str = "stochastic") -> Quantizer:
    """A method of `METHODS` at some bits, for grad_input."""
    q = replace(quantizer(method, bits), rounding=rounding)
    return replace(q, transform=BlockHouseholder(guard=False)) if method == "bhq" else q


def paper_quantizers(bits: Sequence[int], roundings: Sequence[str]) -> dict[tuple[str, str, int], Quantizer]:
    """All of them, by (method, rounding, bits)."""
    return {
        (method, rounding, b): paper_quantizer(method, b, rounding)
        for method in METHODS
        for rounding in roundings
        for b in bits
    }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the variance sweep: what quantizes the two gradients of every layer.

    Attributes:
        method, rounding, bits: of grad_input; None where it is exact.
        grad_weight: "exact"; "ptq8", the paper's; or "column8", the released code's for PSQ and BHQ.
    """

    method: str | None
    rounding: str | None
    bits: int | None
    grad_weight: str

    def recipe(self) -> Recipe:
        """The recipe; the forward pass is the paper's."""
        weight = {"exact": None, "ptq8": "ptq8", "column8": _RELEASED_WEIGHT}[self.grad_weight]
        if self.method is None or self.bits is None or self.rounding is None:
            return Recipe(grad_weight=weight)
        return Recipe(grad_input=paper_quantizer(self.method, self.bits, self.rounding), grad_weight=weight)


def sweep(bits: Sequence[int]) -> list[Cell]:
    """The cells of the figure, method by method.

    grad_input alone with stochastic and dithered rounding, which shows the law of the bits; with the paper's
    8-bit PTQ for grad_weight, the same for every method; and what that quantizer and the released code's add.
    """
    cells = [
        Cell(method=method, rounding=rounding, bits=b, grad_weight=weight)
        for method in METHODS
        for rounding, weight in (("stochastic", "exact"), ("dithered", "exact"), ("stochastic", "ptq8"))
        for b in bits
    ]
    weights = ("ptq8", "column8")
    cells += [Cell(method=None, rounding=None, bits=None, grad_weight=weight) for weight in weights]
    ends = [b for b in bits if b in (4, 8)]
    cells += [
        Cell(method=method, rounding="stochastic", bits=b, grad_weight="column8")
        for method in ("psq", "bhq")
        for b in ends
    ]
    return cells
