"""What one backward pass shows of every gradient operand: exact variances at all widths, ranges, codes.

Nothing is sampled: `Quantizer.variances` gives the variance over the rounding noise of the very tensor that is
being quantized, given the noise that reached it from the layers above, which is how Theorem 2 conditions it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.kernels import ops
from fqt.kernels.codes import COLUMN, ROW, Entries
from fqt.kernels.tensor import RowView
from fqt.nn import GradientOperand, Recipe
from fqt.quant.quantizer import Quantizer
from fqt.stats.moments import Moments
from fqt.stats.passes import ROLES, converted, energy
from fqt.stats.spread import Estimate, estimates

__all__ = ["WIDTHS", "Operand", "Operands", "multiplications", "nuclear_norm"]

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
LARGEST_GRAM = 1024
MOST_BINS = 256


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
        variance: exact variance of the quantized operand by width, 2 to 8 bits or the one that its grid has; its
            error is that of the mean over batches. Of grad_output alone: what the product's right operand adds
            where it is quantized again is no part of it (`Diagnosis.again`).
        bound: the closed form by width: ¼ of a squared step per entry (1/12 when dithered), on measured ranges.
        limit: by width, what the bound of no left transform with a common range falls below,
            ‖X‖_*²/(N·B²) with rows centred (dithered: a third of that, with B − 1). It limits bounds, not the
            variance. ‖X‖_*² relative to the energy is the first batch's: to compute it for all layers takes
            half a training step. None where a step was folded in, or the matrix has more than 1,024 rows and
            columns.
        range_ratio: largest range of a row over the mean one: 1 for equal rows, N for a single large row.
        histogram: how often each code occurred in the first batch, at the recipe's width, the lowest first; of
            more than 256 codes (`Pairs`) runs of as many.
        empty: share of codes, or runs, that never did.
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
        return self.quantizer.bits


class Operands:
    """An observer for `fqt.nn.observe`: call `end()` after each backward pass.

    Args:
        model: whose layers are observed.
        widths: bits at which variances are taken, of operands whose grid has them; of others their own.
        full: also bounds, limits, ranges and codes; without, only the variances.

    Raises:
        FqtError: a layer keeps a part of grad_output's rows for a product.
    """

    def __init__(self, model: nn.Module, widths: Sequence[int] = WIDTHS, full: bool = True) -> None:
        self.layers, self.widths, self.full = converted(model), tuple(widths), full
        _refuse_kept(self.layers)
        self.order: list[str] = []
        """Layers in the order in which their gradients were quantized last, uses in a row counted once."""
        self.uses: dict[str, int] = {}
        """How many products each layer's gradient was quantized for last, of the role that had more."""
        self._now: dict[tuple[str, str], _Sums] = {}
        self._moments: dict[tuple[str, str], Moments] = {}
        self._last: dict[tuple[str, str], _Sums] = {}
        self._histograms: dict[tuple[str, str], Tensor] = {}
        self._norms: dict[tuple[str, str], float] = {}
        self._concentration: dict[tuple[str, str], float] = {}
        self._fresh = True
        self._seen: tuple[Any, Tensor, _Matrix] | None = None

    def __call__(self, name: str, operand: GradientOperand) -> None:
        """Takes one operand of the pass under way."""
        if self._fresh:
            self.order, self.uses, self._fresh = [], {}, False
        if not self.order or self.order[-1] != name:
            self.order.append(name)
        key = (name, operand.role)
        matrix = self._matrix(operand) if self.full else None
        sums = _Sums.of(self.layers[name], operand, self._widths(operand.quantizer), matrix)
        self._now[key] = sums if key not in self._now else self._now[key].plus(sums)
        self.uses[name] = max(self.uses.get(name, 0), self._now[key].uses)
        if matrix is not None and key not in self._concentration:
            square = math.nan if sums.folded else matrix.nuclear**2 / max(sums.shape[0], 1)
            self._norms[key] = self._norms.get(key, 0.0) + square
        if self.full and key not in self._moments:
            seen, codes = self._histograms.get(key), _histogram(operand)
            self._histograms[key] = codes if seen is None else seen + codes

    def _widths(self, quantizer: Quantizer) -> tuple[int, ...]:
        """Those asked for that the quantizer's grid has; of one that has none of them, its own."""
        of_grid = quantizer.grid.widths
        return tuple(b for b in self.widths if b in of_grid) or (of_grid if self.widths else ())

    def _matrix(self, operand: GradientOperand) -> _Matrix:
        """The gradient as a matrix; one object where both products quantize one tensor by the same rows."""
        x = operand.gradient
        key = (x.data_ptr(), x.shape, x.stride(), operand.rows)
        if self._seen is None or self._seen[0] != key:
            # x is held, so that nothing else gets its address meanwhile
            self._seen = (key, x, _Matrix.of(x, operand.rows))
        return self._seen[2]

    def end(self) -> None:
        """The pass is complete."""
        self._seen = None
        for key, sums in self._now.items():
            if key in self._norms and sums.figures[0] > 0:
                self._concentration[key] = self._norms[key] / float(sums.figures[0])
            self._moments.setdefault(key, Moments()).update([sums.figures])
        self._norms = {}
        self._last, self._now, self._fresh = self._now, {}, True

    def variances(self) -> dict[tuple[str, str], dict[int, float]]:
        """The exact variances by width in the last pass, by (layer, role)."""
        return {
            key: dict(zip(sums.widths, sums.figures[1 : 1 + len(sums.widths)].tolist(), strict=True))
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
        last, found = self._last[key], estimates(self._moments[key])
        widths, n = last.widths, len(last.widths)
        histogram = tuple(self._histograms[key].tolist())
        bounds = [e.value for e in found[1 + n : 1 + 2 * n]]
        square = self._concentration.get(key, 0.0) * found[0].value  # 0: no batch had a gradient here
        return Operand(
            layer=key[0],
            role=key[1],
            quantizer=last.quantizer,
            shape=last.shape,
            multiplications=last.multiplications,
            energy=found[0],
            variance=dict(zip(widths, found[1 : 1 + n], strict=True)),
            bound=dict(zip(widths, bounds, strict=True)),
            limit=None if math.isnan(square) else {b: _limit(square, last.quantizer, b) for b in widths},
            range_ratio=found[-1].value,
            histogram=histogram,
            empty=sum(count == 0 for count in histogram) / len(histogram),
        )


@dataclass(frozen=True)
class _Matrix:
    """A gradient as the matrix that is quantized: rows by columns, or on its side where that saves a copy."""

    values: Tensor
    on_side: bool

    @staticmethod
    def of(x: Tensor, rows: tuple[int, ...]) -> _Matrix:
        view = RowView.of(x.shape, rows, may_transpose=True)
        return _Matrix(view.matrix(x), view.transposed)

    @cached_property
    def nuclear(self) -> float:
        """‖X‖_* of the matrix with its rows centred; NaN where it would take long."""
        x = self.values.T if self.on_side else self.values
        return nuclear_norm(x) if min(x.shape) <= LARGEST_GRAM else math.nan

    @cached_property
    def range_ratio(self) -> Tensor:
        """The largest range of a row over the mean one, float64 (1,)."""
        least, greatest = ops.value_range(Entries(self.values), COLUMN if self.on_side else ROW)
        ranges = (greatest - least).double().flatten().cpu()
        mean = ranges.mean()
        return torch.where(mean > 0, ranges.amax() / mean, 1.0).reshape(1)


@dataclass(frozen=True)
class _Sums:
    """One pass's figures as a float64 vector: energy, variances, and if full: bounds, range ratio.

    `folded` tells whether a step other than 1 was folded in.
    """

    quantizer: Quantizer
    widths: tuple[int, ...]
    shape: tuple[int, int]
    multiplications: int
    figures: Tensor
    full: bool
    folded: bool
    uses: int = 1

    @staticmethod
    def of(module: nn.Module, operand: GradientOperand, widths: tuple[int, ...], matrix: _Matrix | None) -> _Sums:
        """Of one operand; full with its matrix, only energy and variances without."""
        q, x, folded = operand.quantizer, operand.gradient, operand.folded
        if folded is not None and bool((folded == 1).all()):
            folded = None
        # A factor of 0 takes an entry out of the product: it has neither energy nor noise there.
        divisor = None if folded is None else torch.where(folded == 0, math.inf, folded)
        weight = None if divisor is None else 1 / divisor.double().square()
        variances, bounds = q.variances(
            x, widths, operand.seed, axis=operand.rows, weight=weight, range=operand.range
        )
        rows = math.prod(x.shape[d] for d in operand.rows)
        shape = (rows, x.numel() // max(rows, 1))
        unfolded = energy(x if divisor is None else x / divisor)
        figures = [unfolded.reshape(1), variances.cpu()]
        if matrix is not None:
            figures += [bounds.cpu(), matrix.range_ratio]
        count = multiplications(module, x, operand.weight)
        return _Sums(q, widths, shape, count, torch.cat(figures), matrix is not None, folded is not None)

    def plus(self, other: _Sums) -> _Sums:
        """Two uses of one layer: sums of all but the range ratio, of which the larger."""
        figures = self.figures + other.figures
        if self.full:
            figures[-1] = torch.maximum(self.figures[-1], other.figures[-1])
        count = self.multiplications + other.multiplications
        folded = self.folded or other.folded
        return replace(self, multiplications=count, figures=figures, folded=folded, uses=self.uses + other.uses)


def _refuse_kept(layers: Mapping[str, nn.Module]) -> None:
    """Raises FqtError where a product has rows sampled or dropped, whatever its left operand is quantized by."""
    for name, layer in layers.items():
        recipe: Recipe = layer.fqt_recipe  # type: ignore[assignment]
        kept = [role for role in ROLES if recipe.product(role).keep is not None]
        if kept:
            raise FqtError(
                f"layer {name or '(model)'!r} keeps a part of grad_output's rows in {' and '.join(kept)}, whose "
                "variance is not its quantizers' alone: measure the whole with quantization_variance, or give its "
                "products no keep"
            )


def _limit(square: float, q: Quantizer, bits: int) -> float:
    """‖X‖_*²/(N·B²) in the form of the quantizer's rounding; `square` is ‖X‖_*²/N."""
    codings = [coding for coding in q.with_bits(bits).codings if coding.rounding.draws]
    # Relative to stochastic rounding, whose entries vary by ¼ squared step at most.
    limits = [4 * c.rounding.unit_bound * square / (c.levels.high - c.levels.low) ** 2 for c in codings]
    return min(limits, default=0.0)


def nuclear_norm(matrix: Tensor) -> float:
    """The sum of singular values of a matrix (N, D) whose rows are centred first.

    From the eigenvalues, in float64, of the smaller Gram matrix in the matrix's own precision, which keeps small
    rows beside large ones. In float32 it is off by 1e-7 on matrices of full rank, however their rows differ in
    size; at low rank all other singular values are rounding, which adds 0.5 % at rank one of 128 rows, 2 % of
    1,024.
    """
    gram = _gram(matrix if matrix.dtype == torch.float64 else matrix.float())
    if not 1e-20 < float(gram.trace()) < 1e30:  # near the ends of float32's range
        gram = _gram(matrix.double())
    if not bool(torch.isfinite(gram).all()):
        return math.nan
    return float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum())


def _gram(x: Tensor) -> Tensor:
    """The smaller Gram matrix of x (N, D), its rows centred; in float64."""
    centred = x - x.mean(1, keepdim=True)
    return (centred @ centred.T if x.shape[0] <= x.shape[1] else centred.T @ centred).double()


def _histogram(operand: GradientOperand) -> Tensor:
    """How often each code occurs, the lowest first; int64 of as many entries as there are codes or runs of them."""
    q = operand.quantizer
    how: dict[str, Any] = {"axis": operand.rows, "nonfinite": "propagate", "range": operand.range}
    codes = q.quantize(operand.gradient, operand.seed, **how).matrix_codes.flatten()
    levels = q.grid.levels(q.scale.mode)
    if levels.uniform:
        places, count = codes.int() - levels.low, levels.high - levels.low + 1
    else:
        numbers = torch.tensor(levels.numbers, dtype=torch.float64, device=codes.device)
        places, count = torch.searchsorted(numbers, codes.double()), len(numbers)
    run = -(-count // MOST_BINS)
    return torch.bincount(places // run, minlength=-(-count // run)).cpu()


def multiplications(module: nn.Module, grad_output: Tensor, shape: torch.Size | None = None) -> int:
    """Of one backward product of a layer: entries of grad_output times the terms that each one meets.

    A transposed convolution's borders are counted as its inside.

    Args:
        module: the layer.
        grad_output: of the product.
        shape: of the weight in it, (O, I/groups, *), transposed (I, O/groups, *). If it is None, the layer's own;
            an attention's products are then counted as if all had its embedding dimension.
    """
    if shape is None and isinstance(module, nn.MultiheadAttention):
        return grad_output.numel() * module.embed_dim
    if shape is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        shape = weight.shape
    stride = getattr(module, "stride", None)
    if getattr(module, "transposed", False) and isinstance(stride, tuple):
        groups = int(module.groups)  # type: ignore[arg-type]
        terms = shape[0] // groups * math.prod(shape[2:])
        return grad_output.numel() * terms // math.prod(stride)
    return grad_output.numel() * math.prod(shape[1:])
