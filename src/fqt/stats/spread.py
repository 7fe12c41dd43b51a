"""The variance of a streamed gradient, holding one copy of it.

With the n-th observation x of a parameter's gradient and d = x − mean,

    increment_n = (n − 1)/n · ‖d‖²   (n ≥ 2),   mean += d/n,   variance = Σ increments / (n − 1),

which is Welford's M2 summed over entries as it goes: the only thing of the gradient's size is the mean. The
increments are squared Helmert contrasts: each has the variance as its mean and, for independent normal
observations, they are independent, so that their own spread gives the standard error. E[x²] − E[x]² is not used:
it subtracts two nearly equal numbers exactly when the variance is small against the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.stats.moments import Moments
from fqt.stats.passes import energy

__all__ = ["Estimate", "Spread", "estimates", "ratio"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate and its standard error, both in the same unit."""

    value: float
    error: float


class Spread:
    """Mean and variance of gradients that arrive parameter by parameter.

    Use `add(name, gradient)` once per parameter, then `end()`: that is one observation. The total's increments
    are the sums of the parameters'. Means and differences are in the gradient's dtype, at least float32; their
    squares are summed in float64.

    Args:
        groups: what each parameter's figures are added up under; they also go to `TOTAL`.
    """

    TOTAL = None

    def __init__(self, groups: dict[str, str]) -> None:
        self.groups = groups
        self.names: list[str | None] = [*dict.fromkeys(groups.values()), Spread.TOTAL]
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self.increments = Moments()
        self.energies = Moments()
        self._begin()

    def _begin(self) -> None:
        self._increment = torch.zeros(len(self.names), dtype=torch.float64)
        self._energy = torch.zeros(len(self.names), dtype=torch.float64)

    def add(self, name: str, gradient: Tensor) -> None:
        """One parameter's gradient of the present observation; it is kept or overwritten."""
        where = [self.names.index(self.groups[name]), -1]
        self._energy[where] += energy(gradient)
        n = self.count + 1
        value = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if n == 1:
            self.mean[name] = value
            return
        mean = self.mean[name]
        delta = value.sub_(mean)
        self._increment[where] += (n - 1) / n * energy(delta)
        mean.add_(delta, alpha=1 / n)

    def end(self) -> None:
        """The observation is complete."""
        self.count += 1
        self.energies.update([self._energy])
        if self.count > 1:
            self.increments.update([self._increment])
        self._begin()

    def variance(self) -> dict[str | None, Estimate]:
        """The unbiased variance of each group, summed over entries; its error is NaN from 2 observations.

        Raises:
            FqtError: fewer than two observations.
        """
        if self.count < 2:
            raise FqtError(f"a variance needs at least 2 observations, there is {self.count}")
        return dict(zip(self.names, estimates(self.increments), strict=True))

    def energy(self) -> dict[str | None, Estimate]:
        """The mean of ‖gradient‖² of each group, and its standard error."""
        return dict(zip(self.names, estimates(self.energies), strict=True))


def estimates(moments: Moments, index: int = 0) -> list[Estimate]:
    """The mean of each entry of the observations' `index`-th tensor, row-major, with its standard error.

    NaN errors where there is one observation.
    """
    means = moments.mean[index].flatten()
    errors = torch.full_like(means, torch.nan)
    if moments.count > 1:
        errors = (moments.variance()[index].flatten() / moments.count).sqrt()
    return [Estimate(value=v, error=e) for v, e in zip(means.tolist(), errors.tolist(), strict=True)]


def ratio(above: Estimate, below: Estimate) -> Estimate:
    """The quotient of independent estimates, its error to first order; NaN where the divisor is not positive."""
    if not below.value > 0:
        return Estimate(value=float("nan"), error=float("nan"))
    value = above.value / below.value
    return Estimate(value=value, error=math.hypot(above.error, value * below.error) / below.value)
