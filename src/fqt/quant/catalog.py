"""The catalog: methods of the literature by name, `psq4`, `shq4d`, `psq8d@channel`, `mxfp4`, `int4rht`.

A method is a row of a table, four choices with their source. A name is the method's with its bits in place, then a
letter for the rounding where it is not the method's first, or `k` and how many random bits that takes, then `@` and
an axis (`fqt.quant.names` reads it). A new method is a new row.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fqt.kernels.rounding import MOST_BITS
from fqt.quant.grid import E2M1, E4M3, E5M2, Floats, Logarithmic, Pairs
from fqt.quant.keep import ByRange
from fqt.quant.method import Method, Paper
from fqt.quant.scale import Scale
from fqt.quant.transform import BlockHouseholder, Identity, Kept, Rotated, ScaledHadamard

_PLAIN = ("stochastic", "nearest")
_STATQUANT = Paper("Chen et al., StatQuant", 2020, "2010.14298")
_OURS = Paper("this library", 2026)
_LUQ = Paper("Chmiel et al., LUQ", 2021, "2112.10769")
_FP8 = Paper("Micikevicius et al., FP8 formats", 2022, "2209.05433")


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
