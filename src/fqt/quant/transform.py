"""Transforms: what is mixed before quantizing. The mathematics is in `fqt.kernels.mixing`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import mixing, ops
from fqt.kernels.codes import Blocks, Entries, Findings, Quantized
from fqt.kernels.mixing import Guard, Mixing
from fqt.kernels.rounding import Coding


@dataclass(frozen=True)
class Transform:
    """What is done to a matrix before it is rounded, and undone after."""

    @property
    def mixes_rows(self) -> bool:
        """Whether rows meet: their steps must then be per row."""
        return False

    @property
    def sees_levels(self) -> bool:
        """Whether what is mixed depends on the levels that come after."""
        return False

    def apply(self, x: Tensor, coding: Coding, seed: Tensor | None) -> tuple[Tensor, Mixing | None]:
        """The matrix that is rounded, (N, D), and how to undo the transform; None if there is nothing to undo."""
        raise NotImplementedError

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Mixing | None]:
        """`apply` and the codes of its result at once."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Transform):
    """No transform."""

    def apply(self, x: Tensor, coding: Coding, seed: Tensor | None) -> tuple[Tensor, Mixing | None]:
        """x itself, and nothing to undo."""
        return x, None

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Mixing | None]:
        """The codes of x."""
        return ops.quantize(x, blocks, coding, seed, known), None


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

    @property
    def sees_levels(self) -> bool:
        """Exact variances depend on the width, ranges do not."""
        return self.guard == "exact"


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

    def apply(self, x: Tensor, coding: Coding, seed: Tensor | None) -> tuple[Tensor, Mixing]:
        """The transformed matrix (N, D) and its `Mixing`."""
        return mixing.householder(x, self.small_rows, Guard(self.guard, coding))

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Mixing]:
        """`apply` and the codes of its result at once."""
        return mixing.householder_codes(x, self.small_rows, self.guard, coding, seed, known)


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
        if type(self.block) is not int or self.block < 1 or self.block & (self.block - 1):
            raise FqtError(f"a Hadamard block must be a power of two, not {self.block!r}")

    def apply(self, x: Tensor, coding: Coding, seed: Tensor | None) -> tuple[Tensor, Mixing]:
        """The transformed matrix (N, D) and its `Mixing`."""
        return mixing.scaled_hadamard(x, self.block, _drawn(seed), Guard(self.guard, coding))

    def codes(
        self, x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Mixing]:
        """`apply` and the codes of its result at once."""
        return mixing.hadamard_codes(x, self.block, self.guard, coding, _drawn(seed), known)


def _drawn(seed: Tensor | None) -> Tensor:
    if seed is None:
        raise FqtError("this quantizer draws random signs: give a seed")
    return seed
