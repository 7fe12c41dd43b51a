"""The catalog: methods of the literature by name, `psq4`, `shq4d`, `psq8d@channel`, `mxfp4`, `int4rht`.

A method is a row of a table, four choices with their source. A name is the method's with its bits in place, then a
letter for the rounding where it is not the method's first, or `k` and how many random bits that takes, then `@` and
an axis. A new method is a new row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from fqt.errors import FqtError, UnknownName, nearest
from fqt.kernels.rounding import MOST_BITS, ROUNDINGS, FewBits, Rounding
from fqt.quant.best import Best
from fqt.quant.grid import E2M1, E4M3, E5M2, Floats, Grid, Integers, Logarithmic, Pairs
from fqt.quant.keep import ByRange
from fqt.quant.quantizer import Quantizer
from fqt.quant.scale import Scale
from fqt.quant.transform import BlockHouseholder, Identity, Kept, Rotated, ScaledHadamard, Transform

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


_STATQUANT = Paper("Chen et al., StatQuant", 2020, "2010.14298")
_OURS = Paper("this library", 2026)
_LUQ = Paper("Chmiel et al., LUQ", 2021, "2112.10769")
_FP8 = Paper("Micikevicius et al., FP8 formats", 2022, "2209.05433")


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


def _symmetric(group: str | tuple[int, int], store: str = "float32") -> Scale:
    return Scale(group, "symmetric", store=store)


def _few_bits(word: str, default: int = 4) -> tuple[str, ...]:
    """Names of roundings with few random bits, the default first."""
    return tuple(
        f"{word}{bits}" for bits in sorted(range(1, MOST_BITS + 1), key=lambda bits: (bits != default, bits))
    )


_SRU = Paper("Jeong et al., SRU-Q", 2024)
_SRU_LEFT_OUT = (
    "its shift register, whose bits neighbours share and which repeats (here every entry has bits of its own), and "
    "the way of drawing that follows the batch size; the step per row and the 4 random bits of a bare name are "
    "ours (sru8k6 has 8-bit codes and 6 random bits)"
)
_ROTATED_AGAIN = "the other operand of a product is rotated and rounded again, to 8 bits without bias"
_WEIGHT_RULES = "rules for weights near the edge of a bin; selective higher precision"
_ROWS = (
    Method(
        name="ptq*",
        title="per-tensor quantizer",
        what="integers, one affine step for the tensor",
        scale=Scale("tensor"),
        paper=_STATQUANT,
    ),
    Method(
        name="hind*",
        title="in-hindsight ranges",
        paper=Paper("Fournarakis & Nagel", 2021, "2105.04246"),
        what="as ptq, in the decayed mean of the ranges of the tensors before",
        left_out=(
            "the same for activations; a zero that is rounded to a code; certified in nine tenths of the tensor's "
            "own range, measured in its own, as a first tensor is, which is exact"
        ),
        scale=Scale("tensor", range="hindsight"),
        roundings=("stochastic", "dithered", "nearest"),
        bias="biased: clips what lies outside",
        usual=(8,),
    ),
    Method(
        name="psq*",
        title="per-sample quantizer",
        what="integers, an affine step per row",
        paper=_STATQUANT,
    ),
    Method(
        name="bhq*",
        title="block Householder quantizer",
        what="rows mixed by reflections, then integers, an affine step per row",
        transform=BlockHouseholder(),
        paper=_STATQUANT,
    ),
    Method(
        name="shq*",
        title="scaled Hadamard quantizer",
        what="rows scaled and mixed by a random Hadamard, then integers, an affine step per row",
        transform=ScaledHadamard(),
        paper=_OURS,
    ),
    Method(
        name="thq*",
        title="two-sided Hadamard quantizer",
        what="features rotated by a random Hadamard of 128, rows as shq, integers, an affine step per row",
        left_out=_ROTATED_AGAIN,
        transform=Rotated(ScaledHadamard()),
        paper=_OURS,
    ),
    Method(
        name="int*rht",
        title="integers after a rotation",
        paper=Paper("UFP4", 2026, "2606.20381"),
        what="features rotated by a random Hadamard of 128, integers, an affine step per row",
        left_out=_ROTATED_AGAIN,
        transform=Rotated(Identity()),
    ),
    Method(
        name="hlq*",
        title="Hadamard low-rank quantizer, its grad_input",
        paper=Paper("Kim et al., HLQ", 2024, "2406.15102"),
        what="features rotated in blocks of 16, integers, an affine step per row; not its biased grad_weight",
        left_out=(
            "grad_weight from 8 of 16 low-sequency rows, which is no quantizer of an operand: the recipes hlq "
            "(biased) and hlq_sampled have it"
        ),
        transform=Rotated(Identity(), block=16),
    ),
    Method(
        name="luq*",
        title="logarithmic unbiased quantizer",
        what="powers of two and 0, one step for the tensor",
        left_out=(
            "averaging several draws, the range of the step before, deterministic clipping of the forward pass"
        ),
        widths=(2, 3, 4),
        grid=lambda bits: Floats(bits - 1, 0),
        scale=_symmetric("tensor"),
        roundings=_PLAIN,
        paper=_LUQ,
    ),
    Method(
        name="luqr*",
        title="logarithmic unbiased quantizer, by row",
        what="powers of two and 0, a step per row",
        widths=(2, 3, 4),
        grid=lambda bits: Floats(bits - 1, 0),
        scale=_symmetric("row"),
        roundings=_PLAIN,
        paper=_LUQ,
    ),
    Method(
        name="mxfp*",
        title="microscaling floats",
        paper=Paper("Chen et al., TetraJet", 2025, "2502.20853"),
        what="E2M1, blocks of 1 × 32, power-of-two steps rounded up",
        left_out=_WEIGHT_RULES,
        widths=(4,),
        grid=lambda _: E2M1,
        scale=_symmetric((1, 32), "power"),
        roundings=_PLAIN,
        product="blocked",
    ),
    Method(
        name="mxint*",
        title="microscaling integers",
        paper=Paper("Rouhani et al., Microscaling", 2023, "2310.10537"),
        what="integers about 0, blocks of 1 × 32, power-of-two steps rounded up",
        scale=_symmetric((1, 32), "power"),
        roundings=_PLAIN,
        product="blocked",
        usual=(4, 8),
    ),
    Method(
        name="nvfp*",
        title="NVFP4 with head-room",
        paper=Paper("NVIDIA, NVFP4", 2025, "2509.25149"),
        what="E2M1, blocks of 1 × 16, E4M3 steps under one of the tensor, 16/17 of the range",
        left_out=_WEIGHT_RULES,
        widths=(4,),
        grid=lambda _: E2M1,
        scale=_symmetric((1, 16), "e4m3"),
        roundings=_PLAIN,
        product="blocked",
    ),
    Method(
        name="eden*",
        title="MS-EDEN",
        paper=Paper("Quartet II", 2026, "2601.22813"),
        what="features rotated (128), E2M1 to nearest, 1 × 16; corrected E4M3 steps, rounded stochastically",
        left_out=(
            f"{_ROTATED_AGAIN}; its variance is the exact mean square error given the rotation, averaged over 4 "
            "sampled ones, with a squared bias that vanishes as rows become long and dense"
        ),
        widths=(4,),
        grid=lambda _: E2M1,
        transform=Rotated(Identity()),
        scale=_symmetric((1, 16), "correctable"),
        roundings=("corrected",),
        bias="asymptotic",
        product="blocked",
    ),
    Method(
        name="tile*",
        title="integer tiles",
        paper=Paper("Xi et al., Jetfire", 2024, "2403.12422"),
        what="integers about 0, blocks of 32 × 32",
        scale=_symmetric((32, 32)),
        roundings=_PLAIN,
        product="blocked",
        usual=(4, 8),
    ),
    Method(
        name="fallback*",
        title="block fallback",
        paper=Paper("Zhang et al., Fallback", 2025, "2503.08040"),
        what="integers about 0, blocks of 128 × 128, a second code for the quarter with the largest values",
        left_out="the threshold that follows a share over steps of training: here a quarter of a tensor's blocks",
        widths=(8,),
        grid=Pairs,
        scale=_symmetric((128, 128), "fallback"),
        roundings=_PLAIN,
        product="blocked",
    ),
    Method(
        name="split*",
        title="bit splitting",
        paper=Paper("Xi et al., INT4 training", 2023, "2306.11987"),
        what="two integers, coarse to nearest and fine stochastic, one step for the tensor",
        left_out=(
            "sampling by leverage scores, of the coarse and the fine half of each row apart: the recipe int4 "
            "samples whole rows, before they are split; published ranges and codes (±6 of 98 steps) clip, these do "
            "not. Its two products, of the coarse and of the fine half, are one here: a pair 14·h + l of two codes "
            "up to 7 is an integer up to 105, whose product in bytes is the sum of the two exactly"
        ),
        widths=(2, 3, 4),
        grid=Pairs,
        scale=_symmetric("tensor"),
        roundings=_PLAIN,
    ),
    Method(
        name="kim*",
        title="INT4 fixed-point",
        paper=Paper("Kim et al., INT4 fixed-point", 2024, "2407.12637"),
        what="integers about 0, one step for the tensor, from a part of its range steered by the share clipped",
        left_out="learned ranges of weights and activations; certified and measured as `hind`",
        scale=Scale("tensor", "symmetric", range="steered"),
        roundings=_PLAIN,
        bias="biased: clips by design",
    ),
    Method(
        name="agp*",
        title="activation gradient pruning",
        paper=Paper("Gao et al., 1-bit FQT", 2024, "2408.14267"),
        what="a quarter of the rows, by range, over their probability, then integers, an affine step per row",
        transform=Kept(ByRange(0.25)),
        roundings=("stochastic", "dithered"),
    ),
    Method(
        name="shift*",
        title="ShiftQuant",
        paper=Paper("Guo et al., ShiftQuant", 2024, "2411.10948"),
        what="integers about 0, a step per column: one of the tensor, shifted by 0 to 15 bits",
        left_out=(
            "L1 normalization; the number of groups is ours, 16. In Linear layers the terms of each group are "
            "multiplied as bytes, side by side, and its sum is scaled by the shift; simulated beside an affine "
            "input (grad_weight), and in convolutions: a column is a channel at one position there, and every sum "
            "takes its own"
        ),
        scale=_symmetric("column", "shift"),
        roundings=_PLAIN,
        product="blocked",
    ),
    Method(
        name="sru*",
        title="few random bits",
        paper=_SRU,
        what="integers, an affine step per row, rounded stochastically with k random bits an entry, 4 if not said",
        left_out=_SRU_LEFT_OUT,
        roundings=_few_bits("stochastic"),
        bias="biased: by up to 2^−k of a step, downwards",
    ),
    Method(
        name="sruc*",
        title="few random bits, centred",
        paper=_SRU,
        what="as sru, but the chance of the upper neighbour is rounded to k bits and not cut off",
        left_out=_SRU_LEFT_OUT,
        roundings=_few_bits("centred"),
        bias="biased: by up to 2^−(k + 1) of a step",
    ),
    Method(
        name="lns*",
        title="logarithmic number system",
        paper=Paper("Zhao et al., LNS-Madam", 2021, "2106.13914"),
        what="powers of 2^(1/8) and 0, one step for the tensor",
        left_out="products as sums of exponents, and the Madam optimizer",
        widths=(8,),
        grid=Logarithmic,
        scale=_symmetric("tensor"),
        roundings=_PLAIN,
        product="simulated",
    ),
    Method(
        name="e4m3",
        title="FP8, E4M3",
        what="E4M3 floats, one step for the tensor",
        widths=(8,),
        grid=lambda _: E4M3,
        scale=_symmetric("tensor"),
        roundings=_PLAIN,
        product="simulated",
        paper=_FP8,
    ),
    Method(
        name="e5m2",
        title="FP8, E5M2",
        what="E5M2 floats, one step for the tensor",
        widths=(8,),
        grid=lambda _: E5M2,
        scale=_symmetric("tensor"),
        roundings=_PLAIN,
        product="simulated",
        paper=_FP8,
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.stem: method for method in _ROWS})
"""All methods, by name without bits; read only: a new one is a row above, or a `Quantizer` without a name."""

_LONGEST_FIRST = sorted(_ROWS, key=lambda method: -len(method.stem))


def name_meant(name: object, others: Iterable[str] = ()) -> str | None:
    """The name, without an axis, of a quantizer or of these others that is nearest to what was written, if any."""
    endings = "".join(ROUNDING_SUFFIX)
    names = [name + ending for m in _ROWS for name in m.names for ending in ("", *endings) if ending in m.suffixes]
    return nearest(name.partition("@")[0], [*others, *names]) if isinstance(name, str) else None


def quantizer(name: str, bits: int | None = None) -> Quantizer:
    """The quantizer of that name.

    Args:
        name: a method, with or without its bits, rounding and axis: "bhq4", "shq4d", "psq8d@channel", "bhq".
        bits: if the name does not say; most methods have 2 to 8.

    Raises:
        FqtError: the name or the bits are unknown, missing, or said twice differently.

    >>> quantizer("psq4") == quantizer("psq", bits=4)
    True
    >>> quantizer("shq4d").rounding
    Dithered()
    """
    method, (digits, suffix, axis) = _match(name)
    return method.quantizer(_width(name, method, digits, bits), suffix, axis)


def _match(name: str) -> tuple[Method, tuple[str, str, str | None]]:
    """The row that a name belongs to, and what the name says: bits, the rounding's suffix, axis."""
    for method in _LONGEST_FIRST:
        match = method.pattern.fullmatch(name) if isinstance(name, str) else None
        if match is not None:
            return method, (match[1], match[2], match[3])
    bits = width_meant(name)
    meant = f"psq{bits}" if bits else name_meant(name)
    near = f"did you mean {meant!r}?" if meant else _SOME
    raise UnknownName(f"unknown quantizer {name!r}; {near}")


_SOME = (
    "known: ptq, psq, bhq, shq, thq and others, with bits behind and 'd' for dithered, as in 'psq4' and 'shq4d'; "
    "`fqt catalog` lists them all; recipes are for quantize_"
)
_WIDTH = re.compile(r"(?:u?int|bits?|fp(?=8))?[ _-]?([2-8])[ _-]?(?:bits?)?")


def width_meant(name: object) -> str:
    """The number of bits if a name says no more: "8", "int8", "8-bit"; else empty."""
    match = _WIDTH.fullmatch(name.strip().lower()) if isinstance(name, str) else None
    return match[1] if match else ""


def _width(name: str, method: Method, digits: str, bits: int | None) -> int:
    """The bits, from the name or from beside it."""
    if digits and bits is not None and int(digits) != bits:
        raise FqtError(f"quantizer {name!r} says {digits} bits and bits={bits}: say one")
    if digits:
        return int(digits)
    if bits is not None:
        return bits
    if "*" in method.name:
        some = "" if len(method.widths) == 1 else f" … {method.names[-1]!r}"
        raise FqtError(f"quantizer {name!r} needs its bits: {method.names[0]!r}{some}, or bits=")
    return method.widths[0]


def rounded(transform: Transform, scale: Scale, grid: Grid, rounding: Rounding | str) -> Quantizer:
    """The quantizer of these choices.

    Args:
        transform, scale, grid: as `Quantizer` takes them.
        rounding: as `Quantizer` takes it; or "best": of stochastic rounding on this scale and on the affine one,
            and dithered rounding on that, whichever has the least exact variance.
    """
    if rounding != "best":
        return Quantizer(transform=transform, scale=scale, grid=grid, rounding=rounding)
    if scale.mode == "symmetric":
        raise FqtError("the best rounding is one of affine scales, not of a symmetric one")
    own = Quantizer(transform=transform, scale=scale, grid=grid, rounding="stochastic")
    affine = replace(own, scale=replace(scale, mode="affine"))
    return Best(candidates=tuple(dict.fromkeys((own, affine, replace(affine, rounding="dithered")))))


def quantizer_name(q: Quantizer) -> str | None:
    """The name that `quantizer` would build `q` from, or None if the catalog has none."""
    return next((name for method in _ROWS if (name := method.name_of(q)) is not None), None)


def method_of(name: str) -> Method:
    """The row that a quantizer's name belongs to.

    Raises:
        FqtError: it belongs to none.
    """
    return _match(name)[0]
