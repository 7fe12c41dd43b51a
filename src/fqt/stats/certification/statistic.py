"""One test statistic for means, valid for errors that take two values as well as for smooth ones.

Let x_1 … x_M be independent copies of a variable of mean 0 that moves by at most w. The mean is studentised as

    score = |x̄| / (z √((s² + w² ℓ/M)/M)),   z = Φ⁻¹(1 − a/2),   ℓ = ln(2/a),

s² the sample variance, a the level; it rejects above 1. Without w² ℓ/M this is the z-test, which is worthless for
rare events: an error of −p, and of 1 − p with probability p, shows M equal values with probability (1 − p)^M,
then s = 0. The extra term is what Bernstein's inequality adds. An error that never left −p is let pass up to
p ≈ √2·ℓ/M, where (1 − p)^M is below a; at p = ½ and M = 1024 the term costs 3 % of z. Bennett's inequality in the
empirical form of Maurer and Pontil (2009) is rigorous for every bounded variable, but asks for a bias 1.4 times as
large. That this one keeps its level for every two-valued error is checked by exact binomial sums in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """The false-alarm rate `rate` shared equally by `tests` two-sided tests (Bonferroni: valid for any dependence)."""

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

    def error(self, variance: Tensor, jump: Tensor | float, count: float) -> Tensor:
        """The standard error of a mean of `count` draws, with the term for rare events."""
        return ((variance + (self.log / count) * torch.as_tensor(jump).square()) / count).sqrt()

    def score(
        self, mean: Tensor, variance: Tensor, jump: Tensor | float, count: float, slack: Tensor | float = 0.0
    ) -> Tensor:
        """|mean| less `slack`, over what chance may give; above 1 rejects. 0/0 counts as 0, over 1e6 as infinite."""
        excess = (mean.abs() - slack).clamp(min=0)
        score = torch.where(excess > 0, excess / (self.z * self.error(variance, jump, count)), 0.0)
        return torch.where(score > 1e6, math.inf, score)


def moments(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and typical jump √(m4/m2) of each column of (M, n).

    The jump is the size at which the variance is carried: σ for a fair coin, 1.7σ for a Gaussian, the whole jump
    for a rare one. It cannot speak of what was never seen: for statistics that are zero where nothing was seen.
    """
    mean = draws.mean(0)
    square = (draws - mean).square()
    second = square.mean(0)
    jump = torch.where(second > 0, square.square().mean(0) / second.clamp(min=1e-300), 0.0).sqrt()
    return mean, square.sum(0) / max(len(draws) - 1, 1), jump
