"""Memory for intermediate results, kept from call to call.

A fresh allocation of some megabytes costs a page fault per four kilobytes, which is more than the arithmetic on it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from fqt.kernels import native

_memory = threading.local()


def workspace(name: str, shape: torch.Size, like: Tensor) -> Tensor | None:
    """An uninitialised contiguous tensor of like's dtype; None where the native kernels cannot use it.

    The same memory is given again at the next call with this name in this thread: the result must not outlive the
    call that asked for it.
    """
    if not native.takes(like):
        return None
    size = math.prod(shape)
    held: dict[str, Tensor] = _memory.__dict__.setdefault("held", {})
    found = held.get(name)
    if found is None or found.numel() < size or found.dtype != like.dtype:
        held.pop(name, None)
        found = held[name] = torch.empty(size, dtype=like.dtype, device="cpu")
    return found[:size].view(shape)
