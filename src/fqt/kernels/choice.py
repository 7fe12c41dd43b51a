"""The best of several codings of a matrix: the one whose exact variance on it is the least.

The choice looks at the data, not at the rounding noise, so an estimate by the coding taken is as unbiased as each
of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.codes import Blocks, Entries, Findings, Quantized, Scales
from fqt.kernels.op import Op
from fqt.kernels.rounding import DITHERED, Coding
from fqt.kernels.variance import RoundingError


@dataclass(frozen=True)
class Choice:
    """Codings of one matrix, and which of them has the least exact variance on it.

    Attributes:
        taken: int64 scalar tensor, the place of the one that is taken; the choice stays on the device.
        errors: each one's, with its parameters.
        variances: each one's variance by block; (None,) where there is but one.
    """

    taken: Tensor
    errors: tuple[RoundingError, ...]
    variances: tuple[Tensor | None, ...]

    @staticmethod
    def of(
        x: Entries, lo: Tensor, hi: Tensor, blocks: Blocks, codings: Sequence[Coding], cost: Tensor | None
    ) -> Choice:
        """cost: (N,) float64, what a variance in each row counts; None is 1 everywhere."""
        errors = tuple(RoundingError(ops.scales_of(lo, hi, coding, blocks), coding) for coding in codings)
        if len(errors) == 1:
            return Choice(torch.zeros((), dtype=torch.int64, device=lo.device), errors, (None,))
        variances = tuple(error.by_block(x) for error in errors)
        taken, least = torch.zeros((), dtype=torch.int64, device=lo.device), _in_order(variances[0], cost)
        for place, each in enumerate(variances[1:], 1):
            total = _in_order(each, cost)
            taken, least = torch.where(total < least, place, taken), torch.where(total < least, total, least)
        return Choice(taken, errors, variances)

    @property
    def place(self) -> int | None:
        """The place as a number, where asking costs nothing."""
        if len(self.errors) == 1:
            return 0
        return int(self.taken) if ops.at_hand(self.taken) else None

    def pick(self, values: Sequence[Tensor]) -> Tensor:
        """The value that belongs to the coding taken."""
        if self.place is not None:
            return values[self.place]
        result = values[0]
        for place, value in enumerate(values[1:], 1):
            result = torch.where(self.taken == place, value, result)
        return result

    def variance(self, y: Tensor, cost: Tensor | None) -> Tensor:
        """float64 scalar: Σ_i cost_i Σ_j of the exact variances of y (N, D), on which it was chosen."""
        each = zip(self.errors, self.variances, strict=True)
        return self.pick([error.variance(y, cost, blocks) for error, blocks in each])

    def bound(self, y: Tensor, cost: Tensor | None) -> Tensor:
        """float64 scalar: the same of the variance bounds."""
        return self._of_taken(lambda error: error.bound(y, cost))

    def weighted(self, y: Tensor, weight: Tensor) -> Tensor:
        """float64 scalar: Σ of the exact variances times weights (N, D), or (1, D) for all rows."""
        return self._of_taken(lambda error: error.weighted(y, weight))

    def weighted_bound(self, y: Tensor, weight: Tensor) -> Tensor:
        """float64 scalar: Σ of the variance bounds times weights."""
        return self._of_taken(lambda error: error.weighted_bound(y, weight))

    def _of_taken(self, ask: Callable[[RoundingError], Tensor]) -> Tensor:
        """What the coding taken answers; all are asked where it is not known which."""
        if self.place is not None:
            return ask(self.errors[self.place])
        return self.pick([ask(error) for error in self.errors])


def _in_order(blocks: Tensor, cost: Tensor | None) -> Tensor:
    """float64 scalar: the blocks' sum, added in one order on every number of threads; another backend's may move
    it by 2⁻⁵⁰ of it, which decides only between codings that are as good."""
    weighted = blocks if cost is None else blocks * cost[:, None]
    return weighted.flatten().cumsum(0)[-1:].sum()


@Op
def quantize_best(
    x: Entries,
    blocks: Blocks,
    codings: Sequence[Coding],
    seed: Tensor | None,
    cost: Tensor | None = None,
    known: Findings | None = None,
) -> Quantized:
    """As `quantize` with the one of several codings that has the least exact variance on x; the first where equal.

    Args:
        x, blocks, seed, known: as for `quantize`.
        codings: of codes of one dtype.
        cost: (N,) float64, what a variance in each row counts; None is 1 everywhere.
    """
    choice = Choice.of(x, *ops.value_range(x, blocks), blocks, codings, cost)
    if choice.place is not None:
        return ops.encoded(x, choice.errors[choice.place].scales, codings[choice.place], seed)._replace(
            findings=known
        )
    each = [ops.encoded(x, error.scales, error.coding, seed) for error in choice.errors]
    step, offset = (choice.pick([getattr(q.scales, name) for q in each]) for name in ("step", "offset"))
    flag = lambda coding: torch.full((), coding.rounding == DITHERED, device=step.device)  # no copy to wait for
    dithered = choice.pick([flag(coding) for coding in codings])
    noise = ops.dither(seed, x, step.dtype).where(dithered)
    return Quantized(choice.pick([q.codes for q in each]), Scales(step, offset, blocks), noise, known)
