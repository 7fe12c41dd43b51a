"""How groups of known ranges are rounded: steps, codes and variances of one rounding, or of the best of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.reference import DITHER_LEVELS
from fqt.quant.scale import Integers
from fqt.quant.tensor import Dither

# The largest variance of one entry, in squared steps.
_UNIT_BOUND = {"nearest": 0.0, "stochastic": 1 / 4, "dithered": 1 / 12}


@dataclass(frozen=True)
class Entries:
    """What is encoded: a matrix, its columns' factor, and whether it lies on its side."""

    matrix: Tensor
    factor: Tensor | None
    transposed: bool


@dataclass(frozen=True)
class Plan:
    """How one matrix is rounded: its groups' parameters, the range of t, and the rounding."""

    step: Tensor
    offset: Tensor
    low: int
    high: int
    rounding: str

    @staticmethod
    def of(lo: Tensor, hi: Tensor, mode: str, grid: Integers, rounding: str) -> Plan:
        """The plan for groups with ranges [lo, hi]."""
        low, high = Plan.codes(mode, grid, rounding)
        return Plan(*ops.parameters(lo, hi, mode, high), low, high, rounding)

    @staticmethod
    def codes(mode: str, grid: Integers, rounding: str) -> tuple[int, int]:
        """The range that positions are clamped to; its end is also the number of steps."""
        if mode == "symmetric":
            return -grid.symmetric_steps, grid.symmetric_steps
        # Dithered codes may round up by almost two steps' worth: one step of head-room keeps them in 0 … B.
        return 0, grid.affine_steps - (rounding == "dithered")

    def encode(self, x: Entries, key: Tensor | None) -> Tensor:
        """(N, D) codes."""
        rest = (self.low, self.high, self.rounding, key, x.factor, x.transposed)
        return ops.encode(x.matrix, self.step, self.offset, *rest)

    def decoding(
        self, matrix: Tensor, transposed: bool, key: Tensor | None
    ) -> tuple[Tensor, Tensor, Dither | None]:
        """Step, offset and dither."""
        if self.rounding != "dithered":
            return self.step, self.offset, None
        return self.step, self.offset, Dither(*ops.dither(key, matrix, self.step.dtype, transposed))

    def group_variance(self, y: Tensor, factor: Tensor | None) -> Tensor:
        """float64, of step's shape: Σ over the group of its entries' variances (to 2⁻²⁵ of a squared step each)."""
        if self.rounding == "stochastic":
            sums = ops.variance_sums(y, self.step, self.offset, self.low, self.high, factor)
            return sums.double() / DITHER_LEVELS * self.step.double().square()
        size = y.numel() // max(self.step.numel(), 1)
        return self.step.double().square() * (size * _UNIT_BOUND[self.rounding])

    def variance(self, y: Tensor, cost: Tensor | None, groups: Tensor | None = None) -> Tensor:
        """float64 scalar: Σ_i cost_i Σ_j of the entries' exact variances; to 2⁻²⁵ of a squared step each.

        `groups` is `group_variance(y, None)` where it is known.
        """
        if cost is not None and self.step.shape != (y.shape[0], 1):
            return (self.row_variance(y) * cost).sum()
        groups = self.group_variance(y, None) if groups is None else groups
        return groups.sum() if cost is None else (groups.squeeze(1) * cost).sum()

    def row_variance(self, y: Tensor) -> Tensor:
        """(N,) float64: Σ_j of the entries' exact variances."""
        if self.rounding != "stochastic":
            return self.row_bound(y)
        unit = ops.code_variance(y, self.step, self.offset, self.low, self.high)
        if self.step.shape[1] == 1:
            return _row_sums(unit) * self.step.double().square().squeeze(1)
        return (unit * self.step.double().square()).sum(1)

    def row_bound(self, y: Tensor) -> Tensor:
        """(N,) float64: Σ_j of the entries' variance bounds."""
        square = self.step.double().square()
        rows = square.sum(1) if square.shape[1] == y.shape[1] else square[:, 0] * y.shape[1]
        return (rows * _UNIT_BOUND[self.rounding]).expand(y.shape[0])

    def entry_variance(self, y: Tensor) -> Tensor:
        """(N, D) float64: the entries' exact variances, before a transform is undone."""
        if self.rounding != "stochastic":
            return self.entry_bound(y)
        unit = ops.code_variance(y, self.step, self.offset, self.low, self.high)
        return unit * self.step.double().square()

    def entry_bound(self, y: Tensor) -> Tensor:
        """(N, D) float64: the entries' variance bounds, before a transform is undone."""
        return (self.step.double().square() * _UNIT_BOUND[self.rounding]).expand(y.shape)

    def weighted_variance(self, y: Tensor, weight: Tensor) -> Tensor:
        """float64 scalar: Σ of the entries' exact variances times weights (N, D), or (1, D) for all rows."""
        if self.rounding != "stochastic":
            return self.weighted_bound(y, weight)
        if weight.shape[0] != 1 or self.step.shape[1] != 1:
            return (self.entry_variance(y) * weight).sum()
        unit = ops.code_variance(y, self.step, self.offset, self.low, self.high)
        rows = _row_sums(unit.mul_(weight.to(unit.dtype)))
        return (rows * self.step.double().square().squeeze(1)).sum()

    def weighted_bound(self, y: Tensor, weight: Tensor) -> Tensor:
        """float64 scalar: Σ of the entries' variance bounds times weights, as above."""
        if weight.shape[0] != 1 or self.step.shape[1] != 1:
            return (self.entry_bound(y) * weight).sum()
        steps = self.step.double().square().expand(y.shape[0], 1).sum()
        return steps * (weight.sum() * _UNIT_BOUND[self.rounding])


@dataclass(frozen=True)
class Best:
    """Several plans and which of them is taken; the choice stays on the device.

    Attributes:
        taken: int64 scalar tensor, an index of `plans`.
        plans: the candidates, at most one of them dithered.
        groups: their group variances, which the choice was made on.
    """

    taken: Tensor
    plans: tuple[Plan, ...]
    groups: tuple[Tensor, ...]

    @staticmethod
    def of(plans: tuple[Plan, ...], y: Tensor, factor: Tensor | None, cost: Tensor | None) -> Best:
        """The plan of the least exact variance on y (N, D), times `cost` (N,) by row; the first of equals."""
        groups = tuple(plan.group_variance(y, factor) for plan in plans)
        taken = torch.zeros((), dtype=torch.int64, device=y.device)
        least = _in_order(groups[0], cost)
        for index, group in enumerate(groups[1:], 1):
            variance = _in_order(group, cost)
            taken = torch.where(variance < least, index, taken)
            least = torch.where(variance < least, variance, least)
        return Best(taken, plans, groups)

    def _pick(self, values: Sequence[Tensor]) -> Tensor:
        picked = values[0]
        for index, value in enumerate(values[1:], 1):
            picked = torch.where(self.taken == index, value, picked)
        return picked

    def _on_cpu(self) -> Plan | None:
        """The plan taken, where asking costs nothing."""
        return self.plans[int(self.taken)] if ops.at_hand(self.taken) else None

    def plan(self) -> Plan | Best:
        """The plan taken, where asking costs nothing; else all."""
        return self._on_cpu() or self

    def variance(self, y: Tensor, cost: Tensor | None) -> Tensor:
        """float64 scalar, of the matrix the choice was made on."""
        plans = zip(self.plans, self.groups, strict=True)
        return self._pick([plan.variance(y, cost, groups) for plan, groups in plans])

    def encode(self, x: Entries, key: Tensor | None) -> Tensor:
        """(N, D) codes."""
        taken = self._on_cpu()
        if taken is not None:
            return taken.encode(x, key)
        return self._pick([plan.encode(x, key) for plan in self.plans])

    def decoding(
        self, matrix: Tensor, transposed: bool, key: Tensor | None
    ) -> tuple[Tensor, Tensor, Dither | None]:
        """Step, offset and dither of the plan taken."""
        taken = self._on_cpu()
        if taken is not None:
            return taken.decoding(matrix, transposed, key)
        picked = self._pick([p.step for p in self.plans]), self._pick([p.offset for p in self.plans])
        dithered = next((i for i, p in enumerate(self.plans) if p.rounding == "dithered"), None)
        if dithered is None:
            return *picked, None
        dither = self.plans[dithered].decoding(matrix, transposed, key)[2]
        assert dither is not None
        return *picked, dither.where(self.taken == dithered)

    def row_variance(self, y: Tensor) -> Tensor:
        """(N,) float64."""
        return self._pick([plan.row_variance(y) for plan in self.plans])

    def row_bound(self, y: Tensor) -> Tensor:
        """(N,) float64."""
        return self._pick([plan.row_bound(y) for plan in self.plans])

    def entry_variance(self, y: Tensor) -> Tensor:
        """(N, D) float64."""
        return self._pick([plan.entry_variance(y) for plan in self.plans])

    def entry_bound(self, y: Tensor) -> Tensor:
        """(N, D) float64."""
        return self._pick([plan.entry_bound(y) for plan in self.plans])

    def weighted_variance(self, y: Tensor, weight: Tensor) -> Tensor:
        """float64 scalar."""
        return self._pick([plan.weighted_variance(y, weight) for plan in self.plans])

    def weighted_bound(self, y: Tensor, weight: Tensor) -> Tensor:
        """float64 scalar."""
        return self._pick([plan.weighted_bound(y, weight) for plan in self.plans])


def _in_order(groups: Tensor, cost: Tensor | None) -> Tensor:
    """float64 scalar: the groups' sum, added in one order on every backend: no choice may depend on the machine."""
    weighted = groups if cost is None else groups * cost[:, None]
    return weighted.flatten().cumsum(0)[-1:].sum()


def _row_sums(x: Tensor) -> Tensor:
    """(N,) float64 from (N, D) entries that are not negative, to 1e-7.

    Sums of 256 columns in x's own dtype, then float64: several times faster than float64 from the start.
    """
    whole = x.shape[1] - x.shape[1] % 256
    sums = x[:, whole:].sum(1, dtype=torch.float64)
    if whole:
        sums += x[:, :whole].unflatten(1, (-1, 256)).sum(1).sum(1, dtype=torch.float64)
    return sums
