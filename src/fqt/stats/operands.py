"""What one backward pass shows of every gradient operand: exact variances at all widths, ranges, codes.

Nothing is sampled: `Quantizer.variances` gives the variance over the rounding noise of the very tensor that is
being quantized, given the noise that reached it from the layers above, which is how Theorem 2 conditions it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.kernels import ops
from fqt.nn import GradientOperand
from fqt.quant.quantizer import Quantizer
from fqt.quant.scale import Integers
from fqt.quant.tensor import RowView
from fqt.stats.moments import Moments
from fqt.stats.passes import energy
from fqt.stats.spread import Estimate, estimates

__all__ = ["WIDTHS", "Operand", "Operands", "multiplications", "nuclear_norm"]

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
LARGEST_GRAM = 1024


@dataclass(frozen=True, kw_only=True)
class Operand:
    """grad_output of one layer as one of its two quantizers takes it; means over batches, uses of the layer summed.

    Every figure is in squared units of grad_output itself: a step that was folded in is divided out again.

    Attributes:
        layer: qualified name.
        role: "grad_input" or "grad_weight": the product it is quantized for.
        quantizer: what the recipe says.
        shape: (N, D) of the matrix that is quantized, in the first use.
        multiplications: of the product, per batch.
        energy: ‖grad_output‖².
        variance: exact variance of the quantized operand by width, 2 to 8 bits; its error is that of the mean over
            batches.
        bound: the closed form by width: ¼ of a squared step per entry (1/12 when dithered), on measured ranges.
        limit: by width, what the bound of no left transform with a common range falls below,
            ‖X‖_*²/(N·B²) with rows centred (dithered: a third of that, with B − 1). It limits bounds, not the
            variance. None where a step was folded in, or the matrix has more than 1,024 rows and columns.
        range_ratio: largest range of a row over the mean one: 1 for equal rows, N for a single large row.
        histogram: how often each code occurred in the first batch, at the recipe's width.
        empty: share of codes that never did.
    """

    layer: str
    role: str
    quantizer: Quantizer
    shape: tuple[int, int]
    multiplications: int
    energy: Estimate
    variance: dict[int, Estimate]
    bound: dict[int, float]
    limit: dict[int, float] | None
    range_ratio: float
    histogram: tuple[int, ...]
    empty: float

    @property
    def bits(self) -> int:
        """The recipe's width."""
        return self.quantizer.grid.bits


class Operands:
    """An observer for `fqt.nn.observe`: call `end()` after each backward pass.

    Args:
        model: whose layers are observed.
        widths: bits at which variances are taken.
        full: also bounds, limits, ranges and codes; without, only the variances.
    """

    def __init__(self, model: nn.Module, widths: Sequence[int] = WIDTHS, full: bool = True) -> None:
        self.model, self.widths, self.full = model, tuple(widths), full
        self.order: list[str] = []
        """Layers in the order in which their gradients were quantized last, uses in a row counted once."""
        self.uses: dict[str, int] = {}
        """How many products each layer's gradient was quantized for last, of the role that had more."""
        self._now: dict[tuple[str, str], _Sums] = {}
        self._moments: dict[tuple[str, str], Moments] = {}
        self._last: dict[tuple[str, str], _Sums] = {}
        self._histograms: dict[tuple[str, str], Tensor] = {}
        self._fresh = True
        self._norm: tuple[Any, Tensor, float] | None = None

    def __call__(self, name: str, operand: GradientOperand) -> None:
        """Takes one operand of the pass under way."""
        if self._fresh:
            self.order, self.uses, self._fresh = [], {}, False
        if not self.order or self.order[-1] != name:
            self.order.append(name)
        key = (name, operand.role)
        norm = self._nuclear(operand) if self.full else math.nan
        sums = _Sums.of(self.model.get_submodule(name), operand, self.widths, self.full, norm)
        self._now[key] = sums if key not in self._now else self._now[key].plus(sums)
        self.uses[name] = max(self.uses.get(name, 0), self._now[key].uses)
        if self.full and key not in self._moments:
            seen, codes = self._histograms.get(key), _histogram(operand)
            self._histograms[key] = codes if seen is None else seen + codes

    def _nuclear(self, operand: GradientOperand) -> float:
        """The nuclear norm, computed once where both products quantize one tensor by the same rows."""
        x = operand.gradient
        key = (x.data_ptr(), x.shape, x.stride(), operand.rows)
        if self._norm is None or self._norm[0] != key:
            matrix = RowView(x.shape, operand.rows).matrix(x)
            norm = nuclear_norm(matrix) if min(matrix.shape) <= LARGEST_GRAM else math.nan
            self._norm = (key, x, norm)  # x is held, so that nothing else gets its address meanwhile
        return self._norm[2]

    def end(self) -> None:
        """The pass is complete."""
        self._norm = None
        for key, sums in self._now.items():
            self._moments.setdefault(key, Moments()).update([sums.figures])
        self._last, self._now, self._fresh = self._now, {}, True

    def variances(self) -> dict[tuple[str, str], dict[int, float]]:
        """The exact variances by width in the last pass, by (layer, role)."""
        n = len(self.widths)
        return {
            key: dict(zip(self.widths, sums.figures[1 : 1 + n].tolist(), strict=True))
            for key, sums in self._last.items()
        }

    def multiplications(self, role: str) -> dict[str, int]:
        """Of one product of each layer that has it, in the last pass."""
        return {key[0]: sums.multiplications for key, sums in self._last.items() if key[1] == role}

    def result(self) -> tuple[Operand, ...]:
        """What was seen, in the order of the last pass; needs `full`.

        Raises:
            FqtError: a layer was used in some passes and not in others.
        """
        passes = {moments.count for moments in self._moments.values()}
        if len(passes) > 1:
            raise FqtError("some layers take part in only some of the batches: their variances have no common mean")
        return tuple(self._operand(key) for key in self._last)

    def _operand(self, key: tuple[str, str]) -> Operand:
        last, found, n = self._last[key], estimates(self._moments[key]), len(self.widths)
        histogram = tuple(self._histograms[key].tolist())
        bounds, limits = found[1 + n : 1 + 2 * n], found[1 + 2 * n : 1 + 3 * n]
        by_width = lambda values: {b: e.value for b, e in zip(self.widths, values, strict=True)}
        return Operand(
            layer=key[0],
            role=key[1],
            quantizer=last.quantizer,
            shape=last.shape,
            multiplications=last.multiplications,
            energy=found[0],
            variance=dict(zip(self.widths, found[1 : 1 + n], strict=True)),
            bound=by_width(bounds),
            limit=None if math.isnan(limits[0].value) else by_width(limits),
            range_ratio=found[-1].value,
            histogram=histogram,
            empty=sum(count == 0 for count in histogram) / len(histogram),
        )


@dataclass(frozen=True)
class _Sums:
    """One pass's figures as a float64 vector: energy, variances, and if full: bounds, limits, range ratio."""

    quantizer: Quantizer
    shape: tuple[int, int]
    multiplications: int
    figures: Tensor
    full: bool
    uses: int = 1

    @staticmethod
    def of(module: nn.Module, operand: GradientOperand, widths: tuple[int, ...], full: bool, norm: float) -> _Sums:
        q, x, folded = operand.quantizer, operand.gradient, operand.folded
        if folded is not None and bool((folded == 1).all()):
            folded = None
        weight = None if folded is None else 1 / folded.double().square()
        variances, bounds = q.variances(x, widths, operand.seed, axis=operand.rows, weight=weight)
        rows = math.prod(x.shape[d] for d in operand.rows)
        shape = (rows, x.numel() // max(rows, 1))
        unfolded = energy(x if folded is None else x / folded)
        figures = [unfolded.reshape(1), variances.cpu()]
        if full:
            matrix = RowView(x.shape, operand.rows).matrix(x)
            norm = math.nan if folded is not None else norm
            figures += [bounds.cpu(), _limits(norm, rows, q, widths), _range_ratio(matrix)]
        return _Sums(q, shape, multiplications(module, x), torch.cat(figures), full)

    def plus(self, other: _Sums) -> _Sums:
        """Two uses of one layer: sums of all but the range ratio, of which the larger."""
        figures = self.figures + other.figures
        if self.full:
            figures[-1] = torch.maximum(self.figures[-1], other.figures[-1])
        count = self.multiplications + other.multiplications
        return _Sums(self.quantizer, self.shape, count, figures, self.full, self.uses + other.uses)


def _limits(norm: float, rows: int, q: Quantizer, widths: tuple[int, ...]) -> Tensor:
    """‖X‖_*²/(N·B²) by width, in the form of the quantizer's rounding; NaN from NaN."""
    square = norm**2 / max(rows, 1)
    values = []
    for bits in widths:
        steps = Integers(bits).affine_steps
        stochastic, dithered = square / steps**2, square / (3 * (steps - 1) ** 2)
        both = {"stochastic": stochastic, "dithered": dithered, "best": min(stochastic, dithered), "nearest": 0.0}
        values.append(both[q.rounding])
    return torch.tensor(values, dtype=torch.float64)


def nuclear_norm(matrix: Tensor) -> float:
    """The sum of singular values of a matrix (N, D) whose rows are centred first.

    From the eigenvalues of the smaller Gram matrix in float64: singular values below 1e-8 of the largest are lost.
    """
    centred = matrix.double()
    centred = centred - centred.mean(1, keepdim=True)
    gram = centred @ centred.T if matrix.shape[0] <= matrix.shape[1] else centred.T @ centred
    if not bool(torch.isfinite(gram).all()):
        return math.nan
    return float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum())


def _range_ratio(matrix: Tensor) -> Tensor:
    least, greatest = ops.value_range(matrix, "row")
    ranges = (greatest - least).double().flatten().cpu()
    mean = ranges.mean()
    return torch.where(mean > 0, ranges.amax() / mean, 1.0).reshape(1)


def _histogram(operand: GradientOperand) -> Tensor:
    """How often each code occurs; int64 of as many entries as there are codes."""
    q = operand.quantizer
    quantized = q.quantize(operand.gradient, operand.seed, axis=operand.rows, nonfinite="propagate")
    codes = quantized.matrix_codes
    steps = q.grid.symmetric_steps
    if codes.dtype == torch.int8:
        return torch.bincount(codes.flatten().int() + steps, minlength=2 * steps + 1).cpu()
    return torch.bincount(codes.flatten().int(), minlength=q.grid.affine_steps + 1).cpu()


def multiplications(module: nn.Module, grad_output: Tensor) -> int:
    """Of one backward product of a layer: entries of grad_output times the terms that each one meets.

    A transposed convolution's borders are counted as its inside; an attention's projections as if all had its
    embedding dimension.
    """
    if isinstance(module, nn.MultiheadAttention):
        return grad_output.numel() * module.embed_dim
    weight, stride = getattr(module, "weight", None), getattr(module, "stride", None)
    assert isinstance(weight, Tensor)
    if getattr(module, "transposed", False) and isinstance(stride, tuple):
        groups = int(module.groups)  # type: ignore[arg-type]
        terms = weight.shape[0] // groups * math.prod(weight.shape[2:])
        return grad_output.numel() * terms // math.prod(stride)
    return grad_output.numel() * weight[0].numel()
