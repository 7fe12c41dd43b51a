"""Where the range of a tensor comes from: the tensor itself, or what tensors before it taught.

    own          [min x, max x]: nothing is clipped, nothing remembered
    hindsight    the [lo, hi] remembered; then lo ← η·lo + (1 − η)·min x, and hi alike, with η = 0.9
                 (Fournarakis & Nagel 2021, arXiv 2105.04246)
    steered      ±γ·max|x|; then γ ← γ + 10⁻³·sign(share clipped − p/(2^b − 1)), p = 10⁻³, within [10⁻³, 1]
                 (Kim et al. 2024, arXiv 2407.12637, as released)

What lies outside is clipped to the nearer end: the estimate's mean is the clipped tensor, so that it is biased by
what was cut off, and unbiased where nothing was. A first tensor has its own range, whatever the way; γ then starts
at the least multiple of 10⁻³ that clips no larger share of that tensor than is aimed at. What is not finite
teaches nothing.

State is a value, an argument and a result: a quantizer that changed as it is used could not be replayed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.codes import TENSOR, Entries, Levels, Quantized, Scales
from fqt.kernels.rounding import Coding


@dataclass(frozen=True, eq=False)
class RangeState:
    """What a sequence of tensors has taught.

    Attributes:
        bounds: float64 (2,): hindsight's [lo, hi]; steered −γ and γ, in parts of a tensor's largest magnitude.
        counts: int64 (3,): tensors that taught, their entries, and how many of these were clipped.
    """

    bounds: Tensor
    counts: Tensor

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> RangeState:
        """Before the first tensor."""
        bounds = torch.zeros(2, dtype=torch.float64, device=device)
        return RangeState(bounds, torch.zeros(3, dtype=torch.int64, device=device))

    @property
    def tensors(self) -> Tensor:
        """How many tensors taught, int64 scalar."""
        return self.counts[0]

    @property
    def entries(self) -> Tensor:
        """How many entries they had, int64 scalar."""
        return self.counts[1]

    @property
    def clipped(self) -> Tensor:
        """How many of these were clipped, int64 scalar."""
        return self.counts[2]

    @property
    def clipped_share(self) -> Tensor:
        """The share that was clipped, float64 scalar; 0 before the first tensor."""
        return self.clipped.double() / self.entries.clamp(min=1)

    @property
    def packed(self) -> Tensor:
        """int64 (5,), counts and the bits of the bounds: one tensor, which no conversion of dtypes rounds."""
        return torch.cat([self.counts, self.bounds.view(torch.int64)])

    @staticmethod
    def unpacked(packed: Tensor) -> RangeState:
        """The state again, a copy."""
        packed = packed.clone()
        return RangeState(packed[3:].view(torch.float64), packed[:3])


class Measured(NamedTuple):
    """What one tensor teaches.

    Attributes:
        bounds: float64 (2,), as `RangeState`'s: what they were if this tensor were the first.
        counts: int64 (3,), to be added to `RangeState`'s; zeros if it teaches nothing.
    """

    bounds: Tensor
    counts: Tensor


@dataclass(frozen=True)
class RangeSource:
    """One way to choose a tensor's range.

    Attributes:
        name: as `Scale` has it.
        remembers: whether it needs a state, and clips.
    """

    name: ClassVar[str]
    remembers: ClassVar[bool] = True

    def used(self, lo: Tensor, hi: Tensor, state: RangeState) -> tuple[Tensor, Tensor]:
        """The range that a tensor is quantized in whose own is [lo, hi]; its own where nothing was taught."""
        raise NotImplementedError

    def teaches(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Whether a tensor with that range of its own changes the state."""
        return torch.isfinite(lo) & torch.isfinite(hi)

    def seen(self, x: Entries, lo: Tensor, hi: Tensor, levels: Levels, state: RangeState) -> Tensor:
        """float64 (2,): the bounds that x would have as a first tensor; it has an entry, and the range [lo, hi]."""
        raise NotImplementedError

    def moved(self, state: RangeState, seen: Measured, levels: Levels) -> Tensor:
        """float64 (2,): the bounds after one more tensor, not the first."""
        raise NotImplementedError

    def knows(self, state: RangeState) -> Tensor:
        """Whether there are bounds to go by, a scalar."""
        return state.tensors > 0

    def learned(self, state: RangeState, seen: Measured, levels: Levels) -> RangeState:
        """The state after one more tensor."""
        bounds = torch.where(self.knows(state), self.moved(state, seen, levels), seen.bounds)
        return RangeState(torch.where(seen.counts[0] > 0, bounds, state.bounds), state.counts + seen.counts)


@dataclass(frozen=True)
class Own(RangeSource):
    """The tensor's own."""

    name: ClassVar[str] = "own"
    remembers: ClassVar[bool] = False


@dataclass(frozen=True)
class Hindsight(RangeSource):
    """That of the tensors before, the older the less.

    A range of no width, as of a gradient that was zero, counts as none: everything would be clipped to it. A
    tensor of zeros has its own, in which it is exact: zero need not be among the codes of a remembered range.
    """

    name: ClassVar[str] = "hindsight"
    decay: ClassVar[float] = 0.9

    def knows(self, state: RangeState) -> Tensor:
        """Whether a range of some width is remembered."""
        return (state.tensors > 0) & (state.bounds[0] < state.bounds[1])

    def used(self, lo: Tensor, hi: Tensor, state: RangeState) -> tuple[Tensor, Tensor]:
        """The bounds, as far as the dtype goes; a tensor of zeros' own."""
        known = self.knows(state) & self.teaches(lo, hi) & ((lo != 0) | (hi != 0))
        largest = torch.finfo(lo.dtype).max  # float64 tensors may have taught more
        least, most = state.bounds.clamp(-largest, largest).to(lo.dtype)
        return torch.where(known, least, lo), torch.where(known, most, hi)

    def seen(self, x: Entries, lo: Tensor, hi: Tensor, levels: Levels, state: RangeState) -> Tensor:
        """x's own range."""
        return torch.cat([lo.flatten(), hi.flatten()]).double()

    def moved(self, state: RangeState, seen: Measured, levels: Levels) -> Tensor:
        """The decayed mean."""
        return self.decay * state.bounds + (1 - self.decay) * seen.bounds


@dataclass(frozen=True)
class Steered(RangeSource):
    """A part γ of the tensor's own largest magnitude, for which a small share of the entries is clipped.

    It is p/(2^b − 1), with p = 10⁻³ the share of gradients that are called large: 7·10⁻⁵ at four bits.
    """

    name: ClassVar[str] = "steered"
    large: ClassVar[float] = 1e-3
    parts: ClassVar[int] = 1000

    def _aim(self, levels: Levels) -> float:
        """The share."""
        return self.large / (levels.high - levels.low + 1)

    def teaches(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Whether there is a largest magnitude."""
        return super().teaches(lo, hi) & ((lo != 0) | (hi != 0))

    def used(self, lo: Tensor, hi: Tensor, state: RangeState) -> tuple[Tensor, Tensor]:
        """±γ times the largest magnitude."""
        known = self.knows(state) & self.teaches(lo, hi)
        reach = torch.maximum(lo.abs(), hi.abs()) * state.bounds[1].to(lo.dtype)
        return torch.where(known, -reach, lo), torch.where(known, reach, hi)

    def seen(self, x: Entries, lo: Tensor, hi: Tensor, levels: Levels, state: RangeState) -> Tensor:
        """The least γ that clips no larger share of x; only where it is not known that x is not the first."""
        if ops.at_hand(state.counts) and bool(self.knows(state)):
            return state.bounds
        magnitudes = x.values().abs().flatten()
        outside = math.floor(self._aim(levels) * magnitudes.numel() + 1e-6)
        last = magnitudes.topk(outside + 1).values[-1].double()
        largest = torch.maximum(lo.abs(), hi.abs()).double().squeeze()
        return self._bounds((last / largest * self.parts).ceil())

    def moved(self, state: RangeState, seen: Measured, levels: Levels) -> Tensor:
        """γ, one part further where more was clipped than is aimed at, and one back where less was."""
        share = seen.counts[2].double() / seen.counts[1].clamp(min=1)
        return self._bounds((state.bounds[1] * self.parts).round() + (share - self._aim(levels)).sign())

    def _bounds(self, parts: Tensor) -> Tensor:
        gamma = parts.clamp(1, self.parts) / self.parts
        return torch.stack([-gamma, gamma])


RANGES: dict[str, RangeSource] = {source.name: source for source in (Own(), Hindsight(), Steered())}


def reach(used: tuple[Tensor, Tensor], scales: Scales, levels: Levels) -> tuple[Tensor, Tensor]:
    """Beyond what values entries are clipped: the ends of the range, or of the levels where these go further.

    Args:
        used: the range that the scales were made from.
        scales: one step for the tensor.
        levels: as the positions are clamped to.
    """
    like = torch.empty((1, 1), dtype=levels.dtype, device=scales.step.device)
    low, high = (ops.decode(torch.full_like(like, end), scales, None) for end in (levels.low, levels.high))
    return torch.minimum(low, used[0]), torch.maximum(high, used[1])


def quantize_within(
    x: Entries, coding: Coding, seed: Tensor | None, source: RangeSource, state: RangeState
) -> tuple[Quantized, Measured]:
    """Codes of x, one step for all, in the range that the state says; and what x teaches.

    Args:
        x, coding, seed: as for `ops.quantize`.
        source: one that remembers.
        state: on x's device.
    """
    own = ops.value_range(x, TENSOR)
    used = source.used(*own, state)
    scales = ops.scales_of(*used, coding, TENSOR)
    clipped = _outside(x, own, reach(used, scales, coding.levels))
    entries = torch.full_like(clipped, x.matrix.numel())
    counts = torch.stack([torch.ones_like(clipped), entries, clipped])
    if not x.matrix.numel():
        return ops.encoded(x, scales, coding, seed), Measured(state.bounds, torch.zeros_like(counts))
    seen = Measured(source.seen(x, *own, coding.levels, state), counts * source.teaches(*own).squeeze())
    return ops.encoded(x, scales, coding, seed), seen


def _outside(x: Entries, own: tuple[Tensor, Tensor], ends: tuple[Tensor, Tensor]) -> Tensor:
    """How many entries lie outside, int64 scalar; without a look at them where the tensor's own range tells."""
    if ops.at_hand(own[0]) and bool((own[0] >= ends[0]) & (own[1] <= ends[1])):
        return torch.zeros((), dtype=torch.int64, device=own[0].device)
    values = x.values()
    return ((values < ends[0]) | (values > ends[1])).sum()
