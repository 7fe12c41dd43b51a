"""The matrices on which quantizers go wrong, and two on which they do not.

Each has a reason. Small ones with many generic entries catch what is common; the others each hold one thing that
released quantizers got wrong: a range of zero, an extreme that is clipped, energy in a few entries, an outlier
that sets the step of its group, values that no exponent holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.seeds import derive_seed

ROWS, COLUMNS = 8, 128


@dataclass(frozen=True)
class Input:
    """A named matrix.

    Attributes:
        name: what is special about it.
        x: (N, D) float32.
    """

    name: str
    x: Tensor

    @property
    def carriers(self) -> float:
        """How many entries carry a row's energy: (Σx²)²/Σx⁴, the median of rows that are not zero; 0 if all are.

        1 for a one-hot row, D for a row of equal magnitudes, about D/3 for a Gaussian one.
        """
        square = self.x.double().square()
        square = square / square.amax(1, keepdim=True).clamp(min=1e-300)  # fourth powers must not underflow
        energy = square.sum(1)
        share = energy.square() / square.square().sum(1).clamp(min=1e-300)
        return float(share[energy > 0].median()) if (energy > 0).any() else 0.0


def _one_hot(g: torch.Generator) -> Tensor:
    x = torch.zeros(ROWS, COLUMNS)
    where = torch.randperm(COLUMNS, generator=g)[:ROWS]
    x[torch.arange(ROWS), where] = torch.exp(torch.randn(ROWS, generator=g)) * _signs(g, ROWS)
    return x


def _sparse(g: torch.Generator) -> Tensor:
    keep = torch.rand(ROWS, COLUMNS, generator=g).argsort(1) < 3
    return torch.randn(ROWS, COLUMNS, generator=g) * keep


def _on_codes(g: torch.Generator) -> Tensor:
    """Multiples of a power of two from 0 … 15 and −7 … 7 that reach both ends: the 4-bit grids' own values."""
    x = torch.randint(0, 16, (ROWS, COLUMNS), generator=g).float()
    x[:, 0], x[:, 1] = 0, 15
    x[ROWS // 2 :] = (x[ROWS // 2 :] - 8).clamp(min=-7)
    return x * 0.0625


def _edge(g: torch.Generator) -> Tensor:
    """Distances 10⁰ … 10⁻⁴ of the range from its ends."""
    gap = 10.0 ** (-4 * torch.rand(ROWS, COLUMNS, generator=g))
    gap[:, :2] = 0
    sign = _signs(g, (ROWS, COLUMNS))
    sign[:, 0], sign[:, 1] = 1, -1
    return sign * (1 - gap) * torch.exp(torch.randn(ROWS, 1, generator=g))


def _outliers(g: torch.Generator) -> Tensor:
    """One large entry, never twice the same, in every 16."""
    x = torch.randn(ROWS, COLUMNS // 16, 16, generator=g)
    x[..., 5] = (20 + 80 * torch.rand(ROWS, COLUMNS // 16, generator=g)) * _signs(g, (ROWS, COLUMNS // 16))
    return x.reshape(ROWS, COLUMNS)


def _heavy(g: torch.Generator) -> Tensor:
    """Student's t with two degrees of freedom."""
    gaussian = torch.randn(3, ROWS, COLUMNS, generator=g)
    return gaussian[0] / gaussian[1:].square().mean(0).sqrt()


def _one_large_row(g: torch.Generator) -> Tensor:
    x = 0.01 * torch.randn(ROWS, COLUMNS, generator=g)
    x[ROWS // 3] *= 100
    return x


def _signs(g: torch.Generator, shape: int | tuple[int, ...]) -> Tensor:
    return torch.randint(0, 2, (shape,) if isinstance(shape, int) else shape, generator=g) * 2.0 - 1


def _gaussian(rows: int, columns: int, scale: float = 1.0) -> Callable[[torch.Generator], Tensor]:
    return lambda g: (scale * torch.randn(rows, columns, generator=g, dtype=torch.float64)).float()


_MAKERS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "gaussian": _gaussian(ROWS, COLUMNS),
    "heavy tail": _heavy,
    "non-negative": lambda g: 0.1 + torch.randn(ROWS, COLUMNS, generator=g).abs(),
    "one large row": _one_large_row,
    "rows of all sizes": lambda g: torch.randn(ROWS, COLUMNS, generator=g) * torch.logspace(0, -6, ROWS)[:, None],
    "one outlier per group": _outliers,
    "one-hot rows": _one_hot,
    "sparse rows": _sparse,
    "on code points": _on_codes,
    "at the range edge": _edge,
    "denormal": _gaussian(ROWS, COLUMNS, 1e-40),
    "constant rows": lambda g: torch.randn(ROWS, 1, generator=g).expand(ROWS, COLUMNS).contiguous(),
    "all zero": lambda g: torch.zeros(ROWS, COLUMNS),
    "odd size 1×1": _gaussian(1, 1),
    "odd size 1×37": _gaussian(1, 37),
    "odd size 37×1": _gaussian(37, 1),
    "odd size 7×19": _gaussian(7, 19),
}


def adversarial_inputs(seed: int) -> list[Input]:
    """All inputs; their random entries depend on `seed` alone. The first is plain Gaussian.

    Their generator's seed is none that a draw may get (below 2³¹), not in the 32 bits that torch's generator uses
    either: a function that makes noise from its seed as the inputs were made would be correlated with them.
    """
    g = torch.Generator().manual_seed(2**31 + derive_seed(seed, "inputs") % 2**31)
    return [Input(name, make(g)) for name, make in _MAKERS.items()]
