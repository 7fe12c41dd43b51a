"""Levels that a small float holds: which numbers they are, and rounding to them, exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from fqt.kernels import ops, reference
from fqt.kernels.codes import TENSOR, Entries, Levels, Scales
from fqt.kernels.rounding import NEAREST, STOCHASTIC, round_stochastic
from fqt.quant.grid import E2M1, E4M3, E5M2, Floats, Grid, Integers, Logarithmic

FLOATS: dict[str, tuple[Grid, int]] = {  # and the exponent of the least number
    "E2M1": (E2M1, -1),
    "E4M3": (E4M3, -9),
    "E5M2": (E5M2, -16),
    "E3M0": (Floats(3, 0), -2),
    "E2M3": (Floats(2, 3), -3),
    "E3M2": (Floats(3, 2), -4),
    "E1M2": (Floats(1, 2), 0),
}
SMALL = {"E2M1": E2M1, "E3M0": Floats(3, 0), "E2M3": Floats(2, 3), "E3M2": Floats(3, 2), "int4": Integers(4)}
by_small = pytest.mark.parametrize("grid", SMALL.values(), ids=SMALL)


def magnitudes(exponent: int, mantissa: int) -> list[Fraction]:
    """By the definition: (1 + m/2^M)·2^(e − bias), at e = 0 m/2^M·2^(1 − bias), in units of the least number."""
    bias, whole = 2 ** (exponent - 1) - 1, 2**mantissa
    unit = Fraction(2) ** (1 - bias - mantissa)
    found = []
    for e in range(2**exponent):
        for m in range(whole):
            value = Fraction(m, whole) * Fraction(2) ** (1 - bias)
            if e:
                value = (1 + Fraction(m, whole)) * Fraction(2) ** (e - bias)
            found.append(value / unit)
    return found


def enumerated(levels: Levels) -> list[int]:
    """All levels, by going from each to the one above; from zero up, and mirrored."""
    up = [0]
    while up[-1] < levels.high:
        gap = levels.gap(torch.tensor(float(up[-1])))
        up.append(up[-1] + int(gap))
    return [-n for n in up[:0:-1]] + up


@pytest.mark.parametrize("name", [n for n in FLOATS if n not in ("E4M3", "E5M2")])
def test_levels_are_the_formats_numbers(name: str) -> None:
    grid = FLOATS[name][0]
    assert isinstance(grid, Floats)
    numbers = magnitudes(grid.exponent, grid.mantissa)
    levels = grid.levels("symmetric")
    assert enumerated(levels) == [-n for n in numbers[:0:-1]] + numbers
    assert len(set(numbers)) == 2 ** (grid.bits - 1)


def test_the_familiar_ones() -> None:
    assert enumerated(E2M1.levels("symmetric"))[7:] == [0, 1, 2, 3, 4, 6, 8, 12]  # twice 0, ½, 1, 1½, 2, 3, 4, 6
    assert enumerated(Floats(3, 0).levels("symmetric"))[7:] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert (E2M1.bits, Floats(3, 0).bits, E4M3.bits, E5M2.bits) == (4, 4, 8, 8)
    assert (E4M3.levels("symmetric").high, E5M2.levels("symmetric").high) == (448 * 2**9, 57344 * 2**16)
    assert Integers(4).levels("symmetric") == Levels(-7, 7)
    assert Integers(4).levels("affine") == Integers(4).levels("zero") == Levels(0, 15)


@pytest.mark.parametrize(("name", "dtype"), [("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)])
def test_levels_are_torchs_eight_bit_floats(name: str, dtype: torch.dtype) -> None:
    grid, exponent = FLOATS[name]
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = (numbers[torch.isfinite(numbers)] * 2.0**-exponent).unique().tolist()
    assert enumerated(grid.levels("symmetric")) == numbers


@pytest.mark.parametrize("name", FLOATS)
def test_neighbours_and_the_fraction_between_them(name: str) -> None:
    """At every level, halfway and a quarter of the way to the next, on both sides of zero."""
    levels = FLOATS[name][0].levels("symmetric")
    numbers = torch.tensor(enumerated(levels), dtype=torch.float64)
    low, high = numbers[:-1], numbers[1:]
    for fraction in (0.25, 0.5, 0.75):
        below, found, gap = levels.split(low + fraction * (high - low))
        assert torch.equal(below, low)
        assert torch.equal(found, torch.full_like(low, fraction))
        assert torch.equal(torch.as_tensor(gap).expand_as(low), high - low)
    below, found, _ = levels.split(numbers)
    assert torch.equal(below, numbers)
    assert not found.any()


TABLE = Levels(-64, 64, table=(0.0, 1.0, 1.5, 2.5, 5.0, 8.0, 16.0, 32.0, 64.0))


def test_levels_of_a_table() -> None:
    """Mirrored; rounding to nearest, and stochastically by all values of its noise, as between any neighbours."""
    up = torch.tensor(TABLE.table, dtype=torch.float64)
    numbers = torch.cat([-up.flip(0)[:-1], up])
    low, gap = numbers[:-1], numbers[1:] - numbers[:-1]
    assert not TABLE.uniform
    assert TABLE.dtype == torch.float32
    for fraction in (0.25, 0.5, 0.75):
        below, found, apart = TABLE.split(low + fraction * gap)
        assert torch.equal(below, low)
        assert torch.equal(found, torch.full_like(low, fraction))
        assert torch.equal(torch.as_tensor(apart), gap)
        if fraction != 0.5:
            assert torch.equal(TABLE.nearest(low + fraction * gap), low + gap * (fraction > 0.5))
    assert torch.equal(TABLE.split(numbers)[0], numbers)
    assert not TABLE.split(numbers)[1].any()
    assert torch.equal(TABLE.nearest(numbers), numbers)
    t = (low[:, None] + gap[:, None] * torch.arange(16) / 16).flatten()
    codes = round_stochastic(t, torch.arange(16, dtype=torch.int32)[:, None], 16, TABLE)
    assert torch.equal(codes.mean(0), t)
    assert torch.isin(codes, numbers).all()


def test_powers_are_eight_to_a_factor_of_two() -> None:
    levels = Logarithmic(8).levels("symmetric")
    up = torch.tensor(levels.table, dtype=torch.float64)
    assert up[0] == 0
    assert len(up) == 128
    assert levels.high == up[-1] == 2**16
    assert torch.allclose(up[2:] / up[1:-1], torch.full((126,), 2 ** (1 / 8), dtype=torch.float64), rtol=1e-7)
    single = up.float()
    assert torch.equal(single[:-1] + (single[1:] - single[:-1]), single[1:])


@pytest.mark.parametrize("name", [*SMALL, "E4M3"])
def test_the_gap_at_the_last_level_is_the_one_before_it(name: str) -> None:
    """There is none beyond it: a bound would be that of a gap which is not there."""
    levels = (E4M3 if name == "E4M3" else SMALL[name]).levels("symmetric")
    numbers = enumerated(levels)
    ends = torch.as_tensor(levels.gap(torch.tensor([float(levels.low), float(levels.high)])))
    assert (ends == numbers[-1] - numbers[-2]).all()


@by_small
@pytest.mark.parametrize("chances", [4, 16])
def test_stochastic_rounding_by_all_its_noise(grid: Grid, chances: int) -> None:
    """Mean t and variance f(1 − f)·gap², exactly; only the two neighbours."""
    levels = grid.levels("symmetric")
    numbers = torch.tensor(enumerated(levels), dtype=torch.float64)
    low, gap = numbers[:-1, None], (numbers[1:] - numbers[:-1])[:, None]
    fraction = torch.arange(chances, dtype=torch.float64) / chances
    t = (low + gap * fraction).flatten()
    noise = torch.arange(chances, dtype=torch.int32)[:, None]
    codes = round_stochastic(t, noise, chances, levels)
    assert torch.equal(codes.mean(0), t)
    variance = (gap * gap * fraction * (1 - fraction)).flatten()
    assert torch.equal((codes - t).square().mean(0), variance)
    assert torch.isin(codes, numbers).all()
    assert ((codes - t).abs() < (gap + 0 * fraction).flatten()).all()
    scales = Scales(torch.ones(1, 1), torch.zeros(1, 1), TENSOR)
    assert torch.equal(ops.code_variance(Entries(t[None]), scales, levels)[0], variance)


@by_small
def test_nearest_takes_the_nearer_and_ties_to_the_even_one(grid: Grid) -> None:
    """Even: an even number of gaps of the finer side, which is the level whose last mantissa bit is 0."""
    levels = grid.levels("symmetric")
    numbers = torch.tensor(enumerated(levels), dtype=torch.float64)
    low, high = numbers[:-1], numbers[1:]
    for fraction in (0.01, 0.49, 0.51, 0.99):
        t = low + fraction * (high - low)
        assert torch.equal(NEAREST.round(t, levels, None, False), high if fraction > 0.5 else low)
    assert torch.equal(NEAREST.round(numbers, levels, None, False), numbers)
    middle = NEAREST.round((low + high) / 2, levels, None, False)
    assert torch.equal(middle, torch.where((low / (high - low)) % 2 == 0, low, high))
    assert torch.equal(middle, -NEAREST.round(-(low + high) / 2, levels, None, False))


@pytest.mark.parametrize(("name", "dtype"), [("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)])
def test_nearest_is_torchs_cast(name: str, dtype: torch.dtype) -> None:
    grid, exponent = FLOATS[name]
    levels = grid.levels("symmetric")
    g = torch.Generator().manual_seed(0)
    t = torch.randn(4000, generator=g) * torch.exp2(torch.randint(0, 20, (4000,), generator=g).float())
    t = t.clamp(levels.low, levels.high)
    cast = (t * 2.0**exponent).to(dtype).float() * 2.0**-exponent
    assert torch.equal(NEAREST.round(t[None], levels, None, False)[0], cast)


@pytest.mark.parametrize("name", FLOATS)
def test_codes_are_levels_and_stay_inside(name: str) -> None:
    levels = FLOATS[name][0].levels("symmetric")
    numbers = torch.tensor(enumerated(levels), dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 50, generator=g) * torch.exp(2 * torch.randn(40, 50, generator=g))
    scales = Scales(x.abs().amax().view(1, 1) / levels.high, torch.zeros(1, 1), TENSOR)
    for rounding, seed in ((NEAREST, None), (STOCHASTIC, torch.tensor(5))):
        codes = ops.encode(Entries(x), scales, levels, rounding, seed)
        assert codes.dtype == (torch.int8 if levels.high <= 127 else torch.float32)
        assert torch.isin(codes.float(), numbers).all()
        t = reference.position(x, scales, levels)
        assert ((codes.float() - t).abs() <= torch.as_tensor(levels.split(t)[2])).all()
