"""Transforms: what is mixed before quantizing. The mathematics is in `fqt.kernels.mixing`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import mixing, ops
from fqt.kernels.codes import Blocks, Entries, Findings, Quantized, is_power_of_two
from fqt.kernels.mixing import Guard, Mixing
from fqt.kernels.rotation import Rotation
from fqt.kernels.rounding import Coding
from fqt.quant.abstract import Abstract
from fqt.quant.keep import Sampled


class Undo(NamedTuple):
    """How a transform is undone: first of rows, then of features; None where there is nothing to undo."""

    mixing: Mixing | None = None
    rotation: Rotation | None = None

    def of_errors(self, error: Tensor) -> Tensor:
        """What errors (N, D) of the matrix that was rounded become in the one that was given."""
        if self.mixing is not None:
            error = self.mixing.undo(error) - self.mixing.offset
        return error if self.rotation is None else self.rotation.undo_columns(error)


class Mixed(NamedTuple):
    """A transformed matrix.

    Attributes:
        y: the matrix that is rounded.
        undo: how to undo the transform.
    """

    y: Entries
    undo: Undo


class Measured(NamedTuple):
    """A transformed matrix as its noise is measured.

    Attributes:
        y: the matrix whose rounding is measured.
        undo: how to undo the transform.
        chance: (N,) float64, the probability with which a row is kept, and is y's then; None where all are.
    """

    y: Entries
    undo: Undo
    chance: Tensor | None = None

    @property
    def cost(self) -> Tensor | None:
        """(N,) float64, what a squared error of a row of y counts; None is 1 everywhere."""
        return self.chance if self.undo.mixing is None else self.undo.mixing.cost

    def sampling(self, weight: Tensor | None = None) -> Tensor:
        """What keeping rows adds, weighted by (N, D) or (1, D), float64 scalar: Σ (1/p − 1) x² = Σ p (1 − p) y²."""
        if self.chance is None:
            return torch.zeros((), dtype=torch.float64, device=self.y.matrix.device)
        square = self.y.matrix.double().square()
        square = square if weight is None else square * weight
        return (square.sum(1) * self.chance * (1 - self.chance)).sum()


@dataclass(frozen=True)
class Transform(Abstract):
    """What is done to a matrix before it is rounded, and undone after."""

    instead: ClassVar[str] = "Identity(), BlockHouseholder(), ScaledHadamard(), Rotated() or Kept(ByRange())"

    @property
    def needs_rows(self) -> bool:
        """Whether the matrix must have the quantizer's rows as its rows: it may not lie on its side."""
        return self.mixes_rows

    @property
    def mixes_rows(self) -> bool:
        """Whether rows meet: their steps must then be per row."""
        return False

    @property
    def scales_rows(self) -> bool:
        """Whether each row is scaled by itself: steps must then be per row."""
        return self.mixes_rows

    def sees_levels(self, mode: str) -> bool:
        """Whether what is mixed depends on the levels that come after, on a scale of that mode."""
        return False

    def bits_stored(self, rows: int) -> int:
        """Of what undoing it needs for so many rows, beside the seed."""
        return 0

    @abstractmethod
    def apply(self, x: Entries, coding: Coding, seed: Tensor | None) -> Mixed:
        """The matrix that is rounded, and how to undo the transform."""

    def measured(self, x: Entries, coding: Coding, seed: Tensor | None) -> Measured:
        """As `apply`, for exact variances; of a sample of rows, all of them."""
        return Measured(*self.apply(x, coding, seed))

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Undo]:
        """The codes of `apply`'s result at once, and how to undo the transform."""
        y, undo = self.apply(x, coding, seed)
        return ops.quantize(y, blocks, coding, seed)._replace(findings=known), undo


@dataclass(frozen=True)
class Identity(Transform):
    """No transform."""

    def apply(self, x: Entries, coding: Coding, seed: Tensor | None) -> Mixed:
        """x itself, and nothing to undo."""
        return Mixed(x, Undo())

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Undo]:
        """The codes of x."""
        return ops.quantize(x, blocks, coding, seed, known), Undo()


@dataclass(frozen=True)
class OverRows(Transform):
    """A transform over rows with a guard, which keeps plain rows where they cost less (`fqt.kernels.mixing`)."""

    guard: bool | str = True

    def __post_init__(self) -> None:
        if self.guard not in (True, False, "exact"):
            raise FqtError(f"unknown guard {self.guard!r}; known: True, False, 'exact'")

    @property
    def mixes_rows(self) -> bool:
        """True."""
        return True

    def bits_stored(self, rows: int) -> int:
        """Offset, inverse scale and place of every row, 32 bits each."""
        return 3 * 32 * rows

    def sees_levels(self, mode: str) -> bool:
        """Exact variances depend on them; bounds do not where steps are in proportion to ranges."""
        return self.guard == "exact" or (self.guard is True and mode != "affine")


@dataclass(frozen=True)
class BlockHouseholder(OverRows):
    """One large row spread over a block of small ones by a reflection (the paper's BHQ).

    Grouping and scales follow the released rule (rows sorted by range; as many large rows as each deserve more
    than one small one; s1 ∝ w1^(−1/3), s2 ∝ (w2/(k − 1))^(−1/3), w1 = λ1/√k) without its absolute epsilon.
    Deterministic. O(N·D), by reflections; no N × N matrix is formed.

    Attributes:
        guard: True, "exact" or False: see `fqt.kernels.mixing`.
        small_rows: the model of the small rows' range after mixing: "released" is w2 = λ2·max|Q|, which is not
            a bound; "rigorous" is w2 = λ2 (k − 1)/√k, which is.
    """

    small_rows: str = "released"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.small_rows not in ("released", "rigorous"):
            raise FqtError(f"unknown small_rows {self.small_rows!r}; known: released, rigorous")

    def apply(self, x: Entries, coding: Coding, seed: Tensor | None) -> Mixed:
        """The mixed rows."""
        y, mix = mixing.householder(x.values(), self.small_rows, Guard(self.guard, coding))
        return Mixed(Entries(y, period=x.period), Undo(mix))

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Undo]:
        """`apply` and the codes of its result at once."""
        found, mix = mixing.householder_codes(x, self.small_rows, self.guard, coding, seed, known)
        return found, Undo(mix)


@dataclass(frozen=True)
class ScaledHadamard(OverRows):
    """Rows scaled by λ^(−1/2), then mixed by a randomised orthonormal Hadamard matrix (this project's SHQ).

    The rule s = λ^(−1/2): flat mixing (every |M_ij|² = 1/m) gives each transformed row the mean square
    Σ_i s_i²λ_i²/m, λ_i the size of row i about its offset; its range is a constant c times the root of that;
    and undoing S costs Σ_i s_i⁻² in all. So the variance is proportional to c² (Σ s_i²λ_i²)(Σ s_i⁻²)/m, which
    by Cauchy–Schwarz is at least c² (Σ λ_i)²/m, reached exactly at s_i ∝ λ_i^(−1/2). Plain rows have Σ c_i²λ_i².

    Limits of the claim: λ is a range here, a proxy for the size; c depends on the rows: a mixture is nearly
    Gaussian while a row may be flat, which can cost a factor up to 16 on two-valued rows. The guard is what
    bounds the loss: with it the step bound is never above that of plain rows, and with guard="exact" the
    variance is not. Signs are ±1 from a Philox stream of the seed; unbiased for every sign pattern.

    Attributes:
        guard: True, "exact" or False: see `fqt.kernels.mixing`.
        block: the largest block, a power of two. Any N is split into powers of two; the rows of all blocks of
            at least 32 rows are dealt out evenly by size, the smallest rows go to the small blocks.
    """

    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_power_of_two(self.block):
            raise FqtError(f"a Hadamard block must be a power of two, not {self.block!r}")

    def apply(self, x: Entries, coding: Coding, seed: Tensor | None) -> Mixed:
        """The mixed rows."""
        y, mix = mixing.scaled_hadamard(x.values(), self.block, _drawn(seed), Guard(self.guard, coding))
        return Mixed(Entries(y, period=x.period), Undo(mix))

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Undo]:
        """`apply` and the codes of its result at once."""
        found, mix = mixing.hadamard_codes(x, self.block, self.guard, coding, _drawn(seed), known)
        return found, Undo(mix)


@dataclass(frozen=True)
class Rotated(Transform):
    """A randomized Hadamard matrix over features, then another transform over rows (`fqt.kernels.rotation`).

    A large feature is spread over its block, as a large row is by a transform over rows; in a product contracting
    the features the other operand takes the same rotation, and it cancels. It does not pay everywhere: exact zeros,
    and rows with few features that matter, become dense. Constant rows come back to the rounding of float32 only.
    Sums of √block of the largest entries must be floats themselves: beyond 3e37 in float32 some are not, and what
    is made of them is NaN.

    Attributes:
        rows: the transform over rows.
        block: the largest block, a power of two; the last axis is split into blocks that sum to it.
    """

    rows: Transform = field(default_factory=Identity)
    block: int = 128

    def __post_init__(self) -> None:
        if not is_power_of_two(self.block):
            raise FqtError(f"a Hadamard block must be a power of two, not {self.block!r}")
        if not isinstance(self.rows, Transform):
            raise FqtError(f"the rows of Rotated are a transform such as ScaledHadamard(), not {self.rows!r}")
        if isinstance(self.rows, Rotated):
            raise FqtError("features are rotated once: the transform over rows cannot rotate them again")

    @property
    def needs_rows(self) -> bool:
        """True: neighbours along a row meet."""
        return True

    @property
    def mixes_rows(self) -> bool:
        """Whether the transform over rows does."""
        return self.rows.mixes_rows

    @property
    def scales_rows(self) -> bool:
        """Whether the transform over rows does."""
        return self.rows.scales_rows

    def bits_stored(self, rows: int) -> int:
        """The transform over rows'; the rotation's signs come from the seed."""
        return self.rows.bits_stored(rows)

    def sees_levels(self, mode: str) -> bool:
        """Whether the transform over rows does."""
        return self.rows.sees_levels(mode)

    def _rotated(self, x: Entries, seed: Tensor | None) -> tuple[Entries, Rotation]:
        values, period = x.values(), x.period or x.shape[1]
        rotation = Rotation.draw(_drawn(seed), period, self.block, values.dtype)
        return Entries(rotation.columns(values), period=period), rotation

    def apply(self, x: Entries, coding: Coding, seed: Tensor | None) -> Mixed:
        """The rotated matrix, its rows mixed."""
        y, rotation = self._rotated(x, seed)
        mixed = self.rows.apply(y, coding, seed)
        return mixed._replace(undo=mixed.undo._replace(rotation=rotation))

    def measured(self, x: Entries, coding: Coding, seed: Tensor | None) -> Measured:
        """As the transform over rows."""
        y, rotation = self._rotated(x, seed)
        found = self.rows.measured(y, coding, seed)
        return found._replace(undo=found.undo._replace(rotation=rotation))

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Undo]:
        """`apply` and the codes of its result at once."""
        y, rotation = self._rotated(x, seed)
        found, undo = self.rows.codes(y, blocks, coding, seed, None)
        return found._replace(findings=known), undo._replace(rotation=rotation)


@dataclass(frozen=True)
class Kept(Transform):
    """A sample of rows with weights 1/p (`fqt.quant.keep`); those that are not kept have code 0.

    Unbiased. The variance of keeping, Σ (1/p − 1)‖x_i‖², is part of the quantizer's exact variance, which is over
    samples and rounding: a kept row is rounded at 1/p times its own step.

    Attributes:
        rows: which are kept.
    """

    rows: Sampled

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Sampled):
            raise FqtError(f"Kept takes a sample of rows such as ByRange(0.25), not {self.rows!r}")

    @property
    def needs_rows(self) -> bool:
        """True: rows are what is kept."""
        return True

    @property
    def scales_rows(self) -> bool:
        """True."""
        return True

    def apply(self, x: Entries, coding: Coding, seed: Tensor | None) -> Mixed:
        """Rows times m/p."""
        return Mixed(Entries(self.rows.apply(x.values(), None, _drawn(seed), 1), period=x.period), Undo())

    def measured(self, x: Entries, coding: Coding, seed: Tensor | None) -> Measured:
        """Every row times 1/p, and p."""
        values = x.values()
        p = self.rows.chances(values)
        scale = torch.where(p == 0, 0.0, 1 / p).to(values.dtype)[:, None]
        return Measured(Entries(values * scale, period=x.period), Undo(), p)


def _drawn(seed: Tensor | None) -> Tensor:
    if seed is None:
        raise FqtError("this quantizer draws random numbers before it rounds: give a seed")
    return seed
