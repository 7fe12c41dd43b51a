"""How a position between two levels lands on one of them.

With f the fraction of the way from the level below t to the next one, a *gap* apart:

    nearest      the nearer one                  error deterministic, at most ½ gap: biased
    stochastic   the upper one with chance f     mean t, variance f(1 − f) gap², at most ¼ gap²
    dithered     ⌊t + a + b⌋ − a − b + ½         mean t, variance gap²/12 wherever t lies (uniform levels only)
    corrected    the nearer one, then the block's step is corrected: asymptotically unbiased under a rotation
    few bits     the upper one with the chance p nearest to f, or below it, of those that k random bits can give:
                 off by up to 2^−k gap, variance p(1 − p) gap²

Dithered rounding is *subtractive* dither (Schuchman 1964; Gray & Stockham 1993): what was added is taken off again
when codes are turned back. Its dither is the sum of one number per row and one per column, so that a product of
codes can take it off with low rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels.codes import DITHER_LEVELS, Entries, Levels, Scales
from fqt.kernels.philox import (
    STREAM_DITHER_COLUMN,
    STREAM_DITHER_ROW,
    STREAM_STEP,
    few_random_bits,
    random_u24,
    rounding_noise,
)
from fqt.kernels.steps import E4M3, STORES, SmallFloat

MOST_BITS = 16
"""Random bits of `FewBits`."""


@dataclass(frozen=True)
class Rounding:
    """One way to round.

    Attributes:
        name: as recipes and names of quantizers have it.
        draws: whether it needs a seed.
        unit_bound: the largest variance of one entry, in squared gaps; where no position matters, the variance.
        varies: whether the variance depends on the position.
        unit_bias: no mean error is larger, in gaps; it says nothing of one that settles.
        headroom: how many levels at the upper end positions must stay away from.
        settles: whether steps change after the codes are known; `errors` then says what that does.
    """

    name: ClassVar[str]
    draws: ClassVar[bool] = True
    unit_bound: ClassVar[float] = 0.0
    varies: ClassVar[bool] = False
    headroom: ClassVar[int] = 0
    settles: ClassVar[bool] = False

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """Levels for positions t (N, D) that lie between the lowest and the highest.

        Noise is counted row-major; with `transposed` the matrix lies on its side.
        """
        raise NotImplementedError

    @property
    def unit_bias(self) -> float:
        """0: unbiased."""
        return 0.0

    def variance(self, t: Tensor, levels: Levels) -> Tensor:
        """(N, D): the exact variance of each entry's code, t as for `round`, in squared steps."""
        gap = levels.gap(t)
        return torch.full_like(t, self.unit_bound) * gap * gap

    def mean_error(self, t: Tensor, levels: Levels) -> Tensor:
        """(N, D): how far the mean of each entry's code is from t, in steps."""
        return torch.zeros_like(t)

    def settled(self, x: Entries, codes: Tensor, scales: Scales, highest: int, seed: Tensor | None) -> Scales:
        """What the codes of x mean in the end, where they were made with `scales` for levels up to `highest`."""
        return scales

    def errors(self, x: Entries, scales: Scales, levels: Levels) -> tuple[Tensor, Tensor]:
        """Of a rounding that settles its steps later: (N, D) mean square errors and bounds, in squared steps."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Nearest(Rounding):
    """To the nearer level, ties to the even one. Deterministic and biased."""

    name: ClassVar[str] = "nearest"
    draws: ClassVar[bool] = False

    @property
    def unit_bias(self) -> float:
        """Half a gap."""
        return 0.5

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """The nearest level."""
        return levels.nearest(t)

    def mean_error(self, t: Tensor, levels: Levels) -> Tensor:
        """The error itself."""
        return levels.nearest(t) - t


@dataclass(frozen=True)
class Stochastic(Rounding):
    """To the upper of the two neighbours with the chance that makes the mean right."""

    name: ClassVar[str] = "stochastic"
    unit_bound: ClassVar[float] = 1 / 4
    varies: ClassVar[bool] = True

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """One of the two neighbours."""
        assert seed is not None
        return round_stochastic(t, rounding_noise(seed, t.numel()).view(t.shape), levels=levels)

    def variance(self, t: Tensor, levels: Levels) -> Tensor:
        """f(1 − f)·gap²."""
        _, fraction, gap = levels.split(t)
        return _of_two(fraction, levels, gap)


@dataclass(frozen=True)
class FewBits(Rounding):
    """Stochastic rounding with k random bits for an entry (SRU-Q, AICAS 2024): ⌊t + (r + c)/2^k⌋, r the bits.

    It goes up with the chance p = ⌊2^k f + c⌋/2^k where f would be right, so the mean is off by p − f gaps: by less
    than 2^−k and never up with c = 0; *centred*, with c = ½, by at most 2^−(k + 1) either way. The variance is
    exactly p(1 − p) squared gaps, and positions on a level stay there.

    Attributes:
        bits: k, from 1 to 16.
        centred: whether c is ½ and not 0.
    """

    unit_bound: ClassVar[float] = 1 / 4
    varies: ClassVar[bool] = True
    bits: int = 4
    centred: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= MOST_BITS:
            raise FqtError(f"stochastic rounding takes 1 to {MOST_BITS} random bits, not {self.bits!r}")
        if type(self.centred) is not bool:
            raise FqtError(f"centred is True or False, not {self.centred!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """ "stochastic4" of four bits, "centred4" if centred."""
        return f"{'centred' if self.centred else 'stochastic'}{self.bits}"

    @property
    def unit_bias(self) -> float:
        """2^−k, half of it if centred."""
        return (0.5 if self.centred else 1.0) / (1 << self.bits)

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """One of the two neighbours."""
        assert seed is not None
        noise = few_random_bits(seed, t.numel(), self.bits).view(t.shape)
        return round_few_bits(t, noise, self, levels)

    def chance(self, fraction: Tensor) -> Tensor:
        """p by f, both of any one shape."""
        wanted = fraction * (1 << self.bits)  # exact, as all that follows: no sum may be rounded up to an integer
        whole = wanted.floor()
        return (whole + (wanted - whole >= 0.5 if self.centred else 0.0)) / (1 << self.bits)

    def variance(self, t: Tensor, levels: Levels) -> Tensor:
        """p(1 − p)·gap²."""
        _, fraction, gap = levels.split(t)
        return _of_two(self.chance(fraction), levels, gap)

    def mean_error(self, t: Tensor, levels: Levels) -> Tensor:
        """(p − f)·gap."""
        _, fraction, gap = levels.split(t)
        return (self.chance(fraction) - fraction) * gap


@dataclass(frozen=True)
class Dithered(Rounding):
    """Subtractive dither of one number per row and one per column; uniform levels only."""

    name: ClassVar[str] = "dithered"
    unit_bound: ClassVar[float] = 1 / 12
    headroom: ClassVar[int] = 1

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """⌊t + a + b⌋."""
        assert seed is not None
        return round_dithered(t, *dither_noise(seed, t.shape[0], t.shape[1], transposed))


@dataclass(frozen=True)
class Corrected(Rounding):
    """To the nearer level, then the block's step times S = ⟨y, y⟩/⟨y, ŷ⟩, itself rounded stochastically to E4M3.

    MS-EDEN (Quartet II, arXiv 2601.22813). S makes ⟨y, ŷ⟩ = ‖y‖² in every block; that alone is no unbiased
    estimate, but of a randomly rotated vector the errors' other parts average out as it grows: asymptotically
    unbiased, with a bias of some percent where few entries carry a row (128 rotated, 16 in a block). Only the
    rounding of the step is drawn. `errors` is the exact mean square of ŷ − y over it, given the rotation, not a
    variance: averaged over rotations it is the variance plus the squared bias.
    """

    name: ClassVar[str] = "corrected"
    varies: ClassVar[bool] = True
    settles: ClassVar[bool] = True

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """The nearest level."""
        return levels.nearest(t)

    def settled(self, x: Entries, codes: Tensor, scales: Scales, highest: int, seed: Tensor | None) -> Scales:
        """The corrected steps."""
        assert seed is not None
        wanted, unit = _corrected(x, codes, scales, highest)
        noise = random_u24(seed, STREAM_STEP, wanted.numel()).view(wanted.shape)
        return replace(scales, step=round_stochastic(wanted, noise, levels=E4M3) * unit)

    def errors(self, x: Entries, scales: Scales, levels: Levels) -> tuple[Tensor, Tensor]:
        """(N, D) each: the mean square error of each entry over the step's noise, and a bound; in squared steps.

        The bound takes ½ gap (or what is clipped) for the error of the code, and ¼ for the noise of the step.
        """
        step = scales.spread(x.shape)[0]
        t = torch.where(step > 0, x.values() / step, 0.0)
        codes = levels.nearest(t.clamp(levels.low, levels.high))
        wanted, unit = _corrected(x, codes, scales, levels.high)
        _, fraction, gap = E4M3.split(wanted)
        part = torch.where(scales.step > 0, unit / scales.step, 0.0)

        def spread(parameter: Tensor) -> Tensor:
            return scales.blocks.spread(parameter, x.shape)

        noise, most = (spread((part * gap).square() * share) for share in (fraction * (1 - fraction), 1 / 4))
        mean = codes * spread(part * wanted)
        mine = torch.maximum((codes - t).abs(), torch.as_tensor(levels.gap(codes)) / 2)
        bound = ((mean - codes).abs() + mine).square() + codes.square() * most
        return (mean - t).square() + codes.square() * noise, bound


def _corrected(x: Entries, codes: Tensor, scales: Scales, highest: int) -> tuple[Tensor, Tensor]:
    """The steps that are wanted, in E4M3's least number, and what that stands for."""
    store = STORES["correctable"]
    assert isinstance(store, SmallFloat)
    values, step = x.values(), scales.spread(x.shape)[0]
    t, code = torch.where(step > 0, values / step, 0.0).double(), codes.double()
    square, along = scales.blocks.sums(t * t), scales.blocks.sums(t * code)
    unit = store.unit(values.abs(), highest)
    wanted = scales.step / unit * torch.where(along > 0, square / along, 1.0)
    return wanted.to(scales.step.dtype).clamp(0, E4M3.high), unit


@dataclass(frozen=True)
class Coding:
    """How the range of a block becomes codes.

    Attributes:
        mode: where zero lies: "affine" (the least value is code 0), "zero" (the same with 0 exactly on a code) or
            "symmetric" (0 is code 0).
        levels: what positions are clamped to, and the number of steps of the range; for dithered rounding `high` is
            one below the last code.
        rounding: between neighbouring levels.
        store: how a step is stored: a name in `fqt.kernels.steps.STORES`.
    """

    mode: str
    levels: Levels
    rounding: Rounding
    store: str = "float32"


NEAREST, STOCHASTIC, DITHERED, CORRECTED = Nearest(), Stochastic(), Dithered(), Corrected()
ROUNDINGS: dict[str, Rounding] = {
    rounding.name: rounding
    for rounding in (
        *(NEAREST, STOCHASTIC, DITHERED, CORRECTED),
        *(FewBits(bits, centred) for centred in (False, True) for bits in range(1, MOST_BITS + 1)),
    )
}
"""All of them, by name."""

KNOWN_ROUNDINGS = (
    f"nearest, stochastic, dithered, corrected; with few random bits stochastic1 … stochastic{MOST_BITS}, "
    f"centred1 … centred{MOST_BITS}"
)
INTEGERS = Levels(-(2**30), 2**30)


def round_stochastic(t: Tensor, u: Tensor, chances: int = DITHER_LEVELS, levels: Levels = INTEGERS) -> Tensor:
    """The level below t, or the one above where u/chances is below the fraction, for noise u in 0 … chances − 1.

    (⌊t + u⌋ in floats can leave the range.) Over all values of u the mean is t, exactly if the fraction is a
    multiple of 1/chances, and the variance is f(1 − f) squared gaps.
    """
    below, fraction, gap = levels.split(t)
    up = u.to(t.dtype) * (1.0 / chances) < fraction
    return below + (up if levels.uniform else up * gap)


def round_few_bits(t: Tensor, r: Tensor, how: FewBits, levels: Levels = INTEGERS) -> Tensor:
    """The level below t, or the one above where 2^k f + r + c reaches 2^k, for integers r in 0 … 2^k − 1.

    Over all values of r the mean and the variance are those of `FewBits`, for any t.
    """
    below, fraction, gap = levels.split(t)
    least = (1 << how.bits) - (0.5 if how.centred else 0.0) - r.to(t.dtype)
    up = fraction * (1 << how.bits) >= least
    return below + (up if levels.uniform else up * gap)


def _of_two(chance: Tensor, levels: Levels, gap: Tensor | float) -> Tensor:
    """The variance of a choice between two levels, in squared steps."""
    unit = chance * (1 - chance)
    return unit if levels.uniform else unit * gap * gap


def round_dithered(t: Tensor, row: Tensor, column: Tensor, chances: int = DITHER_LEVELS) -> Tensor:
    """⌊t + (row + column)/chances⌋ in exact arithmetic, for integers row (N, 1), column (1, D) below `chances`.

    For t in [0, B − 1] the code stays in 0 … B. Over all (row, column) the error
    code − (row + column)/chances + ½(1 − 1/chances) − t has mean zero and variance (1 − chances⁻²)/12, exactly
    if t is a multiple of 1/chances.
    """
    k = row + column
    u = k % chances
    floor = t.floor()
    threshold = (chances - u).to(t.dtype) * (1.0 / chances)
    return floor + torch.div(k, chances, rounding_mode="floor") + (t - floor >= threshold)


def dither_noise(seed: Tensor, rows: int, columns: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """The two independent 24-bit noise vectors of dithered rounding: int32 (N, 1) and (1, D).

    With `transposed` the matrix lies on its side: its columns are the quantizer's rows, and take their stream.
    """
    along_rows, along_columns = dither_streams(transposed)
    row, column = random_u24(seed, along_rows, rows), random_u24(seed, along_columns, columns)
    return row.view(rows, 1), column.view(1, columns)


def dither_streams(transposed: bool) -> tuple[int, int]:
    """The streams along the rows and along the columns of a matrix."""
    return (STREAM_DITHER_COLUMN, STREAM_DITHER_ROW) if transposed else (STREAM_DITHER_ROW, STREAM_DITHER_COLUMN)
