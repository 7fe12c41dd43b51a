"""The processes over which a model's gradients are averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.nn.wrappers import inside

__all__ = ["Processes"]


@dataclass(frozen=True)
class Processes:
    """How many processes `.grad` is an average over, and their group; one where nothing averages."""

    count: int = 1
    group: Any = None

    @staticmethod
    def of(model: nn.Module) -> Processes:
        """Those of the `DistributedDataParallel` that a model is.

        Raises:
            FqtError: the model is inside another wrapper with it, and there are several.
        """
        outer: nn.Module | None = model
        while outer is not None:
            if any(kind.__name__ == "DistributedDataParallel" for kind in type(outer).__mro__):
                group: Any = outer.process_group
                found = Processes(torch.distributed.get_world_size(group), group)
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

    def mean_of(self, number: float) -> float:
        """The mean of every process's number."""
        return float(self.mean(torch.tensor(number, dtype=torch.float64))) if self.count > 1 else number

    def total(self, number: int) -> int:
        """The sum of every process's whole number."""
        return round(self.mean_of(number) * self.count)
