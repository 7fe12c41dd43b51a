"""Torch's default dtype and device are the user's: results do not depend on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fqt

NAMES = ("ptq4", "ptq8d", "psq8", "bhq8", "shq8d", "psq8x")


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def results() -> list[torch.Tensor]:
    x = torch.linspace(-3, 2, 4000, dtype=torch.float32, device="cpu").view(40, 100).sin()
    found = []
    for name in NAMES:
        qx = fqt.quantizer(name).quantize(x, seed=7)
        found += [qx.codes, qx.step, qx.dequantize(), fqt.quantizer(name).variance(x, seed=7)]
    layer = nn.Linear(100, 5, device="cpu", dtype=torch.float32)
    nn.init.constant_(layer.weight, 0.5)
    nn.init.zeros_(layer.bias)
    fqt.quantize_(layer, "default")
    torch.manual_seed(3)
    layer(x).square().sum().backward()
    return [*found, layer.weight.grad]


def test_default_dtype(default_dtype: torch.dtype) -> None:
    found = results()
    torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, results(), strict=True))


def test_default_device() -> None:
    truth = results()
    with torch.device("meta"):
        found = results()
    assert all(b.device.type == "cpu" and torch.equal(a, b) for a, b in zip(truth, found, strict=True))
