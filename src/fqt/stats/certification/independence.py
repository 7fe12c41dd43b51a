"""Tests that errors are uncorrelated: between entries, and between draws.

Errors are taken in steps (or spreads), about their sample mean, so that a bias does not pass for dependence. What
decides is whether products of different errors have mean zero: then every linear functional of the estimate, a
product's entry or a gradient, has the variance that independent errors would give it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fqt.stats.certification.certificate import Finding
from fqt.stats.certification.sample import Sample
from fqt.stats.certification.statistic import Level, moments

LAGS = (1, 2, 3)
SHIFTS = (-1, 0, 1)


def pairs(sample: Sample, level: Level, mixes: int | None) -> Finding:
    """E[e_i e_j] = 0 for every pair of entries, but pairs along the axis `mixes`. Below n²/2 tests.

    Effect: the correlation of the pair that stands out most.
    """
    unit = _centred(sample)
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
    allowed = level.z * level.error(product, w[:, None] * w, skew, sample.distinct)
    score = torch.where(allowed > 0, covariance.abs() / allowed.clamp(min=1e-30), 0.0)
    score.mul_(_judged(sample.shape, mixes))
    at = int(score.argmax())
    i, j = at // n, at % n
    effect = float(covariance[i, j] / (v[i] * v[j]).sqrt().clamp(min=1e-30))
    d = sample.shape[1]
    where = f"entries ({i // d}, {i % d}) and ({j // d}, {j % d})"
    return Finding("pairs of errors", sample.input.name, float(score.flatten()[at]), effect, where)


def sums(sample: Sample, level: Level, mixes: int | None) -> list[Finding]:
    """Var[Σ e] = Σ Var[e] over each row, over each column, over all. N + D + 1 tests.

    Sums along `mixes`, and over all where anything mixes, are reported and not judged. Effect: the factor by which
    a sum varies more than a sum of independent errors.
    """
    name = sample.input.name
    unit = _centred(sample).view(-1, *sample.shape)
    judged: list[Finding] = []
    reported: list[Finding] = []
    for axis, label in ((1, "row"), (0, "column"), (None, "all entries")):
        dims = (1, 2) if axis is None else (axis + 1,)
        total, square = (v.sum(dims).view(len(unit), -1) for v in (unit, unit.square()))
        of = moments(total.square() - square)
        # Where a sum has one moving term the two sides differ by last bits only.
        score = level.score(of, of.jump, sample.distinct, 1e-9 * square.mean(0))
        at = int(score.argmax())
        ratio = float(total[:, at].square().mean() / square[:, at].mean()) if square[:, at].any() else 1.0
        where = label if axis is None else f"{label} {at}"
        keep = mixes is None or (axis is not None and axis != mixes)
        (judged if keep else reported).append(
            Finding("sums of errors", name, float(score[at]), ratio, where, judged=keep)
        )
    return [max(kept, key=lambda f: f.score) for kept in (judged, reported) if kept]


def seeds(sample: Sample, level: Level) -> Finding:
    """Σ_i e_i(seed) e_{i+s}(seed + k) = 0 on average, for lags k and shifts s of a few. 9 tests.

    A shift other than 0 sees a generator keyed by seed + index. Effect: the correlation.
    """
    unit = _centred(sample)
    m = len(unit)
    own = unit.square().sum(1)
    products, correction = [], []
    for lag in LAGS:
        for shift in SHIFTS:
            a, b = unit[:-lag], unit[lag:]
            if shift > 0:
                a, b = a[:, :-shift], b[:, shift:]
            elif shift < 0:
                a, b = a[:, -shift:], b[:, :shift]
            products.append((a * b).sum(1)[: m - max(LAGS)])
            correction.append(float(own.mean()) / m if shift == 0 else 0.0)  # of the sample mean, once per draw
    of = moments(torch.stack(products, 1) + torch.tensor(correction, dtype=torch.float64))
    score = level.score(of, of.jump, sample.distinct)
    at = int(score.argmax())
    lag, shift = LAGS[at // len(SHIFTS)], SHIFTS[at % len(SHIFTS)]
    effect = float(of.mean[at] / own.mean()) if own.any() else 0.0
    where = f"seeds {lag} apart" + (f", entries {shift:+d}" if shift else "")
    return Finding("seeds", sample.input.name, float(score[at]), effect, where)


def odd_draw(sample: Sample, first_seed: int) -> Finding:
    """No draw's ‖error‖² stands apart: a seed (0, say) with which nothing is drawn, or something else is.

    Apart is: farther from all others than these span. For energies that are near normal that takes about ten
    standard deviations; no part of the false-alarm rate is set aside for it. Effect: the gap over that span.
    """
    energy, order = sample.unit.square().sum(1).sort()
    span = energy[-2] - energy[0], energy[-1] - energy[1]
    gap = energy[-1] - energy[-2], energy[1] - energy[0]
    scores = [float(g / s) if s > 0 else 0.0 for g, s in zip(gap, span, strict=True)]
    at = 0 if scores[0] >= scores[1] else 1
    seed = first_seed + int(order[-1 if at == 0 else 0])
    return Finding("every seed alike", sample.input.name, scores[at], scores[at], f"seed {seed}")


def energy_spread(sample: Sample) -> Finding:
    """Var ‖e‖² over what independent errors would give: reported, never judged.

    Linear functionals need pairs only. Of dithered errors any three are independent and four at the corners of a
    rectangle are not, which shows here: intervals for quadratic quantities must come from repeated draws.
    """
    square = _centred(sample).square()
    own = square.var(0).sum()
    ratio = float(square.sum(1).var() / own) if own > 0 else 1.0
    return Finding("spread of ‖error‖²", sample.input.name, 0.0, ratio, judged=False)


def repeats(sample: Sample, level: Level) -> tuple[Finding, float]:
    """Whether different seeds gave the same estimate; and how many draws count as independent.

    By chance two draws agree with probability at most Π_i P(entry i agrees) where entries are independent, which
    is estimated from neighbouring draws; judged only where that is too small to happen. All M the same is no
    repetition but a deterministic function, which the mean judges. With clusters of n_c equal draws the mean has
    the variance of M²/Σ n_c² draws.
    """
    draws, name = sample.error, sample.input.name
    m = len(draws)
    _, counts = torch.unique(draws, dim=0, return_counts=True)
    distinct = len(counts)
    if distinct == 1:
        return Finding("repeated draws", name, 0.0, 0.0), float(m)
    effective = m * m / float(counts.double().square().sum())
    if distinct == m:
        return Finding("repeated draws", name, 0.0, 0.0), effective
    apart = max(m // 2, 1)
    agree = torch.stack([(draws[k:] == draws[:-k]).double().mean(0) for k in (1, apart)]).amin(0)
    chance = float(agree.clamp(min=1 / m).log().sum()) + math.log(m * m / 2)
    score = math.inf if chance < math.log(level.rate) else 0.0
    effect = 1 - distinct / m
    return Finding("repeated draws", name, score, effect, f"{distinct} different in {m}"), effective


def _centred(sample: Sample) -> Tensor:
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
