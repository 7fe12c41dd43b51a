"""A quantizer is four choices: transform × scale × grid × rounding.

Every method of the field is a point in that product, so there is one class and no subclass; encode, decode,
the exact variance and its bound follow from the four values. A class per method was rejected: it repeats the
edge cases once per method, which is where released quantizers go wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import ops, reference
from fqt.kernels.philox import as_seed
from fqt.quant.scale import Integers, Scale, parameters
from fqt.quant.tensor import QuantizedTensor, RowView
from fqt.quant.transform import Identity, Mixing, Transform

ROUNDINGS = ("nearest", "stochastic", "dithered", "best")


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """A point in transform × scale × grid × rounding.

    Unbiased, E[dequantize()] = x over the seed, for every rounding but "nearest", up to the rounding of float
    arithmetic. Nothing is ever clipped, but for estimates beyond the largest float of the dtype, which only
    dithered rounding and transforms can give: half a step, or their noise, outside the range of x.
    "best" is stochastic or dithered per tensor, whichever has the lower exact variance on it (its stochastic
    candidate follows the scale's mode, its dithered one is affine).

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
    ) -> QuantizedTensor:
        """Codes of `x`, with what turns them back.

        Args:
            x: any shape with at least one axis, any real floating dtype, any strides.
            seed: an int or an int64 scalar tensor; the same seed gives the same codes on every backend.
                Needed by every rounding but "nearest".
            axis: which axes of x are the rows; all others are columns.
            nonfinite: "raise", or "propagate": NaN out for the whole group (with a transform: the tensor).

        Raises:
            FqtError: x is not a floating tensor with an axis, holds NaN or Inf, or the seed is missing.
        """
        return self.rounded(x, seed, axis=axis, nonfinite=nonfinite)[1]

    def rounded(
        self,
        x: Tensor,
        seed: int | Tensor | None = None,
        *,
        axis: int | tuple[int, ...] = 0,
        nonfinite: str = "raise",
    ) -> tuple[Tensor, QuantizedTensor]:
        """`quantize`, and the (N, D) matrix that it rounds: rows less their offset and mixed, or x as it is.

        `QuantizedTensor.decode` is an estimate of that matrix whose errors are independent; undoing a transform
        correlates rows. Arguments and errors are those of `quantize`.
        """
        view = _view(x, axis)
        x = x.detach()
        if nonfinite not in ("raise", "propagate"):
            raise FqtError(f"unknown nonfinite {nonfinite!r}; known: raise, propagate")
        matrix = view.matrix(x).to(reference.compute_dtype(x.dtype))
        if nonfinite == "raise" and not torch.isfinite(matrix).all():
            raise FqtError("cannot quantize NaN or Inf; pass nonfinite='propagate' to get NaN back instead")
        key = self._key(seed, x.device)
        y, mixing, plan = self._plan(matrix, key)
        codes = plan.encode(y, key)
        step, offset, dither = plan.decoding(y.shape, key)
        return y, QuantizedTensor(view, x.dtype, codes, step, offset, dither, mixing)

    def variance(self, x: Tensor, seed: int | Tensor | None = 0, *, axis: int | tuple[int, ...] = 0) -> Tensor:
        """The exact variance of `quantize(x, seed).dequantize()`, summed over entries.

        Over the rounding noise, given the transform (random signs included) that this seed draws:
        Σ_i ‖S⁻¹e_i‖² step_i² Σ_j p_ij(1 − p_ij), with 1/12 for p(1 − p) when dithered.
        One pass, no sampling. Zero for nearest rounding, which is biased instead.

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

    def _variance(self, x: Tensor, seed: int | Tensor | None, axis: int | tuple[int, ...], exact: bool) -> Tensor:
        view = _view(x, axis)
        matrix = view.matrix(x.detach()).to(reference.compute_dtype(x.dtype))
        y, mixing, plan = self._plan(matrix, self._key(seed, x.device))
        rows = plan.row_variance(y) if exact else plan.row_bound(y)
        return (rows if mixing is None else rows * mixing.cost).sum()

    def _key(self, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
        if seed is not None:
            return as_seed(seed, device)
        if self.rounding != "nearest":
            raise FqtError(f"{self.rounding} rounding draws noise: give quantize() a seed")
        return None

    def _plan(self, x: Tensor, key: Tensor | None) -> tuple[Tensor, Mixing | None, Plan | Either]:
        """The transformed matrix, how to undo the transform, and how to round it."""

        def row_cost(y: Tensor) -> Tensor:
            if getattr(self.transform, "guard", True) == "exact":
                return self._rounding_plan(y, None).row_variance(y)
            lo, hi = ops.value_range(y, "row")
            return Plan.of(lo, hi, self.scale.mode, self.grid, "stochastic").row_bound(y)

        y, mixing = self.transform.apply(x, key, row_cost)
        return y, mixing, self._rounding_plan(y, None if mixing is None else mixing.cost)

    def _rounding_plan(self, y: Tensor, cost: Tensor | None) -> Plan | Either:
        lo, hi = ops.value_range(y, self.scale.group)
        if self.rounding != "best":
            return Plan.of(lo, hi, self.scale.mode, self.grid, self.rounding)
        stochastic = Plan.of(lo, hi, self.scale.mode, self.grid, "stochastic")
        dithered = Plan.of(lo, hi, "affine", self.grid, "dithered")
        gain = stochastic.row_variance(y) - dithered.row_variance(y)
        return Either((gain if cost is None else gain * cost).sum() > 0, dithered, stochastic)


@dataclass(frozen=True)
class Plan:
    """How one matrix is rounded: its groups' parameters, the range of t, and the rounding."""

    step: Tensor
    offset: Tensor
    low: int
    high: int
    rounding: str

    @staticmethod
    def of(lo: Tensor, hi: Tensor, mode: str, grid: Integers, rounding: str) -> Plan:
        """The plan for groups with ranges [lo, hi]."""
        if mode == "symmetric":
            high = grid.symmetric_steps
            return Plan(*parameters(lo, hi, mode, high), -high, high, rounding)
        # Dithered codes may round up by almost two steps' worth: one step of head-room keeps them in 0 … B.
        high = grid.affine_steps - (rounding == "dithered")
        return Plan(*parameters(lo, hi, mode, high), 0, high, rounding)

    def encode(self, y: Tensor, key: Tensor | None) -> Tensor:
        """(N, D) codes."""
        return ops.encode(y, self.step, self.offset, self.low, self.high, self.rounding, key)

    def decoding(self, shape: torch.Size, key: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Step, offset and dither so that value = step · (code − dither) + offset.

        Dither is one number per row and one per column. The one along which the step does not vary goes into
        the offset, together with the constant that centres it.
        """
        if self.rounding != "dithered":
            return self.step, self.offset, None
        assert key is not None
        levels = reference.DITHER_LEVELS
        row, column = (n.to(self.step.dtype) / levels for n in ops.dither_noise(key, *shape))
        into_offset, dither = (column, row) if self.step.shape[1] != 1 else (row, column)
        # The constant ½ goes with the dither: so the offset stays inside the group's range, and finite.
        offset = self.offset + self.step * (1.0 - 0.5 / levels - into_offset)
        return self.step, offset, dither + 0.5

    def row_variance(self, y: Tensor) -> Tensor:
        """(N,) float64: Σ_j of the entries' exact variances."""
        if self.rounding != "stochastic":
            return self.row_bound(y)
        unit = ops.code_variance(y, self.step, self.offset, self.low, self.high)
        if self.step.shape[1] == 1:
            return unit.sum(1, dtype=torch.float64) * self.step.double().square().squeeze(1)
        return (unit * self.step.double().square()).sum(1)

    def row_bound(self, y: Tensor) -> Tensor:
        """(N,) float64: Σ_j of the entries' variance bounds."""
        unit = {"nearest": 0.0, "stochastic": 1 / 4, "dithered": 1 / 12}[self.rounding]
        return self.step.double().square().expand(y.shape).sum(1) * unit


@dataclass(frozen=True)
class Either:
    """Two plans and a boolean scalar that takes the first; the choice stays on the device."""

    take_first: Tensor
    first: Plan
    second: Plan

    def _pick(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.where(self.take_first, first, second)

    def encode(self, y: Tensor, key: Tensor | None) -> Tensor:
        """(N, D) codes."""
        return self._pick(self.first.encode(y, key), self.second.encode(y, key))

    def decoding(self, shape: torch.Size, key: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Step, offset and dither of the plan taken."""
        step, offset, dither = self.first.decoding(shape, key)
        step2, offset2, _ = self.second.decoding(shape, key)
        assert dither is not None
        return (
            self._pick(step, step2),
            self._pick(offset, offset2),
            self._pick(dither, dither.new_zeros(())),
        )

    def row_variance(self, y: Tensor) -> Tensor:
        """(N,) float64."""
        return self._pick(self.first.row_variance(y), self.second.row_variance(y))

    def row_bound(self, y: Tensor) -> Tensor:
        """(N,) float64."""
        return self._pick(self.first.row_bound(y), self.second.row_bound(y))


def _view(x: Tensor, axis: int | tuple[int, ...]) -> RowView:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise FqtError(f"cannot quantize {getattr(x, 'dtype', type(x).__name__)}: give a floating-point tensor")
    if x.ndim == 0:
        raise FqtError("cannot quantize a scalar: give a tensor with at least one axis")
    axes = (axis,) if isinstance(axis, int) else axis
    if not isinstance(axes, tuple | list) or not all(isinstance(a, int) for a in axes):
        raise FqtError(f"axis must be an int or a tuple of ints, not {axis!r}")
    normal = tuple(a + x.ndim if a < 0 else a for a in axes)
    if any(a not in range(x.ndim) for a in normal) or len(set(normal)) != len(normal):
        raise FqtError(f"axis {axis!r} does not name distinct axes of a tensor of shape {tuple(x.shape)}")
    return RowView(x.shape, normal)
