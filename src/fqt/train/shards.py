"""A model whose parameters are dealt out over processes (`fully_shard`, FSDP2); what is saved of it is whole.

So a checkpoint does not say how many processes wrote it, and any number of them can take it up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fqt.nn.sharded import is_sharded
from fqt.train.ranks import Ranks

__all__ = ["gathered", "local", "placed", "placed_optimizer", "shard", "whole"]


def shard(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Deals the parameters out, in place: those of each block together, then the rest.

    A block is what stands in a `ModuleList` or `Sequential` and has modules of its own: its parameters are whole
    only while it computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    mesh = init_device_mesh(device.type, (ranks.count,))
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # it takes no other
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    for blocks in reversed(lists):  # the innermost first
        for block in blocks:
            if any(True for _ in block.children()) and not isinstance(block, nn.ModuleList):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Meanwhile every process holds all of the model's parameters and can compute with it alone, without gradients.

    Every process must enter and leave it.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def whole(value: Any) -> Any:
    """Tensors in nested dictionaries, each shard replaced by the whole that it is of; all processes must ask."""
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    return value.full_tensor() if isinstance(value, Tensor) and is_sharded(value) else value  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; shares its memory where gradients are off."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed(value: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor dealt out as ``like`` is."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[union-attr]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)  # type: ignore[union-attr]


def placed_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state with what it keeps per entry of a parameter dealt out as the parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def place(index: int, value: Any) -> Any:
        like = parameters[index] if index < len(parameters) else None
        alike = isinstance(value, Tensor) and like is not None and value.shape == like.shape
        return placed(value, like) if alike else value

    entries = {i: {name: place(i, value) for name, value in kept.items()} for i, kept in state["state"].items()}
    return {**state, "state": entries}
