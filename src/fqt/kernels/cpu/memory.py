"""Memory of large results on the CPU, used again as soon as the tensor in it is gone.

A fresh allocation of some megabytes costs a page fault per four kilobytes: at the speed of the kernels up to a
third of a training step. The C library hands such memory back to the system and asks for it anew, so the results of
the native kernels come from blocks that are kept here. Blocks in use and kept ones together are never more than
half as much again as was in use at one time; no less, since a step that needs a few sizes, not all at once, would
otherwise lose a block in every round.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor

LEAST = 1 << 20
"""Bytes below which the C library's own memory is as good."""


class _Blocks:
    """Free blocks by size, and how much is and was in use."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a collection may run a finalizer while the lock is held
        self.free: dict[int, list[mmap.mmap]] = {}
        self.held = self.used = self.peak = 0

    def take(self, size: int) -> mmap.mmap:
        """A block of `size` bytes with unknown content."""
        with self.lock:
            self.used += size
            self.peak = max(self.peak, self.used)
            found = self.free.get(size)
            if found:
                self.held -= size
                return found.pop()
            self._trim(size)
        # Private: what a forked child writes stays its own.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def give(self, block: mmap.mmap, size: int) -> None:
        """Keeps a block whose tensor is gone; others are dropped where that would be too much."""
        with self.lock:
            self.used -= size
            self.free.setdefault(size, []).append(block)
            self.held += size
            self._trim(size)

    def _trim(self, size: int) -> None:
        """Drops free blocks beyond the bound, of other sizes first."""
        for other in sorted(self.free, key=lambda s: s == size):
            while self.held + self.used > self.peak * 3 // 2 and self.free[other]:
                self.free[other].pop()
                self.held -= other


_blocks = _Blocks()


@lru_cache(maxsize=256)
def _lease(size: int) -> type:
    """A buffer of that many bytes that can be watched."""
    return type("Lease", (ctypes.c_uint8 * size,), {})


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor on the CPU, as `torch.empty`.

    A large one lies in a block that is used again when no tensor refers to it any more; its storage cannot be
    resized.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LEAST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    # Sizes in steps of an eighth of a power of two, so that slightly different shapes share blocks.
    step = max(mmap.PAGESIZE, 1 << (size.bit_length() - 4))
    size = -(-size // step) * step
    block = _blocks.take(size)
    lease = _lease(size).from_buffer(block)  # type: ignore[attr-defined]
    weakref.finalize(lease, _blocks.give, block, size).atexit = False
    return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)


def release() -> None:
    """Hands all free blocks back to the system."""
    with _blocks.lock:
        _blocks.free.clear()
        _blocks.held = 0
        _blocks.peak = _blocks.used
