"""The monitor: unbiased readings, no trace left behind, the same readings after a restart."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fqt
from fqt.errors import FqtError
from fqt.stats.monitor import first_half

from .nets import batches, loss, make, mlp


def test_arguments_swapped() -> None:
    swapped = (
        lambda: fqt.Monitor(loss, mlp()),
        lambda: fqt.diagnose(loss, mlp(), batches(2)),
        lambda: fqt.stats.quantization_variance(loss, mlp(), batches(2), 2),
        lambda: fqt.stats.sampling_variance(loss, mlp(), batches(2)),
    )
    for call in swapped:
        with pytest.raises(FqtError, match=r"takes the model first, a torch.nn.Module, not function"):
            call()


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


# What is wrong with the gradients when the monitor reads them, and how the refusal begins. "Right" is the control.
MISUSES: dict[str, tuple[Callable[[nn.Module, list], tuple], str]] = {}


def misuse(message: str) -> Callable:
    """Registers a step gone wrong: it leaves gradients in the model and gives the monitor's arguments."""

    def register(step: Callable[[nn.Module, list], tuple]) -> Callable:
        MISUSES[step.__name__] = step, message
        return step

    return register


def backward(model: nn.Module, batch: tuple, factor: float = 1.0) -> None:
    (loss(model, batch) * factor).backward()


@misuse("")
def right(model: nn.Module, data: list) -> tuple:
    backward(model, data[0])
    return (data[0],)


@misuse("got another batch")
def another_batch(model: nn.Module, data: list) -> tuple:
    backward(model, data[0])
    return (data[1],)


@misuse("not those of this batch: look for")
def other_targets(model: nn.Module, data: list) -> tuple:
    backward(model, data[0])
    return ((data[0][0], data[0][1].flip(0)),)


@misuse("and 1 more forward passes were seen")
def two_batches_accumulated(model: nn.Module, data: list) -> tuple:
    backward(model, data[0])
    backward(model, data[1])
    return (data[1],)


@misuse("got another batch")
def one_batch_of_two_given_wrongly(model: nn.Module, data: list) -> tuple:
    backward(model, data[0])
    backward(model, data[1])
    return data[0], data[2]


@misuse(r"2 times those of these 2 batches.*reduction=\"sum\"")
def summed_not_averaged(model: nn.Module, data: list) -> tuple:
    backward(model, data[0])
    backward(model, data[1])
    return data[0], data[1]


@misuse(r"0\.\d+ times those of this batch.*before clipping")
def clipped_before(model: nn.Module, data: list) -> tuple:
    backward(model, data[0])
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 2)
    return (data[0],)


@misuse("not those of this batch: look for")
def clipped_by_value(model: nn.Module, data: list) -> tuple:
    backward(model, data[0])
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    return (data[0],)


@misuse(r"65536 times those of this batch.*pass scale=")
def loss_scaled(model: nn.Module, data: list) -> tuple:
    backward(model, data[0], 65536)
    return (data[0],)


@misuse("a missing zero_grad")
def zero_grad_forgotten(model: nn.Module, data: list) -> tuple:
    other = copy.deepcopy(model)  # so that the step before has no forward pass in this one
    backward(other, data[1])
    for p, before in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = before.grad
    return right(model, data)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after three good readings"])
@pytest.mark.parametrize("name", MISUSES)
def test_what_is_no_gradient_of_the_batch_is_refused(name: str, late: bool) -> None:
    step, message = MISUSES[name]
    model, data = plain("psq4", dropout=0.5), batches(3)
    monitor = fqt.Monitor(model, loss, every=1)
    for _ in range(3 if late else 0):
        model.zero_grad()
        assert monitor.step(*right(model, data))
    model.zero_grad()
    before, given = monitor.state_dict(), step(model, data)
    if not message:
        assert monitor.step(*given)
        return
    with pytest.raises(FqtError, match=message) as error:
        monitor.step(*given)
    assert "\n" not in str(error.value)
    assert monitor.state_dict() == {**before, "count": before["count"] + 1}
    model.zero_grad()
    assert monitor.step(*right(model, data))


@pytest.mark.parametrize("recipe", ["ptq2", "psq4", "shq8d", "default"])
@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 2), mlp], ids=["tiny", "mlp"])
def test_a_right_gradient_is_never_refused(build: Callable[[], nn.Module], recipe: str) -> None:
    """A tiny layer's noise has few directions, 8 bits hardly any noise: shares along the gradient say nothing."""
    model = make(build, recipe)
    data = batches(40, shape=(4,) if isinstance(model, nn.Linear) else (6,))
    data = [(x, y % 2) for x, y in data]
    assert all(readings(model, data))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_accumulated_gradient_is_read_as_such(reduction: str) -> None:
    """Quantization by its definition; sampling, by enumeration, the variance of the accumulated gradient."""
    float_forward = fqt.Recipe(input=None, weight=None, grad_input="psq3", grad_weight="ptq3")
    data, found, parts = batches(4), [], 4 if reduction == "mean" else 1
    torch.manual_seed(0)
    exact = fqt.restore_(plain())
    single = torch.stack([gradient(exact, batch) for batch in data]) / parts
    for first in itertools.combinations(range(4), 2):
        model = plain(float_forward, dropout=0.0)
        order = [data[i] for i in (*first, *(i for i in range(4) if i not in first))]
        monitor = fqt.Monitor(model, loss, every=1)
        for batch in order:
            backward(model, batch, 1 / parts)
        reading = monitor.step(*order, reduction=reduction)
        noisy = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        assert reading["quantization"] == pytest.approx(float((noisy - single.sum(0)).square().sum()), rel=1e-4)
        found.append(reading["sampling"])
    assert sum(found) / len(found) == pytest.approx(4 * float(single.var(0).sum()), rel=1e-4)


def test_accumulated_batches_replay_their_own_masks() -> None:
    """Random numbers drawn between the batches, as by a loader, are no part of any pass."""
    model, data = plain("psq8", dropout=0.5), batches(2)
    monitor = fqt.Monitor(model, loss, every=1)
    for batch in data:
        backward(model, batch, 0.5)
        torch.rand(3)
    noise = monitor.step(*data)["quantization"]
    assert noise < 1e-3 * sum(float(p.grad.square().sum()) for p in model.parameters())


def test_a_grad_scaler_is_divided_out() -> None:
    model, batch = plain(), batches(1)[0]
    plainly = readings(model, [batch])[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for scale in (scaler, 2.0**16):
        monitor = fqt.Monitor(model, loss, every=1)
        model.zero_grad()
        torch.manual_seed(0)
        scaler.scale(loss(model, batch)).backward()
        assert monitor.step(batch, scale=scale) == plainly
        monitor.close()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = fqt.Monitor(model, loss, every=1)
    model.zero_grad()
    scaler.scale(loss(model, batch)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(FqtError, match=r"1\.52588e-05 times"):
        monitor.step(batch, scale=scaler)


def test_a_gradient_that_overflowed_gives_no_reading() -> None:
    model, batch = plain(), batches(1)[0]
    monitor = fqt.Monitor(model, loss, every=1)
    backward(model, batch)
    model[0].weight.grad[0, 0] = math.inf
    assert monitor.step(batch, scale=2.0**16) is None
    assert math.isnan(monitor.reading()["rho"])


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
    for arguments, message in [
        ({"scale": 0}, "finite number other than 0"),
        ({"reduction": "max"}, 'must be "mean"'),
    ]:
        loss(model, batch).backward()
        with pytest.raises(FqtError, match=message):
            monitor.step(batch, **arguments)
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


def test_a_wrapped_model_is_read_in_as_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that made `.grad` is seen under the wrapper too: only the first reading is looked at twice."""
    checks = []
    check = fqt.Monitor._check
    monkeypatch.setattr(fqt.Monitor, "_check", lambda self, *a, **k: checks.append(1) or check(self, *a, **k))
    for wrap in (lambda model: model, nn.DataParallel):
        checks.clear()
        readings(wrap(plain()), batches(3))
        assert len(checks) == 1
