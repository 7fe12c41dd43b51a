"""The variance that rounding adds: exact in one pass, and its closed-form bound.

Stochastic rounding of a position between neighbours a ≤ t ≤ b has variance (t − a)(b − t), at most (b − a)²/4;
dithered rounding has (b − a)²/12 wherever t lies; any other has what `Rounding.variance` says. All in squared
steps; errors of different entries are independent (dithered: any three of them), so variances of sums are sums of
variances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels import ops, reference
from fqt.kernels.codes import COLUMN, DITHER_LEVELS, Entries, Scales
from fqt.kernels.rounding import STOCHASTIC, Coding


@dataclass(frozen=True)
class RoundingError:
    """What rounding does to a matrix (N, D) whose blocks' parameters are known; variances in squared units of it.

    Attributes:
        scales: the blocks' parameters.
        coding: how they were made, and how entries are rounded.
    """

    scales: Scales
    coding: Coding

    @property
    def _one_bound(self) -> bool:
        """Whether all entries with one step have one bound."""
        return self.coding.levels.uniform and not self.coding.rounding.settles

    def _unit(self, x: Entries) -> Tensor:
        """(N, D): the entries' exact variances in squared steps."""
        rounding, levels = self.coding.rounding, self.coding.levels
        if rounding.settles:
            return rounding.errors(x, self.scales, levels)[0]
        if rounding == STOCHASTIC:
            return ops.code_variance(x, self.scales, levels)
        return rounding.variance(reference.position(x.values(), self.scales, levels), levels)

    @property
    def _by_row(self) -> bool:
        """Whether all entries of a row have one step."""
        return self.scales.blocks.plain and self.scales.step.shape[1] == 1 and self.scales.blocks != COLUMN

    def by_block(self, x: Entries) -> Tensor:
        """float64, of step's shape: Σ over the block of its entries' variances, to 2⁻²⁵ of a squared step each."""
        square, levels = self.scales.step.double().square(), self.coding.levels
        if not self.coding.rounding.varies:
            sizes = self.scales.blocks.sizes(x.shape, square.device)
            return square * (sizes * self.coding.rounding.unit_bound)
        if levels.dtype == torch.float32 or self.coding.rounding != STOCHASTIC:  # sums may leave an integer
            return self.scales.blocks.sums(self._unit(x).double()) * square
        return ops.variance_sums(x, self.scales, levels).double() / DITHER_LEVELS * square

    def variance(self, y: Tensor, cost: Tensor | None, blocks: Tensor | None = None) -> Tensor:
        """float64 scalar: Σ_i cost_i Σ_j of the entries' exact variances; to 2⁻²⁵ of a squared step each.

        `blocks` is `by_block` where it is known.
        """
        if cost is not None and self.scales.step.shape != (y.shape[0], 1):
            return (self.by_row(y) * cost).sum()
        blocks = self.by_block(Entries(y)) if blocks is None else blocks
        return blocks.sum() if cost is None else (blocks.squeeze(1) * cost).sum()

    def bound(self, y: Tensor, cost: Tensor | None) -> Tensor:
        """float64 scalar: the same of the entries' variance bounds."""
        rows = self.bound_by_row(y)
        return (rows if cost is None else rows * cost).sum()

    def by_row(self, y: Tensor) -> Tensor:
        """(N,) float64: Σ_j of the entries' exact variances."""
        if not self.coding.rounding.varies:
            return self.bound_by_row(y)
        unit = self._unit(Entries(y))
        if self._by_row:
            return _row_sums(unit) * self.scales.step.double().square().squeeze(1)
        return (unit * self._squares(y)).sum(1)

    def bound_by_row(self, y: Tensor) -> Tensor:
        """(N,) float64: Σ_j of the entries' variance bounds."""
        if not self._by_row or not self._one_bound:
            return self.bound_by_entry(y).sum(1)
        square = self.scales.step.double().square()
        return (square[:, 0] * y.shape[1] * self.coding.rounding.unit_bound).expand(y.shape[0])

    def by_entry(self, y: Tensor) -> Tensor:
        """(N, D) float64: the entries' exact variances, before a transform is undone."""
        if not self.coding.rounding.varies:
            return self.bound_by_entry(y)
        return self._unit(Entries(y)) * self._squares(y)

    def bound_by_entry(self, y: Tensor) -> Tensor:
        """(N, D) float64: the entries' variance bounds, before a transform is undone."""
        if self.coding.rounding.settles:
            return self.coding.rounding.errors(Entries(y), self.scales, self.coding.levels)[1] * self._squares(y)
        bound = (self._squares(y) * self.coding.rounding.unit_bound).expand(y.shape)
        if self.coding.levels.uniform:
            return bound
        return bound * self.coding.levels.split(reference.position(y, self.scales, self.coding.levels))[2] ** 2

    def weighted(self, y: Tensor, weight: Tensor) -> Tensor:
        """float64 scalar: Σ of the entries' exact variances times weights (N, D), or (1, D) for all rows."""
        if not self.coding.rounding.varies:
            return self.weighted_bound(y, weight)
        if weight.shape[0] != 1 or not self._by_row:
            return (self.by_entry(y) * weight).sum()
        unit = self._unit(Entries(y))
        rows = _row_sums(unit.mul_(weight.to(unit.dtype)))
        return (rows * self.scales.step.double().square().squeeze(1)).sum()

    def weighted_bound(self, y: Tensor, weight: Tensor) -> Tensor:
        """float64 scalar: Σ of the entries' variance bounds times weights, as above."""
        if weight.shape[0] != 1 or not self._by_row or not self._one_bound:
            return (self.bound_by_entry(y) * weight).sum()
        steps = self.scales.step.double().square().expand(y.shape[0], 1).sum()
        return steps * (weight.sum() * self.coding.rounding.unit_bound)

    def _squares(self, y: Tensor) -> Tensor:
        """Squared steps in float64, broadcasting against y."""
        return self.scales.spread((y.shape[0], y.shape[1]))[0].double().square()


def _row_sums(x: Tensor) -> Tensor:
    """(N,) float64 from (N, D) entries that are not negative, to 1e-7.

    Sums of 256 columns in x's own dtype, then float64: several times faster than float64 from the start.
    """
    whole = x.shape[1] - x.shape[1] % 256
    sums = x[:, whole:].sum(1, dtype=torch.float64)
    if whole:
        sums += x[:, :whole].unflatten(1, (-1, 256)).sum(1).sum(1, dtype=torch.float64)
    return sums
