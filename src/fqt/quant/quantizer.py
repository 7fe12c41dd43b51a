"""A quantizer is four choices: transform × scale × grid × rounding.

Every method of the field is a point in that product, so there is one class and no subclass per method; encode,
decode, the exact variance and its bound follow from the four values. A class per method was rejected: it repeats
the edge cases once per method, which is where released quantizers go wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import ops, reference
from fqt.kernels.choice import Choice
from fqt.kernels.codes import Blocks, Entries, Findings, Quantized, compute_dtype
from fqt.kernels.mixing import Mixing
from fqt.kernels.philox import as_seed
from fqt.kernels.ranges import RangeState, reach
from fqt.kernels.rounding import CORRECTED, DITHERED, KNOWN_ROUNDINGS, ROUNDINGS, Coding, Rounding
from fqt.kernels.tensor import QuantizedTensor, RowView
from fqt.quant.grid import Grid, Integers, Pairs, check_levels
from fqt.quant.remembering import Remembering
from fqt.quant.scale import Scale
from fqt.quant.transform import Identity, Transform, Undo


@dataclass(frozen=True, kw_only=True)
class Quantizer(Remembering):
    """A point in transform × scale × grid × rounding.

    Unbiased, E[dequantize()] = x over the seed, for every rounding but "nearest", those with few random bits
    (`FewBits`), and "corrected", which is so asymptotically, up to the rounding of float arithmetic. Nothing is
    ever clipped but by "corrected", by a range that is remembered (`Scale.range`: E[dequantize()] is then the
    clipped x, and `mean_error` the difference), and but for estimates beyond the largest float of the dtype, which
    only dithered rounding and transforms can give: half a step, or their noise, outside the range of x.

    Attributes:
        transform: `Identity()`, `BlockHouseholder()` or `ScaledHadamard()`, or `Rotated()` of one of these; the two
            that mix rows take row scales.
        scale: `Scale(group, mode, axis, store, range)`.
        grid: `Integers(bits)`, `Floats(exponent, mantissa)`, `Pairs(bits)` or `Logarithmic(bits)`.
        rounding: `Nearest()` (deterministic), `Stochastic()`, `Dithered()`, `Corrected()`,
            `FewBits(bits, centred)`, or the name of one.
    """

    transform: Transform = field(default_factory=Identity)
    scale: Scale = field(default_factory=Scale)
    grid: Grid = field(default_factory=Integers)
    rounding: Rounding | str = "stochastic"

    def __post_init__(self) -> None:
        for name, kind in (("transform", Transform), ("scale", Scale), ("grid", Grid)):
            if not isinstance(getattr(self, name), kind):
                raise FqtError(f"{name} is a {kind.__name__} of fqt.quant, not {getattr(self, name)!r}")
        if not isinstance(self.rounding, Rounding) or type(self.rounding) is Rounding:
            if not isinstance(self.rounding, str) or self.rounding not in ROUNDINGS:
                raise FqtError(f"unknown rounding {self.rounding!r}; known: {KNOWN_ROUNDINGS}")
            object.__setattr__(self, "rounding", ROUNDINGS[self.rounding])
        if self.rounding == DITHERED and self.scale.mode == "symmetric":
            raise FqtError("dithered rounding needs an affine scale, not a symmetric one")
        if (self.rounding == CORRECTED) != (self.scale.store == "correctable"):
            raise FqtError("corrected rounding and steps stored as 'correctable' need each other")
        if self.scale.store == "fallback" and not isinstance(self.grid, Pairs):
            raise FqtError(f"steps stored as 'fallback' are of codes in Pairs(), not {self.grid}")
        if self.transform.scales_rows and self.scale.group != "row":
            raise FqtError(f"a transform over rows needs row scales, not {self.scale.group!r}")
        if self.rounding == CORRECTED and self.scale.remembers:
            raise FqtError("corrected rounding needs the tensor's own range")
        assert isinstance(self.rounding, Rounding)
        check_levels(self.grid, self.scale.mode, self.rounding.headroom)

    @cached_property
    def coding(self) -> Coding:
        """Scale, grid and rounding as the kernels take them."""
        assert isinstance(self.rounding, Rounding)
        levels = self.grid.levels(self.scale.mode)
        # Dithered codes may round up by almost two steps' worth: a step of head-room keeps them in the levels.
        levels = replace(levels, high=levels.high - self.rounding.headroom)
        return Coding(self.scale.mode, levels, self.rounding, self.scale.store)

    @property
    def codings(self) -> tuple[Coding, ...]:
        """All that may be taken: one, or those of a `Best`."""
        return (self.coding,)

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.grid.bits

    @property
    def draws(self) -> bool:
        """Whether it needs a seed: it is not deterministic."""
        return any(coding.rounding.draws for coding in self.codings)

    @property
    def rounding_name(self) -> str:
        """ "nearest", "stochastic", "dithered", …, or "best" for a choice between several."""
        return str(self.rounding)

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the codes: uint8 on affine scales, int8 on symmetric ones, float32 for levels that fit no byte."""
        return self.coding.levels.dtype

    @cached_property
    def code_range(self) -> tuple[int, int]:
        """The least and the greatest code: of all levels, also those that dithered rounding leaves as head-room."""
        levels = [self.grid.levels(coding.mode) for coding in self.codings]
        return min(each.low for each in levels), max(each.high for each in levels)

    def with_bits(self, bits: int) -> Quantizer:
        """The same quantizer at another width."""
        return replace(self, grid=self.grid.with_bits(bits))

    def with_transform(self, transform: Transform) -> Quantizer:
        """The same quantizer after another transform."""
        return replace(self, transform=transform)

    def bits_stored(self, shape: Sequence[int], *, axis: int | tuple[int, ...] = 0) -> float:
        """Bits that a tensor of this shape takes when it is stored: codes, and what turns them back.

        Codes are taken as packed; steps count as they are stored, an affine scale's offset 32 bits, a transform's
        state as its own (`Transform.bits_stored`). The seed, from which dither and signs are drawn again, does not
        count.

        Args:
            shape: of the tensor.
            axis: which of its axes are the rows.

        Raises:
            FqtError: the shape is none.
        """
        if not isinstance(shape, Sequence) or not all(type(size) is int and size >= 0 for size in shape):
            raise FqtError(f"a shape is a sequence of sizes such as (1024, 1024), not {shape!r}")
        view = _view_of(torch.Size(shape), (axis,) if isinstance(axis, int) else tuple(axis), False)
        blocks = math.prod(self.scale.blocks().count(view.size))
        codes = math.prod(view.size) * self.bits * self.scale.stored.code_share(blocks)
        return codes + self.scale.bits_stored(view.size) + self.transform.bits_stored(view.size[0])

    def quantize(
        self,
        x: Tensor,
        seed: int | Tensor | None = None,
        *,
        axis: int | tuple[int, ...] = 0,
        nonfinite: str = "raise",
        factor: Tensor | None = None,
        range: RangeState | None = None,
    ) -> QuantizedTensor:
        """Codes of `x`, with what turns them back.

        Args:
            x: any shape with at least one axis, any real floating dtype, any strides.
            seed: an int or an int64 scalar tensor; the same seed gives the same codes on every backend.
                Needed by every rounding but "nearest". Noise is counted in the order of the matrix (`RowView`).
            axis: which axes of x are the rows; all others are columns.
            nonfinite: "raise", or "propagate": NaN out for the whole group (with a transform: the tensor).
            factor: (x.shape[-1],) in float32 (float64 for float64 x): what is quantized is x · factor, multiplied
                on the way to save a pass over memory; None is x itself.
            range: what is remembered, if `scale.range` is not "own"; None for a first tensor, in its own range.

        Raises:
            FqtError: x is not a floating tensor with an axis, holds NaN or Inf, or the seed is missing.
        """
        if range is not None:
            return self.quantize_measuring(x, range, seed, axis=axis, nonfinite=nonfinite, factor=factor)[0]
        return self.quantize_knowing(x, Findings(), seed, axis=axis, nonfinite=nonfinite, factor=factor)[0]

    def quantize_knowing(
        self,
        x: Tensor,
        known: Findings,
        seed: int | Tensor | None = None,
        *,
        axis: int | tuple[int, ...] = 0,
        nonfinite: str = "raise",
        factor: Tensor | None = None,
    ) -> tuple[QuantizedTensor, Findings]:
        """`quantize` for one of several quantizers that read the same x: what is known of x saves a pass.

        Args:
            x, seed, axis, nonfinite, factor: as for `quantize`.
            known: what passes over x have found out; with `channels`, its sums are wanted.

        Returns:
            The codes, and what is known now.
        """
        entries, view = self._entries(x, axis, factor)
        # They are of x itself, with its last axis innermost.
        mine = known if factor is None and view.order[-1] == x.ndim - 1 else None
        found, undo = self._codes(entries, view, self._key(seed, x.device), mine)
        quantized = self._checked(nonfinite, QuantizedTensor.of(found, view, x.dtype, *undo, self.code_range))
        return quantized, found.findings or known

    def rounded(
        self,
        x: Tensor,
        seed: int | Tensor | None = None,
        *,
        axis: int | tuple[int, ...] = 0,
        nonfinite: str = "raise",
        factor: Tensor | None = None,
    ) -> tuple[Tensor, QuantizedTensor]:
        """`quantize`, and the matrix that it rounds: rows less their offset and mixed, or x as it is.

        `QuantizedTensor.decode` is an estimate of that matrix whose errors are independent; undoing a transform
        correlates rows. Arguments and errors are those of `quantize`; the matrix lacks the factor.
        """
        entries, view = self._entries(x, axis, factor)
        key = self._key(seed, x.device)
        y, undo = self.transform.apply(entries, self.coding, key)
        found = self._rounded(y, view, key, undo, None)
        return y.matrix, self._checked(nonfinite, QuantizedTensor.of(found, view, x.dtype, *undo, self.code_range))

    @staticmethod
    def _checked(nonfinite: str, quantized: QuantizedTensor) -> QuantizedTensor:
        if nonfinite not in ("raise", "propagate"):
            raise FqtError(f"unknown nonfinite {nonfinite!r}; known: raise, propagate")
        # A block's range shows what it holds: no pass over the values is needed.
        parameters = [quantized.scales.step, *([] if quantized.mixing is None else [quantized.mixing.offset])]
        if nonfinite == "raise" and any(bool(torch.isnan(p).any()) for p in parameters):
            raise FqtError("cannot quantize NaN or Inf; pass nonfinite='propagate' to get NaN back instead")
        return quantized

    def _codes(
        self, x: Entries, view: RowView, key: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Undo]:
        """Codes of x, and how to undo the transform."""
        return self.transform.codes(x, self._blocks(view), self.coding, key, known)

    def _rounded(
        self, y: Entries, view: RowView, key: Tensor | None, undo: Undo, known: Findings | None
    ) -> Quantized:
        """Codes of a matrix that is transformed already."""
        return ops.quantize(y, self._blocks(view), self.coding, key, known)

    def variance(
        self,
        x: Tensor,
        seed: int | Tensor | None = 0,
        *,
        axis: int | tuple[int, ...] = 0,
        range: RangeState | None = None,
    ) -> Tensor:
        """The exact variance of `quantize(x, seed).dequantize()`, summed over entries.

        Over the rounding noise, given the transform (random signs included) that this seed draws; over the sample
        too where rows are kept by chance:
        Σ_i ‖S⁻¹e_i‖² step_i² Σ_j p_ij(1 − p_ij), p the chance of the upper neighbour; with 1/12 for p(1 − p) when
        dithered.
        One pass, no sampling; each p(1 − p) to 2⁻²⁵. Zero for nearest rounding, which is biased instead. For
        corrected rounding the exact mean square error given the rotation, which one seed samples. In a remembered
        `range` it is about the mean, which is the clipped x: `mean_error` says how far that is off.

        Returns:
            float64 scalar tensor, in squared units of x.
        """
        return self._variance(x, seed, axis, range, exact=True)

    def variance_bound(
        self,
        x: Tensor,
        seed: int | Tensor | None = 0,
        *,
        axis: int | tuple[int, ...] = 0,
        range: RangeState | None = None,
    ) -> Tensor:
        """The closed-form bound: `variance` with ¼ for p(1 − p), on the steps measured on x.

        Never below `variance(x, seed)`; equal to it when dithered. float64 scalar tensor.
        """
        return self._variance(x, seed, axis, range, exact=False)

    def mean_error(
        self,
        x: Tensor,
        seed: int | Tensor | None = 0,
        *,
        axis: int | tuple[int, ...] = 0,
        range: RangeState | None = None,
    ) -> Tensor:
        """The exact bias of every entry: E[quantize(x, seed, range=range).dequantize()] − x.

        Over the rounding noise, given the transform that this seed draws, up to the rounding of float arithmetic.
        What was cut off, and what the rounding itself is off by in the mean: of nearest rounding its error, with
        few random bits up to 2⁻ᵏ of a step, of others nothing.

        Returns:
            x's shape, float32 (float64 for float64 x).

        Raises:
            FqtError: no closed form is known: of corrected rounding, and of a choice between several quantizers.
        """
        if len(self.codings) > 1 or self.coding.rounding.settles:
            raise FqtError(f"the mean error of {self.rounding_name} rounding has no closed form here")
        entries, view = self._entries(x, axis, None)
        key = self._key(seed, x.device)
        y, undo = self.transform.apply(replace(entries, matrix=entries.values()), self.coding, key)
        blocks = self._blocks(view)
        used = self._ranges(y, blocks, range)
        scales, levels = ops.scales_of(*used, self.coding, blocks), self.coding.levels
        error = torch.zeros_like(y.matrix)
        if range is not None:
            error = y.matrix.clamp(*reach(used, scales, levels)) - y.matrix
        if self.coding.rounding.unit_bias:
            position = reference.position(y.matrix, scales, levels)
            error = error + self.coding.rounding.mean_error(position, levels) * scales.spread(y.shape)[0]
        return view.restore(undo.of_errors(error))

    def variances(
        self,
        x: Tensor,
        widths: Sequence[int],
        seed: int | Tensor | None = 0,
        *,
        axis: int | tuple[int, ...] = 0,
        weight: Tensor | None = None,
        range: RangeState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`variance` and `variance_bound` of this quantizer at other widths, sharing what widths have in common.

        The transform and the ranges are computed once where the guard's choice does not depend on the width: on
        affine scales, unless it is "exact". With `weight` they are those of Σ weight·error², entries weighted.

        Args:
            x: as for `quantize`.
            widths: bits in place of the grid's own, of those that `grid.with_bits` takes.
            seed, axis: as for `quantize`.
            weight: not negative, broadcasting against x; None for 1 everywhere.
            range: what is remembered, taken to be the same at all widths.

        Returns:
            (variances, bounds), each float64 of shape (len(widths),), in squared units of x (times weight).
        """
        entries, view = self._entries(x, axis, None)
        entries = replace(entries, matrix=entries.values())
        members, key = [self.with_bits(bits) for bits in widths], self._key(seed, x.device)
        exact, bound = [], []
        for number, member in enumerate(members):
            if number == 0 or self._mixing_sees_levels:
                measured = member.transform.measured(entries, member.coding, key)
                (y, undo, chance), cost = measured, measured.cost
                ranges = self._ranges(y, self._blocks(view), range)
                weights = None if weight is None else _entry_weight(weight, view, undo)
                sampling = measured.sampling(weights)
                if weights is not None and chance is not None:
                    weights = weights * chance[:, None]
            choice = Choice.of(y, *ranges, self._blocks(view), member.codings, cost)
            if weights is None:
                exact.append(choice.variance(y.matrix, cost) + sampling)
                bound.append(choice.bound(y.matrix, cost) + sampling)
            else:
                exact.append(choice.weighted(y.matrix, weights) + sampling)
                bound.append(choice.weighted_bound(y.matrix, weights) + sampling)
        empty = torch.zeros(0, dtype=torch.float64, device=x.device)
        return (torch.stack(exact), torch.stack(bound)) if members else (empty, empty)

    @property
    def _mixing_sees_levels(self) -> bool:
        """Whether what the transform does depends on the width."""
        return self.transform.sees_levels(self.scale.mode)

    def _variance(
        self,
        x: Tensor,
        seed: int | Tensor | None,
        axis: int | tuple[int, ...],
        range: RangeState | None,
        exact: bool,
    ) -> Tensor:
        entries, view = self._entries(x, axis, None)
        entries = replace(entries, matrix=entries.values())
        measured = self.transform.measured(entries, self.coding, self._key(seed, x.device))
        y, cost, blocks = measured.y, measured.cost, self._blocks(view)
        choice = Choice.of(y, *self._ranges(y, blocks, range), blocks, self.codings, cost)
        found = choice.variance(y.matrix, cost) if exact else choice.bound(y.matrix, cost)
        return found if measured.chance is None else found + measured.sampling()

    def _entries(self, x: Tensor, axis: int | tuple[int, ...], factor: Tensor | None) -> tuple[Entries, RowView]:
        """x as a matrix, with the factor as the kernels take it, and its view."""
        if factor is not None and factor.shape != x.shape[-1:]:
            raise FqtError(f"a factor of shape {tuple(factor.shape)} for a tensor of shape {tuple(x.shape)}")
        # A transform mixes rows: its kernels want them as the matrix's rows.
        view = _view(x, axis, may_transpose=not self.transform.needs_rows)
        values = x.detach()
        if factor is not None and (view.order[-1] != x.ndim - 1 or x.ndim == len(view.axis)):
            values, factor = values.to(compute_dtype(values.dtype)) * factor, None
        return Entries(view.matrix(values), factor, view.transposed, _period(view)), view

    def _key(self, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
        if seed is not None:
            return as_seed(seed, device)
        if self.draws:
            raise FqtError(f"{self.coding.rounding} rounding draws noise: give quantize() a seed")
        return None

    def _blocks(self, view: RowView) -> Blocks:
        return self.scale.blocks(view.transposed)


def _period(view: RowView) -> int:
    """The length of the last axis that is a column; 0 where there is none."""
    return view.shape[view.others[-1]] if view.others else 0


def _entry_weight(weight: Tensor, view: RowView, undo: Undo) -> Tensor:
    """Σ_ik (S⁻¹)_ir² weight_ik R_kj², what an error of the rounded matrix weighs; broadcasts to (N, D)."""
    found = _row_weight(weight, view, undo.mixing)
    return found if undo.rotation is None else undo.rotation.block_means(found)


def _row_weight(weight: Tensor, view: RowView, mixing: Mixing | None) -> Tensor:
    """Σ_i (S⁻¹)_ir² weight_ij: the same without rotation."""
    shape = (1,) * (len(view.shape) - weight.ndim) + weight.shape
    if not view.transposed and all(shape[d] == 1 for d in view.axis):  # equal in all rows: mixing changes nothing
        one_row = torch.Size(1 if d in view.axis else n for d, n in enumerate(view.shape))
        row = RowView(one_row, view.axis).matrix(weight.expand(one_row)).double()
        return row if mixing is None else mixing.cost[:, None] * row
    full = view.matrix(weight.expand(view.shape)).double()
    if mixing is None:
        return full
    unit = torch.eye(full.shape[0], dtype=mixing.offset.dtype, device=full.device)
    inverse = mixing.undo(unit) - mixing.offset  # S⁻¹ itself
    return inverse.double().square().T @ full


def _view(x: Tensor, axis: int | tuple[int, ...], may_transpose: bool) -> RowView:
    if not isinstance(x, Tensor):
        how = ", which torch.from_numpy makes" if type(x).__module__ == "numpy" else ""
        raise FqtError(f"cannot quantize a {type(x).__name__}: give a floating-point tensor{how}")
    if not x.is_floating_point():
        raise FqtError(f"cannot quantize {x.dtype}: give a floating-point tensor")
    axes = (axis,) if isinstance(axis, int) else axis
    if not isinstance(axes, tuple | list) or not all(isinstance(a, int) for a in axes):
        raise FqtError(f"axis must be an int or a tuple of ints, not {axis!r}")
    return _view_of(x.shape, tuple(axes), may_transpose)


@lru_cache(maxsize=1024)
def _view_of(shape: torch.Size, axes: tuple[int, ...], may_transpose: bool) -> RowView:
    if not shape:
        raise FqtError("cannot quantize a scalar: give a tensor with at least one axis")
    normal = tuple(a + len(shape) if a < 0 else a for a in axes)
    if any(a not in range(len(shape)) for a in normal) or len(set(normal)) != len(normal):
        raise FqtError(f"axis {axes!r} does not name distinct axes of a tensor of shape {tuple(shape)}")
    return RowView.of(shape, normal, may_transpose)
