"""Under autocast a layer takes and returns what its float form would; GradScaler sees overflow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fqt

from .cases import LAYERS, Case, ids, loss_of, small_batch, small_net

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
RECIPES = ("qat", "psq4", "default")


def outcome(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> tuple:
    """dtypes of the output and of all gradients."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(leaf)
    out.float().sum().backward()
    return out.dtype, leaf.grad.dtype, *(p.grad.dtype for p in layer.parameters())


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_dtypes_are_the_float_layers(case: Case, cast: torch.dtype) -> None:
    for dtype in (torch.float32, cast):
        layer, x = case.layer(torch.float32), case.input(dtype)
        truth = outcome(layer, x, cast)
        layer.zero_grad()
        assert outcome(fqt.quantize_(layer, "psq4"), x, cast) == truth


def test_float64_and_short_parameters() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        layer, x = nn.Linear(3, 2).to(dtype), torch.randn(4, 3, dtype=dtype)
        truth = outcome(layer, x, torch.bfloat16)
        layer.zero_grad()
        assert outcome(fqt.quantize_(layer, "psq4"), x, torch.bfloat16) == truth


def test_disabled_inside() -> None:
    layer = fqt.quantize_(nn.Linear(3, 2), "psq8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(4, 3)).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(torch.randn(4, 3)).dtype == torch.float32
            with pytest.raises(RuntimeError, match="bfloat16"):
                layer(torch.randn(4, 3).bfloat16())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_network_trains(recipe: str) -> None:
    model, batch = fqt.quantize_(small_net(), recipe), small_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_autocast_rounds_only_the_output() -> None:
    """The operands are quantized from what was given, not from its bfloat16 rounding."""
    for case in LAYERS:
        layer, x = fqt.quantize_(case.layer(torch.float32), "qat"), case.input(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        assert torch.equal(out, layer(x).bfloat16())


@pytest.mark.parametrize("recipe", RECIPES)
def test_grad_scaler_skips_an_overflow(recipe: str) -> None:
    model, (x, y) = fqt.quantize_(small_net(), recipe), small_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, moves in ((1.0, True), (torch.inf, False), (1.0, True)):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(loss_of(model, (x, y)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert moved == moves
        assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == 2.0**9


def test_a_power_of_two_loss_scale_changes_nothing() -> None:
    model, batch = fqt.quantize_(small_net(), "psq4"), small_batch()
    found = []
    for scale in (1.0, 2.0**12):
        torch.manual_seed(1)
        model.zero_grad()
        (loss_of(model, batch) * scale).backward()
        found.append([p.grad / scale for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))
