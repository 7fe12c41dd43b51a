"""Many draws of one estimate of one matrix, and the errors they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import reference
from fqt.quant import Quantizer
from fqt.stats.certification.inputs import Input

Function = Callable[[Tensor, int], Tensor]
_TINY = 1e-44  # a few of the least float32


class Refused(Exception):
    """The function raised on this input."""


@dataclass(frozen=True)
class Sample:
    """M draws of one input, with n = N·D entries.

    Attributes:
        input: what was quantized.
        error: (M, n) float64, estimate − x.
        width: (n,) float64, how far each entry's error moves.
        still: (n,) bool, where noise is drawn but nothing was seen to move in the whole row.
        unit: (M, n) float64, the errors whose dependence is tested: of a `Quantizer`, in gaps and before the
            inverse transform; of a function, the same as `error` over the row's spread.
        law: the declared variance of `unit`, (M, n) or (M, 1); None for a function, and for rounding that corrects
            steps after the codes, which declares none of an entry alone.
        clipped: whether a value lay outside the codes' range; None for a function.
        overlong: whether an error exceeded what the rounding allows; None for a function.
        distinct: how many of the M draws count as independent; fewer than M where seeds repeat draws.
    """

    input: Input
    error: Tensor
    width: Tensor
    still: Tensor
    unit: Tensor
    law: Tensor | None
    clipped: bool | None
    overlong: bool | None
    distinct: float

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.input.x.shape[0], self.input.x.shape[1]

    @property
    def x(self) -> Tensor:
        """(N, D) float64."""
        return self.input.x.double()

    @property
    def slack(self) -> Tensor:
        """(n,): what float32 arithmetic may add to an entry's mean error: last bits of its row and of its step."""
        least = 5e-7 * self.x.abs().amax(1) + _TINY
        return least.repeat_interleave(self.shape[1]) + 1e-4 * self.width


def estimates(function: Function, given: Input, seeds: Sequence[int]) -> Tensor:
    """(M, n) float64: function(x, seed) for every seed.

    Raises:
        Refused: the function raised.
        FqtError: it returned something that is no estimate of x.
    """
    out = torch.empty(len(seeds), given.x.numel(), dtype=torch.float64)
    for m, seed in enumerate(seeds):
        try:
            # The global generator is the function's to seed and to use, but not to leave changed.
            with torch.no_grad():
                value = function(given.x.clone(), seed)
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        out[m] = _checked(value, given).flatten()
    return out


def _checked(value: object, given: Input) -> Tensor:
    wanted = tuple(given.x.shape)
    if not isinstance(value, Tensor):
        raise FqtError(f"f(x, seed) must return a tensor, not {type(value).__name__}")
    if tuple(value.shape) != wanted:
        raise FqtError(f"f(x, seed) must keep the shape of x: got {tuple(value.shape)} for {wanted} ({given.name})")
    if not value.is_floating_point():
        raise FqtError(f"f(x, seed) must return the dequantized float estimate, not {value.dtype}")
    return value.detach().to("cpu", torch.float64)


def _width(error: Tensor, x: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
    """(n,): how far an entry's error moves, taken from its row: the widest movement seen in it; and `still`.

    In a row that did not move, but for the last bits of floats, rare movements may have gone unseen. It gets the
    widest of all rows; if none moved, its own range, beyond which no quantizer steps. A function that never moves
    gets zeros: its errors are not noise.
    """
    n, d = x.shape
    if deterministic:
        return torch.zeros(n * d, dtype=torch.float64), torch.zeros(n * d, dtype=torch.bool)
    row = (error.amax(0) - error.amin(0)).view(n, d).amax(1)
    still = row <= 1e-6 * x.abs().amax(1) + _TINY
    unseen = x.amax(1) - x.amin(1) if still.all() else row.masked_fill(still, 0.0).max()
    return torch.where(still, unseen, row).repeat_interleave(d), still.repeat_interleave(d)


def draw(subject: Quantizer | Function, given: Input, seeds: Sequence[int], deterministic: bool = False) -> Sample:
    """The sample of one input; `error` is not finite where an estimate is not.

    Args:
        deterministic: it is known that no seed changes the estimate.

    Raises:
        Refused: the function raised.
        FqtError: it returned something that is no estimate of x.
    """
    if isinstance(subject, Quantizer):
        return _draw_quantizer(subject, given, seeds, deterministic)
    x = given.x.double()
    error = estimates(subject, given, seeds) - x.flatten()
    width, still = _width(error, x, deterministic)
    unit = torch.where(width > 0, error / width.clamp(min=1e-300), 0.0)
    return Sample(given, error, width, still, unit, None, None, None, len(seeds))


def _draw_quantizer(q: Quantizer, given: Input, seeds: Sequence[int], deterministic: bool) -> Sample:
    """Takes each draw apart into the matrix that was rounded and the codes' values."""
    x, m = given.x, len(seeds)
    estimate, y, decoded, step, offset, position = torch.empty(6, m, *x.shape, dtype=torch.float64)
    dithered = torch.empty(m, 1, 1, dtype=torch.bool)
    for i, seed in enumerate(seeds):
        rounded, quantized = q.rounded(x, seed)
        y[i], position[i] = rounded, reference.position(rounded, quantized.matrix_scales, q.coding.levels)
        estimate[i], decoded[i] = quantized.dequantize(), quantized.decode()
        step[i], offset[i] = quantized.matrix_scales.spread((x.shape[0], x.shape[1]))
        # "best" has zeros for dither where it took the stochastic candidate.
        dithered[i] = quantized.matrix_dither is not None and bool(quantized.matrix_dither.any())
    error = (estimate - x.double()).flatten(1)
    width = _width(error, x.double(), deterministic)
    rounding = _rounding_errors(q, y, decoded, step, offset, dithered, position)
    unit = rounding.error.flatten(1)
    if q.coding.rounding.settles:
        return Sample(given, error, *width, unit, None, None, None, m)
    law = rounding.variance.flatten(1)
    return Sample(given, error, *width, unit, law, rounding.clipped, rounding.overlong, m)


class _Rounding(NamedTuple):
    """Errors in gaps between levels and their declared variance, (M, N, D), and two things that must not happen."""

    error: Tensor
    variance: Tensor
    clipped: bool
    overlong: bool


def _rounding_errors(
    q: Quantizer, y: Tensor, decoded: Tensor, step: Tensor, offset: Tensor, dithered: Tensor, rounded: Tensor
) -> _Rounding:
    """What rounding `y` to `decoded` did; all (M, N, D), `dithered` (M, 1, 1), `rounded` the positions in float32.

    Errors are in gaps of the two levels beside them, one step where levels are one apart. Their declared mean
    square is the rounding's: p(1 − p), p the position between these two, or 1/12 when dithered; in constant groups,
    which have no step, errors and variance are zero. Clipped: a position outside the codes' range (dither, which is
    part of the offset, hides the position: there the error's length must tell). Overlong: an error of more than a
    gap, or half a gap if dithered or nearest. Both allow for what float32 may add.
    """
    moving = step > 0
    step = torch.where(moving, step, 1.0)
    error = torch.where(moving, (decoded - y) / step, 0.0)
    # Last bits: of the offset and the value against the step.
    slack = 1e-4 + 1e-6 * torch.maximum(offset.abs(), y.abs()) / step
    levels, position = q.grid.levels(q.scale.mode), (y - offset) / step
    # The law may jump where few bits do not tell positions apart: of those that were rounded, to the last bit.
    gap, own, rounding = levels.gap(position), levels.gap(rounded), q.coding.rounding
    law = (rounding.variance(rounded, levels) + rounding.mean_error(rounded, levels).square()) / (own * own)
    limit = torch.where(dithered, 0.5, 1.0 if q.draws else 0.5)
    error = error / gap
    overlong = moving & (error.abs() > limit + slack)
    variance = torch.where(dithered, 1 / 12, law) * moving
    outside = moving & ~dithered & ((position > levels.high + slack) | (position < levels.low - slack))
    return _Rounding(error, variance, bool(outside.any()), bool(overlong.any()))
