"""What a backward product keeps of grad_output's rows: samples with weights 1/p, or a part of their spectrum.

Applied before grad_output is quantized, so that any quantizer may follow; rows are a Linear's tokens, a
convolution's samples. With m_i = 1 with probability p_i, row g_i becomes (m_i/p_i) g_i, whose mean is g_i. In
grad_weight rows are what is contracted: the sample adds Σ_i (1/p_i − 1)‖g_i‖²‖x_i‖² of variance, x_i the row of the
input, exactly for a Linear; to grad_output itself it adds the same without x. The rounding of what is kept comes on
top.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import sampling
from fqt.kernels.codes import compute_dtype, is_power_of_two
from fqt.quant.abstract import Abstract


@dataclass(frozen=True)
class Keep(Abstract):
    """What is kept of grad_output for one product.

    Attributes:
        bias: "exact" (none), or "biased: " and by what.
    """

    instead: ClassVar[str] = "Leverage(0.5), ByRange(0.25), Sequency(8, 16) or LowSequency(8, 16)"

    @property
    def bias(self) -> str:
        """ "exact"."""
        return "exact"

    @property
    def turns(self) -> bool:
        """Whether tokens are transformed, so that the input of grad_weight must be too."""
        return False

    @property
    def sees_input(self) -> bool:
        """Whether probabilities in grad_weight depend on the input."""
        return False

    def turned(self, x: Tensor) -> Tensor:
        """The other operand of grad_weight (…, N, I), in the domain where rows are kept."""
        return x

    def back(self, y: Tensor, length: int) -> Tensor:
        """A gradient of the input (…, N', I), from the domain where rows are kept to N = `length` tokens."""
        return y

    @abstractmethod
    def apply(self, g: Tensor, x: Tensor | None, seed: Tensor, axes: int) -> Tensor:
        """What is quantized in place of grad_output.

        Args:
            g: laid out, its first `axes` axes the rows; float32 or float64.
            x: the input, laid out alike; None for grad_input, or if it `sees_input` not.
            seed: int64 scalar.
            axes: how many.
        """

    @abstractmethod
    def variance(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """Exact variance that keeping rows adds to grad_weight = gᵀ·x; to g itself without x. float64 scalar.

        Over the sample alone; the square of a bias, where there is one, is no variance.

        Args:
            g, x: (N, O) and (N, I), floats.

        Raises:
            FqtError: they are not.
        """

    def __str__(self) -> str:
        by, *values = self.words.items()
        return ", ".join([by[1], *(f"{k}={v}" for k, v in values)])

    @property
    def words(self) -> dict[str, Any]:
        """The table that `keep_from` builds it from."""
        return {
            "by": WORDS.get(type(self), type(self).__name__),
            **{f.name: getattr(self, f.name) for f in fields(self)},
        }


@dataclass(frozen=True)
class Sampled(Keep):
    """A sample of rows.

    Attributes:
        share: of the rows that are kept on average, in (0, 1]; fewer where some are zero.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or isinstance(self.share, bool) or not 0 < self.share <= 1:
            raise FqtError(f"keep takes a share of rows above 0 and up to 1, not {self.share!r}")

    @abstractmethod
    def score(self, g: Tensor, x: Tensor | None) -> Tensor:
        """(N,) float64, what probabilities are in proportion to; above 0 but for rows of zeros. g: (N, D)."""

    def chances(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """(N,) float64, the probability of each row: in proportion to its score, capped at 1.

        Near the end of g's float range it is as large as it must be for the row over it to stay finite.

        Args:
            g, x: (N, D) and (N, I), floats.

        Raises:
            FqtError: they are not.
        """
        _check_rows(g, x)
        largest = torch.linalg.vector_norm(g, torch.inf, dim=1) if g.numel() else g.new_zeros(g.shape[0])
        p = sampling.capped(self.score(g, x), self.share)
        return sampling.finite(p, largest.double() / torch.finfo(compute_dtype(g.dtype)).max)

    def apply(self, g: Tensor, x: Tensor | None, seed: Tensor, axes: int) -> Tensor:
        """Rows times m/p."""
        p = self.chances(_matrix(g, axes), None if x is None else _matrix(x, axes))
        weight = sampling.weights(p, seed).to(g.dtype)
        return g * weight.view(*g.shape[:axes], *[1] * (g.ndim - axes))

    def variance(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """Σ (1/p − 1)‖g_i‖²‖x_i‖²."""
        p = self.chances(g, x)
        square = _norms(g).square() if x is None else (_norms(g) * _norms(x)).square()
        return sampling.variance(p, square)


@dataclass(frozen=True)
class Leverage(Sampled):
    """Leverage scores: p ∝ ‖g_i‖‖x_i‖, in grad_input ∝ ‖g_i‖ (INT4 training, arXiv 2306.11987), capped at 1.

    Unbiased, and of all samples with this Σp the one of least variance. The paper samples the coarse and the fine
    half of every row apart, after quantizing; here whole rows are, before.
    """

    @property
    def sees_input(self) -> bool:
        """True."""
        return True

    def score(self, g: Tensor, x: Tensor | None) -> Tensor:
        """Norms."""
        return _norms(g) if x is None else _norms(g) * _norms(x)


@dataclass(frozen=True)
class ByRange(Sampled):
    """Activation gradient pruning (1-bit FQT, arXiv 2408.14267): p ∝ the range of grad_output's row, capped at 1.

    Unbiased. The range is that of the row and 0: a constant row would have none, and be lost. The released code
    keeps the rows of largest range and divides by nothing, which is biased.
    """

    share: float = 0.25

    def score(self, g: Tensor, x: Tensor | None) -> Tensor:
        """Ranges."""
        if not g.numel():
            return g.new_zeros(g.shape[0], dtype=torch.float64)
        return g.amax(1).clamp(min=0).double() - g.amin(1).clamp(max=0).double()


@dataclass(frozen=True)
class LowSequency(Keep):
    """Of every block of neighbouring tokens the Walsh–Hadamard rows with the fewest changes of sign.

    Of HLQ (arXiv 2406.15102); and of LBP-WHT (2309.15275) with tokens in a line, where that has 8 × 8 patches of an
    image, whose sides a layer does not know, and their sequency in two dimensions. Deterministic, and biased by
    design: what changes fast between neighbours is dropped, (H_⊥g)ᵀ(H_⊥x) of the gradient. Of a Linear only, whose
    tokens are neighbours along the last axis but one. Blocks do not cross samples; the last of a sample is filled
    up with zeros.

    Attributes:
        rows: how many of a block are kept.
        block: of how many tokens, a power of two.
    """

    rows: int = 8
    block: int = 16

    def __post_init__(self) -> None:
        if not is_power_of_two(self.block):
            raise FqtError(f"keep's block is a power of two, not {self.block!r}")
        if type(self.rows) is not int or not 1 <= self.rows <= self.block:
            raise FqtError(f"keep's rows are 1 to {self.block} of a block, not {self.rows!r}")

    @property
    def bias(self) -> str:
        """By what is dropped."""
        return "exact" if self.rows == self.block else "biased: what is of high sequency is dropped"

    @property
    def turns(self) -> bool:
        """True."""
        return True

    @property
    def _taken(self) -> int:
        """The rows of a block that the transform makes."""
        return self.rows

    def turned(self, x: Tensor) -> Tensor:
        """Tokens in the Walsh domain."""
        return sampling.sequency(x, self.block, self._taken)

    def back(self, y: Tensor, length: int) -> Tensor:
        """From the Walsh domain."""
        return sampling.undo_sequency(y, self.block, self._taken, length)

    def apply(self, g: Tensor, x: Tensor | None, seed: Tensor, axes: int) -> Tensor:
        """Low rows of the Walsh domain."""
        return self.turned(g)

    def variance(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """0: nothing is drawn."""
        return g.new_zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Sequency(LowSequency):
    """As many rows of the same transform, sampled by their leverage scores from all of a batch: unbiased.

    p ∝ ‖(Hg)_i‖‖(Hx)_i‖, in grad_input ∝ ‖(Hg)_i‖, capped at 1, Σp = rows/block of all; where low rows hold the
    energy they are kept for certain, as the published form keeps them, and the others are not lost but rare.
    """

    @property
    def bias(self) -> str:
        """None."""
        return "exact"

    @property
    def sees_input(self) -> bool:
        """True."""
        return True

    @property
    def _taken(self) -> int:
        return self.block

    @property
    def _sample(self) -> Leverage:
        return Leverage(self.rows / self.block)

    def apply(self, g: Tensor, x: Tensor | None, seed: Tensor, axes: int) -> Tensor:
        """All rows of the Walsh domain, times m/p."""
        return self._sample.apply(self.turned(g), None if x is None else self.turned(x), seed, axes)

    def variance(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """That of the leverage-score sample of transformed rows."""
        _check_rows(g, x)
        return self._sample.variance(self.turned(g), None if x is None else self.turned(x))


def _check_rows(g: Tensor, x: Tensor | None) -> None:
    """Raises FqtError for what are no rows of grad_output, and of the input beside them."""
    for name, given in (("g", g), ("x", x)):
        if given is None and name == "x":
            continue
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim != 2:
            kind = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise FqtError(f"{name} must be a matrix of floats whose rows are kept or not, not {kind}")
    if x is not None and len(x) != len(g):
        raise FqtError(f"g has {len(g)} rows and x has {len(x)}: give both the same tokens")


def _matrix(x: Tensor, axes: int) -> Tensor:
    """(rows, rest) of a tensor whose first axes are rows."""
    return x.reshape(x.shape[:axes].numel(), x.shape[axes:].numel())


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)


KEEPS: dict[str, type[Keep]] = {
    "leverage": Leverage,
    "range": ByRange,
    "low sequency": LowSequency,
    "sequency": Sequency,
}
"""By the word of a recipe's table, `{ by = "leverage", share = 0.5 }`."""

WORDS = {kind: word for word, kind in KEEPS.items()}


def keep_from(table: Any) -> Keep:
    """The value that a recipe's table stands for.

    Raises:
        FqtError: says what is unknown or wrong, and what is known.
    """
    kind = KEEPS.get(table["by"]) if isinstance(table, dict) and isinstance(table.get("by"), str) else None
    if kind is None:
        raise FqtError(f"keep is a table with by = {', '.join(map(repr, KEEPS))}, not {table!r}")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(table) - known - {"by"})
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise FqtError(f"unknown keep key {names}; known for {table['by']!r}: {', '.join(sorted(known))}")
    return kind(**{k: v for k, v in table.items() if k != "by"})
