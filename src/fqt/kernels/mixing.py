"""Rows mixed before they are quantized: S = M·diag(s), M orthogonal over rows, blocks of rows at a time.

Each row's offset z is subtracted first and added back last (`value = S⁻¹ y + z`), so that a row's constant part
costs nothing and a constant row comes back exactly (s := 0, 1/s := 0). What a step on transformed row i costs
is ‖S⁻¹e_i‖² = Σ_r M_ir²/s_r²; with it the variance of any member has one formula.

The guard keeps plain rows (S = I) in every block where they cost less: `True` compares the step bounds
Σ_i ‖S⁻¹e_i‖² R_i², whose ranges R are known by then; "exact" compares exact variances at the price of a pass;
False never keeps them. So under `True` the bound is never above that of plain rows, but the exact variance of
stochastic rounding may be, where plain entries lie on codes and mixed ones do not: with 97 % zeros and lognormal
rows bhq4 was seen at 15.6 and shq4 at 9.9 times psq4. Dithered variances are their bounds: there it is exact. The
guard looks at the data, not at the rounding noise, so it leaves the estimate unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.codes import ROW, Entries, Findings, Quantized
from fqt.kernels.op import Op
from fqt.kernels.philox import STREAM_SIGN
from fqt.kernels.reference import Scaling, Unscaling
from fqt.kernels.roots import inverse_cube_root, square_root
from fqt.kernels.rotation import powers_of_two
from fqt.kernels.rounding import STOCHASTIC, Coding
from fqt.kernels.variance import RoundingError

WIDEST = 255
"""Steps of a range at which the bounds of affine rows are compared, whatever the width of their codes."""


@dataclass(frozen=True)
class Reflections:
    """M of the block Householder transform: symmetric, so it is its own transpose.

    Attributes:
        group: (N,) int64, each row's block.
        normal: (N, 1), n_r; zero for rows that stay as they are.
        beta: (N, 1), β_g = 2/‖n‖² of block g in row g.
    """

    group: Tensor
    normal: Tensor
    beta: Tensor

    def mixed(self, x: Tensor, before: Scaling) -> Tensor:
        """M · scaled x, (N, D)."""
        return ops.reflect(x, self.group, self.normal, self.beta, before)

    def unmixed(self, y: Tensor, after: Unscaling) -> Tensor:
        """Mᵀ y, unscaled, (N, D)."""
        return ops.reflect(y, self.group, self.normal, self.beta, after=after)


@dataclass(frozen=True)
class Butterflies:
    """√m·M of the Hadamard transform: symmetric, so it is its own transpose; scales take up signs and 1/√m.

    Attributes:
        order: (N,) int64, the rows block by block.
        blocks: the blocks' sizes m.
        keep: (N, 1) bool; False for rows that stay as they are.
    """

    order: Tensor
    blocks: tuple[int, ...]
    keep: Tensor

    def unmixed(self, y: Tensor, after: Unscaling) -> Tensor:
        """√m·Mᵀ y, unscaled, (N, D)."""
        return ops.hadamard(y, self.order, self.blocks, keep=self.keep, after=after)


@dataclass(frozen=True)
class Mixing:
    """The state of one application of a transform: enough to undo it.

    Attributes:
        inverse_scale: (N, 1), 1/s, zero for constant rows.
        offset: (N, 1), z.
        matrix: M, up to a factor that `inverse_scale` takes up.
        cost: (N,) float64, ‖S⁻¹e_i‖² of each transformed row.
    """

    inverse_scale: Tensor
    offset: Tensor
    matrix: Reflections | Butterflies
    cost: Tensor

    def undo(self, y: Tensor) -> Tensor:
        """S⁻¹ y + z, (N, D); finite where y is (values beyond the largest float are clamped to it)."""
        return self.matrix.unmixed(y, Unscaling(self.inverse_scale, self.offset, dtype=y.dtype))

    def undo_product(self, p: Tensor, of_ones: Tensor, dtype: torch.dtype) -> Tensor:
        """(S⁻¹ y + z)·B of `dtype`, given p = y·B (N, K) and 1·B (K,)."""
        return self.matrix.unmixed(p, Unscaling(self.inverse_scale, self.offset, of_ones, dtype))


@dataclass(frozen=True)
class Guard:
    """When a block of rows is mixed.

    Attributes:
        kind: True, "exact" or False; see the module.
        coding: of the rows, mixed or plain.
    """

    kind: bool | str
    coding: Coding

    def keeps(self, x: Tensor, y: Tensor, cost: Tensor, group: Tensor) -> Tensor:
        """(N,) bool: whether a row's block stays mixed.

        Args:
            x, y: (N, D), the rows plain and mixed.
            cost: (N,) float64, ‖S⁻¹e_i‖².
            group: (N,) int64, each row's block.
        """
        if self.kind is False:
            return torch.ones_like(group, dtype=torch.bool)
        plain, mixed = self._variance(x), self._variance(y) * cost
        gain = torch.zeros_like(cost).index_add_(0, group, plain - mixed)
        return (gain > 0)[group]

    def _variance(self, y: Tensor) -> Tensor:
        """(N,) float64: the variance of each row, exact or bounded."""
        coding, levels = self.coding, self.coding.levels
        if self.kind != "exact":
            # Affine steps are in proportion to ranges: at one width for all, the choice is the same to a bit.
            top = WIDEST if coding.mode == "affine" else levels.high + coding.rounding.headroom
            coding = replace(coding, levels=replace(levels, high=top), rounding=STOCHASTIC)
        error = RoundingError(ops.scales_of(*ops.value_range(Entries(y), ROW), coding, ROW), coding)
        return error.by_row(Entries(y).values()) if self.kind == "exact" else error.bound_by_row(y)


def householder(x: Tensor, small_rows: str, guard: Guard) -> tuple[Tensor, Mixing]:
    """One large row spread over a block of small ones by a reflection.

    Args:
        x: (N, D), any real floating dtype.
        small_rows: "released" or "rigorous", the model of the small rows' range after mixing.
        guard: when a block is mixed.

    Returns:
        The transformed matrix (N, D) and how to undo it.
    """
    rows = _Rows.of(x)
    group, large, blocks = householder_blocks(rows.range.double())
    size, big, small = (value[group] for value in blocks)
    scale = torch.where(large, *_householder_scales(size, big, small, small_rows))
    in_block = size > 1
    root = square_root(size.clamp(min=2))
    normal = torch.where(large, 1 / root - 1, 1 / root) * in_block
    beta = 1 / (1 - 1 / square_root(blocks[0].clamp(min=2)))
    scale = torch.where(in_block, scale, 1.0).masked_fill(rows.constant, 0.0)
    inverse = _inverse(scale)

    dtype = rows.offset.dtype
    mix = Reflections(group, normal.to(dtype)[:, None], beta.to(dtype)[:, None])
    y = mix.mixed(x, rows.scaling(scale))
    # Q_ri² = δ_ri (1 − 2 β n_i²) + β² n_r² n_i², so ‖S⁻¹e_i‖² = Σ_r Q_ri²/s_r² needs one sum per block.
    own, weight = beta[group], normal.square()
    spread = torch.zeros_like(inverse).index_add_(0, group, weight * inverse.square())[group]
    cost = inverse.square() * (1 - 2 * own * weight) + own.square() * weight * spread
    keep = in_block & guard.keeps(x, y, cost, group)
    mix = replace(mix, normal=mix.normal * keep[:, None])
    return _assemble(x, y, rows, inverse, cost, keep, mix)


def scaled_hadamard(x: Tensor, block: int, seed: Tensor, guard: Guard) -> tuple[Tensor, Mixing]:
    """Rows scaled by λ^(−1/2), λ their range, then mixed by a randomised orthonormal Hadamard matrix.

    Args:
        x: (N, D), any real floating dtype.
        block: the largest block, a power of two.
        seed: int64 scalar, of the random signs.
        guard: when a block is mixed.

    Returns:
        The transformed matrix (N, D) and how to undo it.
    """
    rows = _Rows.of(x)
    n = x.shape[0]
    blocks = hadamard_blocks(n, block)[0]
    # To copy them makes the host wait for a GPU. Tensors of a trace or of a function's transform must not be kept.
    plain = type(x) is Tensor and torch._C._functorch.maybe_current_level() is None
    deal, block_of, sizes = (_placed if x.is_cuda and plain else _positions)(n, block, x.device)
    by_size = torch.sort(rows.range, descending=True, stable=True).indices
    order = by_size[deal]
    group = torch.empty_like(order).index_copy_(0, order, block_of)
    size = sizes[group]

    sign = 1.0 - 2.0 * (ops.random_u24(seed, STREAM_SIGN, n) >> 23).double()
    scale = (sign * rows.range.double().rsqrt()).masked_fill(rows.constant, 0.0)
    inverse = _inverse(scale)
    before = rows.scaling(scale * size.rsqrt())
    y = ops.hadamard(x, order, blocks, before)
    cost = _block_mean(inverse.square(), group)
    keep = (size > 1) & guard.keeps(x, y, cost, group)
    mix = Butterflies(order, blocks, keep[:, None])
    return _assemble(x, y, rows, inverse * size.rsqrt(), cost, keep, mix)


@Op
def householder_codes(
    x: Entries,
    small_rows: str,
    guard: bool | str,
    coding: Coding,
    seed: Tensor | None,
    known: Findings | None = None,
) -> tuple[Quantized, Mixing]:
    """`householder` and the codes of its rows, whose guard looks at stochastic codes of the same levels."""
    y, mixing = householder(x.values(), small_rows, Guard(guard, coding))
    return ops.quantize(Entries(y), ROW, coding, seed)._replace(findings=known), mixing


@Op
def hadamard_codes(
    x: Entries, block: int, guard: bool | str, coding: Coding, seed: Tensor, known: Findings | None = None
) -> tuple[Quantized, Mixing]:
    """`scaled_hadamard` and the codes of its rows."""
    y, mixing = scaled_hadamard(x.values(), block, seed, Guard(guard, coding))
    return ops.quantize(Entries(y), ROW, coding, seed)._replace(findings=known), mixing


@dataclass(frozen=True)
class _Rows:
    """Offset (N, 1), range (N,) and constancy (N,) of a matrix's rows."""

    offset: Tensor
    range: Tensor
    constant: Tensor
    half: Tensor

    @staticmethod
    def of(x: Tensor) -> _Rows:
        lo, hi = ops.value_range(Entries(x), ROW)
        wide = hi * 0.5 - lo * 0.5 > torch.finfo(lo.dtype).max / 4
        half = torch.where(wide, 0.5, 1.0).to(lo.dtype)
        # A range beyond the largest float is only a size here: halve it rather than overflow.
        size = torch.where(wide, hi * 0.5 - lo * 0.5, hi - lo)[:, 0]
        # About its middle a row is no larger than half its range, so that undoing S cannot overflow.
        middle = torch.where(lo == hi, lo, lo * 0.5 + hi * 0.5)
        return _Rows(middle, size, (lo == hi)[:, 0], half)

    def scaling(self, scale: Tensor) -> Scaling:
        """diag(scale)·(x − z), with no overflow on the way."""
        return Scaling(self.half, self.offset, (scale[:, None] / self.half).to(self.half.dtype))


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _block_mean(value: Tensor, group: Tensor) -> Tensor:
    """Each row's block mean of `value` (N,)."""
    total = torch.zeros_like(value).index_add_(0, group, value)
    count = torch.zeros_like(value).index_add_(0, group, torch.ones_like(value))
    return (total / count.clamp(min=1))[group]


def _assemble(
    x: Tensor,
    y: Tensor,
    rows: _Rows,
    inverse: Tensor,
    cost: Tensor,
    keep: Tensor,
    matrix: Reflections | Butterflies,
) -> tuple[Tensor, Mixing]:
    """Plain rows where the guard says so; NaN everywhere if any row is not finite, since rows are mixed."""
    column = keep[:, None]
    offset = torch.where(column, rows.offset, 0.0)
    offset = torch.where(torch.isfinite(rows.range).all() & torch.isfinite(rows.offset).all(), offset, torch.nan)
    scale = torch.where(keep, inverse, 1.0).to(y.dtype)[:, None]
    return ops.replace_rows_(y, column, x), Mixing(scale, offset, matrix, torch.where(keep, cost, 1.0))


def householder_blocks(size: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The released grouping rule, without loops over rows and for every N.

    Rows are sorted by size, v_1 ≥ … ≥ v_N (ties keep their order). G, the number of large rows, is the largest
    i with (N − i)·v_i > v_1 + … + v_i: the i-th still deserves more than one small row. Large row j gets
    a share of the small ones proportional to v_j, cumulative shares rounded half up, the largest small rows
    first. No such i (N ≤ 2, all zero, NaN): no blocks.

    Args:
        size: (N,) float64, ≥ 0.

    Returns:
        group: (N,) int64, each row's block; rows outside blocks are blocks of one.
        large: (N,) bool, whether it is its block's large row.
        (rows, large size, largest small size) of every block: three (N,) float64 tensors indexed by group.
    """
    n = size.numel()
    v, order = torch.sort(size, descending=True, stable=True)
    total = v.cumsum(0)
    rank = torch.arange(n, device=size.device)
    deserves = (n - 1 - rank) * v > total
    count = torch.where(deserves, rank + 1, 0).amax(0, keepdim=True) if n else rank
    is_large = rank < count
    share = (n - count) * total / total.gather(0, (count - 1).clamp(min=0)) if n else total
    boundary = torch.where(is_large, (share + 0.5).floor(), n + 1).to(torch.int64)
    owner = torch.searchsorted(boundary, (rank - count).clamp(min=0), right=True)
    group_by_rank = torch.where(is_large | (count == 0), rank, owner)

    rows = torch.zeros_like(v).index_add_(0, group_by_rank, torch.ones_like(v))
    first = count + torch.cat([boundary.new_zeros(min(n, 1)), boundary[:-1]])
    largest_small = v.gather(0, first.clamp(max=max(n - 1, 0)))
    group = torch.empty_like(order).index_copy_(0, order, group_by_rank)
    large = torch.empty_like(is_large).index_copy_(0, order, is_large)
    return group, large, (rows, v, largest_small)


def _householder_scales(k: Tensor, big: Tensor, small: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """s1 of a block's large row and s2 of its small ones, from w1^(−1/3) and (w2/(k − 1))^(−1/3)."""
    root = square_root(k.clamp(min=2))
    if rule == "rigorous":
        w2 = small * (k - 1) / root
    else:
        three = k.clamp(min=3)
        off_diagonal = torch.where(k > 2, 1 / (three - square_root(three)), 0.0)
        diagonal = (1 - 1 / (k.clamp(min=2) - root)).abs()
        w2 = small * torch.maximum(torch.maximum(off_diagonal, diagonal), 1 / root)
    # Where all small rows are constant w2 is 0 and their scale is replaced by 0 later.
    return inverse_cube_root(big / root), torch.where(w2 > 0, inverse_cube_root(w2 / (k - 1).clamp(min=1)), 1.0)


def hadamard_blocks(n: int, largest: int) -> tuple[tuple[int, ...], Tensor]:
    """Block sizes that sum to n, and which rank (by row size) each position takes."""
    blocks, deal = _dealt(n, largest)
    return blocks, torch.from_numpy(deal)


@lru_cache(maxsize=64)
def _dealt(n: int, largest: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The same with an array: a tensor that was made while torch fakes them must not be kept."""
    blocks = powers_of_two(n, largest)
    dealt = [size for size in blocks if size >= min(32, blocks[0])] if blocks else []
    # Position j of a block of size m asks for the rank at the fraction (j + ½)/m of all rows dealt out.
    wishes = sorted(((j + 0.5) / m, b, j) for b, m in enumerate(dealt) for j in range(m))
    starts = [sum(blocks[:b]) for b in range(len(blocks))]
    deal = np.arange(n, dtype=np.int64)
    for rank, (_, b, j) in enumerate(wishes):
        deal[starts[b] + j] = rank
    return blocks, deal


def _positions(n: int, largest: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The rank that each position of `hadamard_blocks` takes, its block, both int64; the blocks' sizes, float64."""
    blocks, deal = hadamard_blocks(n, largest)
    sizes = torch.tensor(blocks, dtype=torch.int64, device="cpu")
    block_of = torch.repeat_interleave(torch.arange(len(blocks), device="cpu"), sizes, output_size=n)
    return deal.to(device), block_of.to(device), sizes.double().to(device)


_kept_positions = lru_cache(maxsize=64)(_positions)
_in_graphs: dict[tuple[int, int, torch.device], tuple[Tensor, ...]] = {}


def _placed(n: int, largest: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`_positions` on a GPU, kept; for ever where a CUDA graph is captured, which holds their addresses only."""
    found = _kept_positions(n, largest, device)
    if torch.cuda.is_current_stream_capturing():
        _in_graphs[n, largest, device] = found
    return found
