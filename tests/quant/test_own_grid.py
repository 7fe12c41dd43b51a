"""A grid of one's own: what does not fit its bits or its scale is refused when a quantizer is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import fqt
from fqt import FqtError, Quantizer
from fqt.kernels.codes import Levels
from fqt.quant import Grid, Scale


@dataclass(frozen=True)
class Own(Grid):
    bits: Any = 4  # type: ignore[assignment]
    low: Any = -7
    high: Any = 7
    table: Any = None

    def levels(self, mode: str) -> Levels:
        return Levels(self.low, self.high, table=self.table)


class Listed(Own):
    def levels(self, mode: str) -> Any:
        return [-1, 0, 1]


def quantizer(grid: Grid, mode: str = "symmetric") -> Quantizer:
    return Quantizer(scale=Scale("row", mode), grid=grid)


@pytest.mark.parametrize(
    ("grid", "mode", "says"),
    [
        (Own(2, -100, 100), "symmetric", "2 bits do not tell 201 levels apart"),
        (Own(2, -4, 4, (0, 1, 2, 4)), "symmetric", "2 bits do not tell 7 levels apart"),
        (Own(3.5), "symmetric", "not 3.5"),
        (Own(40), "symmetric", "not 40"),
        (Own(4, -6, 7), "symmetric", "from −L to L"),
        (Own(4, -7, 7), "affine", "integers from 0 on"),
        (Own(4, -4, 4, (0, 1, 4)), "zero", "integers from 0 on"),
        (Own(4, -7.5, 7.5), "symmetric", "from an integer"),
        (Own(4, 7, -7), "symmetric", "up to a larger one"),
        (Own(4, -4, 4, (0, 2, 1, 4)), "symmetric", "rising"),
        (Own(4, -4, 4, (1, 2, 4)), "symmetric", "from 0 on"),
        (Own(4, -4, 4, [0, 1, 4]), "symmetric", "a tuple"),
        (Own(4, -4, 4, (0, 1, 8)), "symmetric", "up to 8"),
        (Own(4, -4, 4, (0, 0.1, 4)), "symmetric", "float32"),
        (Own(4, -(10**39), 10**39, (0, 1.0, 10**39)), "symmetric", "float32"),
        (Own(1, 0, 1), "zero", "too few levels"),
        (Listed(), "symmetric", "not list"),
    ],
    ids=str,
)
def test_what_is_no_grid_is_refused(grid: Grid, mode: str, says: str) -> None:
    with pytest.raises(FqtError, match=says) as error:
        quantizer(grid, mode)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("grid", "mode"),
    [
        (Own(4, -16, 16, (0, 1, 4, 16)), "symmetric"),
        (Own(3, -4, 4, (0, 0.25, 4)), "symmetric"),
        (Own(5, 0, 20), "affine"),
        (Own(1, 0, 1), "affine"),
        (Own(2, 0, 2), "zero"),
    ],
    ids=str,
)
def test_what_is_one_is_unbiased_and_of_the_declared_variance(grid: Grid, mode: str) -> None:
    certificate = fqt.certify(quantizer(grid, mode), draws=64)  # convicts a sound one with at most 1e-3
    assert certificate.exact, str(certificate)
