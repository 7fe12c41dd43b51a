"""Scale: who shares a step, and where the codes' origin lies. Grid: which codes there are.

From a group's range [lo, hi] and a number of steps n (B = 2^b − 1, one less with dither):

    affine      offset = lo, step = (hi − lo)/n                     codes 0 … B
    zero        the same with 0 exactly on a code: offset = −z·step, z an integer      codes 0 … B
    symmetric   offset = 0, step = max(|lo|, |hi|)/(2^(b−1) − 1)    codes −(2^(b−1) − 1) … 2^(b−1) − 1

A constant group gets step 0 and offset lo (symmetric: step |lo|, code ±1), so that it comes back bit for bit.
Nothing is ever clipped: an absolute epsilon, the usual remedy against a zero range, was rejected because it is
a no-op for large values and swamps small ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from fqt.errors import FqtError

GROUPS = ("tensor", "row", "column")
MODES = ("affine", "zero", "symmetric")
AXES = ("sample", "token", "channel")


@dataclass(frozen=True)
class Scale:
    """Who shares a step, and where zero lies.

    Attributes:
        group: "tensor", "row" or "column" of the matrix that is quantized.
        mode: "affine", "zero" (affine with zero on a code) or "symmetric".
        axis: what a layer takes as rows: "sample", "token" (every position of a sequence or an image) or
            "channel" (the output channel); None for the operand's own habit. It says nothing for a matrix.
    """

    group: str = "row"
    mode: str = "affine"
    axis: str | None = None

    def __post_init__(self) -> None:
        for field, value, known in (("group", self.group, GROUPS), ("mode", self.mode, MODES)):
            if value not in known:
                raise FqtError(f"unknown scale {field} {value!r}; known: {', '.join(known)}")
        if self.axis is not None and self.axis not in AXES:
            raise FqtError(f"unknown axis {self.axis!r}; known: {', '.join(AXES)}")


@dataclass(frozen=True)
class Integers:
    """The uniform integer grid of `bits` bits, 2 to 8."""

    bits: int = 8

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in range(2, 9):
            raise FqtError(f"{self.bits!r} bits: this grid has 2 to 8")

    @property
    def affine_steps(self) -> int:
        """B = 2^b − 1, the last unsigned code."""
        return 2**self.bits - 1

    @property
    def symmetric_steps(self) -> int:
        """2^(b−1) − 1, the last signed code; −2^(b−1) is not used, so that the grid is symmetric."""
        return int(2 ** (self.bits - 1)) - 1
