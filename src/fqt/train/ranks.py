"""The processes that make one run together, as `torchrun` starts them; a run alone is one of one process.

The first process (rank 0) locks the folder, writes and reports; what it alone knows it tells the others. They talk
on the CPU: a few numbers per step.

What ends one process ends all: it says why, in one line, and the others, whose connection to it breaks, say
nothing. To agree on errors at every step was no alternative: the others wait in the exchange of gradients by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from fqt.errors import FqtError
from fqt.seeds import derive_seed

__all__ = ["Ranks", "claims", "launched", "peers", "started"]

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for what the first process does alone, such as a beam search over a test set


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run, in torch's default group of processes.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
        local: rank among those on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @staticmethod
    @contextmanager
    def start() -> Iterator[Ranks]:
        """Those that `torchrun` has started, in a group that ends with the context; without it, this one alone.

        Raises:
            FqtError: another of them has ended.
        """
        if started() == 1:
            yield Ranks()
            return
        ranks = Ranks(int(os.environ["RANK"]), started(), int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        with peers():
            dist.init_process_group(
                backend, store=_store(), rank=ranks.rank, world_size=ranks.count, timeout=PATIENCE
            )
            yield ranks
            # Not after an error: the others would miss this process before it has said why.
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def lead(self, function: Callable[[], T]) -> T:
        """What the first process finds, on all of them; the others wait.

        Raises:
            FqtError: what the function raised there, on all of them.
        """
        if self.count == 1:
            return function()
        answer: list[Any] = [None]
        if self.first:
            try:
                answer = [(None, function())]
            except FqtError as error:
                answer = [(error, None)]
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        failure, value = answer[0]
        if failure is not None:
            raise failure
        return value

    def everyone(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks."""
        found: list[Any] = [value]
        if self.count > 1:
            found = [None] * self.count
            dist.all_gather_object(found, value)
        return found

    def total(self, sums: Tensor) -> list[float]:
        """Sums (k,) over all processes, in float64: counts are exact. The same bits on all of them."""
        mine = sums.to("cpu", torch.float64, copy=True)
        if self.count > 1:
            dist.all_reduce(mine)
        return mine.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any of them."""
        return flag if self.count == 1 else self.total(torch.tensor([float(flag)]))[0] > 0

    def deal(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """This process's items, one of every `count`, each with whether it counts.

        All processes get equally many, so that they can exchange something at each: where the last items are too
        few, those that have none take the first of them, which does not count.
        """
        source = iter(items)
        while together := list(islice(source, self.count)):
            counts = self.rank < len(together)
            yield together[self.rank if counts else 0], counts

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Puts the first process's values into all processes' tensors, in one message for each dtype and device."""
        if self.count == 1:
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            values = torch.cat([tensor.detach().flatten() for tensor in alike])
            dist.broadcast(values, 0)
            for tensor, value in zip(alike, values.split([t.numel() for t in alike]), strict=True):
                tensor.copy_(value.view(tensor.shape))

    def noise_seed(self, seed: int, step: int = 0) -> int:
        """The seed of this process's noise from a step on; the first one's is that of a run alone.

        Args:
            seed: of the run.
            step: 0 at the start, else where a process joins a run that has gone on without it.
        """
        if self.first:
            return derive_seed(seed, "noise")
        return derive_seed(seed, "noise", self.rank, *((step,) if step else ()))


def launched() -> bool:
    """Whether `torchrun` has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def claims(line: str) -> bool:
    """Whether this process is the one to say a line, as the first of all that would; without `torchrun` it is."""
    try:
        return started() == 1 or _store().add(f"said {derive_seed(line)}", 1) == 1
    except RuntimeError:  # torchrun itself has gone
        return True


def started() -> int:
    """How many processes `torchrun` has started to work together; one without it."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


@cache
def _store() -> Any:
    """What torchrun's processes find each other by; it outlives each of them."""
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("fqt", store)


@contextmanager
def peers() -> Iterator[None]:
    """Says that another process has ended where torch says what that did to a connection."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise FqtError(
            "another process of the run has ended, and so does this one: see what it said; --resume continues"
        ) from error
