"""The processes over which a model's gradients are averages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.nn.wrappers import inside

__all__ = ["Processes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that `.grad` is an average over; one where nothing averages.

    Attributes:
        count: how many.
        group: theirs.
        device: the model's; a group of GPUs' own (NCCL) sends nothing that lies elsewhere.
    """

    count: int = 1
    group: Any = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a constant

    @staticmethod
    def of(model: nn.Module, group: Any = None) -> Processes:
        """Those of a group, or of the `DistributedDataParallel` that a model is.

        Args:
            model: whose gradients they average.
            group: a process group; None for that of the model.

        Raises:
            FqtError: the model is inside another wrapper with it, and there are several.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if group is not None:
            return Processes(torch.distributed.get_world_size(group), group, device)
        outer: nn.Module | None = model
        while outer is not None:
            if any(kind.__name__ == "DistributedDataParallel" for kind in type(outer).__mro__):
                own: Any = outer.process_group
                found = Processes(torch.distributed.get_world_size(own), own, device)
                if outer is not model and found.count > 1:
                    raise FqtError(
                        f"a monitor cannot make one process's passes through {type(model).__name__} around "
                        "DistributedDataParallel: put that outermost, DistributedDataParallel(torch.compile(model))"
                    )
                return found
            name = inside(outer)
            outer = None if name is None else outer.get_submodule(name)
        return Processes()

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every process's x, in place; the same bits on all of them."""
        if self.count > 1:
            torch.distributed.all_reduce(x, group=self.group)
            x /= self.count
        return x

    def means(self, *numbers: float) -> tuple[float, ...]:
        """The mean of every process's numbers, one by one."""
        if self.count == 1:
            return numbers
        return tuple(self.mean(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist())

    def total(self, number: int) -> int:
        """The sum of every process's whole number."""
        return round(self.means(number)[0] * self.count)

    def together(self, work: Callable[[], T]) -> T:
        """What a process's own work gives, which asks the others for nothing.

        Where it fails on one process it fails on all: none is left waiting for the others.

        Raises:
            FqtError: it failed on another process; on its own, an error is raised as it is.
        """
        failure: Exception | None = None
        try:
            value = work()
        except Exception as error:
            failure = error
        if self.total(failure is not None):
            raise failure or FqtError("another process refused its part, and said why")
        return value
