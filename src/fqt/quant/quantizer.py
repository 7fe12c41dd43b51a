"""A quantizer is four choices: transform × scale × grid × rounding.

Every method of the field is a point in that product, so there is one class and no subclass; encode, decode,
the exact variance and its bound follow from the four values. A class per method was rejected: it repeats the
edge cases once per method, which is where released quantizers go wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import mixed, native, ops, reference
from fqt.kernels.ops import Findings
from fqt.kernels.philox import as_seed
from fqt.kernels.reference import Quantized
from fqt.quant.rounding import Best, Entries, Plan
from fqt.quant.scale import Integers, Scale
from fqt.quant.tensor import Dither, QuantizedTensor, RowView
from fqt.quant.transform import Identity, Mixing, Transform

ROUNDINGS = ("nearest", "stochastic", "dithered", "best")
_GUARD_GRID = Integers(8)


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """A point in transform × scale × grid × rounding.

    Unbiased, E[dequantize()] = x over the seed, for every rounding but "nearest", up to the rounding of float
    arithmetic. Nothing is ever clipped, but for estimates beyond the largest float of the dtype, which only
    dithered rounding and transforms can give: half a step, or their noise, outside the range of x.
    "best" takes per tensor what has the least exact variance on it: stochastic or dithered on affine scales, and
    with the scale mode "zero" also stochastic with zero on a code. So it is never above any of those.

    Attributes:
        transform: `Identity()`, `BlockHouseholder()` or `ScaledHadamard()`; the latter two take row scales.
        scale: `Scale(group, mode, axis)`.
        grid: `Integers(bits)`.
        rounding: "nearest" (deterministic), "stochastic", "dithered" or "best".
    """

    transform: Transform = field(default_factory=Identity)
    scale: Scale = field(default_factory=Scale)
    grid: Integers = field(default_factory=Integers)
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise FqtError(f"unknown rounding {self.rounding!r}; known: {', '.join(ROUNDINGS)}")
        if self.rounding in ("dithered", "best") and self.scale.mode == "symmetric":
            raise FqtError(f"{self.rounding} rounding needs an affine scale, not a symmetric one")
        if not isinstance(self.transform, Identity) and self.scale.group != "row":
            raise FqtError(f"a transform over rows needs row scales, not {self.scale.group!r}")
        if self.rounding == "best" and getattr(self.transform, "guard", None) == "exact":
            # The guard decides block by block, the rounding for the whole: neither is exact without the other.
            raise FqtError("guard='exact' compares one rounding's variances: choose 'stochastic' or 'dithered'")

    def quantize(
        self,
        x: Tensor,
        seed: int | Tensor | None = None,
        *,
        axis: int | tuple[int, ...] = 0,
        nonfinite: str = "raise",
        factor: Tensor | None = None,
        findings: Findings | None = None,
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
            findings: what passes over x have found out, to be used and added to where that saves a pass.

        Raises:
            FqtError: x is not a floating tensor with an axis, holds NaN or Inf, or the seed is missing.
        """
        scaled = factor is not None
        matrix, view, factor = self._matrix(x, axis, factor)
        if scaled or view.order[-1] != x.ndim - 1:
            findings = None  # they are of x itself, with its last axis innermost
        key = self._key(seed, x.device)
        quantized = self._mixed_at_once(matrix, view, factor, x.dtype, key, findings)
        if quantized is None:
            return self._checked(nonfinite, *self._rounded(matrix, view, factor, x.dtype, key, findings))[1]
        _check_nonfinite(nonfinite)
        return quantized

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
        matrix, view, factor = self._matrix(x, axis, factor)
        key = self._key(seed, x.device)
        return self._checked(nonfinite, *self._rounded(matrix, view, factor, x.dtype, key, None))

    @staticmethod
    def _checked(nonfinite: str, y: Tensor, quantized: QuantizedTensor) -> tuple[Tensor, QuantizedTensor]:
        _check_nonfinite(nonfinite)
        # A group's range shows what it holds: no pass over the values is needed.
        parameters = [quantized.matrix_step, *([] if quantized.mixing is None else [quantized.mixing.offset])]
        if nonfinite == "raise" and any(bool(torch.isnan(p).any()) for p in parameters):
            raise FqtError("cannot quantize NaN or Inf; pass nonfinite='propagate' to get NaN back instead")
        return y, quantized

    def _mixed_at_once(
        self,
        matrix: Tensor,
        view: RowView,
        factor: Tensor | None,
        dtype: torch.dtype,
        key: Tensor | None,
        findings: Findings | None,
    ) -> QuantizedTensor | None:
        """What `_rounded` gives, in one call of a kernel; None where there is none for it. All finite."""
        if self.rounding == "best" or self.scale.mode != "affine":
            return None
        high = Plan.codes(self.scale.mode, self.grid, self.rounding)[1]
        how = mixed.Rounding(True, _GUARD_GRID.affine_steps, high, self.rounding, key)
        found = self.transform.codes(matrix, factor, how)
        if found is None:
            return None
        codes, mixing = found
        if findings is not None:
            findings.found(codes.range)
        dither = None if codes.dither is None else Dither(*codes.dither)
        return QuantizedTensor(view, dtype, codes.codes, codes.step, codes.offset, dither, mixing)

    def _rounded(
        self,
        matrix: Tensor,
        view: RowView,
        factor: Tensor | None,
        dtype: torch.dtype,
        key: Tensor | None,
        findings: Findings | None,
    ) -> tuple[Tensor, QuantizedTensor]:
        if isinstance(self.transform, Identity):
            low, high = Plan.codes(self.scale.mode, self.grid, self.rounding)
            how = (self.matrix_group(view.transposed), self.scale.mode, low, high, self.rounding, key)
            found: Quantized | None = None
            if self.rounding != "best":
                found = ops.quantize(matrix, *how, factor, view.transposed, findings)
            elif ops.quantizes_at_once(matrix, key, factor):
                found = native.quantize(matrix, *how, factor, view.transposed, findings)
            if found is not None:
                codes, step, offset, noise = found
                dither = None if noise is None else Dither(*noise)
                return matrix, QuantizedTensor(view, dtype, codes, step, offset, dither)
        y, factor, mixing, plan = self._plan(matrix, factor, view.transposed, key)
        codes = plan.encode(Entries(y, factor, view.transposed), key)
        decoding = plan.decoding(y, view.transposed, key)
        return y, QuantizedTensor(view, dtype, codes, *decoding, mixing)

    def variance(self, x: Tensor, seed: int | Tensor | None = 0, *, axis: int | tuple[int, ...] = 0) -> Tensor:
        """The exact variance of `quantize(x, seed).dequantize()`, summed over entries.

        Over the rounding noise, given the transform (random signs included) that this seed draws:
        Σ_i ‖S⁻¹e_i‖² step_i² Σ_j p_ij(1 − p_ij), with 1/12 for p(1 − p) when dithered.
        One pass, no sampling; each p(1 − p) to 2⁻²⁵. Zero for nearest rounding, which is biased instead.

        Returns:
            float64 scalar tensor, in squared units of x.
        """
        return self._variance(x, seed, axis, exact=True)

    def variance_bound(
        self, x: Tensor, seed: int | Tensor | None = 0, *, axis: int | tuple[int, ...] = 0
    ) -> Tensor:
        """The closed-form bound: `variance` with ¼ for p(1 − p), on the steps measured on x.

        Never below `variance(x, seed)`; equal to it when dithered. float64 scalar tensor.
        """
        return self._variance(x, seed, axis, exact=False)

    def variances(
        self,
        x: Tensor,
        widths: Sequence[int],
        seed: int | Tensor | None = 0,
        *,
        axis: int | tuple[int, ...] = 0,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`variance` and `variance_bound` of this quantizer at other widths, sharing what widths have in common.

        The transform and the ranges are computed once where the guard's choice does not depend on the width: on
        affine scales, unless it is "exact". With `weight` they are those of Σ weight·error², entries weighted.

        Args:
            x: as for `quantize`.
            widths: bits, each 2 to 8, in place of the grid's own.
            seed, axis: as for `quantize`.
            weight: not negative, broadcasting against x; None for 1 everywhere.

        Returns:
            (variances, bounds), each float64 of shape (len(widths),), in squared units of x (times weight).
        """
        matrix, view, _ = self._matrix(x, axis, None)
        matrix = reference.values(matrix)
        members = [replace(self, grid=Integers(bits)) for bits in widths]
        key, shares = self._key(seed, x.device), self._guards_any_width()
        exact, bound = [], []
        for number, member in enumerate(members):
            if number == 0 or not shares:
                y, mixing = member._mix(matrix, key)
                ranges = self._ranges(y, None, view.transposed)
                cost = None if mixing is None else mixing.cost
                entries = None if weight is None else _entry_weight(weight, view, mixing)
            plan = member._rounding_plan(y, None, ranges, cost)
            taken = plan.plan() if isinstance(plan, Best) else plan
            if entries is None:
                upper = taken.row_bound(y)
                exact.append(plan.variance(y, cost))
                bound.append((upper if cost is None else upper * cost).sum())
            else:
                exact.append(taken.weighted_variance(y, entries))
                bound.append(taken.weighted_bound(y, entries))
        empty = torch.zeros(0, dtype=torch.float64, device=x.device)
        return (torch.stack(exact), torch.stack(bound)) if members else (empty, empty)

    def _variance(self, x: Tensor, seed: int | Tensor | None, axis: int | tuple[int, ...], exact: bool) -> Tensor:
        matrix, view, _ = self._matrix(x, axis, None)
        matrix = reference.values(matrix)
        y, _, mixing, plan = self._plan(matrix, None, view.transposed, self._key(seed, x.device))
        cost = None if mixing is None else mixing.cost
        if exact:
            return plan.variance(y, cost)
        rows = plan.row_bound(y)
        return (rows if cost is None else rows * cost).sum()

    def _matrix(
        self, x: Tensor, axis: int | tuple[int, ...], factor: Tensor | None
    ) -> tuple[Tensor, RowView, Tensor | None]:
        """The matrix of x, its view, and the factor as the kernels take it."""
        if factor is not None and factor.shape != x.shape[-1:]:
            raise FqtError(f"a factor of shape {tuple(factor.shape)} for a tensor of shape {tuple(x.shape)}")
        # A transform mixes rows: its kernels want them as the matrix's rows.
        view = _view(x, axis, may_transpose=isinstance(self.transform, Identity))
        matrix = view.matrix(x.detach())
        if factor is not None and (view.order[-1] != x.ndim - 1 or x.ndim == len(view.axis)):
            matrix, factor = view.matrix(reference.values(x.detach()) * factor), None
        return matrix, view, factor

    def _key(self, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
        if seed is not None:
            return as_seed(seed, device)
        if self.rounding != "nearest":
            raise FqtError(f"{self.rounding} rounding draws noise: give quantize() a seed")
        return None

    def _plan(
        self, x: Tensor, factor: Tensor | None, transposed: bool, key: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Mixing | None, Plan | Best]:
        """The transformed matrix and the factor still to be applied, how to undo the transform, how to round."""
        if factor is not None and not isinstance(self.transform, Identity):
            x, factor = reference.values(x, factor), None
        y, mixing = self._mix(x, key)
        ranges = self._ranges(y, factor, transposed)
        return y, factor, mixing, self._rounding_plan(y, factor, ranges, None if mixing is None else mixing.cost)

    def _ranges(self, y: Tensor, factor: Tensor | None, transposed: bool) -> tuple[Tensor, Tensor]:
        """Least and greatest values of the groups; rows of a matrix on its side are its columns."""
        return ops.value_range(y, self.matrix_group(transposed), factor)

    def matrix_group(self, transposed: bool) -> str:
        """Who shares a step in the matrix: its columns are the rows if it lies on its side."""
        group = self.scale.group
        return {"row": "column", "column": "row"}.get(group, group) if transposed else group

    def _mix(self, x: Tensor, key: Tensor | None) -> tuple[Tensor, Mixing | None]:
        """The transformed matrix, and how to undo the transform."""

        def row_cost(y: Tensor) -> Tensor:
            lo, hi = ops.value_range(y, "row")
            if getattr(self.transform, "guard", True) == "exact":
                return self._rounding_plan(y, None, (lo, hi), None).row_variance(reference.values(y))
            # Affine steps are in proportion to ranges: at one width for all, the choice is the same to a bit.
            grid = _GUARD_GRID if self.scale.mode == "affine" else self.grid
            return Plan.of(lo, hi, self.scale.mode, grid, "stochastic").row_bound(y)

        return self.transform.apply(x, key, row_cost)

    def _guards_any_width(self) -> bool:
        """Whether the transformed matrix is the same at every width."""
        guard = getattr(self.transform, "guard", False)
        return guard is False or (guard is True and self.scale.mode == "affine")

    def _rounding_plan(
        self, y: Tensor, factor: Tensor | None, ranges: tuple[Tensor, Tensor], cost: Tensor | None
    ) -> Plan | Best:
        lo, hi = ranges
        if self.rounding != "best":
            return Plan.of(lo, hi, self.scale.mode, self.grid, self.rounding)
        modes = ("zero", "affine") if self.scale.mode == "zero" else (self.scale.mode,)
        plans = [Plan.of(lo, hi, mode, self.grid, "stochastic") for mode in modes]
        plans.append(Plan.of(lo, hi, "affine", self.grid, "dithered"))
        return Best.of(tuple(plans), y, factor, cost)


def _entry_weight(weight: Tensor, view: RowView, mixing: Mixing | None) -> Tensor:
    """Σ_i (S⁻¹)_ir² weight_ij, what an error of the rounded matrix weighs; broadcasts to (N, D)."""
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


def _check_nonfinite(nonfinite: str) -> None:
    if nonfinite not in ("raise", "propagate"):
        raise FqtError(f"unknown nonfinite {nonfinite!r}; known: raise, propagate")


def _view(x: Tensor, axis: int | tuple[int, ...], may_transpose: bool) -> RowView:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise FqtError(f"cannot quantize {getattr(x, 'dtype', type(x).__name__)}: give a floating-point tensor")
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
