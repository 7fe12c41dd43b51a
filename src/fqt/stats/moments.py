"""Streaming mean and variance of lists of tensors (Welford 1962; Chan, Golub and LeVeque 1979 for the merge).

With the n-th observation x the state moves by

    d = x − mean,   mean += d/n,   M2 += d·(x − mean),

in float64. The textbook shortcut E[x²] − E[x]² is not used: it subtracts two nearly equal numbers exactly when
the variance is small against the mean, which is the case of a gradient with little quantization noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fqt.errors import FqtError

__all__ = ["Moments"]


class Moments:
    """Entrywise mean and variance of a stream of observations, each a list of tensors of fixed shapes.

    Holds two float64 tensors per tensor of an observation, on that tensor's device. Nothing of the observation
    itself is kept.

    >>> m = Moments()
    >>> for x in (1.0, 2.0, 6.0):
    ...     m.update([torch.tensor([x])])
    >>> m.count, m.mean[0].item(), m.variance()[0].item()
    (3, 3.0, 7.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: list[Tensor] = []
        self._m2: list[Tensor] = []

    def update(self, observation: Sequence[Tensor]) -> None:
        """Adds one observation.

        Raises:
            FqtError: the number or the shapes of the tensors differ from the observations before.
        """
        values = [x.detach().to(torch.float64) for x in observation]
        if self.count == 0:
            self.mean = [torch.zeros_like(x) for x in values]
            self._m2 = [torch.zeros_like(x) for x in values]
        _check_shapes(self.mean, values)
        self.count += 1
        for mean, m2, x in zip(self.mean, self._m2, values, strict=True):
            delta = x - mean
            mean.add_(delta, alpha=1.0 / self.count)
            m2.addcmul_(delta, x - mean)

    def merge(self, other: Moments) -> Moments:
        """The moments of both streams together; neither operand changes.

        Raises:
            FqtError: the two hold observations of different shapes.
        """
        merged = Moments()
        if self.count == 0 or other.count == 0:
            filled = self if other.count == 0 else other
            merged.count = filled.count
            merged.mean = [x.clone() for x in filled.mean]
            merged._m2 = [x.clone() for x in filled._m2]
            return merged
        _check_shapes(self.mean, other.mean)
        n = self.count + other.count
        merged.count = n
        for a, b, a2, b2 in zip(self.mean, other.mean, self._m2, other._m2, strict=True):
            delta = b - a
            merged.mean.append(a + delta * (other.count / n))
            merged._m2.append(a2 + b2 + delta.square() * (self.count * other.count / n))
        return merged

    def variance(self) -> list[Tensor]:
        """The unbiased variance of every entry, M2/(n − 1), in the shapes of an observation.

        Raises:
            FqtError: fewer than two observations.
        """
        if self.count < 2:
            raise FqtError(f"a variance needs at least 2 observations, there is {self.count}")
        return [m2 / (self.count - 1) for m2 in self._m2]

    def variance_sums(self) -> Tensor:
        """The unbiased variance summed over the entries of each tensor; shape (number of tensors,), on the CPU.

        This is Var[X] = E‖X − E X‖² of each tensor as a random vector, the quantity the theorems speak of.

        Raises:
            FqtError: fewer than two observations.
        """
        return torch.stack([v.sum().cpu() for v in self.variance()])


def _check_shapes(expected: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    if [x.shape for x in expected] != [x.shape for x in given]:
        raise FqtError(
            f"observations must keep their shapes: expected {[tuple(x.shape) for x in expected]}, "
            f"got {[tuple(x.shape) for x in given]}"
        )
