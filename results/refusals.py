"""What the monitor refuses: right gradients never, wrong ones nearly always; and how often it has to look twice.

    python results/refusals.py OUTPUT.json

Small nets are trained for some steps with a reading at every one. Each reading's share of ‖ĝ − g‖² along g is
noted, and whether the pass was made again. Then, with the averages of good readings behind it, the monitor is given
gradients that went wrong each in one way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqt
from fqt.errors import FqtError
from fqt.records import environment, write_json
from fqt.stats import monitor as module

RECIPES = ("ptq2", "psq4", "shq3", "psq8", "shq8d", "default")
STEPS, SAMPLES, CLASSES = 60, 32, 4
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Tokens through one attention block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(8, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 8) -> (N, CLASSES)
        """The logits."""
        y = self.embed(x)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.head((y + self.mlp(y)).mean(1))


def _mlp(width: int, inputs: int) -> nn.Module:
    sizes = (inputs, width, width, CLASSES)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _convolutions() -> nn.Module:
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(144, CLASSES))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear 4 → 4": (lambda: nn.Linear(4, CLASSES), (4,)),
    "MLP of width 8": (lambda: _mlp(8, 6), (6,)),
    "MLP of width 64": (lambda: _mlp(64, 32), (32,)),
    "convolutions": (_convolutions, (3, 8, 8)),
    "attention": (Block, (6, 8)),
}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def _batch(shape: tuple[int, ...], seed: int) -> Batch:
    """Gaussian inputs; the class is the largest of four of their linear functions."""
    x = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(seed))
    teacher = torch.randn(x[0].numel(), CLASSES, generator=torch.Generator().manual_seed(-1))
    return x, (x.flatten(1) @ teacher).argmax(1)


def _backward(model: nn.Module, batch: Batch) -> None:
    loss_fn(model, batch).backward()


def _clipped(model: nn.Module, batch: Batch, other: Batch) -> Batch:
    _backward(model, batch)
    for p in model.parameters():
        p.grad *= 0.5
    return batch


def _scaled(model: nn.Module, batch: Batch, other: Batch) -> Batch:
    (loss_fn(model, batch) * 65536).backward()
    return batch


def _accumulated(model: nn.Module, batch: Batch, other: Batch) -> Batch:
    _backward(model, other)
    _backward(model, batch)
    return batch


def _not_zeroed(model: nn.Module, batch: Batch, other: Batch) -> Batch:
    before = torch.autograd.grad(loss_fn(model.eval(), other), list(model.parameters()))
    for p, gradient in zip(model.train().parameters(), before, strict=True):
        p.grad = gradient
    _backward(model, batch)
    return batch


def _other_batch(model: nn.Module, batch: Batch, other: Batch) -> Batch:
    _backward(model, batch)
    return other


def _other_targets(model: nn.Module, batch: Batch, other: Batch) -> Batch:
    _backward(model, batch)
    return batch[0], other[1]


WRONG = {
    "half, as if clipped": _clipped,
    "loss scale of 65536": _scaled,
    "two batches, one given": _accumulated,
    "not zeroed": _not_zeroed,
    "another batch": _other_batch,
    "another batch's targets": _other_targets,
}


class _Watch:
    """Notes the shares along g, and how often a pass was made again."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.again = 0

    def on(self) -> Any:
        """While it lasts, readings are noted."""
        check, init = module.Monitor._check, module.Comparison.__init__
        seen: list[module.Comparison] = []

        def noted(comparison: module.Comparison) -> None:
            init(comparison)
            seen.append(comparison)

        def counted(monitor: module.Monitor, *arguments: Any) -> None:
            self.again += 1
            check(monitor, *arguments)

        step = module.Monitor.step

        def stepped(monitor: module.Monitor, *arguments: Any, **options: Any) -> Any:
            seen.clear()
            try:
                return step(monitor, *arguments, **options)
            finally:
                self.shares += [c.along for c in seen[:1] if c.reference]

        return patch.multiple(module.Monitor, _check=counted, step=stepped), patch.object(
            module.Comparison, "__init__", noted
        )


def _measure(name: str, recipe: str) -> dict[str, Any]:
    build, shape = NETS[name]
    torch.manual_seed(0)
    model = fqt.quantize_(build(), recipe).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor, watch, refused = fqt.Monitor(model, loss_fn, every=1), _Watch(), 0
    patches = watch.on()
    with patches[0], patches[1]:
        for step in range(STEPS):
            optimizer.zero_grad()
            batch = _batch(shape, step)
            _backward(model, batch)
            try:
                monitor.step(batch)
            except FqtError:
                refused += 1
            optimizer.step()
    shares = torch.tensor(watch.shares, dtype=torch.float64)
    wrong: dict[str, int] = {}
    for label, make in WRONG.items():
        wrong[label] = 0
        for trial in range(STEPS // 3):
            optimizer.zero_grad()
            given = make(model, _batch(shape, 1000 + trial), _batch(shape, 2000 + trial))
            state = monitor.state_dict()
            try:
                monitor.step(given)
            except FqtError:
                wrong[label] += 1
            monitor.load_state_dict(state)
    monitor.close()
    return {
        "net": name,
        "recipe": recipe,
        "right": {"readings": STEPS, "refused": refused, "made_again": watch.again},
        "share_along": {"median": float(shares.median()), "max": float(shares.max())},
        "wrong": {"readings": STEPS // 3, "refused": wrong},
    }


def main(output: Path) -> None:
    """Measures and writes the record."""
    torch.set_num_threads(1)
    rows = []
    for name in NETS:
        for recipe in RECIPES:
            rows.append(_measure(name, recipe))
            print(rows[-1], flush=True)
    command = ["python", "results/refusals.py", output.name]
    write_json(output, {"environment": environment(command), "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
