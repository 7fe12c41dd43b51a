"""Layers that read one input share its codes: less time and memory, the same numbers."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import Recipe
from fqt.nn import operand, sharing

from .test_memory import kept_bytes


class Branches(nn.Module):
    """Layers on one input; `apart` gives each a copy."""

    def __init__(self, *layers: nn.Module, apart: bool = False) -> None:
        super().__init__()
        self.layers, self.apart = nn.ModuleList(layers), apart

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1  # a leaf's codes are never shared
        return torch.stack([layer(x.clone() if self.apart else x) for layer in self.layers]).sum(0)


def branches(recipe: str | Recipe = "psq8", apart: bool = False) -> Branches:
    torch.manual_seed(0)
    return fqt.quantize_(Branches(nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(64, 8), apart=apart), recipe)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that were quantized."""
    seen: list[Tensor] = []
    real = sharing.shared

    def counting(x, quantizer, axis, kind, quantize):  # type: ignore[no-untyped-def]
        return real(x, quantizer, axis, kind, lambda: (seen.append(x), quantize())[1])

    monkeypatch.setattr(operand, "shared", counting)
    return seen


def test_kept_once() -> None:
    x = torch.randn(128, 64, requires_grad=True)
    one = kept_bytes(fqt.quantize_(nn.Linear(64, 8), "psq8"), x)
    assert kept_bytes(branches(), x) <= one + 64  # steps and offsets at most
    assert kept_bytes(branches(apart=True), x) >= 3 * 128 * 64


def test_the_same_numbers(quantized: list[Tensor]) -> None:
    found = []
    for apart in (False, True):
        model, x = branches("default", apart), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        torch.manual_seed(3)
        out = model(x)
        out.backward(torch.ones_like(out))
        found.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(quantized) == 1 + 3


def test_an_input_that_was_written_to_is_quantized_again(quantized: list[Tensor]) -> None:
    model, x = branches(), torch.randn(5, 64, requires_grad=True) * 1
    first = model.layers[0](x)
    x.detach().mul_(2)
    second = model.layers[1](x)
    assert len(quantized) == 2
    assert torch.equal(second, model.layers[1](x.clone()))
    x.data = torch.randn(6, 64)
    assert model.layers[0](x).shape == (6, 8)
    del first


def test_leaves_are_never_shared(quantized: list[Tensor]) -> None:
    """A fused optimizer, numpy or `.data` write to them in ways that no version counter sees."""
    model, x = branches(), torch.randn(5, 64, requires_grad=True)
    first = model.layers[0](x)
    x.data.mul_(2)
    assert torch.equal(model.layers[0](x), model.layers[0](x.clone()))
    del first


def test_another_layout_is_another_set_of_codes(quantized: list[Tensor]) -> None:
    recipe = Recipe(input="ptq8@sample", grad_input="psq8", grad_weight="ptq8")
    linear, conv = fqt.quantize_(nn.Linear(6, 4), recipe), fqt.quantize_(nn.Conv1d(6, 4, 1), recipe)
    x = torch.randn(3, 6, 6, requires_grad=True) * 1
    out = linear(x)
    assert torch.equal(conv(x), conv(x.clone()))
    del out


def test_other_quantizers_and_graphs_that_are_gone(quantized: list[Tensor]) -> None:
    rules = (fqt.Rule("layers.1", Recipe(input="ptq4", grad_input="psq8", grad_weight="ptq8")),)
    model = branches(Recipe(grad_input="psq8", grad_weight="ptq8", rules=rules))
    x = torch.randn(5, 64, requires_grad=True)
    model(x).sum().backward()
    assert len(quantized) == 2  # 8 bits, once, and 4 bits
    model(x).sum().backward()
    assert len(quantized) == 4  # nothing of the first graph was kept
    with torch.no_grad():
        model(x)
    assert len(quantized) == 4 + 3  # without a graph nothing is kept


def test_nothing_outlives_its_input() -> None:
    gc.collect()
    before = len(sharing._known)
    model, x = branches(), torch.randn(5, 64, requires_grad=True) * 1
    out = model.layers[0](x) + model.layers[1](x)
    assert len(sharing._known) == before + 1
    out.sum().backward()
    del x, out
    gc.collect()
    assert len(sharing._known) == before


def test_inference_tensors_are_never_shared(quantized: list[Tensor]) -> None:
    with torch.inference_mode():
        x = torch.randn(5, 64)
        y = x * 1
    model = branches()
    with torch.no_grad():
        assert sharing.shared(y, model.layers[0].fqt_recipe.input, (0,), nn.Linear, lambda: "new") == "new"
    assert len(quantized) == 0
