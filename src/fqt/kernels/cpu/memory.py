"""Memory of large results on the CPU, used again as soon as the tensor in it is gone.

A fresh allocation of some megabytes costs a page fault per four kilobytes: at the speed of the kernels up to a
third of a training step. The C library hands such memory back to the system and asks for it anew, so large results
lie in regions that are kept here. A result is cut from the free range at the lowest address that holds it, and
becomes one with its free neighbours when it is gone. What a step keeps for its backward pass is let go in the
reverse order, so that this comes to little more than what was in use at one time; where it comes to more than half
as much again, free pages go back to the system.

Rejected: free blocks by size: a layer's are no use to the next, whose sizes differ.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from bisect import bisect_left
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1 << 20
"""Bytes below which the C library's own memory is as good."""

_REGION = 1 << 28
"""Bytes of addresses in a region; a page is no memory before it is written to."""


@dataclass(order=True)
class _Range:
    """Free bytes of a region, at most `written` of which the process holds."""

    start: int
    size: int
    written: int


class _Region:
    """A run of addresses: in use or free below `top`, never touched above."""

    def __init__(self, size: int) -> None:
        # Private: what a forked child writes stays its own.
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.size, self.top = size, 0
        self.free: list[_Range] = []  # in the order of addresses, no two of them neighbours

    def cut(self, size: int) -> int | None:
        """The lowest place for so many bytes; None if there is none."""
        for i, found in enumerate(self.free):
            if found.size >= size:
                rest = found.size - size
                self.free[i : i + 1] = [_Range(found.start + size, rest, min(found.written, rest))] if rest else []
                return found.start
        if self.size - self.top < size:
            return None
        self.top += size
        return self.top - size

    def join(self, start: int, size: int) -> None:
        """Takes back what was cut."""
        joined = _Range(start, size, size)
        i = bisect_left(self.free, joined)
        if i < len(self.free) and start + size == self.free[i].start:
            after = self.free.pop(i)
            joined = _Range(start, size + after.size, size + after.written)
        if i and self.free[i - 1].start + self.free[i - 1].size == start:
            i -= 1
            before = self.free.pop(i)
            joined = _Range(before.start, before.size + joined.size, before.written + joined.written)
        self.free.insert(i, joined)


class _Blocks:
    """What is in use, in all regions, and what was at most."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.regions: list[_Region] = []
        # A finalizer may run anywhere, also while the lock is held: it only leaves a note here.
        self.returned: deque[tuple[_Region, int, int]] = deque()
        self.used = self.peak = 0

    def take(self, size: int) -> tuple[_Region, int]:
        """A region, and where in it `size` bytes with unknown content begin."""
        with self.lock:
            self.collect()
            self.used += size
            self.peak = max(self.peak, self.used)
            for region in self.regions:
                start = region.cut(size)
                if start is not None:
                    break
            else:
                region, start = _Region(max(size, _REGION)), 0
                self.regions.append(region)
                region.cut(size)
            self._trim(self.peak * 3 // 2)
            return region, start

    def collect(self) -> None:
        """Takes back what tensors have left."""
        while self.returned:
            region, start, size = self.returned.popleft()
            self.used -= size
            region.join(start, size)

    @property
    def held(self) -> int:
        """Free bytes that the process may hold."""
        return sum(free.written for region in self.regions for free in region.free)

    def _trim(self, most: int) -> None:
        """Hands free pages back, the largest ranges first, until no more than `most` bytes are used and held."""
        surplus = self.used + self.held - most
        if surplus <= 0:
            return
        ranges = [(free, region.memory) for region in self.regions for free in region.free]
        for free, memory in sorted(ranges, key=lambda pair: -pair[0].written):
            if surplus <= 0 or not hasattr(mmap, "MADV_DONTNEED"):
                return
            memory.madvise(mmap.MADV_DONTNEED, free.start, free.size)
            surplus -= free.written
            free.written = 0


_blocks = _Blocks()


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor on the CPU, as `torch.empty`.

    A large one lies in memory that is used again when no tensor refers to it any more; its storage cannot be
    resized, and it is a view of that memory.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LEAST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region, start = _blocks.take(size)
    lease = memoryview(region.memory)[start : start + size]
    weakref.finalize(lease, _blocks.returned.append, (region, start, size)).atexit = False
    return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)


def release() -> None:
    """Hands all free pages back to the system; the most that was in use is counted from now on."""
    with _blocks.lock:
        _blocks.collect()
        _blocks.peak = _blocks.used
        _blocks._trim(_blocks.used)
