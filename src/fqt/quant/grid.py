"""Grids: which numbers can be stored. A grid is a set of numbers in units of a step; a code is its number.

    Integers(b)      0 … 2^b − 1, or on a symmetric scale −(2^(b−1) − 1) … 2^(b−1) − 1
    Floats(e, m)     ± the numbers that a float with e exponent and m mantissa bits holds, in units of the least:
                     Floats(2, 1), E2M1, is ±{0, 1, 2, 3, 4, 6, 8, 12}; Floats(3, 0) is ±{0, 1, 2, 4, …, 64}
    Pairs(b)         ±c·(2c + 1), c = 2^(b−1) − 1: two codes of ±c, (2c)·coarse + fine
    Logarithmic(b)   0 and ± powers of 2^(1/8)

All but eight-bit floats, pairs of more than four bits and powers fit a byte: products of their codes are products
of integers.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from fqt.errors import FqtError
from fqt.kernels.codes import Levels
from fqt.quant.abstract import Abstract
from fqt.quant.own import own, words_of

MOST_BITS = 16
"""Of a code."""


@dataclass(frozen=True)
class Grid(Abstract):
    """A set of numbers in units of a step; `bits` says how many a code takes."""

    instead: ClassVar[str] = "Integers(8), Floats(2, 1), Pairs(4) or Logarithmic(8)"

    @property
    @abstractmethod
    def bits(self) -> int:
        """How many bits tell the levels apart."""

    @abstractmethod
    def levels(self, mode: str) -> Levels:
        """The levels on a scale of that mode: from −L to L if it is "symmetric"; if "affine" or "zero", 0 … B."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that `with_bits` takes: its own, where the kind has one width."""
        return (self.bits,)

    def with_bits(self, bits: int) -> Grid:
        """The grid of the same kind with as many bits."""
        if bits == self.bits:
            return self
        raise FqtError(f"{self} comes in one width, {self.bits} bits, not {bits!r}: see grid.widths")

    @property
    def words(self) -> dict[str, Any]:
        """As a recipe's table has it."""
        return {"grid": words_of(self)}


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

    @property
    def widths(self) -> tuple[int, ...]:
        """2 to 8."""
        return tuple(range(2, 9))

    def with_bits(self, bits: int) -> Integers:
        """The integers of another width."""
        return Integers(bits)

    @property
    def words(self) -> dict[str, Any]:
        """The bits."""
        return {"bits": self.bits}

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
        _only_symmetric("floats", mode)
        place = (1 << (self.exponent + self.mantissa)) - 1 - self.reserved
        whole, fraction = divmod(place, 1 << self.mantissa)
        largest = fraction if whole == 0 else ((1 << self.mantissa) + fraction) << (whole - 1)
        return Levels(-largest, largest, self.mantissa)

    @property
    def words(self) -> dict[str, Any]:
        """ "e2m1" and the like."""
        name = f"e{self.exponent}m{self.mantissa}"
        known = _FLOATS.get(name, Floats(self.exponent, self.mantissa))
        return {"grid": name if known == self else words_of(self)}


@dataclass(frozen=True)
class Pairs(Grid):
    """Two codes of ±c each, c = 2^(b−1) − 1, for the value 2c·coarse + fine: the integers up to c·(2c + 1).

    A coarse code to nearest leaves a rest of at most c, which the fine code rounds; so the pair as a whole is
    rounded like an integer.

    Attributes:
        each: bits of each code, 2 to 8.
    """

    each: int = 4

    def __post_init__(self) -> None:
        if type(self.each) is not int or self.each not in range(2, 9):
            raise FqtError(f"{self.each!r} bits: each code of a pair has 2 to 8")

    @property
    def bits(self) -> int:
        """Of both codes."""
        return 2 * self.each

    def levels(self, mode: str) -> Levels:
        """±c·(2c + 1); symmetric scales only."""
        _only_symmetric("pairs", mode)
        c = (1 << (self.each - 1)) - 1
        return Levels(-c * (2 * c + 1), c * (2 * c + 1))

    @property
    def words(self) -> dict[str, Any]:
        """The bits of each."""
        return {"grid": "pairs", "bits": self.each}


@dataclass(frozen=True)
class Logarithmic(Grid):
    """0 and ± the powers of 2^(1/8), 2^(b−1) − 1 of them: a sign and an exponent of b − 1 bits (LNS).

    Its levels are no integers: codes are float32 numbers, and products of them are simulated.
    """

    width: int = 8

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width not in range(6, 9):
            raise FqtError(f"{self.width!r} bits: this grid has 6 to 8")

    @property
    def bits(self) -> int:
        """Sign and exponent."""
        return self.width

    def levels(self, mode: str) -> Levels:
        """Up to 2¹⁶; symmetric scales only."""
        _only_symmetric("powers", mode)
        return Levels(-(2**16), 2**16, table=_powers(2 ** (self.width - 1) - 1, 8, 16))

    @property
    def words(self) -> dict[str, Any]:
        """The bits."""
        return {"grid": "log8", "bits": self.width}


def check_levels(grid: Grid, mode: str, headroom: int) -> None:
    """Raises FqtError unless a grid's bits and levels on a scale of that mode fit each other and the scale.

    Args:
        grid: whose.
        mode: of the scale.
        headroom: how many levels the rounding leaves free at the upper end.
    """
    bits, levels = grid.bits, grid.levels(mode)
    if not isinstance(levels, Levels):
        raise FqtError(f"{grid}: levels() returns a fqt.kernels.codes.Levels, not {type(levels).__name__}")
    if type(bits) is not int or bits not in range(1, MOST_BITS + 1):
        raise FqtError(f"{grid}: a code has 1 to {MOST_BITS} bits, a whole number, not {bits!r}")
    if mode == "symmetric" and levels.low != -levels.high:
        raise FqtError(
            f"{grid}: levels on a symmetric scale go from −L to L, not from {levels.low} to {levels.high}"
        )
    if mode != "symmetric" and (levels.low != 0 or not levels.uniform):
        raise FqtError(
            f"{grid}: levels on a scale that is {mode!r} are the integers from 0 on; make it 'symmetric'"
        )
    if levels.high - headroom < (2 if mode == "zero" else 1):
        raise FqtError(f"{grid}: too few levels for a scale that is {mode!r} with this rounding")
    count = levels.high - levels.low + 1 if levels.uniform else len(levels.numbers)
    if count > 2**bits:
        raise FqtError(f"{grid}: {bits} bits do not tell {count} levels apart")


def _only_symmetric(what: str, mode: str) -> None:
    if mode != "symmetric":
        raise FqtError(f"a grid of {what} is symmetric about 0: its scale cannot be {mode!r}")


@lru_cache(maxsize=16)
def _powers(count: int, per_octave: int, top: int) -> tuple[float, ...]:
    """0 and `count` powers of 2^(1/per_octave), the largest 2^top, to float32."""
    exponents = torch.arange(1 - count, 1, dtype=torch.float64) / per_octave + top
    return (0.0, *torch.exp2(exponents).float().tolist())


E2M1, E4M3, E5M2 = Floats(2, 1), Floats(4, 3, reserved=1), Floats(5, 2, reserved=4)
_FLOATS = {"e4m3": E4M3, "e5m2": E5M2}


def grid_from(table: Mapping[str, Any]) -> Grid:
    """The grid that a recipe's table names by `grid` and `bits`.

    `grid` is "integers" (the default), "pairs" or "log8", with `bits`, 8 by default; or "e2m1" and the like; or a
    class of one's own, as `words_of` writes it.
    """
    name, bits = table.get("grid", "integers"), table.get("bits", 8)
    floats = re.fullmatch(r"e(\d)m(\d)", name) if isinstance(name, str) else None
    if floats is not None:
        found = _FLOATS.get(name) or Floats(int(floats[1]), int(floats[2]))
        if bits != found.bits and "bits" in table:
            raise FqtError(f"grid {name!r} has {found.bits} bits, not {bits!r}")
        return found
    if isinstance(name, Mapping) or (isinstance(name, str) and ":" in name):
        mine = own(Grid, name, "grid")  # type: ignore[type-abstract]
        return mine.with_bits(bits) if "bits" in table else mine
    kinds: dict[str, type[Integers] | type[Pairs] | type[Logarithmic]] = {
        "integers": Integers,
        "pairs": Pairs,
        "log8": Logarithmic,
    }
    if not isinstance(name, str) or name not in kinds:
        raise FqtError(
            f"unknown grid {name!r}; known: {', '.join(kinds)}, e2m1 and other floats of that form, module:Class"
        )
    return kinds[name](bits)


def grid_words(grid: Grid) -> dict[str, Any]:
    """As a recipe's table has it: what `grid_from` reads; one's own class by its path, not as what it extends."""
    return grid.words if type(grid).__module__ == __name__ else {"grid": words_of(grid)}
