"""What a row of the catalog is: a method's name with its widths, its source and its four choices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from fqt.errors import FqtError
from fqt.kernels.rounding import MOST_BITS, ROUNDINGS, FewBits
from fqt.quant.best import rounded
from fqt.quant.grid import Grid, Integers
from fqt.quant.quantizer import Quantizer
from fqt.quant.scale import Scale
from fqt.quant.transform import Identity, Transform

ROUNDING_SUFFIX = {"": "stochastic", "d": "dithered", "x": "best", "n": "nearest"}
_SUFFIX_OF = {rounding: letter for letter, rounding in ROUNDING_SUFFIX.items()}
_SUFFIX_OF |= {name: f"k{way.bits}" for name, way in ROUNDINGS.items() if isinstance(way, FewBits)}
_ALL = tuple(ROUNDING_SUFFIX.values())
_PLAIN = ("stochastic", "nearest")
_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_NONE, _BY_ROW = Identity(), Scale("row")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Attributes:
        name: authors and a short title.
        year: of its first version.
        arxiv: its number; empty where there is none.
    """

    name: str
    year: int
    arxiv: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method: what it is called, where it comes from, and its four choices.

    Attributes:
        name: "*" stands where the bits are; a method of one format may have none.
        title: in words.
        paper: the source.
        what: the choices in one line.
        widths: the bits that a name can have.
        grid: by bits.
        transform, scale: as `Quantizer` takes them.
        roundings: names; the first is meant where a name has no suffix.
        bias: "exact" (none), "asymptotic", or "biased: " and by what; of the first rounding.
        product: what a product of its codes is: "integer"; "blocked", integer within each block that shares a step
            along the contraction, and added up in float between them; "simulated", no integers at all. Products
            that are not "integer" run simulated here, unless a kernel for blocks takes them.
        usual: the widths that tables show; none: 4 bits if there are such, else the only ones.
        left_out: what of the paper is left out, or done otherwise.
    """

    name: str
    title: str
    paper: Paper
    what: str
    widths: tuple[int, ...] = _WIDTHS
    grid: Callable[[int], Grid] = Integers
    transform: Transform = _NONE
    scale: Scale = _BY_ROW
    roundings: tuple[str, ...] = _ALL
    bias: str = "exact"
    product: str = "integer"
    usual: tuple[int, ...] = ()
    left_out: str = ""

    @property
    def stem(self) -> str:
        """The name without bits."""
        return self.name.replace("*", "")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its widths, in its first rounding."""
        return tuple(self.name.replace("*", str(bits)) for bits in self.widths)

    @property
    def shown(self) -> tuple[str, ...]:
        """The names that tables show: of the usual widths, and dithered ones."""
        widths = self.usual or ((4,) if 4 in self.widths else self.widths)
        letters = ("", "d") if "dithered" in self.roundings else ("",)
        return tuple(self.name.replace("*", str(bits)) + letter for bits in widths for letter in letters)

    def bits_of(self, name: str) -> int:
        """The width that one of its names says."""
        match = self.pattern.fullmatch(name)
        return int(match[1]) if match is not None and match[1] else self.widths[0]

    @cached_property
    def suffixes(self) -> dict[str, str]:
        """What a name may have behind its bits, and the rounding that it means; none means the first."""
        spelled = {_SUFFIX_OF[rounding]: rounding for rounding in self.roundings if rounding in _SUFFIX_OF}
        return {"": self.roundings[0], **spelled}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Its names, with or without bits; groups: bits, the rounding's suffix, axis."""
        before, star, after = map(re.escape, self.name.partition("*"))
        bits = r"((?:0|[1-9][0-9]*)?)" if star else "()"
        return re.compile(before + bits + after + r"([dxn]?|k[1-9][0-9]*)(?:@([a-z]+))?")

    def quantizer(self, bits: int, suffix: str = "", axis: str | None = None) -> Quantizer:
        """The quantizer of this width, rounding and axis."""
        if type(bits) is not int or bits not in self.widths:
            most = "" if len(self.widths) == 1 else f" to {self.widths[-1]}"
            name = self.name.replace("*", str(bits)) + suffix
            raise FqtError(f"quantizer {name!r} has {bits!r} bits: there are {self.widths[0]}{most}")
        if suffix not in self.suffixes:
            wrong = ROUNDING_SUFFIX.get(suffix, suffix)
            known = f"k1 to k{MOST_BITS}, random bits" if "k1" in self.suffixes else " or ".join(self.roundings)
            raise FqtError(f"{self.name.replace('*', str(bits))} has no {wrong} rounding, but {known}")
        rounding = self.suffixes[suffix]
        # Without a transform exact zeros stay exact, which dithered rounding cannot give.
        mode = "zero" if rounding == "best" and isinstance(self.transform, Identity) else self.scale.mode
        return rounded(self.transform, replace(self.scale, axis=axis, mode=mode), self.grid(bits), rounding)

    def name_of(self, q: Quantizer) -> str | None:
        """What it calls this quantizer; None if it has not made it."""
        mine = (self.transform, self.scale.group, self.scale.store, self.scale.range)
        if (
            q.transform,
            q.scale.group,
            q.scale.store,
            q.scale.range,
        ) != mine or q.rounding_name not in self.roundings:
            return None
        suffix = next(suffix for suffix, rounding in self.suffixes.items() if rounding == q.rounding_name)
        for bits in self.widths:
            if self.grid(bits) == q.grid and self.quantizer(bits, suffix, q.scale.axis) == q:
                axis = f"@{q.scale.axis}" if q.scale.axis else ""
                return self.name.replace("*", str(bits)) + suffix + axis
        return None
