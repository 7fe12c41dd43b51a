"""What a quantizer does in a range not the tensor's own: it clips, counts and learns (`fqt.kernels.ranges`).

A part of `Quantizer`, which has all that is quantized in the tensor's own range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import ops
from fqt.kernels.codes import Blocks, Entries
from fqt.kernels.ranges import Measured, RangeState, quantize_within
from fqt.kernels.rounding import Coding
from fqt.kernels.tensor import QuantizedTensor, RowView
from fqt.quant.scale import Scale
from fqt.quant.transform import Transform


class Remembering(ABC):
    """The part of a quantizer that takes remembered ranges."""

    transform: Transform
    scale: Scale

    @property
    @abstractmethod
    def coding(self) -> Coding:
        """Scale, grid and rounding as the kernels take them."""

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """The least and the greatest code."""

    @abstractmethod
    def _entries(self, x: Tensor, axis: int | tuple[int, ...], factor: Tensor | None) -> tuple[Entries, RowView]:
        """x as a matrix."""

    @abstractmethod
    def _key(self, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
        """The seed on the device."""

    @staticmethod
    @abstractmethod
    def _checked(nonfinite: str, quantized: QuantizedTensor) -> QuantizedTensor:
        """The same, if `nonfinite` allows it."""

    def quantize_measuring(
        self,
        x: Tensor,
        range: RangeState,
        seed: int | Tensor | None = None,
        *,
        axis: int | tuple[int, ...] = 0,
        nonfinite: str = "raise",
        factor: Tensor | None = None,
    ) -> tuple[QuantizedTensor, Measured]:
        """`quantize` in a remembered range, and what x teaches for the next tensor's: `learned` takes it.

        >>> import torch
        >>> from fqt.quant import RangeState, quantizer
        >>> hindsight, state = quantizer("hind8"), RangeState.empty()
        >>> for step, size in enumerate([1.0, 2.0, 0.5]):
        ...     x = torch.linspace(-size, size, 100)
        ...     quantized, seen = hindsight.quantize_measuring(x, state, seed=step)
        ...     state = hindsight.learned(state, seen)
        >>> print(int(state.clipped), "of", int(state.entries), "clipped")
        50 of 300 clipped
        >>> state.bounds.tolist()
        [-1.04, 1.04]

        Args:
            x, seed, axis, nonfinite, factor: as for `quantize`.
            range: what is remembered, on x's device; `RangeState.empty()` before the first tensor. Not changed.

        Returns:
            The codes, and what x teaches: its own range, and how many entries were clipped.

        Raises:
            FqtError: as `quantize`; the scale's range is its own; or `range` is none that was remembered.
        """
        self._check_range(range)
        entries, view = self._entries(x, axis, factor)
        key = self._key(seed, x.device)
        y, undo = self.transform.apply(entries, self.coding, key)
        found, seen = quantize_within(y, self.coding, key, self.scale.source, range)
        return self._checked(nonfinite, QuantizedTensor.of(found, view, x.dtype, *undo, self.code_range)), seen

    def learned(self, range: RangeState, seen: Measured) -> RangeState:
        """What is remembered after a tensor from which `seen` was measured.

        Raises:
            FqtError: `range` and `seen` are not what `quantize_measuring` takes and gives.
        """
        self._check_range(range)
        if not isinstance(seen, Measured):
            raise FqtError(f"what a tensor taught is the second result of quantize_measuring, not {_kind(seen)}")
        return self.scale.source.learned(range, seen, self.coding.levels)

    def _check_range(self, range: RangeState) -> None:
        if not isinstance(range, RangeState):
            raise FqtError(f"range is a RangeState, RangeState.empty() before the first tensor, not {_kind(range)}")
        if not self.scale.remembers:
            raise FqtError("this quantizer has the tensor's own range and takes no other: see Scale(range=…)")

    def _ranges(self, y: Entries, blocks: Blocks, range: RangeState | None) -> tuple[Tensor, Tensor]:
        """The ranges that blocks of the transformed matrix are quantized in."""
        own = ops.value_range(y, blocks)
        if range is None:
            return own
        self._check_range(range)
        return self.scale.source.used(*own, range)


def _kind(value: object) -> str:
    """What was given instead, on one line."""
    return repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
