"""Training, eval, no_grad and seeds: what is drawn from torch's generator, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fqt
from fqt.kernels import ops

from .cases import (
    FEW,
    LAYERS,
    NOISY,
    Case,
    converted,
    equal,
    gradients,
    ids,
    parameter_gradients,
    small_batch,
    small_net,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
RECIPES = ("ptq4", "psq4", "bhq4", "shq4d", "bhq4x", "default")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_eval_is_qat(case: Case, recipe: str) -> None:
    """Output and gradients of eval mode: those of the same recipe without gradient quantizers, bit for bit."""
    layer, x = converted(case, recipe, torch.float32), case.input(torch.float32)
    own = layer.fqt_recipe
    qat = fqt.Recipe(input=own.input, weight=own.weight)
    truth = gradients(converted(case, qat, torch.float32), x)
    assert equal(gradients(layer.eval(), x), truth)
    assert torch.equal(layer.train()(x), truth[0])


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_eval_draws_nothing(case: Case) -> None:
    layer, x = converted(case, "default", torch.float32).eval(), case.input(torch.float32)
    before = torch.get_rng_state()
    gradients(layer, x)
    with torch.no_grad():
        layer(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", FEW, ids=ids)
def test_training_draws_the_same_with_and_without_gradient(case: Case) -> None:
    """One draw per forward, also under no_grad and with frozen operands; none in the backward."""
    layer, x = converted(case, "default", torch.float32), case.input(torch.float32)
    states = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        torch.manual_seed(8)
        with context:
            layer(x)
        states.append(torch.get_rng_state())
    torch.manual_seed(8)
    gradients(layer, x)
    states.append(torch.get_rng_state())
    layer.requires_grad_(False)
    torch.manual_seed(8)
    layer(x)
    states.append(torch.get_rng_state())
    torch.manual_seed(8)
    untouched = torch.get_rng_state()
    assert all(torch.equal(s, states[0]) for s in states)
    assert not torch.equal(untouched, states[0])


def test_the_draw_does_not_depend_on_the_input() -> None:
    states = []
    for case in FEW:
        layer = converted(case, NOISY, torch.float32)
        for x in (case.input(torch.float32), case.input(torch.float32)[:1], case.input(torch.float32)[:0]):
            torch.manual_seed(8)
            layer(x)
            states.append(torch.get_rng_state())
    assert all(torch.equal(s, states[0]) for s in states)


@pytest.mark.parametrize("recipe", RECIPES)
def test_seeds(recipe: str) -> None:
    model, batch = fqt.quantize_(small_net(), recipe), small_batch()
    found = []
    for seed in (1, 1, 2, None):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(parameter_gradients(model, batch))
    first, same, other, successive = found
    assert all(torch.equal(first[n], same[n]) for n in first)
    for n in ("0.weight", "3.weight", "6.weight"):
        assert not torch.equal(first[n], other[n])
        assert not torch.equal(other[n], successive[n])


def test_global_python_and_numpy_state_do_not_matter() -> None:
    import random

    import numpy as np

    model, batch = fqt.quantize_(small_net(), "psq4"), small_batch()
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(3)
        found.append(parameter_gradients(model, batch))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


class _Items(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["qat", *RECIPES, "psq8d@token"])
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_no_item(case: Case, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a value is not at hand, as on a GPU; on the CPU, where asking costs nothing, work is saved by it."""
    monkeypatch.setattr(ops, "at_hand", lambda x: False)
    layer, x = converted(case, recipe, torch.float32), case.input(torch.float32)
    up = torch.randn_like(layer(x)).detach()
    with _Items() as items:
        gradients(layer, x, upstream=up)
        layer.eval()(x)
    assert items.count == 0
    with _Items() as items:  # the counter counts
        bool(up.sum() > 0)
    assert items.count == 1


class _Noise:
    """Rounding errors of one layer's two gradient quantizers, from the gradients of a linear layer."""

    def __init__(self, seed: int, layers: int = 1) -> None:
        n, o = 64, 64
        up = torch.randn(n, o, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(seed)
        self.noise: list[Tensor] = []
        for _ in range(layers):
            layer = fqt.quantize_(nn.Linear(n, n, bias=False), "ptq4")
            with torch.no_grad():
                layer.weight.copy_(torch.eye(n))
            torch.manual_seed(seed + len(self.noise))
            _, grad_x, grad_w = gradients(layer, torch.eye(n), upstream=up)
            # With 8-bit identities both products return the quantized gradient itself.
            self.noise += [(grad_x - up).flatten(), (grad_w.T - up).flatten()]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_operands_and_layers_have_independent_noise() -> None:
    """4096 pairs each: |ρ| < 0.1 is 6.4 standard errors, false alarms below 2e-9 over all pairs."""
    one, two = _Noise(1), _Noise(1, layers=2)
    assert correlation(one.noise[0], two.noise[0]) > 0.999  # the instrument sees equal noise
    noise = two.noise
    for i in range(len(noise)):
        assert noise[i].abs().max() > 0
        for j in range(i):
            assert abs(correlation(noise[i], noise[j])) < 0.1


def test_layers_in_one_model_have_independent_noise() -> None:
    """Three identity layers in parallel on one seed: the same upstream gradient, different noise."""
    n, up = 64, torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    layers = [fqt.quantize_(nn.Linear(n, n, bias=False), "ptq4") for _ in range(3)]
    for layer in layers:
        nn.init.eye_(layer.weight)
    torch.manual_seed(1)
    outs = [layer(torch.eye(n)) for layer in (*layers, layers[0])]  # the last call: the same layer again
    noise = []
    for out, layer in zip(outs, (*layers, layers[0]), strict=True):
        (grad,) = torch.autograd.grad(out, layer.weight, up)
        noise.append((grad.T - up).flatten())
    for i in range(4):
        for j in range(i):
            assert abs(correlation(noise[i], noise[j])) < 0.1
