"""Exact unbiasedness: every value of a coarse noise is fed through the rounding rules once. No tolerance, no luck.

With M noise levels and t a multiple of 1/M all means are exact. The rules take their noise as an argument, so
this is the code that rounds in earnest, with M in place of 2²⁴.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from fqt.kernels import rounding
from fqt.kernels.philox import STREAM_ROUNDING, few_random_bits, random_words
from fqt.kernels.rounding import FewBits, round_dithered, round_stochastic
from fqt.quant import quantizer

FULL = 1 << 24


def grid(levels: int, top: int) -> Tensor:
    """All multiples of 1/levels in [0, top], the top included."""
    return torch.arange(top * levels + 1, dtype=torch.float64) / levels


@pytest.mark.parametrize("levels", [1, 2, 8, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stochastic_mean_is_t_and_variance_is_p_one_minus_p(levels: int, bits: int) -> None:
    t = grid(levels, 2**bits - 1)
    noise = torch.arange(levels, dtype=torch.int32)[:, None]
    codes = round_stochastic(t, noise, levels)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    p = t - t.floor()
    assert torch.equal(codes.mean(0), t)
    assert torch.equal((codes - t).square().mean(0), p * (1 - p))


def test_stochastic_on_signed_positions() -> None:
    t = torch.arange(-7 * 8, 7 * 8 + 1, dtype=torch.float64) / 8
    codes = round_stochastic(t, torch.arange(8, dtype=torch.int32)[:, None], 8)
    assert torch.equal(codes.mean(0), t)
    assert (codes.abs() <= 7).all()


def dither_errors(t: float | Tensor, row: Tensor, column: Tensor, levels: int) -> Tensor:
    """code − dither + ½(1 − 1/M) − t for row, column noise of shapes (R, 1), (1, C)."""
    position = torch.as_tensor(t, dtype=torch.float64).expand(row.shape[0], column.shape[1])
    codes = round_dithered(position, row, column, levels)
    return codes - (row + column).double() / levels + 0.5 * (1 - 1 / levels) - position


@pytest.mark.parametrize("levels", [2, 4, 16])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dithered_mean_zero_and_variance_one_twelfth(levels: int, bits: int) -> None:
    """Over all (row, column): mean exactly 0, variance exactly (1 − M⁻²)/12, codes in 0 … B."""
    noise = torch.arange(levels, dtype=torch.int32)
    row, column = noise.repeat_interleave(levels), noise.repeat(levels)
    top = 2**bits - 2
    for t in [*grid(levels, top).tolist()[:: max(1, top // 8)], float(top)]:
        errors = torch.stack(
            [dither_errors(t, r.view(1, 1), c.view(1, 1), levels)[0, 0] for r, c in zip(row, column, strict=True)]
        )
        assert float(errors.sum()) == 0
        assert float(errors.square().mean()) == pytest.approx((1 - levels**-2) / 12, rel=1e-14)
        codes = round_dithered(torch.full_like(errors, t), row, column, levels)
        assert codes.min() >= 0
        assert codes.max() <= 2**bits - 1


def joint_table(entries: tuple[tuple[int, int], ...], levels: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Counts of the errors of these entries of a 2 × 3 matrix over all noise, and each entry's own counts."""
    t = torch.tensor([[0.25, 1.5, 2.0], [0.75, 1.0, 0.5]], dtype=torch.float64)
    rows, columns = 2, 3
    outcome = []
    for values in product(range(levels), repeat=rows + columns):
        noise = torch.tensor(values, dtype=torch.int32)
        e = dither_errors(t, noise[:rows, None], noise[None, rows:], levels)
        outcome.append([round(float(e[i]) * 2 * levels) for i in entries])
    table = np.array(outcome)
    shape = tuple(2 * levels * 2 + 1 for _ in entries)
    counts = np.zeros(shape)
    np.add.at(counts, tuple((table + 2 * levels).T), 1)
    counts /= len(table)
    marginals = [counts.sum(tuple(k for k in range(len(entries)) if k != i)) for i in range(len(entries))]
    return counts, marginals


def is_independent(entries: tuple[tuple[int, int], ...], levels: int = 4) -> bool:
    joint, marginals = joint_table(entries, levels)
    expected = marginals[0]
    for m in marginals[1:]:
        expected = np.multiply.outer(expected, m)
    return bool(np.array_equal(joint, expected))  # powers of two: exact


@pytest.mark.parametrize(
    "entries",
    [
        ((0, 0), (0, 1), (0, 2)),  # one row
        ((0, 0), (0, 1), (1, 0)),  # a corner
        ((0, 0), (1, 1), (0, 2)),  # no two in a column
        ((0, 1), (1, 1), (1, 2)),
    ],
)
def test_any_three_dithered_entries_are_independent(entries: tuple[tuple[int, int], ...]) -> None:
    assert is_independent(entries)


def test_four_corners_of_a_rectangle_are_dependent() -> None:
    """The price of a dither that is a sum; and the proof that the test above can fail."""
    assert not is_independent(((0, 0), (0, 1), (1, 0), (1, 1)))


def exact_dithered(t: float, row: int, column: int) -> int:
    """⌊t + (row + column)/2²⁴⌋ in rational arithmetic."""
    position = Fraction(t) + Fraction(row + column, FULL)
    return position.numerator // position.denominator


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dithered_codes_never_leave_their_range(bits: int, dtype: torch.dtype) -> None:
    """t at and around every integer, the top included, with the extreme noises; against exact arithmetic."""
    top = 2**bits - 2  # the last position: one below the last code
    t = torch.arange(top + 1, dtype=dtype)
    up, below = torch.tensor(torch.inf, dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)
    t = torch.cat([t, torch.nextafter(t, up)[:-1], torch.nextafter(t, below)[1:], t[:-1] + 0.5])
    extreme = torch.tensor([0, 1, FULL // 2 - 1, FULL // 2, FULL - 2, FULL - 1], dtype=torch.int32)
    for r, c in product(extreme.tolist(), repeat=2):
        codes = round_dithered(t, torch.tensor([[r]]), torch.tensor([[c]]))[0]
        assert codes.min() >= 0
        assert codes.max() <= 2**bits - 1
        truth = torch.tensor([exact_dithered(v, r, c) for v in t.double().tolist()])
        # A position just below an integer may be finer than 2⁻²⁴: the threshold is then met or not by one level.
        fine = (t.double() * FULL).frac() != 0
        assert torch.equal(codes.long()[~fine], truth[~fine])
        assert ((codes.long() - truth).abs()[fine] <= 1).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_stochastic_codes_never_leave_their_range(bits: int) -> None:
    top = 2**bits - 1
    t = torch.arange(top + 1, dtype=torch.float32)
    t = torch.cat([t, torch.nextafter(t, torch.tensor(-1.0))[1:], torch.nextafter(t, torch.tensor(1e9))[:-1]])
    for u in (0, 1, FULL - 1):
        codes = round_stochastic(t, torch.full(t.shape, u, dtype=torch.int32))
        assert codes.min() >= 0
        assert codes.max() <= top
        assert ((codes == t.floor()) | (codes == t.ceil())).all()
    assert torch.equal(round_stochastic(t, torch.zeros(t.shape, dtype=torch.int32)), t.ceil())


@pytest.mark.parametrize("name", ["sru4", "sruc4", "sru3k1", "sruc8k6@channel"])
def test_a_quantizer_with_few_random_bits_by_all_their_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a float64 matrix: mean error and variance of estimates are those stated, the first as bounded."""
    q, x = quantizer(name), torch.randn(12, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert isinstance(q.rounding, FewBits)
    whole, found = 1 << q.rounding.bits, []
    for r in range(whole):
        monkeypatch.setattr(rounding, "few_random_bits", lambda seed, n, bits, r=r: torch.full((n,), r))
        found.append(q.quantize(x, 0).dequantize())
    draws = torch.stack(found)
    error = draws.mean(0) - x
    assert torch.allclose(error, q.mean_error(x), atol=1e-12)
    assert float(draws.var(0, correction=0).sum()) == pytest.approx(float(q.variance(x)), rel=1e-9)
    step = q.quantize(x, 0).scales.step
    assert bool((error.abs() <= step * (q.rounding.unit_bias + 1e-9)).all())
    assert float(error.abs().max()) > 0.4 * float(step.max()) * q.rounding.unit_bias


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8, 16])
def test_few_random_bits_are_the_words_taken_apart(bits: int) -> None:
    """Every bit of the words is used at 1, 2, 4, 8 and 16; and every value is as frequent, to 5σ."""
    seed, n, room = torch.tensor(5), 4096, 1 << (bits - 1).bit_length()
    words = random_words(seed, STREAM_ROUNDING, n * room // 32).tolist()
    mine = [word >> place & (1 << room) - 1 for word in words for place in range(0, 32, room)]
    found = few_random_bits(seed, n, bits)
    assert found.tolist() == [value >> (room - bits) for value in mine]
    assert abs(float(found.double().mean()) / ((1 << bits) - 1) - 0.5) < 5 * 0.5 / n**0.5
