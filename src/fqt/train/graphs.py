"""The launches of a training step as CUDA graphs: what a call does on a GPU is recorded once and then replayed.

A layer on integers is some tens of launches, and launching costs the host what a large product costs the device.
A replay launches them all at once. Noise is drawn from the device's generator, which a replay moves on as the call
itself would, so that it is new in every step, and the same as without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fqt.errors import FqtError

__all__ = ["Graphs"]

Found = tuple[Tensor, ...]
Call = Callable[[Any], Found]
Record = Callable[[Callable[[], Found]], tuple[Found, Callable[[], None]]]
_WARM = 2  # calls as they are: kernels are compiled and measured, and gradients get the memory that they keep
_MOST = 8  # graphs: each keeps the memory of its step's tensors


class Graphs:
    """A call on batches, replayed for every shape that comes often.

    The call may read the host's memory for nothing but what stays as it is, and must not wait for the device. What
    it leaves behind (gradients, running means) must lie where it lay: gradients are set to zero, not to None.

    Args:
        call: from a batch on the GPU, a tensor or nested tuples of tensors, to tensors.
        record: takes a function without arguments and returns what it returned and a function that runs it again
            into the same tensors; a CUDA graph of it.
    """

    def __init__(self, call: Call, record: Record | None = None) -> None:
        self._call, self._record = call, record or _captured
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[Any, Found, Callable[[], None]]] = {}

    def __call__(self, batch: Any) -> Found:
        """What the call returns for a batch; the tensors are the caller's own."""
        shape = _shape(batch)
        if shape not in self._graphs:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= _WARM or len(self._graphs) == _MOST:
                return _beside(self._call, batch)
            given = _map(batch, torch.clone)
            self._graphs[shape] = (given, *self._record(lambda: self._call(given)))
        given, found, replay = self._graphs[shape]
        _copy(given, batch)
        replay()
        return tuple(tensor.clone() for tensor in found)


def _captured(call: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = call()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise FqtError(f"--graph: this step cannot be recorded ({reason}); leave --graph out") from error
    return found, graph.replay


def _beside(call: Call, batch: Any) -> Found:
    """The call on a stream of its own, as a capture wants the calls before it."""
    if not torch.cuda.is_available():
        return call(batch)
    stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        found = call(batch)
    stream.wait_stream(side)
    return found


def _map(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    return function(batch) if isinstance(batch, Tensor) else tuple(_map(part, function) for part in batch)


def _shape(batch: Any) -> Any:
    return _map(batch, lambda tensor: (tensor.shape, tensor.dtype, tensor.stride()))


def _copy(to: Any, batch: Any) -> None:
    if isinstance(batch, Tensor):
        to.copy_(batch)
    else:
        for old, new in zip(to, batch, strict=True):
            _copy(old, new)
