"""Small cases that stand for the real ones."""

from __future__ import annotations

import math

import pytest
from torch import nn

from fqt.bench.cases import Case, Floor
from fqt.bench.products import OPERANDS
from fqt.bench.workloads import Layer, Product, Quantize, image_classifier, transformer

FLOORS = (
    Floor("bf16", 1e-6, ("psq8",)),
    Floor("fp32", 1e6, ("psq8",)),
    Floor("limit", 1e-9, ("psq8",)),
    Floor("kept/fp32", 0.27, ("psq8",)),
    Floor("kept/bf16", 0.52, ("psq8",)),
)
LINEAR = Case(
    name="linear",
    title="Linear 64→48",
    workload=Layer(model=lambda: nn.Linear(64, 48), input=(128, 64)),
    recipes=("psq8", "shq8"),
    floors=(*FLOORS, Floor("psq8", 1e6, ("shq8",))),
    bound=0.06,
)
CONV = Case(
    name="conv",
    title="Conv 3×3, 16→16",
    workload=Layer(model=lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False), input=(8, 16, 8, 8)),
    recipes=("psq8",),
    bound=0.06,
)
BLOCKS = Case(
    name="blocks", title="one block", workload=transformer(1, 32, 4, 4, 16), recipes=("default",), bound=0.2
)
IMAGES = Case(
    name="images", title="a small net", workload=image_classifier("convnet", 8, 16), recipes=("psq8",), bound=0.9
)
MATRIX = Case(
    name="matrix",
    title="quantizer 64×256",
    workload=Quantize(input=(64, 256)),
    recipes=("psq8", "psq8d"),
    floors=(Floor("copy", 1e-9, ("psq8",)), Floor("copy", 1e9, ("psq8d",))),
)
PRODUCT = Case(
    name="product",
    title="product 70×64 · 64×40",
    workload=Product(input=(70, 64), columns=40, block=16),
    recipes=OPERANDS,
    floors=(Floor("plain", 1e-9, OPERANDS),),
)
TINY = (LINEAR, CONV, BLOCKS, IMAGES, MATRIX, PRODUCT)


class Silent:
    """An observer; `stop_at` raises what Ctrl-C raises when that many readings were made."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.titles: list[str] = []
        self.left = stop_at

    def case(self, title: str, total: int) -> None:
        self.titles.append(title)

    def say(self, text: str) -> None:
        pass

    def advance(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _quick(one_thread, monkeypatch):
    """Readings of a single call, bfloat16 on any machine: what is timed does not matter here."""
    monkeypatch.setattr("fqt.bench.timing.LEAST_SECONDS", 1e-9)
    monkeypatch.setattr("fqt.bench.measure.EMULATED", math.inf)
