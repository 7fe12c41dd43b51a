"""Taps of max pooling's windows by the C++ kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fqt.kernels import pooling as operations
from fqt.kernels.cpu.library import BACKEND, call, expect, takes
from fqt.kernels.cpu.memory import empty
from fqt.kernels.pooling import Windows

_FARTHEST = 1 << 31


class _Windows(ctypes.Structure):
    """`Windows` of csrc/quantize/pooling.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32 * 2) for name in ("size", "stride", "padding", "dilation")),
        ("width", ctypes.c_int64),
    ]

    @staticmethod
    def of(windows: Windows) -> _Windows:
        pairs = (windows.size, windows.stride, windows.padding, windows.dilation)
        return _Windows(*((ctypes.c_int32 * 2)(*pair) for pair in pairs), windows.width)


def _takes(x: Tensor, windows: Windows) -> bool:
    (high, wide), columns = windows.size, x.shape[2] * windows.stride[1] + windows.padding[1]
    span = (high * windows.dilation[0] + 1) * windows.width + wide * windows.dilation[1] + columns
    return takes(integers=x) and x.numel() > 0 and x.is_contiguous() and span < _FARTHEST


def _run(kernel: str, x: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    found, how = empty(x.shape, dtype), _Windows.of(windows)
    call(kernel, expect("x", x, tuple(x.shape), x.dtype), *x.shape, ctypes.addressof(how), found.data_ptr())
    return found


@operations.taps.on(BACKEND, when=lambda places, windows: _takes(places, windows) and places.dtype == torch.int64)
def _taps(places: Tensor, windows: Windows) -> Tensor:
    return _run("fqt_taps", places, windows, torch.uint8)


@operations.places.on(BACKEND, when=lambda taps, windows: _takes(taps, windows) and taps.dtype == torch.uint8)
def _places(taps: Tensor, windows: Windows) -> Tensor:
    return _run("fqt_places", taps, windows, torch.int64)
