"""Tests of what a seed does: that draws of different seeds are new, unrelated, and of one kind.

All on the plain Gaussian input, on which nothing but the noise is special. Errors of two draws are compared by
their inner product, or by its largest value when one is moved over the other. How large these are by chance is not
computed but seen in pairs of draws that nothing relates, so that noise of any distribution is judged by its own
measure; a relation is believed only if every one of `BASES` pairs shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fqt.stats.certification.certificate import Finding
from fqt.stats.certification.independence import centred, grouped
from fqt.stats.certification.sample import Sample
from fqt.stats.certification.statistic import Significance, moments

LAGS = (1, 2, 3)
SHIFTS = (-1, 0, 1)
SEED_BITS = 31
BASES = 4
_ALL = 2**SEED_BITS - 1
RELATIVES = SEED_BITS + 1  # of a seed: those that differ in one bit, and the one that differs in all
_CHANCE_PAIRS = 256
_MARGIN = 1.25  # by which a moved draw's overlap must exceed chance, which is seen in few pairs
_TILTS = 24


def relatives(bases: Sequence[int]) -> list[int]:
    """Each base seed followed by its relatives."""
    return [seed for base in bases for seed in (base, *(base ^ 1 << k for k in range(SEED_BITS)), base ^ _ALL)]


def related(sample: Sample, alpha: Significance) -> Finding:
    """Σ_i e_i(s) e_i(s') is no larger for relatives s' of s than for strangers. 2 tests per kind of relative.

    Seeds of which only some bits count give equal draws, antithetic ones opposite. Effect: the correlation.

    Args:
        sample: draws of `relatives` of `BASES` seeds.
        alpha: its rate is shared by 2 · `RELATIVES` tests.
    """
    unit = centred(sample).view(BASES, 1 + RELATIVES, -1)
    flat = unit.flatten(0, 1)
    products = (flat @ flat.T).view(BASES, 1 + RELATIVES, BASES, 1 + RELATIVES)
    strangers = torch.cat([products[a, :, b].flatten() for a in range(BASES) for b in range(a)])
    each = (alpha.rate / alpha.tests) ** (1 / BASES)
    own = torch.stack([products[b, 0, b, 1:] for b in range(BASES)])  # (BASES, RELATIVES)
    score, kind = 0.0, 0
    for side in (1.0, -1.0):
        chance = torch.quantile(side * strangers, 1 - each)
        weakest, at = (side * own).amin(0).max(0)
        found = _over(float(weakest), float(chance))
        if found > score:
            score, kind = found, int(at)
    energy = flat.square().sum(1).mean()
    effect = float(own[:, kind].mean() / energy) if energy > 0 else 0.0
    where = f"seeds that differ in bit {kind}" if kind < SEED_BITS else "seeds that differ in all bits"
    return Finding("related seeds", sample.input.name, score, effect, where)


def shifted(sample: Sample, alpha: Significance) -> Finding:
    """max_t |Σ_i e_i(s) e_{i+t}(s')| is what it is with s' shuffled: draws are no windows of one stream. 1 test.

    Shifts t are cyclic, of the flat tensor and of rows and columns. Shuffled are whole rows and columns, which
    leaves a draw's own structure. Effect: the least overlap of `BASES` pairs, 1 for the same noise.
    """
    unit = centred(sample)
    deviation = unit.square().mean(0).sqrt()
    unit = torch.where(deviation > 0, unit / deviation.clamp(min=1e-30), 0.0).view(-1, *sample.shape)
    pairs = unit[: 2 * BASES]
    own = _overlap(pairs[::2], pairs[1::2])
    g = torch.Generator().manual_seed(0)
    m, (n, d) = len(unit), sample.shape
    first = torch.randint(0, m, (_CHANCE_PAIRS,), generator=g)
    second = (first + torch.randint(1, m, (_CHANCE_PAIRS,), generator=g)) % m
    rows = torch.rand(_CHANCE_PAIRS, n, 1, generator=g).argsort(1).expand(-1, n, d)
    columns = torch.rand(_CHANCE_PAIRS, 1, d, generator=g).argsort(2).expand(-1, n, d)
    chance = _overlap(unit[first], unit[second].gather(1, rows).gather(2, columns))
    each = (alpha.rate / alpha.tests) ** (1 / BASES)
    score = _over(float(own.min()), _MARGIN * float(torch.quantile(chance, 1 - each)))
    return Finding("shifted draws", sample.input.name, score, float(own.min()) / (n * d), "neighbouring seeds")


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """(P,): the largest |Σ a·moved b| over cyclic moves of the flat matrices and of rows and columns; (P, N, D)."""
    flat = torch.fft.irfft(torch.fft.rfft(a.flatten(1)).conj() * torch.fft.rfft(b.flatten(1)), n=a[0].numel())
    plane = torch.fft.irfft2(torch.fft.rfft2(a).conj() * torch.fft.rfft2(b), s=a.shape[1:])
    return torch.maximum(flat.abs().amax(1), plane.abs().amax((1, 2)))


def _over(found: float, chance: float) -> float:
    if found <= 0:
        return 0.0
    return found / chance if chance > 0 else math.inf


def neighbours(sample: Sample, alpha: Significance) -> Finding:
    """Σ_i e_i(seed) e_{i+s}(seed + k) = 0 on average, for lags k and shifts s of a few. 9 tests.

    A shift other than 0 sees a generator keyed by seed + index. Effect: the correlation.
    """
    unit = centred(sample)
    m = len(unit)
    own = unit.square().sum(1)
    variance = unit.square().mean(0)
    products, correction, least = [], [], []
    for lag in LAGS:
        for shift in SHIFTS:
            a, b = unit[:-lag], unit[lag:]
            if shift > 0:
                a, b = a[:, :-shift], b[:, shift:]
            elif shift < 0:
                a, b = a[:, -shift:], b[:, :shift]
            width = a.shape[1]
            first, second = variance[max(-shift, 0) :][:width], variance[max(shift, 0) :][:width]
            least.append(float((first * second).sum()))
            products.append((a * b).sum(1)[: m - max(LAGS)])
            correction.append(float(own.mean()) / m if shift == 0 else 0.0)  # of the sample mean, once per draw
    of = moments(torch.stack(products, 1) + torch.tensor(correction, dtype=torch.float64))
    of = of._replace(variance=torch.maximum(of.variance, torch.tensor(least, dtype=torch.float64)))
    score = alpha.score(of, of.jump, sample.distinct)
    at = int(score.argmax())
    lag, shift = LAGS[at // len(SHIFTS)], SHIFTS[at % len(SHIFTS)]
    effect = float(of.mean[at] / own.mean()) if own.any() else 0.0
    where = f"seeds {lag} apart" + (f", entries {shift:+d}" if shift else "")
    return Finding("seeds", sample.input.name, float(score[at]), effect, where)


def odd_draw(sample: Sample, others: Sample, alpha: Significance, first_seed: int, mixes: int | None) -> Finding:
    """No draw's ‖error‖² stands apart: a seed (0, say) with which nothing is drawn, or something else is. M tests.

    Apart is: farther from all others than these span, and less likely than alpha where ‖error‖² is a sum of
    independent terms, one per group of entries that nothing mixes. The latter by Chernoff's bound,

        P(Σ_g E_g ≥ t) ≤ exp(Σ_g ln E[exp(λE_g)] − λt),   and with λ < 0 for ≤,

    the expectations from `others`, with room for values too rare to have been seen. Gaps alone would convict noise
    of rare large errors, the bound alone dithered noise, whose terms are not independent. Effect: the gap over
    the span.

    Args:
        sample: draws of seeds from `first_seed` on.
        others: draws of other seeds.
        mixes: the axis along which entries may depend on each other.
    """
    scale = _common_scale(sample, others)
    terms = grouped((sample.unit * scale[0]).square(), sample.shape, mixes)  # (M, G)
    energy, order = terms.sum(1).sort()
    span = energy[-2] - energy[0], energy[-1] - energy[1]
    gap = energy[-1] - energy[-2], energy[1] - energy[0]
    scores = [float(g / s) if s > 0 else 0.0 for g, s in zip(gap, span, strict=True)]
    at = 0 if scores[0] >= scores[1] else 1
    effect, total = scores[at], energy[-1 if at == 0 else 0]
    score = effect
    if score > 1:
        reference = grouped((others.unit * scale[1]).square(), sample.shape, mixes)
        largest = max(float(terms.max()), float(reference.max()))
        surprise = _surprise(reference, float(total), 1 if at == 0 else -1, largest, alpha)
        score = min(score, surprise / alpha.log)
    seed = first_seed + int(order[-1 if at == 0 else 0])
    return Finding("every seed alike", sample.input.name, score, effect, f"seed {seed}")


def _common_scale(a: Sample, b: Sample) -> tuple[Tensor | float, Tensor | float]:
    """What brings both samples' `unit` to one scale: a function's is over the spread that its sample saw."""
    if a.law is not None:
        return 1.0, 1.0
    widest = torch.maximum(a.width, b.width).clamp(min=1e-300)
    return a.width / widest, b.width / widest


def _surprise(terms: Tensor, total: float, side: int, largest: float, alpha: Significance) -> float:
    """−ln of Chernoff's bound on Σ_g E_g reaching `total` from below (side 1) or above (−1).

    `terms` (M, G) are seen ones; 0 and `largest` may have gone unseen with a probability that M draws leave open.
    """
    unseen = min(alpha.log / len(terms), 0.5)
    best = 0.0
    for exponent in range(_TILTS):
        tilt = side * 2.0 ** (exponent - 12) / largest
        seen = torch.logsumexp(tilt * terms, 0) - math.log(len(terms))
        rare = torch.full_like(seen, max(tilt, 0.0) * largest + math.log(unseen))
        cumulants = torch.logaddexp(seen + math.log1p(-unseen), rare)
        best = max(best, tilt * total - float(cumulants.sum()))
    return best


def repeats(sample: Sample, alpha: Significance, mixes: int | None) -> tuple[Finding, float]:
    """Whether different seeds gave the same estimate; and how many draws count as independent.

    By chance two draws agree with probability at most Π_g P(group g agrees), over groups of entries that nothing
    mixes, which is estimated from neighbouring draws; judged only where that is too small to happen. All M the
    same is no repetition but a deterministic function, which the mean judges. With clusters of n_c equal draws the
    mean has the variance of M²/Σ n_c² draws.
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
    differs = [grouped((draws[k:] != draws[:-k]).double(), sample.shape, mixes) for k in (1, max(m // 2, 1))]
    agree = torch.stack([(d == 0).double().mean(0) for d in differs]).amin(0)
    chance = float(agree.clamp(min=1 / m).log().sum()) + math.log(m * m / 2)
    score = math.inf if chance < math.log(alpha.rate) else 0.0
    effect = 1 - distinct / m
    return Finding("repeated draws", name, score, effect, f"{distinct} different in {m}"), effective


def repeatable(sample: Sample, again: Tensor) -> Finding:
    """The first seed gives its draw again, but for last bits: it is the seed that says what is drawn.

    Without chance. Effect: the largest difference, in spreads.
    """
    gap = (again - sample.error[0]).abs()
    beyond = gap > 2 * sample.slack
    width = torch.where(sample.width > 0, sample.width, 1.0)
    score = math.inf if bool(beyond.any()) else 0.0
    return Finding("same seed, same draw", sample.input.name, score, float((gap / width).max()))


def part(sample: Sample, which: slice) -> Sample:
    """Some of a sample's draws."""
    law = None if sample.law is None else sample.law[which]
    error, unit = sample.error[which], sample.unit[which]
    return replace(sample, error=error, unit=unit, law=law, distinct=float(len(error)))
