"""Groups of few channels as fewer groups of more, whose weight is zero between channels of different groups.

The integer kernels take sixteen channels at a time, so a group of four costs as much as one of sixteen; the sums
are the same. Filters of one channel each have a kernel of their own (csrc/products/depthwise.cpp), and stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.kernels.tensor import QuantizedTensor

GROUP_CHANNELS = 16
"""From which on a group is not widened: the kernels' shortest vector of columns (measured: csrc/LOG.md)."""


@dataclass(frozen=True)
class Wide:
    """A map in fewer groups.

    Attributes:
        map: it.
        merged: how many groups became one.
    """

    map: ConvMap
    merged: int

    @staticmethod
    def of(map: LinearMap, shape: Sequence[int]) -> Wide | None:
        """For a weight of this shape as torch has it; None where the groups are wide enough, or of one channel."""
        if isinstance(map, DenseMap) or map.groups == 1:
            return None
        channels = shape[0] // map.groups, shape[1]
        least = min(channels)
        if least >= GROUP_CHANNELS or max(channels) == 1 or not least:
            return None
        fit = (m for m in range(2, map.groups) if map.groups % m == 0 and m * least >= GROUP_CHANNELS)
        merged = next(fit, map.groups)
        return Wide(replace(map, groups=map.groups // merged, group_channels=merged * least), merged)

    @staticmethod
    def of_laid(map: LinearMap, laid: Sequence[int]) -> Wide | None:
        """The same for the shape in which the weight is quantized."""
        transposed = not isinstance(map, DenseMap) and map.transposed
        return Wide.of(map, (laid[0] * laid[1], laid[2]) if transposed else (laid[0], laid[-1]))

    def weight_shape(self, shape: torch.Size) -> torch.Size:
        """Of the weight in torch's layout, from that of the narrow one."""
        return torch.Size((shape[0], shape[1] * self.merged, *shape[2:]))

    def weight(self, w: QuantizedTensor) -> QuantizedTensor:
        """The symmetric weight of the wide map, laid out as the narrow one is."""
        codes = (
            w.codes.flatten(0, 1) if self.map.transposed else w.codes.movedim(-1, 1)
        )  # (A, B, *), groups along A
        blocks = codes.unflatten(0, (self.map.groups, self.merged, -1))  # (groups, merged, A, B, *)
        wide = codes.new_zeros(*blocks.shape[:3], self.merged, *blocks.shape[3:])
        wide.diagonal(dim1=1, dim2=3).copy_(blocks.movedim(1, -1))
        wide = wide.flatten(1, 2).flatten(2, 3)  # (groups, merged · A, merged · B, *)
        laid = wide if self.map.transposed else wide.flatten(0, 1).movedim(1, -1)
        view = replace(w.view, shape=laid.shape)
        return replace(w, view=view, matrix_codes=view.matrix(laid).contiguous())

    def gradient(self, wide: Tensor) -> Tensor:
        """The narrow weight's gradient from the wide one's."""
        blocks = wide.unflatten(0, (self.map.groups, self.merged, -1)).unflatten(3, (self.merged, -1))
        return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 2)
