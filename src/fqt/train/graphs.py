"""The launches of a training step as CUDA graphs: what a call does on a GPU is recorded once and then replayed.

A layer on integers is some tens of launches, and launching costs the host what a large product costs the device.
A replay launches them all at once. Noise is drawn from the device's generator, which a replay moves on as the call
itself would, so that it is new in every step, and the same as without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fqt.errors import FqtError

__all__ = ["Capture", "Graphs"]

Found = tuple[Tensor, ...]
Call = Callable[[Any], Found]
_WARM = 2  # calls as they are: kernels are compiled and measured, and gradients get the memory that they keep
_MOST = 8  # graphs


class Record(Protocol):
    """How calls are recorded."""

    def before(self, call: Callable[[], Found]) -> Found:
        """Makes a call that is not recorded, but will be."""

    def __call__(self, call: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        """What the call returns at the first replay, and what runs it again into the same tensors."""


class Graphs:
    """A call on batches, replayed for every shape that comes often.

    The call may read the host's memory for nothing but what stays as it is, and must not wait for the device. What
    it leaves behind (gradients, running means) must lie where it lay: gradients are set to zero, not to None.

    Args:
        call: from a batch on the GPU, a tensor or nested tuples of tensors, to tensors.
        record: makes the calls before a recording, and recordings: `Capture`.
    """

    def __init__(self, call: Call, record: Record) -> None:
        self._call, self._record = call, record
        self._most = _MOST
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[Any, Found, Callable[[], None]]] = {}

    def __call__(self, batch: Any) -> Found:
        """What the call returns for a batch; the tensors are the caller's own."""
        shape = _shape(batch)
        if shape not in self._graphs:
            if len(self._graphs) == self._most:
                return self._call(batch)
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= _WARM:
                return self._record.before(lambda: self._call(batch))
            given = _map(batch, torch.clone)
            try:
                self._graphs[shape] = (given, *self._record(lambda: self._call(given)))
            except torch.cuda.OutOfMemoryError:  # of a further shape: what is recorded goes on
                self._most = len(self._graphs)
                return self._call(batch)
        given, found, replay = self._graphs[shape]
        _copy(given, batch)
        replay()
        return tuple(tensor.clone() for tensor in found)


class Capture:
    """CUDA graphs of one device, in one pool of memory: they run one at a time, and what they return is copied.

    A step lies in the memory of the stream that it first ran on, so all run on one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def before(self, call: Callable[[], Found]) -> Found:
        """The call on a stream of its own, as a capture wants the calls before it."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            self._side.wait_stream(stream)
            with torch.cuda.stream(self._side):
                found = call()
            stream.wait_stream(self._side)
        return found

    def __call__(self, call: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        """Other threads, such as those that pin batches, may go on meanwhile.

        Raises:
            FqtError: what the call does cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"),
            ):
                found = call()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a broken capture raises a second one
            reason = str(cause).splitlines()[0]
            raise FqtError(
                f"--graph: this step cannot be recorded ({reason}); continue with --resume --no-graph"
            ) from error
        return found, graph.replay


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
