"""Which kernel multiplies: a small table by generation of device, and the fastest of its rows by measurement.

Every schedule gives the same bits (sums are integers, and each float is made from its sum alone), so a choice by
measurement cannot change a result. What was chosen is kept in memory, for a shape and a kind of device. Nothing is
measured while a CUDA graph is captured, since that waits for the device; nor with `FQT_TUNE=off`: the table's first
row that fits is taken then.

The starting points are the configurations that others found best for int8 and fp8 on the same devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
READINGS = 5
_WORTH = 1 << 33  # multiplications, some 20 µs: below, compiling every choice takes more than the best saves
_HEAD_START = 2_000_000  # cycles, about a millisecond: what the host takes for a launch or two


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: a tile of the result, the terms of a step, warps, stages of the pipeline."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        """As kernels take them."""
        return {"BM": self.rows, "BN": self.columns, "BK": self.terms}

    def launch(self) -> dict[str, int]:
        """As launches take them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Schedule:
    """A way to run a matrix product.

    Attributes:
        kind: "tiles", one program per tile that loads through pointers; "persistent", one per multiprocessor that
            loads through tensor descriptors; "parts", one per tile and part of the contraction, and the epilogue
            after them; "library", `torch._int_mm` and the epilogue after it.
        tiles: of the kernel; None for the library.
        turned: whether operands whose terms are not neighbours in memory are copied first so that they are.
    """

    kind: str
    tiles: Tiles | None = None
    turned: bool = True


LIBRARY = Schedule("library")
_SMALL = Tiles(64, 64, 128, 4, 3)
TINY = Tiles(64, 64, 64, 4, 1)
"""For the interpreter, which runs one program after another."""
_WIDE_MEMORY = (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 128, 8, 3))  # 160 KiB of shared memory and more
_NARROW_MEMORY = (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3))  # 99 KiB
_HOPPER = (Tiles(128, 256, 128, 8, 4), Tiles(256, 128, 128, 8, 3), Tiles(128, 128, 128, 8, 4))
_OF_PARTS = Tiles(64, 128, 64, 8, 3)  # with tails, any strides and sums in int64; what is larger spills registers
_DATACENTER = (90, 100, 103)


def schedules(capability: tuple[int, int], rows: int, columns: int) -> list[Schedule]:
    """The rows of the table for a matrix product, the one to take unmeasured first.

    Args:
        capability: the device's; (0, 0) is the interpreter.
        rows, columns: of the result.
    """
    number = 10 * capability[0] + capability[1]
    if number == 0:
        return [Schedule("tiles", TINY)]
    small = min(rows, columns) <= 64 or rows * columns < 1 << 20
    pointers = [_SMALL] if small else [*tiles_for(number)]
    found = [Schedule("tiles", tiles) for tiles in pointers]
    if number in _DATACENTER and not small:
        found = [Schedule("persistent", tiles) for tiles in _HOPPER] + found[-1:]
    else:
        found.append(Schedule("tiles", pointers[0], turned=False))
    return [*found, LIBRARY] if number != 103 else found  # whose library falls back to much older kernels


def in_parts(capability: tuple[int, int]) -> Schedule:
    """For long contractions with few tiles: what int32 does not hold, and what would leave processors idle."""
    return Schedule("parts", TINY if capability == (0, 0) else _OF_PARTS)


def few_tiles(x: Tensor, rows: int, columns: int, terms: int) -> bool:
    """Whether so few tiles make up a result on x's device that its contraction should be shared out."""
    return rows * columns * 2 <= 128 * 128 * processors(x) and terms >= 4096 and x.is_cuda


def tiles_for(number: int) -> Sequence[Tiles]:
    """Of kernels that load through pointers."""
    return _WIDE_MEMORY if number in (80, *_DATACENTER) else _NARROW_MEMORY


def image_tiles(capability: tuple[int, int], channels: int) -> list[Tiles]:
    """For a convolution's output or grad_input with so many channels in a group."""
    if capability == (0, 0):
        return [TINY]
    narrow = [Tiles(128, 64, 64, 4, 3), Tiles(64, 64, 64, 4, 4)]
    return narrow if channels <= 64 else [Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 3), narrow[0]]


def filter_tiles(capability: tuple[int, int], channels: int) -> list[Tiles]:
    """For a convolution's grad_weight; its tiles are of output channels by entries of a filter."""
    if capability == (0, 0):
        return [TINY]
    narrow = [Tiles(64, 64, 128, 4, 3), Tiles(64, 128, 64, 8, 3)]
    terms = 32 if capability >= (10, 0) else 64  # where 64 spill registers
    return narrow if channels <= 64 else [Tiles(128, 128, terms, 8, 3), *narrow]


def capability(x: Tensor) -> tuple[int, int]:
    """Of the device that x lies on; (0, 0) on the CPU, where only the interpreter runs kernels."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def processors(x: Tensor) -> int:
    """How many multiprocessors the device has; 2 in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


_chosen: dict[tuple, object] = {}


def bucket(rows: int) -> int:
    """The power of two at or above: batches of nearly one size share a choice."""
    return 1 << max(0, rows - 1).bit_length()


def fastest(key: tuple, at: Tensor, choices: Sequence[R], run: Callable[[R], object], macs: int) -> R:
    """The choice with which `run` takes the least time on this device; the first where it has little to do.

    Args:
        key: what the choice depends on, besides the kind of device.
        at: a tensor on the device.
        choices: the one to take unmeasured first; those that do not run are left out.
        run: the work; its result is thrown away.
        macs: how many multiplications it has.
    """
    if len(choices) == 1 or not at.is_cuda or macs < _WORTH or os.environ.get("FQT_TUNE") == "off":
        return choices[0]
    key = (torch.cuda.get_device_name(at.device), *key)
    found = _chosen.get(key)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return choices[0]
        spent = {choice: _milliseconds(choice, run) for choice in choices}
        found = min(spent, key=spent.__getitem__)
        if math.isinf(spent[found]):
            return choices[0]  # its error is the caller's to see
        _chosen[key] = found
    return found  # type: ignore[return-value]


def _milliseconds(choice: R, run: Callable[[R], object]) -> float:
    """The median of a few runs; infinite if it does not run (too little shared memory, a shape it refuses).

    The device waits before each: else it would wait for the host within it, and the choice of fewest launches win.
    """
    spent = []
    try:
        run(choice)
        for _ in range(READINGS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_HEAD_START)
            start.record()
            run(choice)
            end.record()
            end.synchronize()
            spent.append(start.elapsed_time(end))
    except Exception:  # whatever a compiler or a library raises; the next choice may do
        return math.inf
    return sorted(spent)[READINGS // 2]
