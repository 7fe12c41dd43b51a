"""Tests that errors of different entries are uncorrelated.

Errors are taken in steps (or spreads), about their sample mean, so that a bias does not pass for dependence. What
decides is whether products of different errors have mean zero: then every linear functional of the estimate, a
product's entry or a gradient, has the variance that independent errors would give it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fqt.stats.certification.certificate import Finding
from fqt.stats.certification.sample import Sample
from fqt.stats.certification.statistic import ColumnMoments, Significance, moments


def pairs(sample: Sample, alpha: Significance, mixes: int | None) -> Finding:
    """E[e_i e_j] = 0 for every pair of entries, but pairs along the axis `mixes`. Below n²/2 tests.

    Effect: the correlation of the pair that stands out most.
    """
    unit = centred(sample)
    m, n = unit.shape
    if n < 2:
        return Finding("pairs of errors", sample.input.name, 0.0, 0.0)
    of = moments(unit)
    unit, v, w = unit.float(), of.variance.float(), of.jump.float()
    square = unit.square()
    covariance = (unit.T @ unit) / (m - 1)
    # Uncorrelated errors whose sizes vary together (with a transform's random signs) have larger products.
    product = torch.maximum(v[:, None] * v, (square.T @ square) / (m - 1))
    skew = ((square * unit).T @ (square * unit)).abs() / (m * product.clamp(min=1e-30))
    allowed = alpha.z * alpha.error(product, w[:, None] * w, skew, sample.distinct)
    score = torch.where(allowed > 0, covariance.abs() / allowed.clamp(min=1e-30), 0.0)
    score.mul_(_judged(sample.shape, mixes))
    at = int(score.argmax())
    i, j = at // n, at % n
    effect = float(covariance[i, j] / (v[i] * v[j]).sqrt().clamp(min=1e-30))
    d = sample.shape[1]
    where = f"entries ({i // d}, {i % d}) and ({j // d}, {j % d})"
    return Finding("pairs of errors", sample.input.name, float(score.flatten()[at]), effect, where)


def sums(sample: Sample, alpha: Significance, mixes: int | None) -> list[Finding]:
    """Var[Σ e] = Σ Var[e] over each row, over each column, over all. N + D + 1 tests.

    Sums along `mixes`, and over all where anything mixes, are reported and not judged. Effect: the factor by which
    a sum varies more than a sum of independent errors.
    """
    name = sample.input.name
    unit = centred(sample).view(-1, *sample.shape)
    judged: list[Finding] = []
    reported: list[Finding] = []
    for axis, label in ((1, "row"), (0, "column"), (None, "all entries")):
        dims = (1, 2) if axis is None else (axis + 1,)
        total, square = (v.sum(dims).view(len(unit), -1) for v in (unit, unit.square()))
        of = _at_least_independent(moments(total.square() - square), _terms(unit.square().mean(0), dims))
        # Two rare errors that never met in M draws would have moved it by twice their product.
        jump = torch.maximum(of.jump, 2 * _largest_product(unit, dims))
        # Where a sum has one moving term the two sides differ by last bits only.
        score = alpha.score(of, jump, sample.distinct, 1e-9 * square.mean(0))
        at = int(score.argmax())
        ratio = float(total[:, at].square().mean() / square[:, at].mean()) if square[:, at].any() else 1.0
        where = label if axis is None else f"{label} {at}"
        keep = mixes is None or (axis is not None and axis != mixes)
        (judged if keep else reported).append(
            Finding("sums of errors", name, float(score[at]), ratio, where, judged=keep)
        )
    return [max(kept, key=lambda f: f.score) for kept in (judged, reported) if kept]


def energy_spread(sample: Sample) -> Finding:
    """Var ‖e‖² over what independent errors would give: reported, never judged.

    Linear functionals need pairs only. Of dithered errors any three are independent and four at the corners of a
    rectangle are not, which shows here: intervals for quadratic quantities must come from repeated draws.
    """
    square = centred(sample).square()
    own = square.var(0).sum()
    ratio = float(square.sum(1).var() / own) if own > 0 else 1.0
    return Finding("spread of ‖error‖²", sample.input.name, 0.0, ratio, judged=False)


def _largest_product(unit: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Of the two entries of each sum that were seen to go farthest, the product of how far; unit (M, N, D)."""
    return torch.nn.functional.pad(_terms(unit.abs().amax(0), dims), (0, 1)).topk(2, 1).values.prod(1)


def _terms(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(sums, terms): the entries of an (N, D) matrix by the sum of an (M, N, D) one over `dims` they belong to."""
    return {(2,): values, (1,): values.T, (1, 2): values.reshape(1, -1)}[dims]


def _at_least_independent(of: ColumnMoments, variances: Tensor) -> ColumnMoments:
    """Moments of (Σe)² − Σe² no smaller than independent errors of these variances (sums, terms) give it.

    Its tail is long above: a sample that lacks it shows too low a mean and too little variance at once. With
    s_k = Σ σ^2k the variance is 2(s₁² − s₂) and the third moment, of symmetric errors, 8(s₁³ − 3s₁s₂ + 2s₃).
    """
    s1, s2, s3 = (variances.pow(k).sum(1) for k in (1, 2, 3))
    variance = 2 * (s1.square() - s2).clamp(min=0)
    third = 8 * (s1.pow(3) - 3 * s1 * s2 + 2 * s3).clamp(min=0)
    skew = torch.where(variance > 0, third / variance.clamp(min=1e-300), 0.0)
    return of._replace(variance=torch.maximum(of.variance, variance), skew=torch.maximum(of.skew, skew))


def grouped(values: Tensor, shape: tuple[int, int], mixes: int | None) -> Tensor:
    """Sums of (M, n) over the entries that `mixes` may make depend on each other: (M, groups)."""
    return values if mixes is None else values.view(-1, *shape).sum(mixes + 1)


def centred(sample: Sample) -> Tensor:
    """Errors about their sample mean; zero where only the last bits of floats move, which are not independent."""
    unit = sample.unit
    still = unit.amax(0) - unit.amin(0) < 1e-4
    return (unit - unit.mean(0)).masked_fill(still, 0.0)


@lru_cache(maxsize=16)
def _judged(shape: tuple[int, int], mixes: int | None) -> Tensor:
    """(n, n) bool: pairs i < j, without those that differ along the axis `mixes` only."""
    n, d = shape
    index = torch.arange(n * d)
    keep = index[:, None] < index
    if mixes == 0:
        keep &= (index % d)[:, None] != index % d
    elif mixes == 1:
        keep &= (index // d)[:, None] != index // d
    return keep
