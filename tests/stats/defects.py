"""Estimates f(x, seed) of an (N, D) matrix wrong in ways that were released, and right ones beside them.

Written from the formulas, in float64 but where the defect is one of precision, so that what fails is the method.
`DEFECTS` and `SOUND` map a name to the function, the verdict that fits and the axis that it mixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor, int], Tensor]


def uniform(shape: tuple[int, ...] | torch.Size, seed: int) -> Tensor:
    """Uniform on [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stochastic(t: Tensor, u: Tensor) -> Tensor:
    """⌊t⌋, or one more where u is below the fraction."""
    return t.floor() + (u < t - t.floor())


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a/b, 0 where b is."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def in_blocks(x: Tensor, size: int, estimate: Callable[[Tensor], Tensor]) -> Tensor:
    """`estimate` of (N, blocks, size), each row cut into blocks and padded with zeros."""
    pad = -x.shape[1] % size
    blocks = torch.nn.functional.pad(x.double(), (0, pad)).view(len(x), -1, size)
    return estimate(blocks).reshape(len(x), -1)[:, : x.shape[1]].float()


# Small floats

E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def e2m1_stochastic(v: Tensor, u: Tensor) -> Tensor:
    """One of the two neighbours in E2M1, with linear probabilities; beyond ±6 it saturates."""
    size = v.abs().clamp(max=6)
    above = torch.searchsorted(E2M1, size).clamp(1, 7)
    low, high = E2M1[above - 1], E2M1[above]
    return v.sign() * torch.where(u < (size - low) / (high - low), high, low)


def e2m1_nearest(v: Tensor) -> Tensor:
    middle = (E2M1[1:] + E2M1[:-1]) / 2
    return v.sign() * E2M1[torch.searchsorted(middle, v.abs())]


def e4m3_nearest(v: Tensor) -> Tensor:
    return v.float().to(torch.float8_e4m3fn).double()


def e4m3_stochastic(v: Tensor, u: Tensor) -> Tensor:
    ulp = torch.exp2(v.clamp(min=2.0**-6).log2().floor() - 3)
    return (stochastic(v / ulp, u) * ulp).clamp(max=448)


def nvfp4(head_room: float, least_scale: float) -> Function:
    """Blocks of 16 with an E4M3 scale; the scale may round down, and the block's largest entry then saturates."""

    def estimate(x: Tensor, seed: int) -> Tensor:
        top = 6 * head_room

        def blocks(b: Tensor) -> Tensor:
            tensor_scale = b.abs().amax() / (top * 448)
            wanted = divide(b.abs().amax(2, keepdim=True), tensor_scale * top)
            scale = e4m3_nearest(wanted).clamp(min=least_scale) * tensor_scale
            return e2m1_stochastic(divide(b, scale), uniform(b.shape, seed)) * scale

        return in_blocks(x, 16, blocks)

    return estimate


nvfp4_saturating = nvfp4(1.0, 2.0**-9)
nvfp4_head_room = nvfp4(16 / 17, 2.0**-9)  # exact but for blocks 3e-5 of the largest: E4M3 subnormals are coarse
nvfp4_exact = nvfp4(16 / 17, 2.0**-6)


def mxfp4(x: Tensor, seed: int) -> Tensor:
    """Blocks of 32 with a power-of-two scale that is rounded up, so that nothing saturates."""

    def blocks(b: Tensor) -> Tensor:
        scale = torch.exp2((b.abs().amax(2, keepdim=True) / 6).clamp(min=1e-300).log2().ceil())
        return e2m1_stochastic(b / scale, uniform(b.shape, seed)) * scale

    return in_blocks(x, 32, blocks)


def four_over_six(x: Tensor, seed: int) -> Tensor:
    """The block's largest entry to 6 or to 4, whichever rounds better: the choice looks at the noise."""

    def blocks(b: Tensor) -> Tensor:
        largest, u = b.abs().amax(2, keepdim=True), uniform(b.shape, seed)
        six, four = (e2m1_stochastic(divide(b, largest / top), u) * largest / top for top in (6, 4))
        better = (four - b).square().sum(2, keepdim=True) < (six - b).square().sum(2, keepdim=True)
        return torch.where(better, four, six)

    return in_blocks(x, 16, blocks)


def hadamard(order: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(order)


def ms_eden(x: Tensor, seed: int, outer: str = "tensor") -> Tensor:
    """Rotate 128 features at random, round to nearest, correct each group of 16 to its length: right as D → ∞.

    Groups' scales are E4M3 times one float32 scale, of the tensor: rows of 1e-5 of the largest get the scale 0.
    """
    sign = (uniform((128,), seed + 10**9) < 0.5) * 2.0 - 1

    def blocks(b: Tensor) -> Tensor:
        y = ((b * sign) @ hadamard(128)).unflatten(2, (8, 16))
        top = 6 * (16 / 17) / 0.93
        largest = y.abs().amax((1, 2, 3), keepdim=True)
        tensor_scale = (largest.amax() if outer == "tensor" else largest) / (256 * top)
        scale = e4m3_nearest(divide(y.abs().amax(3, keepdim=True), tensor_scale * top))
        codes = e2m1_nearest(divide(y, scale * tensor_scale))
        overlap = (y * codes * scale * tensor_scale).sum(3, keepdim=True)
        corrected = divide(y.square().sum(3, keepdim=True), overlap) * scale
        scale = e4m3_stochastic(corrected, uniform(scale.shape, seed))
        return ((codes * scale * tensor_scale).flatten(2) @ hadamard(128)) * sign

    return in_blocks(x, 128, blocks)


def ms_eden_by_row(x: Tensor, seed: int) -> Tensor:
    """The float32 scale is each row's own."""
    return ms_eden(x, seed, "row")


# Integers


def row_stochastic(x: Tensor, seed: int, noise: Callable[[Tensor], Tensor] | None = None, top: int = 7) -> Tensor:
    """Codes −top … top, a step per row."""
    step = x.double().abs().amax(1, keepdim=True) / top
    t = divide(x.double(), step)
    return (stochastic(t, uniform(t.shape, seed) if noise is None else noise(t)) * step).float()


def bit_split(fine_steps: int, last: int) -> Function:
    """v = 14·h + l with codes clamped to ±last."""

    def estimate(x: Tensor, seed: int) -> Tensor:
        step = x.double().abs().max() / fine_steps
        v = divide(x.double(), step)
        h = (v / 14).round().clamp(-last, last)
        low = stochastic(v - 14 * h, uniform(v.shape, seed)).clamp(-last, last)
        return ((14 * h + low) * step).float()

    return estimate


def noise_per_row(x: Tensor, seed: int) -> Tensor:
    """One random number per index of axis 0, broadcast over the others."""
    return row_stochastic(x, seed, lambda t: uniform((len(t), 1), seed).expand(t.shape))


def noise_per_column(x: Tensor, seed: int) -> Tensor:
    return row_stochastic(x, seed, lambda t: uniform((1, t.shape[1]), seed).expand(t.shape))


def dithered(x: Tensor, seed: int) -> Tensor:
    """Noise added before rounding to nearest and subtracted after it: errors uniform whatever the value."""
    step = x.double().abs().amax(1, keepdim=True) / 7
    noise = uniform(x.shape, seed) - 0.5
    return (((divide(x.double(), step) + noise).round() - noise) * step).float()


def affine(x: Tensor, seed: int) -> Tensor:
    """Codes 0 … 15 from each row's minimum."""
    x = x.double()
    low = x.amin(1, keepdim=True)
    step = (x.amax(1, keepdim=True) - low) / 15
    return (stochastic(divide(x - low, step), uniform(x.shape, seed)) * step + low).float()


def zero_preserving(x: Tensor, seed: int) -> Tensor:
    """The zero code is −min·B/range without its fraction; where that is 0 the scale is 0/0."""
    low, size = x.double().min(), x.double().max() - x.double().min()
    zero = (-low * 15 / size).trunc()
    scale = zero / -low
    return ((stochastic(x.double() * scale + zero, uniform(x.shape, seed)).clamp(0, 15) - zero) / scale).float()


def absolute_epsilon(x: Tensor, seed: int) -> Tensor:
    """Ranges widened by 1e-8 in float32: nothing at 1, everything at 1e-40."""
    low = x.amin(1, keepdim=True)
    scale = 15 / (x.amax(1, keepdim=True) + 1e-8 - low)
    t = ((x - low) * scale).double()
    return (stochastic(t, uniform(t.shape, seed)) / scale + low).float()


def short_parameters(x: Tensor, seed: int) -> Tensor:
    """Quantized with float32 minimum and range, dequantized with their bfloat16 copies."""
    low, size = x.amin(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    codes = stochastic(divide((x - low).double() * 15, size.double()), uniform(x.shape, seed))
    return codes.float() * size.bfloat16().float() / 15 + low.bfloat16().float()


def short_scale_clipped(x: Tensor, seed: int) -> Tensor:
    """INT8 with a bfloat16 scale amax/127, codes −128 … 127: the positive end is clipped, the negative is not."""
    scale = (x.abs().amax(1, keepdim=True).bfloat16() / 127).double()
    return (stochastic(divide(x.double(), scale), uniform(x.shape, seed)).clamp(-128, 127) * scale).float()


def down_to_minus_128(x: Tensor, seed: int) -> Tensor:
    """INT8 with scale amax/128, so that the largest positive value, at 128, is clipped to 127."""
    scale = x.double().abs().amax(1, keepdim=True) / 128
    return (stochastic(divide(x.double(), scale), uniform(x.shape, seed)).clamp(-128, 127) * scale).float()


def gaussian_noise(x: Tensor, seed: int) -> Tensor:
    """A tenth of a step of Gaussian noise before rounding to nearest: at fraction 0.3 it hardly ever rounds up."""
    step = x.double().abs().amax(1, keepdim=True) / 7
    g = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return ((divide(x.double(), step) + noise).round() * step).float()


def random_mantissa(x: Tensor, seed: int) -> Tensor:
    """16 random bits under bfloat16's mantissa, cut off; then divided by the scale and rounded to nearest."""
    bits = x.contiguous().view(torch.int32) + (uniform(x.shape, seed) * 2**16).int()
    short = (bits & ~0xFFFF).view(torch.float32).double()
    step = x.double().abs().amax(1, keepdim=True) / 7
    return (divide(short, step).round() * step).float()


def remainder_dropped(x: Tensor, seed: int) -> Tensor:
    """Columns beyond the last whole group of four come back as zero."""
    whole = torch.arange(x.shape[1]) < max(x.shape[1] // 4 * 4, 1)
    return row_stochastic(x, seed) * whole


def few_random_bits(x: Tensor, seed: int) -> Tensor:
    """⌊t + k/8⌋ with 3-bit k: the noise's mean is 7/16, not ½."""
    return row_stochastic(x, seed, lambda t: (uniform(t.shape, seed) * 8).floor() / 8 + 1 / 8, 127)


def rounds_down(x: Tensor, seed: int) -> Tensor:
    return row_stochastic(x, seed, torch.ones_like)


def same_noise_always(x: Tensor, seed: int) -> Tensor:
    return row_stochastic(x, 0)


def eight_seeds(x: Tensor, seed: int) -> Tensor:
    return row_stochastic(x, seed % 8)


def seed_modulo(x: Tensor, seed: int) -> Tensor:
    """20 bits of the seed count."""
    return row_stochastic(x, seed % 2**20)


def antithetic(x: Tensor, seed: int) -> Tensor:
    """Seeds that differ in bit 16 have opposite noise."""

    def noise(t: Tensor) -> Tensor:
        u = uniform(t.shape, seed & ~(1 << 16))
        return 1 - u if seed >> 16 & 1 else u

    return row_stochastic(x, seed, noise)


def shifted_noise(x: Tensor, seed: int) -> Tensor:
    """One array of noise for all seeds, moved by the seed's multiple."""
    return row_stochastic(x, seed, lambda t: uniform(t.shape, 5).flatten().roll(seed * 7919).view(t.shape))


def seed_ignored(x: Tensor, seed: int) -> Tensor:
    """Noise of the global generator, as it comes."""
    return row_stochastic(x, seed, torch.rand_like)


def zero_seed_is_nearest(x: Tensor, seed: int) -> Tensor:
    return row_stochastic(x, seed, (lambda t: torch.full_like(t, 0.5)) if seed == 0 else None)


def seed_plus_index(x: Tensor, seed: int) -> Tensor:
    """Noise number seed + index: the next seed's noise is this one's, moved by an entry."""

    def noise(t: Tensor) -> Tensor:
        z = (seed + torch.arange(t.numel())) * 0x9E3779B97F4A7C1
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
            z = (z ^ ((z >> shift) & (1 << 64 - shift) - 1)) * factor
        return ((z >> 31) & 0xFFFFFFFF).double().view(t.shape) / 2**32

    return row_stochastic(x, seed, noise)


# Logarithmic grids


def luq(signed_maximum: bool = False, noise_in_logarithm: bool = False, by_row: bool = False) -> Function:
    """Powers of two down to amax/64, stochastic between neighbours and below the least."""

    def estimate(x: Tensor, seed: int) -> Tensor:
        x, u = x.double(), uniform(x.shape, seed)
        extremes = x if signed_maximum else x.abs()
        largest = (extremes.amax(1, keepdim=True) if by_row else extremes.max()).clamp(min=1e-300)
        least = largest / 64
        ratio = (x.abs() / least).clamp(min=1e-30)
        if noise_in_logarithm:
            power = torch.exp2((ratio.log2() + u - 0.5).round().clamp(0, 6))
        else:
            low = torch.exp2(ratio.log2().floor().clamp(0, 6))
            power = torch.where(u < (ratio - low) / low, 2 * low, low).clamp(max=64)
        return (x.sign() * least * torch.where(ratio < 1, (u < ratio).double(), power)).float()

    return estimate


def power_domain(x: Tensor, seed: int) -> Tensor:
    """Stochastic between codes of √|x|: unbiased there, and so too low after squaring back, or rather too high."""
    size = x.double().abs().amax(1, keepdim=True)
    t = divide(x.double().abs(), size).sqrt() * 7
    return (x.sign() * (stochastic(t, uniform(t.shape, seed)) / 7).square() * size).float()


def terngrad(by_row: bool = False) -> Function:
    """−s, 0 or s with s the largest magnitude: errors are rare and large."""

    def estimate(x: Tensor, seed: int) -> Tensor:
        size = x.double().abs()
        largest = size.amax(1, keepdim=True) if by_row else size.max()
        return (x.sign() * (uniform(x.shape, seed) * largest < size) * largest).float()

    return estimate


# Sampling


def top_rows(x: Tensor, seed: int) -> Tensor:
    """A quarter of the rows, the largest, kept with no correction for the others."""
    keep = x.abs().amax(1).argsort(descending=True)[: max(len(x) // 4, 1)]
    mask = torch.zeros(len(x), 1).index_fill_(0, keep, 1.0)
    return row_stochastic(x, seed) * mask


def sampled_rows(capped: bool) -> Function:
    """Rows kept with probability p ∝ their range, over p; without a cap p exceeds 1 for large rows."""

    def estimate(x: Tensor, seed: int) -> Tensor:
        size = x.double().abs().amax(1)
        budget = len(x) / 4
        p = divide(budget * size, size.sum())
        while capped and bool((p > 1).any()):
            sure = p >= 1
            left = budget - float(sure.sum())
            p = torch.where(sure, 1.0, divide(max(left, 0.0) * size, size[~sure].sum()).clamp(min=1e-3))
        keep = uniform(p.shape, seed + 10**9) < p
        return row_stochastic(x, seed) * divide(keep.double(), p).float()[:, None]

    return estimate


def low_sequency(x: Tensor, seed: int) -> Tensor:
    """Half of each block's 16 Walsh functions, those of fewest sign changes, and never the others."""
    h = hadamard(16)
    changes = (h[:, 1:] * h[:, :-1] < 0).sum(1)
    kept = h[changes.argsort()[:8]]

    def blocks(b: Tensor) -> Tensor:
        y = b @ kept.T
        step = y.abs().amax() / 127
        return stochastic(divide(y, step), uniform(y.shape, seed)) * step @ kept

    return in_blocks(x, 16, blocks)


class Case(NamedTuple):
    function: Function
    verdict: str
    mixes: int | None = None
    draws: int = 64  # how many show it


DEFECTS = {
    "NVFP4, scale rounds down, maximum saturates": Case(nvfp4_saturating, "biased"),
    "NVFP4 with head-room, subnormal scales": Case(nvfp4_head_room, "biased", draws=256),
    "MS-EDEN, a float32 scale per tensor": Case(ms_eden, "biased", 1, 256),
    "MS-EDEN, a float32 scale per row": Case(ms_eden_by_row, "asymptotic", 1),
    "4-bit splitting, codes clamped to ±6": Case(bit_split(98, 6), "biased"),
    "one random number per row": Case(noise_per_row, "dependent"),
    "one random number per column": Case(noise_per_column, "dependent"),
    "LUQ, signed maximum": Case(luq(signed_maximum=True), "biased"),
    "LUQ, noise in the logarithm": Case(luq(noise_in_logarithm=True), "biased"),
    "top rows kept, not sampled": Case(top_rows, "biased"),
    "rows sampled with p above 1": Case(sampled_rows(capped=False), "biased"),
    "zero-preserving scale, 0/0": Case(zero_preserving, "biased"),
    "absolute epsilon": Case(absolute_epsilon, "biased"),
    "bfloat16 minimum and range": Case(short_parameters, "biased"),
    "bfloat16 scale, codes clipped to 127": Case(short_scale_clipped, "biased"),
    "four over six by realised error": Case(four_over_six, "biased", draws=128),
    "low-sequency Walsh rows only": Case(low_sequency, "biased", 1),
    "rounding in the power domain": Case(power_domain, "biased"),
    "three random bits": Case(few_random_bits, "biased"),
    "always down": Case(rounds_down, "biased"),
    "one noise for all seeds": Case(same_noise_always, "biased"),
    "eight seeds in turn": Case(eight_seeds, "dependent"),
    "seed 0 rounds to nearest": Case(zero_seed_is_nearest, "dependent"),
    "noise at seed + index": Case(seed_plus_index, "dependent"),
    "INT8 to −128, maximum clipped": Case(down_to_minus_128, "biased"),
    "a tenth of a step of Gaussian noise": Case(gaussian_noise, "biased"),
    "random mantissa bits before the scale": Case(random_mantissa, "biased"),
    "remainder dropped": Case(remainder_dropped, "biased"),
    "20 bits of the seed": Case(seed_modulo, "dependent"),
    "antithetic seeds": Case(antithetic, "dependent"),
    "one noise array, shifted": Case(shifted_noise, "dependent"),
    "seed ignored": Case(seed_ignored, "dependent"),
}

SOUND = {
    "stochastic, a step per row": Case(row_stochastic, "exact"),
    "NVFP4 with head-room and normal scales": Case(nvfp4_exact, "exact"),
    "4-bit splitting, codes to ±7": Case(bit_split(105, 7), "exact"),
    "LUQ": Case(luq(), "exact"),
    "LUQ, a grid per row": Case(luq(by_row=True), "exact"),
    "TernGrad without clipping": Case(terngrad(), "exact"),
    "TernGrad without clipping, by row": Case(terngrad(by_row=True), "exact"),
    "MXFP4, scale rounds up": Case(mxfp4, "exact"),
    "subtractive dither": Case(dithered, "exact"),
    "stochastic from each row's minimum": Case(affine, "exact"),
    # Unbiased, but whether a row is there at all is common to its entries: exact if that is admitted.
    "rows sampled with p at most 1": Case(sampled_rows(capped=True), "dependent"),
    "rows sampled, dependence along rows admitted": Case(sampled_rows(capped=True), "exact", 1),
}
