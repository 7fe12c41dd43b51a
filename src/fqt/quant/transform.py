"""Transforms: what is mixed before quantizing. S = M·diag(s), M orthogonal over rows, blocks of rows at a time.

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

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import mixed, ops
from fqt.kernels.mixed import MixedCodes, Rounding
from fqt.kernels.philox import STREAM_SIGN, random_words
from fqt.kernels.reference import Scaling, Unscaling
from fqt.kernels.roots import inverse_cube_root, square_root

RowCost = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reflections:
    """M of the block Householder transform: symmetric, so it is its own transpose.

    Attributes:
        group: (N,) int64, each row's block.
        normal: (N, 1), n_r; zero for rows that stay as they are.
        factor: (N, 1), 2/‖n‖² of block g in row g.
    """

    group: Tensor
    normal: Tensor
    factor: Tensor

    def mixed(self, x: Tensor, before: Scaling) -> Tensor:
        """M · scaled x, (N, D)."""
        return ops.reflect(x, self.group, self.normal, self.factor, before)

    def unmixed(self, y: Tensor, after: Unscaling) -> Tensor:
        """Mᵀ y, unscaled, (N, D)."""
        return ops.reflect(y, self.group, self.normal, self.factor, after=after)


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

    @staticmethod
    def of(found: MixedCodes, matrix: Reflections | Butterflies) -> Mixing:
        """The state that came with codes."""
        return Mixing(found.inverse_scale, found.row_offset, matrix, found.cost)

    def undo(self, y: Tensor) -> Tensor:
        """S⁻¹ y + z, (N, D); finite where y is (values beyond the largest float are clamped to it)."""
        return self.matrix.unmixed(y, Unscaling(self.inverse_scale, self.offset, dtype=y.dtype))

    def undo_product(self, p: Tensor, of_ones: Tensor, dtype: torch.dtype) -> Tensor:
        """(S⁻¹ y + z)·B of `dtype`, given p = y·B (N, K) and 1·B (K,)."""
        return self.matrix.unmixed(p, Unscaling(self.inverse_scale, self.offset, of_ones, dtype))


def _check_guard(guard: bool | str) -> None:
    if guard not in (True, False, "exact"):
        raise FqtError(f"unknown guard {guard!r}; known: True, False, 'exact'")


@dataclass(frozen=True)
class Identity:
    """No transform."""

    def apply(self, x: Tensor, seed: Tensor | None, row_cost: RowCost) -> tuple[Tensor, Mixing | None]:
        """x itself, and nothing to undo."""
        return x, None

    def codes(self, x: Tensor, factor: Tensor | None, how: Rounding) -> None:
        """Nothing: there are no rows to mix."""


@dataclass(frozen=True)
class BlockHouseholder:
    """One large row spread over a block of small ones by a reflection (the paper's BHQ).

    Grouping and scales follow the released rule (rows sorted by range; as many large rows as each deserve more
    than one small one; s1 ∝ w1^(−1/3), s2 ∝ (w2/(k − 1))^(−1/3), w1 = λ1/√k) without its absolute epsilon.
    Deterministic. O(N·D), by reflections; no N × N matrix is formed.

    Attributes:
        guard: see the module.
        small_rows: the model of the small rows' range after mixing: "released" is w2 = λ2·max|Q|, which is not
            a bound; "rigorous" is w2 = λ2 (k − 1)/√k, which is.
    """

    guard: bool | str = True
    small_rows: str = "released"

    def __post_init__(self) -> None:
        _check_guard(self.guard)
        if self.small_rows not in ("released", "rigorous"):
            raise FqtError(f"unknown small_rows {self.small_rows!r}; known: released, rigorous")

    def apply(self, x: Tensor, seed: Tensor | None, row_cost: RowCost) -> tuple[Tensor, Mixing]:
        """The transformed matrix (N, D) and its `Mixing`."""
        rows = _Rows.of(x)
        group, large, blocks = householder_blocks(rows.range.double())
        size, big, small = (value[group] for value in blocks)
        scale = torch.where(large, *_householder_scales(size, big, small, self.small_rows))
        in_block = size > 1
        root = square_root(size.clamp(min=2))
        normal = torch.where(large, 1 / root - 1, 1 / root) * in_block
        factor = 1 / (1 - 1 / square_root(blocks[0].clamp(min=2)))
        scale = torch.where(in_block, scale, 1.0).masked_fill(rows.constant, 0.0)
        inverse = _inverse(scale)

        dtype = rows.offset.dtype
        mix = Reflections(group, normal.to(dtype)[:, None], factor.to(dtype)[:, None])
        y = mix.mixed(x, rows.scaling(scale))
        # Q_ri² = δ_ri (1 − 2 f n_i²) + f² n_r² n_i², so ‖S⁻¹e_i‖² = Σ_r Q_ri²/s_r² needs one sum per block.
        f, weight = factor[group], normal.square()
        spread = torch.zeros_like(inverse).index_add_(0, group, weight * inverse.square())[group]
        cost = inverse.square() * (1 - 2 * f * weight) + f.square() * weight * spread
        keep = in_block & _guarded(self.guard, row_cost, x, y, cost, group)
        mix = replace(mix, normal=mix.normal * keep[:, None])
        return _assemble(x, y, rows, inverse, cost, keep, mix)

    def codes(self, x: Tensor, factor: Tensor | None, how: Rounding) -> tuple[MixedCodes, Mixing] | None:
        """`apply` and its codes at once; None where only the steps can do it. `how.guard` is overridden."""
        if self.guard == "exact":
            return None
        how = replace(how, guard=bool(self.guard))
        found = mixed.householder_codes(x, factor, self.small_rows == "rigorous", how)
        return None if found is None else (found[0], Mixing.of(found[0], Reflections(*found[1:])))


@dataclass(frozen=True)
class ScaledHadamard:
    """Rows scaled by λ^(−1/2), then mixed by a randomised orthonormal Hadamard matrix (this project's SHQ).

    The rule s = λ^(−1/2): flat mixing (every |M_ij|² = 1/m) gives each transformed row the mean square
    Σ_i s_i²λ_i²/m, λ_i the size of row i about its offset; its range is a constant c times the root of that;
    and undoing S costs Σ_i s_i⁻² in all. So the variance is proportional to c² (Σ s_i²λ_i²)(Σ s_i⁻²)/m, which
    by Cauchy–Schwarz is at least c² (Σ λ_i)²/m, reached exactly at s_i ∝ λ_i^(−1/2). Plain rows have Σ c_i²λ_i².

    Limits of the claim: λ is a range here, a proxy for the size; c depends on the rows: a mixture is nearly
    Gaussian while a row may be flat, which can cost a factor up to 16 on two-valued rows. The guard is what
    bounds the loss: with it the step bound is never above that of plain rows, and with guard="exact" the
    variance is not. Signs are ±1 from a Philox stream of the seed; unbiased for every sign pattern.

    Attributes:
        guard: see the module.
        block: the largest block, a power of two. Any N is split into powers of two; the rows of all blocks of
            at least 32 rows are dealt out evenly by size, the smallest rows go to the small blocks.
    """

    guard: bool | str = True
    block: int = 128

    def __post_init__(self) -> None:
        _check_guard(self.guard)
        if type(self.block) is not int or self.block < 1 or self.block & (self.block - 1):
            raise FqtError(f"a Hadamard block must be a power of two, not {self.block!r}")

    def apply(self, x: Tensor, seed: Tensor | None, row_cost: RowCost) -> tuple[Tensor, Mixing]:
        """The transformed matrix (N, D) and its `Mixing`."""
        if seed is None:
            raise FqtError("this quantizer draws random signs: give a seed")
        rows = _Rows.of(x)
        n = x.shape[0]
        blocks, deal = _hadamard_blocks(n, self.block)
        sizes = torch.tensor(blocks, dtype=torch.long, device=x.device)
        block_of = torch.repeat_interleave(torch.arange(len(blocks), device=x.device), sizes, output_size=n)
        by_size = torch.sort(rows.range, descending=True, stable=True).indices
        order = by_size[deal.to(x.device)]
        group = torch.empty_like(order).index_copy_(0, order, block_of)
        size = torch.tensor(blocks, dtype=torch.float64, device=x.device)[group]

        sign = 1.0 - 2.0 * (random_words(seed, STREAM_SIGN, n) >> 31).double()
        scale = (sign * rows.range.double().rsqrt()).masked_fill(rows.constant, 0.0)
        inverse = _inverse(scale)
        before = rows.scaling(scale * size.rsqrt())
        y = ops.hadamard(x, order, blocks, before)
        cost = _block_mean(inverse.square(), group)
        keep = (size > 1) & _guarded(self.guard, row_cost, x, y, cost, group)
        mix = Butterflies(order, blocks, keep[:, None])
        return _assemble(x, y, rows, inverse * size.rsqrt(), cost, keep, mix)

    def codes(self, x: Tensor, factor: Tensor | None, how: Rounding) -> tuple[MixedCodes, Mixing] | None:
        """`apply` and its codes at once; None where only the steps can do it. `how.guard` is overridden."""
        if self.guard == "exact" or how.seed is None:
            return None
        blocks, deal = _hadamard_blocks(x.shape[0], self.block)
        found = mixed.hadamard_codes(x, factor, deal, blocks, replace(how, guard=bool(self.guard)))
        return (
            None if found is None else (found[0], Mixing.of(found[0], Butterflies(found[1], blocks, found[0].keep)))
        )


Transform = Identity | BlockHouseholder | ScaledHadamard


@dataclass(frozen=True)
class _Rows:
    """Offset (N, 1), range (N,) and constancy (N,) of a matrix's rows."""

    offset: Tensor
    range: Tensor
    constant: Tensor
    half: Tensor

    @staticmethod
    def of(x: Tensor) -> _Rows:
        lo, hi = ops.value_range(x, "row")
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


def _guarded(guard: bool | str, row_cost: RowCost, x: Tensor, y: Tensor, cost: Tensor, group: Tensor) -> Tensor:
    """(N,) bool: whether a row's block stays transformed."""
    if guard is False:
        return torch.ones_like(group, dtype=torch.bool)
    plain, mixed = row_cost(x), row_cost(y) * cost
    gain = torch.zeros_like(cost).index_add_(0, group, plain - mixed)
    return (gain > 0)[group]


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


@lru_cache(maxsize=64)
def _hadamard_blocks(n: int, largest: int) -> tuple[tuple[int, ...], Tensor]:
    """Block sizes that sum to n, and which rank (by row size) each position takes."""
    blocks = [largest] * (n // largest)
    rest = n % largest
    blocks += [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    dealt = [size for size in blocks if size >= min(32, blocks[0])] if blocks else []
    # Position j of a block of size m asks for the rank at the fraction (j + ½)/m of all rows dealt out.
    wishes = sorted(((j + 0.5) / m, b, j) for b, m in enumerate(dealt) for j in range(m))
    starts = [sum(blocks[:b]) for b in range(len(blocks))]
    deal = list(range(n))
    for rank, (_, b, j) in enumerate(wishes):
        deal[starts[b] + j] = rank
    return tuple(blocks), torch.tensor(deal, dtype=torch.int64, device="cpu")
