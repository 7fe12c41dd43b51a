"""The monitor: unbiased readings, no trace left behind, the same readings after a restart."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import fqt
from fqt.errors import FqtError
from fqt.stats.monitor import first_half

from .nets import batches, loss, make, mlp


def plain(recipe: str | fqt.Recipe = "psq3", dropout: float = 0.0) -> nn.Module:
    """Without batch norm, whose statistics over half a batch would bias the sampling variance."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    return fqt.quantize_(nn.Sequential(*layers), recipe)


def readings(model: nn.Module, data: list, memory: float = 0.0) -> list[dict]:
    monitor, found = fqt.Monitor(model, loss, every=1, memory=memory), []
    for number, batch in enumerate(data):
        torch.manual_seed(number)
        model.zero_grad()
        loss(model, batch).backward()
        found.append(monitor.step(batch))
    monitor.close()
    return found


def gradient(model: nn.Module, batch: tuple) -> torch.Tensor:
    grads = torch.autograd.grad(loss(model, batch), list(model.parameters()))
    return torch.cat([g.double().flatten() for g in grads])


def test_quantization_is_the_distance_from_the_exact_gradient() -> None:
    model, batch = plain(), batches(1)[0]
    reading = readings(model, [batch])[0]
    noisy = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    exact = gradient(plain("qat"), batch)
    assert reading["quantization"] == pytest.approx(float((noisy - exact).square().sum()), rel=1e-6)


@pytest.mark.parametrize("n", [4, 5])
def test_sampling_is_unbiased_by_enumeration(n: int) -> None:
    """Over all choices of the first half, its mean is the samples' variance over n: unbiased for any sampling.

    The operands' ranges must not depend on the batch, or gradients would not be means over samples.
    """
    float_forward = fqt.Recipe(input=None, weight=None, grad_input="psq3", grad_weight="ptq3")
    x, y = batches(1, n=n)[0]
    found = []
    for first in itertools.combinations(range(n), n // 2):
        order = [*first, *(i for i in range(n) if i not in first)]
        found.append(readings(plain(float_forward), [(x[order], y[order])])[0]["sampling"])
    torch.manual_seed(0)
    exact = fqt.restore_(plain())
    single = torch.stack([gradient(exact, (x[i : i + 1], y[i : i + 1])) for i in range(n)])
    assert sum(found) / len(found) == pytest.approx(float(single.var(0).sum()) / n, rel=1e-5)


def test_layers_add_up_and_averages_are_weighted() -> None:
    data = batches(4)
    single, averaged = readings(plain(), data), readings(plain(), data, memory=0.5)
    assert set(single[0]["layers"]) == {"0", "3", "5"}
    assert single[0]["rho"] == pytest.approx(single[0]["quantization"] / single[0]["sampling"])
    weights = [0.125, 0.25, 0.5, 1]
    for key in ("quantization", "sampling"):
        mean = sum(w * r[key] for w, r in zip(weights, single, strict=True)) / sum(weights)
        assert averaged[-1][key] == pytest.approx(mean)


def test_dropout_is_replayed() -> None:
    """With exact gradient quantizers off but one at 8 bits, other masks would show as noise a thousandfold."""
    data = batches(20)
    with_dropout = readings(plain("psq8", dropout=0.5), data)
    without = readings(plain("psq8"), data)
    mean = lambda found: sum(r["quantization"] for r in found) / len(found)
    assert mean(with_dropout) < 10 * mean(without)


def test_a_loss_of_two_forward_passes_is_replayed_too() -> None:
    """And a stray pass between backward and step changes nothing."""
    data = batches(20)

    def twice(model: nn.Module, batch: tuple) -> torch.Tensor:
        return loss(model, batch) + loss(model, batch)

    def mean(dropout: float, stray: bool) -> float:
        model = plain("psq8", dropout)
        monitor, found = fqt.Monitor(model, twice, every=2, memory=0.0), []
        for number, batch in enumerate(data):
            torch.manual_seed(number)
            model.zero_grad()
            twice(model, batch).backward()
            if stray:
                model(batch[0])
            found.append(monitor.step(batch))
        return sum(r["quantization"] for r in found if r) / (len(found) // 2)

    assert mean(0.5, False) < 10 * mean(0.0, False)
    assert mean(0.5, True) == mean(0.5, False)


def test_it_leaves_no_trace() -> None:
    model, batch = make(), batches(1)[0]
    monitor = fqt.Monitor(model, loss, every=1)
    loss(model, batch).backward()
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert monitor.step(batch) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(model.parameters(), grads, values, strict=True))
    monitor.close()
    assert not model._forward_pre_hooks


def test_a_restart_continues_to_the_same_readings() -> None:
    data = batches(6)
    whole = readings(plain(), data, memory=0.7)
    model = plain()
    first = fqt.Monitor(model, loss, every=1)
    for number in range(3):
        torch.manual_seed(number)
        model.zero_grad()
        loss(model, data[number]).backward()
        first.step(data[number])
    second = fqt.Monitor(model, loss, every=1)
    second.load_state_dict(first.state_dict())
    for number in range(3, 6):
        torch.manual_seed(number)
        model.zero_grad()
        loss(model, data[number]).backward()
        reading = second.step(data[number])
    assert reading == whole[-1]
    assert second.count == 6
    other = fqt.Monitor(fqt.quantize_(nn.Linear(6, 3), "psq4"), loss)
    with pytest.raises(FqtError, match="other layers"):
        other.load_state_dict(first.state_dict())


def test_frozen_parameters_are_left_out() -> None:
    model, batch = plain(), batches(1)[0]
    model[3].requires_grad_(False)
    assert set(readings(model, [batch])[0]["layers"]) == {"0", "5"}


def test_errors() -> None:
    model, batch = plain(), batches(1)[0]
    for bad, message in [(mlp(), "no converted layer"), (make(recipe="qat"), "no layer quantizes its gradient")]:
        with pytest.raises(FqtError, match=message):
            fqt.Monitor(bad, loss)
    for options, message in [({"every": 0}, "at least 1 step"), ({"memory": 1.0}, "memory must lie")]:
        with pytest.raises(FqtError, match=message):
            fqt.Monitor(model, loss, **options)
    monitor = fqt.Monitor(model, loss, every=1)
    with pytest.raises(FqtError, match="there are no gradients"):
        monitor.step(batch)
    loss(model, batch).backward()
    monitor.step(batch)
    with pytest.raises(FqtError, match="no forward pass"):
        monitor.step(batch)
    one = batches(1, n=1)[0]
    loss(model, one).backward()
    with pytest.raises(FqtError, match="a batch of one sample"):
        monitor.step(one)
    bad = (batch[0] * math.nan, batch[1])
    loss(model, batch).backward()
    with pytest.raises(FqtError, match="the loss is nan"):
        monitor.step(bad)
    with pytest.raises(FqtError, match="without tensors"):
        monitor.half("text")


def test_halves() -> None:
    x, y = torch.arange(10).view(5, 2), torch.arange(5)
    (first, (label,)), share = first_half((x, [y]))
    assert torch.equal(first, x[:2])
    assert torch.equal(label, y[:2])
    assert share == 0.4
    table, share = first_half({"x": x, "scale": torch.tensor(2.0), "text": "a"})
    assert torch.equal(table["x"], x[:2])
    assert table["scale"] == 2
    assert share == 0.4
