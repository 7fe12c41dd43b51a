"""One test statistic for means, valid for errors that take two values as well as for smooth ones.

Let x_1 … x_M be independent copies of a variable of mean 0 that moves by at most w. The mean is studentised as

    score = |x̄| √M / (z √((s + g z/(3√M))² + w² ℓ/M)),   z = Φ⁻¹(1 − α/2),   ℓ = ln(2/α),

s² the sample variance, g = |m3|/m2, α the significance; it rejects above 1. With s alone it is the z-test, which
fails for rare events: an error of −p, and of 1 − p with probability p, shows M equal values with probability
(1 − p)^M, and then s = 0. The term w² ℓ/M lets an error that never left −p pass up to p ≈ √2·ℓ/M, where (1 − p)^M
is below α. The term in g is the skewness correction of a studentised mean (Johnson 1978), which matters far out in
the tail, where Bonferroni's correction has sent us. That α is kept for every two-valued error is checked by exact
binomial sums in the tests; at p = ½ and M = 1024 the price is 4 % of z. Maurer and Pontil's empirical Bernstein
inequality (2009) is rigorous for every bounded variable, and asks for a bias 1.4 times as large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Significance:
    """The false-alarm rate `rate` shared by `tests` two-sided tests (Bonferroni: valid for any dependence)."""

    rate: float
    tests: int

    @property
    def z(self) -> float:
        """The normal quantile that one test exceeds with probability rate/tests."""
        each = torch.tensor(self.rate / max(self.tests, 1) / 2, dtype=torch.float64)
        return -float(torch.special.ndtri(each))

    @property
    def log(self) -> float:
        """ln(2 · tests/rate)."""
        return math.log(2 * max(self.tests, 1) / self.rate)

    def error(self, variance: Tensor, jump: Tensor | float, skew: Tensor | float, count: float) -> Tensor:
        """The standard error of a mean of `count` draws, with the terms for skewness and rare events."""
        spread = variance.sqrt() + torch.as_tensor(skew) * (self.z / (3 * math.sqrt(count)))
        return ((spread.square() + (self.log / count) * torch.as_tensor(jump).square()) / count).sqrt()

    def score(self, of: ColumnMoments, jump: Tensor | float, count: float, slack: Tensor | float = 0.0) -> Tensor:
        """|mean| less `slack`, over what chance may give; above 1 rejects. 0/0 is 0, over 1e6 infinite."""
        excess = (of.mean.abs() - slack).clamp(min=0)
        allowed = self.z * self.error(of.variance, jump, of.skew, count)
        score = torch.where(excess > 0, excess / allowed, 0.0)
        return torch.where(score > 1e6, math.inf, score)


class ColumnMoments(NamedTuple):
    """Of each column of (M, n) draws: mean, unbiased variance, |m3|/m2, and the typical jump √(m4/m2).

    The jump is the size at which the variance is carried: σ for a fair coin, 1.7σ for a Gaussian, the whole jump
    for a rare one. It cannot speak of what was never seen: for statistics that are zero where nothing was seen.
    """

    mean: Tensor
    variance: Tensor
    skew: Tensor
    jump: Tensor


def moments(draws: Tensor) -> ColumnMoments:
    """The moments of each column of (M, n)."""
    mean = draws.mean(0)
    centred = draws - mean
    square = centred.square()
    second = square.mean(0)
    # Where nothing moves but last bits, powers of these may vanish.
    over = torch.where(second > 0, 1 / second.clamp(min=1e-300), 0.0)
    skew = (square * centred).mean(0).abs() * over
    jump = (square.square().mean(0) * over).sqrt()
    return ColumnMoments(mean, second * (len(draws) / max(len(draws) - 1, 1)), skew, jump)
