"""Growth: many steps of a small converted network must not fill the memory, fqt's caches or the file table."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fqt

MEBIBYTES = 16  # of growth: the allocator's own; a leak of one activation per step would be fifty times that


def main(cases: int, seed: int = 0, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Trains for `cases` steps; what has grown after the first tenth.

    Args:
        cases: steps.
        seed: of weights, data and noise.
        progress: told how many were made.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    fqt.quantize_(model)
    loss_fn = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    warm = max(2, cases // 10)
    monitor = fqt.Monitor(model, loss_fn, every=min(100, warm // 2))  # its first reading fills caches, too
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    before: dict[str, float] = {}
    for step in range(1, cases + 1):
        batch = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
        if step == warm:
            before = _sizes()
        if progress is not None and step % 50 == 0:
            progress(step)
    after = _sizes()
    grown = {
        name: round(after[name] - before.get(name, 0), 2) for name in after if after[name] > before.get(name, 0)
    }
    failures = [
        f"{name} has grown by {growth} between steps {warm} and {cases}"
        for name, growth in grown.items()
        if growth > (MEBIBYTES if name == "resident MiB" else 0)
    ]
    resident = {"resident MiB at first": before["resident MiB"], "resident MiB at last": after["resident MiB"]}
    return {"cases": cases, "seed": seed, **resident, "grown": grown, "failures": failures}


def _sizes() -> dict[str, float]:
    """Resident memory, open files, living tensors, and the length of every container and cache of fqt's modules."""
    gc.collect()
    sizes: dict[str, float] = {"tensors": sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))}
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes["resident MiB"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
        sizes["open files"] = len(os.listdir("/proc/self/fd"))
    for module_name, module in sorted(sys.modules.items()):
        if module_name.split(".")[0] != "fqt":
            continue
        for name, value in vars(module).items():
            if isinstance(value, functools._lru_cache_wrapper):
                sizes[f"{module_name}.{name}"] = value.cache_info().currsize
            elif isinstance(value, Sized) and not isinstance(value, str | bytes | type):
                sizes[f"{module_name}.{name}"] = len(value)
    return sizes
