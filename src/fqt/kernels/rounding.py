"""How a position between two levels lands on one of them.

With f the fraction of the way from the level below t to the next one, a *gap* apart:

    nearest      the nearer one                  error deterministic, at most ½ gap: biased
    stochastic   the upper one with chance f     mean t, variance f(1 − f) gap², at most ¼ gap²
    dithered     ⌊t + a + b⌋ − a − b + ½         mean t, variance gap²/12 wherever t lies (uniform levels only)

Dithered rounding is *subtractive* dither: what was added is taken off again when codes are turned back. Its dither
is the sum of one number per row and one per column, so that a product of codes can take it off with low rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fqt.kernels.codes import DITHER_LEVELS, Levels
from fqt.kernels.philox import STREAM_DITHER_COLUMN, STREAM_DITHER_ROW, random_u24, rounding_noise


@dataclass(frozen=True)
class Rounding:
    """One way to round.

    Attributes:
        name: as recipes and names of quantizers have it.
        draws: whether it needs a seed.
        unit_bound: the largest variance of one entry, in squared gaps.
        headroom: how many levels at the upper end positions must stay away from.
    """

    name: ClassVar[str]
    draws: ClassVar[bool] = True
    unit_bound: ClassVar[float] = 0.0
    headroom: ClassVar[int] = 0

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """Levels for positions t (N, D) that lie between the lowest and the highest.

        Noise is counted row-major; with `transposed` the matrix lies on its side.
        """
        raise NotImplementedError

    def unit_variance(self, fraction: Tensor) -> Tensor:
        """The variance of one entry, in squared gaps."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Nearest(Rounding):
    """To the nearer level, ties to the even one. Deterministic and biased."""

    name: ClassVar[str] = "nearest"
    draws: ClassVar[bool] = False

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """The nearest level."""
        if levels.uniform:
            return t.round()
        gap = levels.gap(t)
        return (t / gap).round() * gap

    def unit_variance(self, fraction: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(fraction)


@dataclass(frozen=True)
class Stochastic(Rounding):
    """To the upper of the two neighbours with the chance that makes the mean right."""

    name: ClassVar[str] = "stochastic"
    unit_bound: ClassVar[float] = 1 / 4

    def round(self, t: Tensor, levels: Levels, seed: Tensor | None, transposed: bool) -> Tensor:
        """One of the two neighbours."""
        assert seed is not None
        return round_stochastic(t, rounding_noise(seed, t.numel()).view(t.shape), levels=levels)

    def unit_variance(self, fraction: Tensor) -> Tensor:
        """f(1 − f)."""
        return fraction * (1 - fraction)


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

    def unit_variance(self, fraction: Tensor) -> Tensor:
        """1/12."""
        return torch.full_like(fraction, self.unit_bound)


@dataclass(frozen=True)
class Coding:
    """How the range of a block becomes codes.

    Attributes:
        mode: where zero lies: "affine" (the least value is code 0), "zero" (the same with 0 exactly on a code) or
            "symmetric" (0 is code 0).
        levels: what positions are clamped to, and the number of steps of the range; for dithered rounding `high` is
            one below the last code.
        rounding: between neighbouring levels.
        store: how a step is stored: "float32", "power" (of two) or "e4m3"; see `ops.scales_of`.
    """

    mode: str
    levels: Levels
    rounding: Rounding
    store: str = "float32"


NEAREST, STOCHASTIC, DITHERED = Nearest(), Stochastic(), Dithered()
ROUNDINGS = {rounding.name: rounding for rounding in (NEAREST, STOCHASTIC, DITHERED)}
INTEGERS = Levels(-(2**30), 2**30)


def round_stochastic(t: Tensor, u: Tensor, chances: int = DITHER_LEVELS, levels: Levels = INTEGERS) -> Tensor:
    """The level below t, or the one above where u/chances is below the fraction, for noise u in 0 … chances − 1.

    (⌊t + u⌋ in floats can leave the range.) Over all values of u the mean is t, exactly if the fraction is a
    multiple of 1/chances, and the variance is f(1 − f) squared gaps.
    """
    below, fraction, gap = levels.split(t)
    up = u.to(t.dtype) * (1.0 / chances) < fraction
    return below + (up if levels.uniform else up * gap)


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
