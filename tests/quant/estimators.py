"""What the statistical tests measure: many draws in one call, and two tests of a mean with stated error rates.

`draws` quantizes M copies of x side by side. Copies change no row's range, so a row-wise or per-tensor quantizer
treats each like x alone, and each copy's noise is its own. With dither the row part is shared: given it every
entry's errors are independent over copies and uniform, so means may be tested this way, but the spread of
anything that joins two rows may not; `energy_errors` therefore also offers one draw per seed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fqt import QuantizedTensor, Quantizer

ALARM = 1e-9  # false-alarm rate of one entry-wise test, shared among its entries
PAIRS_Z = 25.0  # see `assert_no_common_bias`


def draws(q: Quantizer, x: Tensor, copies: int, seed: int = 0) -> Tensor:
    """(N, copies, D) float64: independent dequantized copies of x (N, D)."""
    return q.quantize(x.repeat(1, copies), seed).dequantize(torch.float64).view(len(x), copies, -1)


def inverse_of(qx: QuantizedTensor) -> Tensor:
    """(N, N) float64: S⁻¹, read off by undoing the transform of each unit vector."""
    n = qx.matrix_codes.shape[0]
    if qx.mixing is None:
        return torch.eye(n, dtype=torch.float64)
    mixing = replace(qx.mixing, offset=torch.zeros_like(qx.mixing.offset))
    return mixing.undo(torch.eye(n, dtype=qx.matrix_step.dtype)).double()


def error_width(qx: QuantizedTensor) -> Tensor:
    """(N, D) float64: the length of an interval that holds each entry's error, Σ_i |S⁻¹_ri| step_i."""
    step = qx.matrix_step.double().expand(qx.matrix_codes.shape)
    return inverse_of(qx).abs() @ step


def float_slack(x: Tensor, width: Tensor) -> Tensor:
    """What float32 arithmetic may add to an entry's error: a few last bits of its row and of its step."""
    return 5e-7 * x.double().abs().amax(1, keepdim=True) + 1e-4 * width


def assert_mean_is(sample: Tensor, x: Tensor, width: Tensor) -> None:
    """Empirical Bernstein (Maurer and Pontil 2009) for each entry of (N, M, D) bounded by `width` (N, D).

    Rigorous for every distribution and M; false alarms below ALARM for the whole matrix.
    """
    m = sample.shape[1]
    log = math.log(4 * x.numel() / ALARM)
    allowed = (2 * sample.var(1) * log / m).sqrt() + 7 * width * log / (3 * (m - 1)) + float_slack(x, width)
    error = (sample.mean(1) - x.double()).abs()
    excess = error - allowed
    assert (excess <= 0).all(), f"biased at {int(excess.argmax())}: {error.flatten()[excess.argmax()]:.3g}"


def assert_no_common_bias(sample: Tensor, x: Tensor, width: Tensor, batches: int = 64) -> None:
    """‖E[sample] − x‖² is zero: its unbiased estimate from products of different batch means' errors.

    Sees a small bias shared by many entries. Studentised, the estimate's law is at worst (one direction carries
    all the noise) (χ²_1 − 1)/√2 and near normal where many do: above PAIRS_Z = 25 with probability below 3e-9.
    """
    n, m, d = sample.shape
    means = sample.view(n, batches, m // batches, d).mean(2) - x.double()[:, None]
    e = means.transpose(0, 1).reshape(batches, n * d)
    gram = (e @ e.T).masked_select(~torch.eye(batches, dtype=torch.bool))
    spread = float(gram.square().mean().sqrt()) * math.sqrt(2 / len(gram))
    slack = float(float_slack(x, width).square().sum())
    assert float(gram.mean()) <= PAIRS_Z * spread + slack, f"squared bias {gram.mean():.3g} ± {spread:.3g}"


def energies(q: Quantizer, x: Tensor, copies: int, seed: int = 0) -> Tensor:
    """(copies,) ‖error‖² of each copy: independent draws where rounding is stochastic or rows are not mixed."""
    return (draws(q, x, copies, seed) - x.double()[:, None]).square().sum((0, 2))


def energy_errors(q: Quantizer, x: Tensor, seeds: int) -> Tensor:
    """(seeds,) ‖error‖² − variance(x, seed): zero mean, independent, whatever the transform draws."""
    out = []
    for seed in range(seeds):
        error = q.quantize(x, seed).dequantize(torch.float64) - x.double()
        out.append(error.square().sum() - q.variance(x, seed))
    return torch.stack(out)


def z_score(sample: Tensor, expected: float = 0.0) -> float:
    """Of a sample's mean against `expected`; 0 for a sample without spread that is right."""
    gap = float(sample.mean()) - expected
    error = float(sample.std()) / math.sqrt(len(sample))
    if error < 1e-9 * abs(expected):  # a sure thing
        return 0.0 if abs(gap) <= 1e-4 * abs(expected) else math.inf
    return gap / error
