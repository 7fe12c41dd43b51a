"""Sums of a map over the pixels of each tap, one axis after the other, without tables of which pixels those are."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.taps import Axis
from fqt.kernels.triton.device import launch, takes

_TILE = {"S": 16, "C": 64}


@triton.jit
def _along(
    out,  # (before, taps, rest)
    map,  # (before, length, rest)
    taps,
    length,
    other,  # pixels of the other side
    rest,
    stride,
    padding,
    dilation,
    READS: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
):
    blocks = tl.cdiv(rest, C)
    line = tl.program_id(0).to(tl.int64) // blocks
    column = tl.program_id(0).to(tl.int64) % blocks * C + tl.arange(0, C)
    first = line % taps * dilation - padding
    total = tl.zeros((S, C), tl.float64)
    for start in range(0, length, S):
        at = start + tl.arange(0, S)
        if READS:
            ahead = at - first
            met = (ahead >= 0) & (ahead < other * stride) & (ahead % stride == 0)
        else:
            read = at * stride + first
            met = (read >= 0) & (read < other)
        there = (met & (at < length))[:, None] & (column < rest)[None, :]
        row = line // taps * length + at
        total += tl.load(map + row[:, None] * rest + column[None, :], there, 0).to(tl.float64)
    tl.store(out + line * rest + column, tl.sum(total, 0), column < rest)


def takes_tap_sums(map: Tensor, axes: tuple[Axis, ...], reads: bool) -> bool:
    """Maps of integers or float64."""
    return map.numel() > 0 and takes(map, dtypes=(torch.int64, torch.int32, torch.float64))


def tap_sums(map: Tensor, axes: tuple[Axis, ...], reads: bool) -> Tensor:
    """As the reference; of integers bit for bit."""
    found, before, rest = map.contiguous(), 1, map.numel()
    for taps, size, made, stride, padding, dilation in axes:
        length, other = (size, made) if reads else (made, size)
        rest //= length
        out = torch.empty(before * taps, rest, dtype=torch.float64, device=map.device)
        sizes: tuple[Any, ...] = (taps, length, other, rest, stride, padding, dilation)
        programs = out.shape[0] * triton.cdiv(rest, _TILE["C"])
        launch(_along, programs, out, found, *sizes, on=out, READS=reads, **_TILE)
        found, before = out, out.shape[0]
    return found.view(-1, map.shape[-1])
