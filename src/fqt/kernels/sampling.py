"""Samples of rows with weights 1/p, and rows of a Walsh–Hadamard transform in the order of their sequency.

Row i is kept with probability p_i, independently, and then weighted by 1/p_i: Σ_i (m_i/p_i) v_i has mean Σ_i v_i,
and its variance is Σ_i (1/p_i − 1)‖v_i‖², exactly. For a given Σ p that is least at p_i ∝ ‖v_i‖, capped at 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.philox import STREAM_KEEP

_FINEST = 1 << 24


def capped(score: Tensor, share: float) -> Tensor:
    """Probabilities in proportion to a score, capped at 1.

    Rows of the largest score are kept for certain, as many as would get more than 1; the others share the rest.

    Args:
        score: (N,) float64, not negative. A score of 0 has probability 0: its row must be zero.
        share: Σ p is share · N, in (0, 1]; less where fewer rows have a score.

    Returns:
        (N,) float64, multiples of 2⁻²⁴, rounded up so that sampling is exact. NaN where a score is not finite.
    """
    n = score.numel()
    if not n:
        return score
    sorted_, _ = score.sort(descending=True, stable=True)
    rest = sorted_.flip(0).cumsum(0).flip(0)  # of this row and all smaller ones
    left = share * n - torch.arange(n, device=score.device)  # for them, if all larger ones are certain
    first = (left * sorted_ <= rest).int().argmax().reshape(1)
    rate = left[first] / rest[first]
    p = torch.where(score == 0, 0.0, (score * rate).clamp(max=1.0))
    p = (p * _FINEST).ceil() / _FINEST
    return torch.where(torch.isfinite(rest[:1]), p, torch.nan)


def finite(p: Tensor, least: Tensor) -> Tensor:
    """Probabilities (N,) raised where a row over its own would be beyond the largest float; 0 stays 0.

    Args:
        p: multiples of 2⁻²⁴.
        least: (N,) float64, each row's largest magnitude in parts of that float.
    """
    enough = (least * (_FINEST + 2)).ceil() / _FINEST  # 2 for what the division rounds
    return torch.where(p == 0, p, torch.maximum(p, enough.clamp(max=1.0)))


def weights(p: Tensor, seed: Tensor) -> Tensor:
    """(N,) float64: m/p, m = 1 with probability p (N,), independently; 0 where p is."""
    kept = ops.random_u24(seed, STREAM_KEEP, p.numel()).double() < p * _FINEST
    return torch.where(p == 0, 0.0, kept / p)


def variance(p: Tensor, square: Tensor) -> Tensor:
    """Σ (1/p − 1) · square, float64 scalar: of the weighted sum of rows with these squared norms (N,)."""
    return torch.where(p == 0, 0.0, (1 / p - 1) * square).sum()


def walsh(block: int, rows: int, like: Tensor) -> Tensor:
    """(rows, block): the rows of the orthonormal Walsh–Hadamard matrix with the fewest changes of sign.

    The entry (i, j) of the matrix in its natural order is (−1)^popcount(i & j); the row of sequency k is i, the
    bits of k ^ k ÷ 2 from the last to the first. Made where it is used: for a copy to a GPU the host would wait.
    """
    bits = block.bit_length() - 1
    k, j = torch.arange(rows, device=like.device)[:, None], torch.arange(block, device=like.device)
    gray = k ^ (k >> 1)
    parity = sum((gray >> (bits - 1 - bit)) & (j >> bit) & 1 for bit in range(bits)) + torch.zeros_like(k * j)
    return (1 - 2 * (parity % 2)).to(like.dtype) * block**-0.5


def sequency(x: Tensor, block: int, rows: int) -> Tensor:
    """Neighbouring tokens in the Walsh domain, (…, N, D) to (…, ceil(N / block) · rows, D).

    The last block is filled up with zeros.
    """
    count = -(-x.shape[-2] // block)
    x = torch.nn.functional.pad(x, (0, 0, 0, count * block - x.shape[-2]))
    found = walsh(block, rows, x) @ x.unflatten(-2, (count, block))
    return found.flatten(-3, -2)


def undo_sequency(y: Tensor, block: int, rows: int, length: int) -> Tensor:
    """The transposed map, (…, ceil(N / block) · rows, D) to (…, N, D): the inverse if all rows are there."""
    count = -(-length // block)
    found = walsh(block, rows, y).T @ y.unflatten(-2, (count, rows))
    return found.flatten(-3, -2).narrow(-2, 0, length)
