"""Which pixels of a map belong to each tap of a convolution's kernel, and sums over them.

A tap reads some pixels of the input, and serves those of the output for which what it reads is there: along each
axis by itself. What padding leaves out belongs to no tap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fqt.kernels.op import Op

Axis = tuple[int, int, int, int, int, int]
"""Taps, pixels of the input and of the output, stride, padding, dilation."""


@Op
def tap_sums(map: Tensor, axes: tuple[Axis, ...], reads: bool) -> Tensor:
    """(taps, D) float64: Σ over a tap's pixels of a map (*, D); exact for integers while sums stay below 2⁵³.

    Args:
        map: integers or floats, of the input's pixels if `reads`, else of the output's.
        axes: the spatial ones.
        reads: whether the pixels are those that taps read, or those that they serve.
    """
    found, d = map.double().unsqueeze(0), map.shape[-1]
    for axis in axes:  # (taps so far, size, …, D)
        met = _met_on(axis, map.device)[0 if reads else 1]
        done, size, rest = found.shape[0], found.shape[1], found.shape[2:]
        found = (met @ found.reshape(done, size, rest.numel())).view(done * met.shape[0], *rest)
    return found.view(-1, d)


@dataclass(frozen=True)
class Taps:
    """The pixels of one side that belong to each tap.

    Attributes:
        axes: the spatial ones.
        reads: whether of the input, those that taps read; else of the output, those that they serve.
    """

    axes: tuple[Axis, ...]
    reads: bool

    @property
    def size(self) -> tuple[int, ...]:
        """The map's axes."""
        return tuple(axis[1 if self.reads else 2] for axis in self.axes)

    def sums(self, map: Tensor) -> Tensor:
        """`tap_sums` of a map (*, D)."""
        return tap_sums(map, self.axes, self.reads)

    def counts(self, device: torch.device) -> Tensor:
        """(taps, 1) float64: how many they are."""
        return self.sums(torch.ones(*self.size, 1, dtype=torch.float64, device=device))


def _met_on(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis, which pixels of the input a tap reads (taps, size), and which of the output it serves
    (taps, out): ones in float64.

    Made where they are used: a copy to a GPU would wait for it, and a tensor kept from the capture of a CUDA graph
    holds nothing before the graph runs.
    """
    if device.type == "cpu":
        reads, serves = _met_on_cpu(axis)
        return torch.from_numpy(reads), torch.from_numpy(serves)
    reads, serves = _met(axis, partial(torch.arange, device=device))
    return reads.double(), serves.double()


@lru_cache(maxsize=256)
def _met_on_cpu(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """As arrays: a tensor that was made while torch fakes them must not be kept."""
    reads, serves = _met(axis, np.arange)
    return reads.astype(np.float64), serves.astype(np.float64)


def _met(axis: Axis, arange: Callable[[int], Any]) -> tuple[Any, Any]:
    """`_met_on` in bool, of tensors or arrays."""
    taps, size, out, stride, padding, dilation = axis
    first = (arange(taps) * dilation - padding)[:, None]
    at, ahead = arange(out) * stride + first, arange(size) - first
    reads = (ahead >= 0) & (ahead < out * stride) & (ahead % stride == 0)
    return reads, (at >= 0) & (at < size)
