"""The plain-torch kernels: what every faster backend must equal, bit for bit on codes.

All work on a matrix of N rows and D columns. A *group* is a set of entries that share a step; its parameters
have the shape (1, 1), (N, 1) or (1, D) and broadcast. Ranges are order-free; where floats are summed the
order is fixed (rows ascending, butterflies by stage) and no multiply-add is contracted, since a last bit that
differs upstream flips codes downstream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels.philox import (
    STREAM_DITHER_COLUMN,
    STREAM_DITHER_ROW,
    random_u24,
    rounding_noise,
)

DITHER_LEVELS = 1 << 24
Quantized = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]
"""Codes, step and offset of a matrix, and its dither along rows (N, 1) and columns (1, D), in steps."""
_LEAST_STEP = 2.0**-126
# Beyond this step a group's range may exceed the largest float: its arithmetic is done on sixteenths.
_WIDE_STEP = {torch.float32: 2.0**100, torch.float64: 2.0**1000}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which steps and codes are computed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def values(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """What is quantized: x (N, D) in its compute dtype, column j times factor[j mod P] for a factor (P,)."""
    x = x.to(compute_dtype(x.dtype))
    if factor is None or (not factor.numel() and not x.shape[1]):
        return x
    return x * factor.repeat(x.shape[1] // factor.numel())


def value_range(x: Tensor, group: str, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each group.

    Args:
        x: (N, D), any real floating dtype.
        group: "tensor", "row" or "column".
        factor: as in `values`.

    Returns:
        Two tensors of shape (1, 1), (N, 1) or (1, D). NaN where the group holds one; zeros where it is empty.
    """
    dims = {"tensor": (0, 1), "row": (1,), "column": (0,)}[group]
    if any(x.shape[d] == 0 for d in dims):
        shape = [1 if d in dims else x.shape[d] for d in (0, 1)]
        zeros = values(x.new_zeros(shape))
        return zeros, zeros.clone()
    x = values(x, factor)
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


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
        step = torch.where(lo == hi, magnitude, (magnitude / steps).clamp(min=_LEAST_STEP))
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
    return ((hi * half - lo * half) / steps / half).clamp(min=_LEAST_STEP)


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
    step = widened(z).clamp(_LEAST_STEP, largest * (1 - 2**-15))  # the next line may widen, not overflow
    bits = step.view(torch.int32 if step.dtype == torch.float32 else torch.int64)
    step = ((bits + 0xFF) & ~0xFF).view(step.dtype)
    return step, torch.where(z == 0, 0.0, (-z * step).clamp(min=-largest))


def narrowing(step: Tensor) -> Tensor:
    """2⁻⁴ for groups so wide that their range could overflow, else 1; scaling by it is exact either way."""
    return torch.where(step > _WIDE_STEP[step.dtype], 0.0625, 1.0).to(step.dtype)


def position(x: Tensor, step: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """Where each entry lies on the code axis: t = (x − offset)/step, clamped to [low, high].

    Clamping comes before rounding, so no rounding can leave the range. NaN (of a group with a NaN step)
    becomes `low`.
    """
    half = narrowing(step)
    divisor = torch.where(step == 0, 1.0, step) * half
    t = (x * half - offset * half) / divisor
    return t.clamp_(low, high).nan_to_num_(nan=float(low))


def round_nearest(t: Tensor) -> Tensor:
    """Nearest integer, ties to even. Deterministic and biased."""
    return t.round()


def round_stochastic(t: Tensor, u: Tensor, levels: int = DITHER_LEVELS) -> Tensor:
    """⌊t⌋ + (u/levels < t − ⌊t⌋) for noise u in 0 … levels − 1.

    (⌊t + u⌋ in floats can leave the range.) Over all values of u the mean is t, exactly if t is a multiple of
    1/levels, and the variance is p(1 − p) with p = frac(t).
    """
    floor = t.floor()
    return floor + (u.to(t.dtype) * (1.0 / levels) < t - floor)


def round_dithered(t: Tensor, row: Tensor, column: Tensor, levels: int = DITHER_LEVELS) -> Tensor:
    """⌊t + (row + column)/levels⌋ in exact arithmetic, for integers row (N, 1), column (1, D) below `levels`.

    For t in [0, B − 1] the code stays in 0 … B. Over all (row, column) the error
    code − (row + column)/levels + ½(1 − 1/levels) − t has mean zero and variance (1 − levels⁻²)/12, exactly
    if t is a multiple of 1/levels.
    """
    k = row + column
    u = k % levels
    floor = t.floor()
    threshold = (levels - u).to(t.dtype) * (1.0 / levels)
    return floor + torch.div(k, levels, rounding_mode="floor") + (t - floor >= threshold)


def dither_noise(seed: Tensor, rows: int, columns: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """The two independent 24-bit noise vectors of dithered rounding: int32 (N, 1) and (1, D).

    With `transposed` the matrix lies on its side: its columns are the quantizer's rows, and take their stream.
    """
    along_rows, along_columns = dither_streams(transposed)
    row, column = random_u24(seed, along_rows, rows), random_u24(seed, along_columns, columns)
    return row.view(rows, 1), column.view(1, columns)


def dither_streams(transposed: bool) -> tuple[int, int]:
    """The streams along the rows and along the columns of a matrix."""
    return (STREAM_DITHER_COLUMN, STREAM_DITHER_ROW) if transposed else (STREAM_DITHER_ROW, STREAM_DITHER_COLUMN)


def encode(
    x: Tensor,
    step: Tensor,
    offset: Tensor,
    low: int,
    high: int,
    rounding: str,
    seed: Tensor | None,
    factor: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Codes of a matrix.

    Args:
        x: (N, D), any real floating dtype.
        step, offset: the groups' parameters, in x's compute dtype. A step of 0 (a constant group) gives code 0.
        low, high: the range t is clamped to; for dithered rounding `high` is one below the last code.
        rounding: "nearest", "stochastic" or "dithered".
        seed: int64 scalar tensor; None only for "nearest". Element noise is indexed row-major.
        factor: as in `values`.
        transposed: as in `dither_noise`.

    Returns:
        (N, D) codes, uint8 if low is 0, else int8.
    """
    x = values(x, factor)
    t = position(x, step, offset, low, high)
    if rounding == "nearest":
        codes = round_nearest(t)
    else:
        assert seed is not None
        if rounding == "stochastic":
            codes = round_stochastic(t, rounding_noise(seed, x.numel()).view(x.shape))
        else:
            codes = round_dithered(t, *dither_noise(seed, x.shape[0], x.shape[1], transposed))
    return codes.to(torch.uint8 if low == 0 else torch.int8)


def decode(codes: Tensor, step: Tensor, offset: Tensor, dither: Tensor | None) -> Tensor:
    """step · (code − dither) + offset, (N, D) in the step's dtype; finite for finite parameters."""
    half = narrowing(step)
    value = codes.to(step.dtype)
    if dither is not None:
        value = value - dither
    value = (value * (step * half) + offset * half) / half
    largest = torch.finfo(step.dtype).max
    return value.clamp_(-largest, largest)


def code_variance(x: Tensor, step: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """p(1 − p) of each entry, p = frac(t): the variance of stochastic rounding in squared steps, (N, D)."""
    t = position(x, step, offset, low, high)
    p = t - t.floor()
    return p * (1 - p)


def variance_sums(
    x: Tensor, step: Tensor, offset: Tensor, low: int, high: int, factor: Tensor | None = None
) -> Tensor:
    """Σ p(1 − p) of each group, every entry rounded to a multiple of 2⁻²⁴: integers, so order does not matter.

    Args:
        x, step, offset, low, high, factor: as in `encode`.

    Returns:
        int64 of step's shape, in units of 2⁻²⁴ squared steps.
    """
    unit = code_variance(values(x, factor), step, offset, low, high)
    dims = [d for d in (0, 1) if step.shape[d] == 1]
    counts = (unit * float(DITHER_LEVELS)).round().to(torch.int64)
    return counts.sum(dims, keepdim=True) if dims else counts


def column_sums(codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Σ over the rows of (N, D) codes, and with weights (N,) in 0 … 2²⁴ − 1 also Σ weight · code: int64 (D,)."""
    wide = codes.to(torch.int64)
    return wide.sum(0), None if weights is None else (wide * weights.to(torch.int64)[:, None]).sum(0)


def value_sums(x: Tensor) -> Tensor:
    """Σ over the rows of values (N, D), any real floating dtype: float64 (D,).

    Faster backends may add runs of 32 rows in float32 first.
    """
    return x.sum(0, dtype=torch.float64)


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
    x = values(x)
    x = x if before is None else before(x)
    mixed = _butterflies(x, order, blocks)
    mixed = mixed if keep is None else torch.where(keep, mixed, x)
    return mixed if after is None else after(mixed)


def _butterflies(x: Tensor, order: Tensor, blocks: tuple[int, ...]) -> Tensor:
    y = x.index_select(0, order)
    start = 0
    for size, count in _runs(blocks):
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


def _runs(blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of equal block sizes, as (size, count)."""
    runs: list[tuple[int, int]] = []
    for size in blocks:
        if runs and runs[-1][0] == size:
            runs[-1] = (size, runs[-1][1] + 1)
        else:
            runs.append((size, 1))
    return runs


def reflect(
    x: Tensor,
    group: Tensor,
    normal: Tensor,
    factor: Tensor,
    before: Scaling | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """Householder reflections over rows, block by block: x_r − n_r f_g Σ_q n_q x_q, q over r's group g.

    Args:
        x: (N, D), any real floating dtype.
        group: (N,) int64 below N: which block a row belongs to.
        normal: (N, 1): the entry n_r of its block's vector; 0 leaves the row as it is.
        factor: (N, 1): f_g = 2/‖n‖² of block g, in row g.
        before, after: what is done to the rows first and last.

    Returns:
        (N, D). The sum runs over ascending rows.
    """
    x = values(x)
    x = x if before is None else before(x)
    total = torch.zeros_like(x).index_add_(0, group, x * normal)
    y = x - normal * (total * factor).index_select(0, group)
    return y if after is None else after(y)


def replace_rows_(y: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """Row r of y, in place, becomes row r of x unless keep (N, 1) holds; returns y, (N, D)."""
    return y.copy_(torch.where(keep, y, values(x)))
