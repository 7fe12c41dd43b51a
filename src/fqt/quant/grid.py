"""Grids: which numbers can be stored. A grid is a set of integers in units of a step; a code is its integer.

    Integers(b)      0 … 2^b − 1, or on a symmetric scale −(2^(b−1) − 1) … 2^(b−1) − 1
    Floats(e, m)     ± the numbers that a float with e exponent and m mantissa bits holds, in units of the least:
                     Floats(2, 1), E2M1, is ±{0, 1, 2, 3, 4, 6, 8, 12}; Floats(3, 0) is ±{0, 1, 2, 4, …, 64}

All but the eight-bit floats fit a byte, so that products of their codes are products of integers.
"""

from __future__ import annotations

from dataclasses import dataclass

from fqt.errors import FqtError
from fqt.kernels.codes import Levels


@dataclass(frozen=True)
class Grid:
    """A set of integers; `bits` says how many a code takes."""

    @property
    def bits(self) -> int:
        """How many bits tell the levels apart."""
        raise NotImplementedError

    def levels(self, mode: str) -> Levels:
        """The levels on a scale of that mode ("affine", "zero", "symmetric")."""
        raise NotImplementedError

    def with_bits(self, bits: int) -> Grid:
        """The grid of the same kind with as many bits."""
        raise FqtError(f"{self} comes in one width only")


@dataclass(frozen=True)
class Integers(Grid):
    """The uniform integer grid of `bits` bits, 2 to 8."""

    bits: int = 8

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in range(2, 9):
            raise FqtError(f"{self.bits!r} bits: this grid has 2 to 8")

    def levels(self, mode: str) -> Levels:
        """0 … B; on a symmetric scale ± half of that, without −2^(b−1), so that the grid is symmetric too."""
        if mode == "symmetric":
            return Levels(-self.symmetric_steps, self.symmetric_steps)
        return Levels(0, self.affine_steps)

    def with_bits(self, bits: int) -> Integers:
        """The integers of another width."""
        return Integers(bits)

    @property
    def affine_steps(self) -> int:
        """B = 2^b − 1, the last unsigned code."""
        return 2**self.bits - 1

    @property
    def symmetric_steps(self) -> int:
        """2^(b−1) − 1, the last signed code."""
        return int(2 ** (self.bits - 1)) - 1


@dataclass(frozen=True)
class Floats(Grid):
    """Small floats: a sign, `exponent` bits and `mantissa` bits, with subnormals, without infinities.

    Attributes:
        exponent: 1 to 5 bits.
        mantissa: 0 to 3 bits.
        reserved: how many of the largest magnitudes are no numbers (E4M3 gives up one, E5M2 four).
    """

    exponent: int
    mantissa: int
    reserved: int = 0

    def __post_init__(self) -> None:
        if self.exponent not in range(1, 6) or self.mantissa not in range(4) or self.reserved < 0:
            raise FqtError(f"{self!r}: give 1 to 5 exponent and 0 to 3 mantissa bits")

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return 1 + self.exponent + self.mantissa

    def levels(self, mode: str) -> Levels:
        """± the magnitudes; symmetric scales only."""
        if mode != "symmetric":
            raise FqtError(f"a grid of floats is symmetric about 0: its scale cannot be {mode!r}")
        place = (1 << (self.exponent + self.mantissa)) - 1 - self.reserved
        whole, fraction = divmod(place, 1 << self.mantissa)
        largest = fraction if whole == 0 else ((1 << self.mantissa) + fraction) << (whole - 1)
        return Levels(-largest, largest, self.mantissa)


E2M1, E4M3, E5M2 = Floats(2, 1), Floats(4, 3, reserved=1), Floats(5, 2, reserved=4)
