"""Activation checkpointing and gradient accumulation: the backward noise does not depend on recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fqt

from .cases import equal, gradients, loss_of, small_batch, small_net

RECIPES = ("qat", "psq4", "bhq4d", "default")


class Checkpointed(nn.Module):
    """The same modules, each pair of them recomputed in the backward."""

    def __init__(self, model: nn.Sequential, use_reentrant: bool, preserve: bool = True) -> None:
        super().__init__()
        self.model, self.options = model, {"use_reentrant": use_reentrant, "preserve_rng_state": preserve}

    def forward(self, x: Tensor) -> Tensor:
        for i in range(0, len(self.model), 2):
            x = checkpoint(self.model[i : i + 2], x, **self.options)
        return x


def model_without_state(recipe: str) -> nn.Sequential:
    """Dropout draws from the same generator; no batch norm, whose running statistics would be updated twice."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.Dropout(0.3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return fqt.quantize_(nn.Sequential(*layers), recipe)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bit_for_bit(recipe: str, use_reentrant: bool) -> None:
    model, (x, _) = model_without_state(recipe), small_batch()
    torch.manual_seed(6)
    truth = gradients(model, x)
    torch.manual_seed(6)
    assert equal(gradients(Checkpointed(model, use_reentrant), x), truth)
    torch.manual_seed(7)
    assert not equal(gradients(model, x), truth)  # dropout alone makes them differ


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_noise_follows_the_seed(use_reentrant: bool) -> None:
    model, (x, _) = model_without_state("psq4").eval(), small_batch()
    for layer in model:
        layer.train(not isinstance(layer, nn.Dropout))
    wrapped = Checkpointed(model, use_reentrant)
    assert not equal(gradients(wrapped, x), gradients(wrapped, x))


def test_without_the_generators_state_the_noise_is_the_first_forwards() -> None:
    """Not reentrant: the graph of the first forward does the backward, so its seed counts."""
    model, (x, _) = fqt.quantize_(nn.Sequential(nn.Flatten(), nn.Linear(72, 5)), "psq4"), small_batch()
    torch.manual_seed(6)
    truth = gradients(model, x)
    torch.manual_seed(6)
    assert equal(gradients(Checkpointed(model, False, preserve=False), x), truth)


def test_sequential() -> None:
    model, (x, _) = model_without_state("shq4"), small_batch()
    torch.manual_seed(6)
    truth = gradients(model, x)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.model, 3, x, use_reentrant=False)

    torch.manual_seed(6)
    assert equal(gradients(Wrapped(), x), truth)


def test_transformer_layer() -> None:
    torch.manual_seed(0)
    layer = fqt.quantize_(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "psq4")
    x, wrapped = torch.randn(3, 5, 8), Checkpointed(nn.Sequential(layer), False)
    torch.manual_seed(6)
    truth = gradients(layer, x)
    torch.manual_seed(6)
    assert equal(gradients(wrapped, x), truth)


def test_saved_tensors_on_the_cpu() -> None:
    """Offloading hooks see every saved tensor and hand back a copy."""
    model, (x, _) = model_without_state("psq4"), small_batch()
    torch.manual_seed(6)
    truth = gradients(model, x)
    torch.manual_seed(6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert equal(gradients(model, x), truth)
    torch.manual_seed(6)
    with torch.autograd.graph.save_on_cpu():
        assert equal(gradients(model, x), truth)


@pytest.mark.parametrize("recipe", RECIPES)
def test_accumulation(recipe: str) -> None:
    """Two backward passes add up, each with its own noise."""
    model, batch = fqt.quantize_(small_net(), recipe), small_batch()
    parts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        loss_of(model, batch).backward()
        parts.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for seed in (1, 2):
        torch.manual_seed(seed)
        loss_of(model, batch).backward()
    for p, a, b in zip(model.parameters(), *parts, strict=True):
        assert torch.equal(p.grad, a + b)
    differ = any(not torch.equal(a, b) for a, b in zip(*parts, strict=True))
    assert differ == (recipe != "qat")


def test_two_forwards_one_backward() -> None:
    model, (x, _) = fqt.quantize_(nn.Sequential(nn.Flatten(), nn.Linear(72, 5)), "psq4"), small_batch()

    def run(order: list[int]) -> Tensor:
        torch.manual_seed(6)
        outs = [model(x), model(x * 2)]
        model.zero_grad()
        for i in order:
            outs[i].square().sum().backward()
        return model[1].weight.grad.clone()

    torch.testing.assert_close(run([0, 1]), run([1, 0]), rtol=1e-6, atol=1e-6)
