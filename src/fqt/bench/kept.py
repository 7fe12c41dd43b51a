"""Bytes kept for backward, counted by autograd's saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fqt.bench.contestants import Runner
from fqt.bench.workloads import PRODUCT_LAYERS, draw


@dataclass(frozen=True)
class Kept:
    """Bytes of distinct storages that a forward pass keeps and that grow with the batch.

    Attributes:
        layers: kept by the layers that have products with a weight.
        total: kept by the whole model.
    """

    layers: int
    total: int


def kept_bytes(runner: Runner) -> Kept:
    """What the model of an eager contestant keeps for one batch.

    Weights, their codes and their casts are left out by taking the difference between the whole batch and half of
    it, twice: whatever form a layer keeps its weight in does not grow with the batch.
    """
    whole, half = _count(runner, runner.input.shape[0]), _count(runner, runner.input.shape[0] // 2)
    return Kept(*(2 * (a - b) for a, b in zip(whole, half, strict=True)))


def _count(runner: Runner, samples: int) -> tuple[int, int]:
    storages: dict[int, Any] = {}  # held, so that no address is used twice
    inside: set[int] = set()
    depth = 0

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    def pack(tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage
            if depth:
                inside.add(storage.data_ptr())
        return tensor

    layers = [m for m in runner.plain.modules() if isinstance(m, PRODUCT_LAYERS)]
    handles = [m.register_forward_pre_hook(enter) for m in layers]
    handles += [m.register_forward_hook(leave, always_call=True) for m in layers]
    shape = (samples, *runner.input.shape[1:])
    x = draw(shape, 1, runner.device).to(runner.input).contiguous(memory_format=_format(runner))
    x = x.requires_grad_(runner.input.requires_grad)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), runner.setting():
            output = runner.plain(x)
    finally:
        for handle in handles:
            handle.remove()
    del output
    return sum(storages[key].nbytes() for key in inside), sum(s.nbytes() for s in storages.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold its numbers: a subclass that wraps others has no storage of its own."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _format(runner: Runner) -> torch.memory_format:
    return runner.format if runner.input.ndim == 4 else torch.contiguous_format
