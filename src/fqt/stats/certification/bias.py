"""Tests of the mean, of clipping, and of the declared variance, on one sample.

Each returns one `Finding`: the largest score of its tests (above 1 rejects) and the effect where it is largest.
The number of tests of each kind over all inputs is known before any draw is made, so that Bonferroni's correction
is exact bookkeeping and nothing is chosen after looking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fqt.quant import Quantizer
from fqt.stats.certification.certificate import Finding
from fqt.stats.certification.sample import Sample
from fqt.stats.certification.statistic import Significance, moments

BATCHES = 64
_FEW_SEEDS, _SEEDS = 8, 64  # at which a declared variance is asked for, if it is the same for all and if not


def entry_mean(sample: Sample, alpha: Significance) -> Finding:
    """E[error] = 0, entry by entry. n tests. Effect: the largest significant |bias|, in spreads of its row."""
    of = moments(sample.error)
    score = alpha.score(of, sample.width, sample.distinct, sample.slack)
    at = int(score.argmax())
    effect = float(of.mean[at].abs() / _unit(sample)[at]) if score[at] > 0 else 0.0
    return Finding("mean, each entry", sample.input.name, float(score[at]), effect, _where(at, sample.x))


def row_mean(sample: Sample, alpha: Significance) -> Finding:
    """Σ_j w_j E[error_rj] = 0 for w = 1 and w = x_r less its mean: common offset and shrinkage. 2N tests.

    Effect: bias per entry, in spreads of its row.
    """
    x = sample.x
    centred = x - x.mean(1, keepdim=True)
    centred = centred / centred.abs().amax(1, keepdim=True).clamp(min=1e-300)
    weights = torch.stack([torch.ones_like(x), centred])  # (2, N, D)
    error = sample.error.view(-1, 1, *x.shape)
    projected = (error * weights).sum(3).flatten(1)  # (M, 2N)
    score, mean = _projection(sample, projected, weights, alpha)
    at = int(score.argmax())
    unit = (weights.abs() * _unit(sample).view(x.shape)).sum(2).flatten()
    effect = float(mean[at].abs() / unit[at]) if score[at] > 0 else 0.0
    return Finding("mean, each row", sample.input.name, float(score[at]), effect, f"row {at % len(x)}")


def squared_bias(sample: Sample, alpha: Significance) -> Finding:
    """‖E[error]‖² = 0, rows scaled to equal noise: sees a small bias of any pattern in many entries. 1 test.

    Estimated without bias by products of different batches' mean errors. Studentised, its law is at worst (one
    direction carries all the noise) (χ²₁ − 1)/√2, which sets the threshold. Not run where seeds repeat draws:
    batches are not independent then. Effect: bias over noise, both as root mean squares.
    """
    name, x = sample.input.name, sample.x
    m = len(sample.error) // BATCHES * BATCHES
    if sample.distinct < len(sample.error):
        return Finding("mean, all entries", name, 0.0, 0.0)
    noise = sample.error.var(0).view(x.shape).mean(1).sqrt()  # (N,)
    weight = torch.where(noise > 0, 1 / noise.clamp(min=1e-300), 0.0).repeat_interleave(x.shape[1])
    means = sample.error[:m].view(BATCHES, m // BATCHES, -1).mean(1) * weight
    gram = (means @ means.T)[~torch.eye(BATCHES, dtype=torch.bool)]
    scale = float(gram.square().mean().sqrt()) * math.sqrt(2 / len(gram))
    slack = float((sample.slack * weight).square().sum())
    threshold = (alpha.z**2 - 1) / math.sqrt(2) * scale
    excess = float(gram.mean()) - slack
    score = excess / threshold if excess > 0 else 0.0
    active = max(int((weight > 0).sum()), 1)
    return Finding("mean, all entries", name, score, math.sqrt(max(float(gram.mean()), 0.0) / active))


def magnitude(sample: Sample, alpha: Significance) -> Finding:
    """⟨E[estimate], x⟩/‖x‖² = 1: what a gradient step along x keeps of its length. 1 test. Effect: less 1."""
    x = sample.x
    energy = (x / x.abs().max().clamp(min=1e-300)).square().sum()
    if energy == 0:
        return Finding("magnitude", sample.input.name, 0.0, 0.0)
    # In units of the largest entry, so that squares of denormals do not vanish.
    weights = (x / x.abs().max() / (energy * x.abs().max())).unsqueeze(0)
    projected = (sample.error * weights.flatten()).sum(1, keepdim=True)
    score, mean = _projection(sample, projected, weights, alpha)
    return Finding("magnitude", sample.input.name, float(score[0]), float(mean[0]))


def clipping(sample: Sample, alpha: Significance) -> Finding:
    """Rows' extremes do not move inwards on average: upper, lower, both. 3 tests, pooled over rows.

    Of a `Quantizer` also, without chance: no position outside the codes' range. Effect: inward shift, relative to
    the row's range.
    """
    x, name = sample.x, sample.input.name
    size = x.amax(1) - x.amin(1)
    rows = size > 0
    outside = math.inf if sample.clipped else 0.0
    if not rows.any():
        return Finding("no clipping", name, outside, 0.0)
    share = torch.where(rows, 1 / size.clamp(min=1e-300), 0.0)[:, None] / rows.sum()
    upper = torch.zeros_like(x).scatter_(1, x.argmax(1, keepdim=True), 1.0) * share
    lower = -torch.zeros_like(x).scatter_(1, x.argmin(1, keepdim=True), 1.0) * share
    weights = torch.stack([upper, lower, (upper + lower) / 2])
    projected = sample.error @ weights.flatten(1).T
    score, mean = _projection(sample, projected, weights, alpha)
    score = torch.where(mean < 0, score, 0.0)  # outwards is not clipping
    at = int(score.argmax())
    where = ("upper end", "lower end", "both ends")[at]
    return Finding("no clipping", name, max(float(score[at]), outside), max(-float(mean[at]), 0.0), where)


def variance_law(sample: Sample, alpha: Significance) -> Finding | None:
    """E[unit²] is the declared p(1 − p) or 1/12, entry by entry and summed. n + 1 tests; None for a function.

    And, without chance: no error beyond a step, or half a step if dithered.

    Effect: measured over declared variance of all entries together, less 1.
    """
    if sample.law is None or not sample.unit.ne(sample.unit[0]).any():
        return None  # no grid is known; or nothing is drawn, which the mean judges
    gap = sample.unit.square() - sample.law
    total = gap.sum(1, keepdim=True)
    of = moments(torch.cat([gap, total], 1))
    jump = of.jump.clone()
    jump[:-1] = 1.0  # an entry's squared error may move by a step²
    # A few last bits of the position in steps: float32, of at most 255 steps.
    slack = torch.full_like(jump, 1e-4)
    slack[-1] *= gap.shape[1]
    score = alpha.score(of, jump, sample.distinct, slack)
    at = int(score.argmax())
    largest = math.inf if sample.overlong else float(score[at])
    declared = float(sample.law.expand(gap.shape).sum())
    effect = float(gap.sum()) / declared if declared > 0 else 0.0
    where = "all entries" if at == gap.shape[1] else _where(at, sample.x)
    return Finding("variance law", sample.input.name, largest, effect, where)


def declared_variance(sample: Sample, q: Quantizer, seeds: Sequence[int], alpha: Significance) -> Finding | None:
    """E‖error‖² is what `variance` says for the same seed, plus ‖`mean_error`‖². 1 test; None if nothing is drawn.

    And, without chance: `variance_bound` is not below it. What a transform draws is given by the seed; where the
    variance is the same for the first seeds, it is taken to depend on none, and all draws count.

    Effect: measured over declared variance, less 1.

    Args:
        sample: draws of these seeds, in their order.
        q: says what is declared.
        seeds: of the draws.
        alpha: its rate is shared with the other tests of the variance.
    """
    if not sample.unit.ne(sample.unit[0]).any():
        return None
    declared, below = _declared(q, sample.input.x, seeds[:_FEW_SEEDS])
    if declared.ne(declared[0]).any():
        declared = _declared(q, sample.input.x, seeds[:_SEEDS])[0]
        square = sample.error[:_SEEDS].square()
    else:
        declared, square = declared[:1], sample.error.square()
    of = moments((square.sum(1) - declared).unsqueeze(1))
    widths = sample.width.view(sample.shape).square()
    still = (widths * sample.still.view(sample.shape)).sum(1).amax()  # rows that were never taken come as a whole
    jump = torch.maximum(of.jump, torch.maximum(widths.amax(), still))
    slack = (2 * square.mean(0).sqrt() * sample.slack + sample.slack.square()).sum()
    score = float(alpha.score(of, jump, len(square), slack)[0])
    size = float(declared.mean())
    wrong = below or not torch.isfinite(declared).all()
    where = "variance_bound below variance" if below else "all entries"
    effect = float(of.mean[0]) / size if size > 0 else 0.0
    return Finding("declared variance", sample.input.name, math.inf if wrong else score, effect, where)


def _declared(q: Quantizer, x: Tensor, seeds: Sequence[int]) -> tuple[Tensor, bool]:
    """(seeds,) float64: mean square errors as declared; and whether a bound is below its variance."""
    variances = torch.tensor([float(q.variance(x, seed)) for seed in seeds], dtype=torch.float64)
    bounds = torch.tensor([float(q.variance_bound(x, seed)) for seed in seeds], dtype=torch.float64)
    biased = len(q.codings) == 1 and not q.coding.rounding.settles and q.coding.rounding.unit_bias > 0
    offsets = [float(q.mean_error(x, seed).double().square().sum()) if biased else 0.0 for seed in seeds]
    return variances + torch.tensor(offsets, dtype=torch.float64), bool((bounds < variances * (1 - 1e-6)).any())


def _projection(sample: Sample, projected: Tensor, weights: Tensor, alpha: Significance) -> tuple[Tensor, Tensor]:
    """Scores and means of projections (M, k) of the errors.

    A projection moves by at most one entry's movement at a time where errors are independent; where they are not,
    its own fourth moment says by how much, and of a row that was not seen to move all entries may move at once (it
    was sampled, and never taken). `weights` has k·n entries, or 2·n of rows projected one by one.
    """
    k = projected.shape[1]
    weights = weights.abs().reshape(k, -1)
    repeats = weights.numel() // sample.width.numel()
    widths, slacks, still = (
        v.repeat(repeats).view(weights.shape) for v in (sample.width, sample.slack, sample.still)
    )
    of = moments(projected)
    together = (weights * widths * still).view(k, -1, sample.shape[1]).sum(2).amax(1)
    jump = torch.maximum(of.jump, torch.maximum((weights * widths).amax(1), together))
    return alpha.score(of, jump, sample.distinct, (weights * slacks).sum(1)), of.mean


def _unit(sample: Sample) -> Tensor:
    """The width of errors; the row's largest value where nothing moves."""
    largest = sample.x.abs().amax(1).repeat_interleave(sample.shape[1])
    return torch.where(sample.width > 0, sample.width, largest)


def _where(index: int, x: Tensor) -> str:
    return f"entry ({index // x.shape[1]}, {index % x.shape[1]})"
