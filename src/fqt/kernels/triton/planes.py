"""24-bit noise as planes of bytes, which products of codes take, and sums of such products put together again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.codes import DITHER_LEVELS
from fqt.kernels.triton.device import launch, takes

_LEVELS = tl.constexpr(float(DITHER_LEVELS))
_SIZE = 1024


@triton.jit
def _in_bytes(planes, noise, n, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(noise + at, at < n, 0)
    for plane in tl.static_range(3):
        byte = (value >> (16 - 8 * plane)) & 0xFF
        tl.store(planes + plane * tl.full((), 1, tl.int64) * n + at, byte.to(tl.uint8), at < n)


def takes_in_bytes(noise: Tensor) -> bool:
    """24-bit integers in int32."""
    return takes(noise, dtypes=(torch.int32,))


def in_bytes(noise: Tensor) -> Tensor:
    """As the reference."""
    planes = torch.empty(3, *noise.shape, dtype=torch.uint8, device=noise.device)
    n = noise.numel()
    launch(_in_bytes, triton.cdiv(n, _SIZE), planes, noise.contiguous(), n, on=noise, SIZE=_SIZE)
    return planes


@triton.jit
def _from_bytes(out, sums, n, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float64)
    for plane in tl.static_range(3):
        one = tl.load(sums + plane * tl.full((), 1, tl.int64) * n + at, at < n, 0).to(tl.float64)
        total = total * 256.0 + one
    tl.store(out + at, total / _LEVELS, at < n)


def takes_from_bytes(sums: Tensor) -> bool:
    """Sums in integers."""
    return takes(sums, dtypes=(torch.int32, torch.int64))


def from_bytes(sums: Tensor) -> Tensor:
    """As the reference: all is exact while the sums stay below 2³⁶."""
    out = torch.empty(sums.shape[1:], dtype=torch.float64, device=sums.device)
    n = out.numel()
    launch(_from_bytes, triton.cdiv(n, _SIZE), out, sums.contiguous(), n, on=sums, SIZE=_SIZE)
    return out
