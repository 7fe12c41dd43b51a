"""The roundings, checked by running through every value of their noise: no sampling, no tolerance."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from fqt import FqtError
from fqt.kernels.codes import Levels
from fqt.kernels.rounding import (
    INTEGERS,
    NEAREST,
    ROUNDINGS,
    FewBits,
    dither_noise,
    round_dithered,
    round_few_bits,
    round_stochastic,
)

LEVELS = [2, 4, 16]


def exact(x: torch.Tensor) -> list[Fraction]:
    """The entries as exact fractions."""
    return [Fraction(float(v)) for v in x.flatten()]


def mean(values: list[Fraction]) -> Fraction:
    """The exact mean."""
    return sum(values, Fraction(0)) / len(values)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_mean_and_variance(levels: int, dtype: torch.dtype) -> None:
    u = torch.arange(levels)
    for k in range(-2 * levels, 3 * levels + 1):
        t = Fraction(k, levels)
        codes = exact(round_stochastic(torch.full((levels,), float(t), dtype=dtype), u, levels))
        p = t - (t.numerator // t.denominator)
        assert mean(codes) == t
        assert mean([(c - t) ** 2 for c in codes]) == p * (1 - p)
        assert all(c in (t - p, t - p + 1) for c in codes)


def awkward(bits: int) -> list[float]:
    """Positions: multiples of a quarter of 2^−k, and float32 neighbours of the odd ones, where sums would round."""
    even = [quarter / (4 << bits) for quarter in range(-4, (4 << bits) + 5, max(1, (1 << bits) // 16))]
    edges = torch.tensor([(n + half) / (1 << bits) for n in (0, 1, (1 << bits) - 1) for half in (0.5, 1.0)])
    beside = [torch.nextafter(edges, torch.tensor(way)).tolist() for way in (-9.0, 9.0)]
    return [*even, *beside[0], *beside[1], 2.0**-30, 2 - 2.0**-23, 5.0]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_few_bits_mean_and_variance(bits: int, centred: bool) -> None:
    """Over all 2^k values, at any position: mean and variance are exactly as declared, the bias is as bounded."""
    how, whole = FewBits(bits, centred), 1 << bits
    for position in awkward(bits):
        t, r = torch.full((whole,), position), torch.arange(whole)
        codes = round_few_bits(t, r, how).double()
        exact_t = Fraction(float(t[0]))
        below = exact_t.numerator // exact_t.denominator
        p = Fraction(int((codes - below).sum()), whole)
        assert set(codes.tolist()) <= {below, below + 1}
        wanted = (exact_t - below) * whole + (Fraction(1, 2) if centred else 0)
        assert p == Fraction(wanted.numerator // wanted.denominator, whole)
        assert abs(p - (exact_t - below)) <= Fraction(how.unit_bias)
        at = t[:1].double()
        assert float(how.variance(at, INTEGERS)) == float(p * (1 - p)) <= how.unit_bound
        assert float(how.mean_error(at, INTEGERS)) == float(p - (exact_t - below))
        assert centred or p <= exact_t - below


def test_few_bits_between_levels_of_a_float() -> None:
    """Mean and variance in gaps of E2M1, over all values of 3 bits."""
    levels, t = Levels(-12, 12, 1), torch.linspace(-12, 12, 97, dtype=torch.float64)
    for centred in (False, True):
        how = FewBits(3, centred)
        codes = torch.stack([round_few_bits(t, torch.full((97,), r), how, levels) for r in range(8)])
        assert set(codes.unique().tolist()) <= set(levels.numbers)
        assert torch.allclose(codes.mean(0) - t, how.mean_error(t, levels), atol=1e-14)
        assert torch.allclose(codes.var(0, correction=0), how.variance(t, levels), atol=1e-12)


@pytest.mark.parametrize("bits", [0, 17, -1, 4.0, True, "4"], ids=repr)
def test_few_bits_are_one_to_sixteen(bits: object) -> None:
    with pytest.raises(FqtError, match="1 to 16 random bits"):
        FewBits(bits)  # type: ignore[arg-type]
    with pytest.raises(FqtError, match="centred"):
        FewBits(4, 1)  # type: ignore[arg-type]


def test_every_rounding_is_found_by_its_name() -> None:
    assert all(name == str(rounding) for name, rounding in ROUNDINGS.items())
    assert len(set(ROUNDINGS.values())) == len(ROUNDINGS) == 36


@pytest.mark.parametrize("levels", LEVELS)
def test_dithered_mean_variance_and_range(levels: int) -> None:
    top = 3
    row, column = torch.arange(levels).view(-1, 1), torch.arange(levels).view(1, -1)
    noise = exact((row + column).double() / levels)
    centre = Fraction(levels - 1, 2 * levels)
    for k in range((top - 1) * levels + 1):
        t = Fraction(k, levels)
        codes = exact(round_dithered(torch.full((levels, levels), float(t)), row, column, levels))
        errors = [c - n + centre - t for c, n in zip(codes, noise, strict=True)]
        assert mean(errors) == 0
        assert mean([e * e for e in errors]) == (1 - Fraction(1, levels**2)) / 12
        assert min(codes) >= 0
        assert max(codes) <= top


def test_dithered_equals_the_sum_in_exact_arithmetic() -> None:
    levels = 1 << 24
    row, column = torch.tensor([[0], [1], [levels - 1], [levels // 2]]), torch.tensor([[0, 1, levels - 1, 12345]])
    for t in (0.0, 2.0**-24, 1 - 2.0**-24, 0.1, 1.0, 253.99998, 254.0):
        value = torch.full((4, 4), t)
        wanted = [x + y for x, y in zip(exact(value), exact((row + column).double() / levels), strict=True)]
        codes = round_dithered(value, row, column).flatten().tolist()
        assert codes == [w.numerator // w.denominator for w in wanted]


def test_dither_is_independent_in_threes_and_not_in_fours() -> None:
    """Every triple of errors in a 2 × 2 rectangle is equally likely; the fourth error follows from them."""
    levels = 4
    t = torch.tensor([[0.25, 1.5], [0.75, 2.0]])
    seen: list[tuple[float, ...]] = []
    for a, b, c, d in itertools.product(range(levels), repeat=4):
        row, column = torch.tensor([[a], [b]]), torch.tensor([[c, d]])
        error = round_dithered(t, row, column, levels) - (row + column) / levels - t
        seen.append(tuple(error.flatten().tolist()))
    for three in itertools.combinations(range(4), 3):
        counts: dict[tuple[float, ...], int] = {}
        for errors in seen:
            key = tuple(errors[i] for i in three)
            counts[key] = counts.get(key, 0) + 1
        assert len(counts) == levels**3
        assert set(counts.values()) == {levels}
    assert len(set(seen)) < levels**4


def test_one_noise_per_entry_would_not_be_subtractable() -> None:
    """The check above can fail: two entries that share their noise are not independent."""
    levels = 4
    errors = set()
    for a in range(levels):
        row, column = torch.tensor([[a]]), torch.zeros(1, 2, dtype=torch.int64)
        error = round_dithered(torch.tensor([[0.25, 1.5]]), row, column, levels) - row / levels
        errors.add(tuple(error.flatten().tolist()))
    assert len(errors) < levels**2


def test_nearest_takes_ties_to_even() -> None:
    t = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, 254.5])
    assert NEAREST.round(t, INTEGERS, None, False).tolist() == [-2, 0, 0, 2, 2, 0, 254]


def test_a_planted_bias_is_caught() -> None:
    """Rounding up at u ≤ p instead of u < p is one level too often: the exact mean sees it."""
    levels, u = 16, torch.arange(16)
    t = torch.full((levels,), 0.25)
    biased = t.floor() + (u / levels <= t)
    assert mean(exact(biased)) != Fraction(1, 4)
    assert mean(exact(round_stochastic(t, u, levels))) == Fraction(1, 4)


def test_transposed_swaps_the_streams_of_dither() -> None:
    seed = torch.tensor(-0x123456789ABCDEF)
    (row, column), (other_row, other_column) = (dither_noise(seed, 5, 7, t) for t in (False, True))
    assert torch.equal(other_row.flatten(), dither_noise(seed, 7, 5)[1].flatten())
    assert torch.equal(other_column.flatten(), dither_noise(seed, 7, 5)[0].flatten())
    assert not torch.equal(row, other_row)
    assert not torch.equal(column, other_column)
