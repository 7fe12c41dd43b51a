"""The plain-torch kernels: what every faster backend must equal, bit for bit on codes.

All work on a matrix of N rows and D columns, in blocks that share a step. Ranges are order-free; where floats are
summed the order is fixed (rows ascending, butterflies by stage) and no multiply-add is contracted, since a last bit
that differs upstream flips codes downstream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from fqt.kernels.codes import DITHER_LEVELS, LEAST_STEP, Blocks, Entries, Findings, Levels, Scales
from fqt.kernels.rounding import STOCHASTIC, Rounding
from fqt.kernels.steps import divided

# Beyond this step a group's range may exceed the largest float: its arithmetic is done on sixteenths.
_WIDE_STEP = {torch.float32: 2.0**100, torch.float64: 2.0**1000}


def value_range(x: Entries, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each block.

    Returns:
        Two tensors with one number per block, in the compute dtype. NaN where the block holds one; zeros where it
        is empty.
    """
    counts = blocks.count(x.shape)
    values = x.values()
    if not values.numel():
        zeros = values.new_zeros(counts)
        return zeros, zeros.clone()
    if blocks.plain:
        dims = [d for d, size in enumerate((blocks.rows, blocks.columns)) if size == 0]
        return values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    return blocks.cut(values, torch.inf).amin((1, 3)), blocks.cut(values, -torch.inf).amax((1, 3))


def parameters(lo: Tensor, hi: Tensor, mode: str, steps: int) -> tuple[Tensor, Tensor]:
    """Step and offset of each group.

    Args:
        lo, hi: the groups' ranges, any one shape, float32 or float64.
        mode: "affine", "zero" or "symmetric".
        steps: how many steps the range is divided into (symmetric: its positive half).

    Returns:
        (step, offset) of lo's shape and dtype. Steps of groups that are not constant are at least 2⁻¹²⁶.
        NaN steps where the range is not finite.
    """
    if mode == "symmetric":
        magnitude = torch.maximum(lo.abs(), hi.abs())
        step = torch.where(lo == hi, magnitude, divided(magnitude, steps).clamp(min=LEAST_STEP))
        offset = torch.zeros_like(lo)
    elif mode == "affine":
        step, offset = _affine_step(lo, hi, steps), lo
    else:
        step, offset = _zero_on_code(lo, hi, steps)
    if mode != "symmetric":
        constant = lo == hi
        step = torch.where(constant, 0.0, step)
        offset = torch.where(constant, lo, offset)
    finite = torch.isfinite(lo) & torch.isfinite(hi)
    return torch.where(finite, step, torch.nan), torch.where(finite, offset, 0.0)


def _affine_step(lo: Tensor, hi: Tensor, steps: int) -> Tensor:
    half = torch.where(hi * 0.5 - lo * 0.5 > torch.finfo(lo.dtype).max / 4, 0.5, 1.0).to(lo.dtype)
    return (divided(hi * half - lo * half, steps) / half).clamp(min=LEAST_STEP)


def _zero_on_code(lo: Tensor, hi: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The integer zero code z, of the two nearest to −lo/step, that widens the step less.

    The step's last eight mantissa bits are cleared (rounding up), so that z·step is exact and zero itself
    lands exactly on code z.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    floor = (-lo / _affine_step(lo, hi, steps)).floor()

    # A side that holds values needs a code of its own.
    least, most = (lo < 0).to(lo.dtype), steps - (hi > 0).to(lo.dtype)
    below_, above_ = floor.clamp(least, most), (floor + 1).clamp(least, most)

    def widened(z: Tensor) -> Tensor:
        below = torch.where(lo < 0, -lo / z, 0.0)
        above = torch.where(hi > 0, hi / (steps - z), 0.0)
        return torch.maximum(below, above)

    z = torch.where(widened(below_) <= widened(above_), below_, above_)
    largest = torch.finfo(lo.dtype).max
    step = widened(z).clamp(LEAST_STEP, largest * (1 - 2**-15))  # the next line may widen, not overflow
    bits = step.view(torch.int32 if step.dtype == torch.float32 else torch.int64)
    step = ((bits + 0xFF) & ~0xFF).view(step.dtype)
    return step, torch.where(z == 0, 0.0, (-z * step).clamp(min=-largest))


def narrowing(step: Tensor) -> Tensor:
    """2⁻⁴ for groups so wide that their range could overflow, else 1; scaling by it is exact either way."""
    return torch.where(step > _WIDE_STEP[step.dtype], 0.0625, 1.0).to(step.dtype)


def position(values: Tensor, scales: Scales, levels: Levels) -> Tensor:
    """Where each value lies on the axis of codes: t = (x − offset)/step, clamped to the levels' range.

    Clamping comes before rounding, so no rounding can leave the range. NaN (of a block with a NaN step)
    becomes the lowest level.
    """
    step, offset = scales.spread((values.shape[0], values.shape[1]))
    half = narrowing(step)
    divisor = torch.where(step == 0, 1.0, step) * half
    t = (values * half - offset * half) / divisor
    return t.clamp_(levels.low, levels.high).nan_to_num_(nan=float(levels.low))


def encode(x: Entries, scales: Scales, levels: Levels, rounding: Rounding, seed: Tensor | None) -> Tensor:
    """Codes of a matrix.

    Args:
        x: the entries.
        scales: their blocks' parameters. A step of 0 (a constant block) gives code 0.
        levels: positions are clamped to their range; for dithered rounding `high` is one below the last code.
        rounding: how.
        seed: int64 scalar tensor; None only for a rounding that draws nothing. Noise is counted row-major.

    Returns:
        (N, D) codes of `levels.dtype`.
    """
    t = position(x.values(), scales, levels)
    return rounding.round(t, levels, seed, x.transposed).to(levels.dtype)


def decode(codes: Tensor, scales: Scales, dither: Tensor | None) -> Tensor:
    """step · (code − dither) + offset, (N, D) in the step's dtype; finite for finite parameters."""
    step, offset = scales.spread((codes.shape[0], codes.shape[1]))
    half = narrowing(step)
    value = codes.to(step.dtype)
    if dither is not None:
        value = value - dither
    value = (value * (step * half) + offset * half) / half
    largest = torch.finfo(step.dtype).max
    return value.clamp_(-largest, largest)


def code_variance(x: Entries, scales: Scales, levels: Levels) -> Tensor:
    """f(1 − f)·gap² of each entry: the variance of stochastic rounding in squared steps, (N, D)."""
    return STOCHASTIC.variance(position(x.values(), scales, levels), levels)


def variance_sums(x: Entries, scales: Scales, levels: Levels) -> Tensor:
    """Σ p(1 − p) of each block, every entry rounded to a multiple of 2⁻²⁴: integers, so order does not matter.

    Args:
        x, scales, levels: as in `encode`; levels that fit a byte.

    Returns:
        int64 of step's shape, in units of 2⁻²⁴ squared steps.
    """
    counts = (code_variance(x, scales, levels) * float(DITHER_LEVELS)).round().to(torch.int64)
    return scales.blocks.sums(counts)


def column_sums(codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Σ over the rows of (N, D) codes, and with weights (N,) in 0 … 2²⁴ − 1 also Σ weight · code: int64 (D,)."""
    wide = codes.to(torch.int64)
    return wide.sum(0), None if weights is None else (wide * weights.to(torch.int64)[:, None]).sum(0)


def value_sums(x: Tensor) -> Tensor:
    """Σ over the rows of values (N, D), any real floating dtype: float64 (D,).

    Faster backends may add runs of 32 rows in float32 first.
    """
    return x.sum(0, dtype=torch.float64)


def scaled_rows(
    x: Tensor, factor: Tensor, weight: Tensor | None, known: Findings
) -> tuple[Tensor, Tensor | None, Findings]:
    """Rows of values times their factors, and the sum over the rows times their weights.

    Args:
        x: (N, D), any real floating dtype.
        factor, weight: (N,) in x's compute dtype; without weight no sum.
        known: what is known of x; backends complete it where that saves a pass.

    Returns:
        (N, D) in x's compute dtype; float64 (D,), whose order of adding up is the backend's own; and what is known
        now.
    """
    x = Entries(x).wide()
    sums = None if weight is None else (x.double() * weight.double()[:, None]).sum(0)
    return x * factor[:, None], sums, known


def row_sums(codes: Tensor) -> Tensor:
    """Σ over the columns of (N, D) codes: int64 (N,)."""
    return codes.sum(1, dtype=torch.int64)


@dataclass(frozen=True)
class Scaling:
    """What is done to rows before a transform: (x · half − offset · half) · scale.

    Attributes:
        half: (N, 1): ½ for rows too wide for a float, else 1.
        offset, scale: (N, 1).
    """

    half: Tensor
    offset: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D)."""
        return (x * self.half).sub_(self.offset * self.half).mul_(self.scale)


@dataclass(frozen=True)
class Unscaling:
    """What is done to rows after a transform: y · scale + offset · right, clamped to the finite floats of y.

    Attributes:
        scale, offset: (N, 1).
        right: (D,), None is 1.
        dtype: of the result.
    """

    scale: Tensor
    offset: Tensor
    right: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, y: Tensor) -> Tensor:
        """(N, D)."""
        largest = torch.finfo(y.dtype).max
        offset = self.offset if self.right is None else self.offset * self.right
        return (y * self.scale).add_(offset).clamp_(-largest, largest).to(self.dtype)


def hadamard(
    x: Tensor,
    order: Tensor,
    blocks: tuple[int, ...],
    before: Scaling | None = None,
    keep: Tensor | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """Walsh–Hadamard butterflies over rows, not normalised, block by block.

    Args:
        x: (N, D), any real floating dtype.
        order: (N,) int64, a permutation: the rows of the first block, then of the second, and so on.
        blocks: block sizes, powers of two that sum to N.
        before, after: what is done to the rows first and last.
        keep: (N, 1) bool; where it is False the row is not mixed. None mixes all.

    Returns:
        (N, D): row order[i] holds output i. The stages run over strides 1, 2, 4, …, each pair (a, b) giving
        (a + b, a − b).
    """
    x = Entries(x).values()
    x = x if before is None else before(x)
    mixed = _butterflies(x, order, blocks)
    mixed = mixed if keep is None else torch.where(keep, mixed, x)
    return mixed if after is None else after(mixed)


def rotate(x: Tensor, before: Tensor, after: Tensor | None, blocks: tuple[int, ...]) -> Tensor:
    """Walsh–Hadamard butterflies over runs of neighbouring columns, not normalised, block by block.

    Args:
        x: (N, D), any real floating dtype.
        before, after: (P,) in the compute dtype, P a divisor of D: factors of a run's columns, first and last; None
            is 1.
        blocks: block sizes, powers of two that sum to P.

    Returns:
        (N, D) in the compute dtype. The stages run as in `hadamard`.
    """
    period = before.numel()
    wide = Entries(x).wide()
    if not wide.numel():
        return wide.clone()
    runs = (wide.reshape(-1, period) * before).T.contiguous()
    mixed = _butterflies(runs, torch.arange(period, device=x.device), blocks).T
    return (mixed if after is None else mixed * after).reshape(wide.shape)


def _butterflies(x: Tensor, order: Tensor, blocks: tuple[int, ...]) -> Tensor:
    y = x.index_select(0, order)
    start = 0
    for size, count in equal_runs(blocks):
        part = y.narrow(0, start, size * count)
        stride = 1
        while stride < size:
            pairs = part.view(size * count // (2 * stride), 2, stride, x.shape[1])
            a, b = pairs[:, 0].clone(), pairs[:, 1]
            pairs[:, 0] += b
            torch.sub(a, b, out=b)
            stride *= 2
        start += size * count
    return torch.empty_like(y).index_copy_(0, order, y)


@lru_cache(maxsize=64)
def equal_runs(blocks: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Runs of equal block sizes, as (size, count)."""
    return tuple((size, len(list(run))) for size, run in groupby(blocks))


def reflect(
    x: Tensor,
    group: Tensor,
    normal: Tensor,
    beta: Tensor,
    before: Scaling | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """Householder reflections over rows, block by block: x_r − n_r β_g Σ_q n_q x_q, q over r's group g.

    Args:
        x: (N, D), any real floating dtype.
        group: (N,) int64 below N: which block a row belongs to.
        normal: (N, 1): the entry n_r of its block's vector; 0 leaves the row as it is.
        beta: (N, 1): β_g = 2/‖n‖² of block g, in row g.
        before, after: what is done to the rows first and last.

    Returns:
        (N, D). The sum runs over ascending rows.
    """
    x = Entries(x).values()
    x = x if before is None else before(x)
    total = torch.zeros_like(x).index_add_(0, group, x * normal)
    y = x - normal * (total * beta).index_select(0, group)
    return y if after is None else after(y)


def replace_rows_(y: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """Row r of y, in place, becomes row r of x unless keep (N, 1) holds; returns y, (N, D)."""
    return y.copy_(torch.where(keep, y, Entries(x).values()))
