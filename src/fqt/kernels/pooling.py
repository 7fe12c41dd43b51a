"""Max pooling keeps which tap of its window was greatest; torch's backward pass asks for its place in the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels.op import Op

Pair = tuple[int, int]
"""Of the height and of the width."""


@dataclass(frozen=True)
class Windows:
    """The windows of a pooling.

    Attributes:
        size, stride, padding, dilation: as of `torch.nn.MaxPool2d`.
        width: of the input.
    """

    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    width: int

    def starts(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where the windows of `like` (N, rows, columns, C) begin, if only in the padding.

        Returns:
            (rows, 1, 1) and (columns, 1) int64: the row of each one's first tap, and its column.
        """
        rows, columns = (torch.arange(n, device=like.device) for n in like.shape[1:3])
        down, across = rows * self.stride[0] - self.padding[0], columns * self.stride[1] - self.padding[1]
        return down[:, None, None], across[:, None]


@Op
def taps(places: Tensor, windows: Windows) -> Tensor:
    """The number of the tap that lies at each place, row · width + column of the window; at most 256 taps.

    Args:
        places: (N, rows, columns, C) int64: row · width + column of the input.
        windows: with a tap at each of them.

    Returns:
        uint8, of the same shape.
    """
    down, across = windows.starts(places)
    # A place less the rows above the window: its column is one of the input, so that the row is right.
    away = places - down * windows.width
    row = torch.div(away, windows.width * windows.dilation[0], rounding_mode="floor")
    column = (away - row * windows.width * windows.dilation[0] - across) // windows.dilation[1]
    return (row * windows.size[1] + column).to(torch.uint8)


@Op
def places(taps: Tensor, windows: Windows) -> Tensor:
    """The inverse: (N, rows, columns, C) int64."""
    (down, across), taps = windows.starts(taps), taps.long()
    row = torch.div(taps, windows.size[1], rounding_mode="floor")
    column = taps - row * windows.size[1]
    return (down + row * windows.dilation[0]) * windows.width + across + column * windows.dilation[1]
