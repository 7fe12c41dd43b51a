"""torch's FLOP counter sees of a converted layer what it sees of the float one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fqt

from .cases import LAYERS, Case, gradients, ids

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def flops(module: nn.Module, x: torch.Tensor) -> dict:
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    return {name.removeprefix("Quantized"): sum(c.values()) for name, c in counter.get_flop_counts().items()}


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_counts_of_the_float_layer(case: Case, needs_input: bool) -> None:
    layer, x = case.layer(torch.float32), case.input(torch.float32).requires_grad_(needs_input)
    wanted = flops(layer, x)
    assert wanted["Global"] > 0
    assert flops(fqt.quantize_(layer, "default"), x) == wanted


@pytest.mark.parametrize("case", LAYERS[:12], ids=ids)
def test_counting_changes_no_number(case: Case) -> None:
    layer, x = fqt.quantize_(case.layer(torch.float32), "default"), case.input(torch.float32)
    torch.manual_seed(2)
    wanted = gradients(layer, x)
    torch.manual_seed(2)
    with FlopCounterMode(display=False):
        found = gradients(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
