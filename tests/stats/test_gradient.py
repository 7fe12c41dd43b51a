"""The estimators against exact enumeration of a toy's noise, against brute force, and on a quantized layer."""

import math

import pytest
import torch
from torch import nn

import fqt
from fqt.errors import FqtError
from fqt.stats import quantization_variance, sampling_variance

# a two-point noise, off centre: 4 with probability 1/4, else 0
LOW, HIGH, P = 0.0, 4.0, 0.25
NOISE_MEAN = HIGH * P
NOISE_VARIANCE = P * (HIGH - NOISE_MEAN) ** 2 + (1 - P) * (LOW - NOISE_MEAN) ** 2


class Toy(nn.Module):
    """loss = noise·⟨w, x⟩, so that the gradient is noise·x: given x its variance is NOISE_VARIANCE·‖x‖²."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        noise = HIGH * float(torch.rand(()) < P)
        return noise * (self.w @ x)


def toy_loss(model, x):
    return model(x)


def _points(count):
    return list(torch.randn(count, 3, generator=torch.Generator().manual_seed(1)).double().float())


def test_quantization_variance_is_the_enumerated_one():
    batches = _points(600)
    exact = NOISE_VARIANCE * sum(x.double().square().sum().item() for x in batches) / len(batches)
    # 2 draws: the sample variance is (a − b)²/2·‖x‖², so a bias of the denominator would show as a factor 2
    found = quantization_variance(Toy(), toy_loss, batches, draws=2).total
    # error of the mean given these batches, by enumeration: sd of (a − b)²/2 is 8·√(q(1 − q)), q = P(a ≠ b)
    q = 2 * P * (1 - P)
    norms = torch.stack(batches).double().square().sum(1)
    exact_error = 8 * math.sqrt(q * (1 - q)) * norms.square().sum().sqrt().item() / len(batches)
    assert abs(found.value - exact) < 4.5 * exact_error  # false alarm: 7e-6
    assert abs(found.value / 2 - exact) > 4.5 * exact_error  # the biased estimator would be caught
    assert exact_error < found.error < 1.5 * exact_error  # the reported one also covers the choice of batches


def test_parameters_add_up_and_what_the_loss_does_not_reach_has_none():
    found = quantization_variance(Toy(), toy_loss, _points(5), draws=4)
    assert set(found.parameters) == {"w", "unused"}
    assert found.parameters["unused"].value == 0
    assert found.total.value == pytest.approx(found.parameters["w"].value, rel=1e-12)
    assert (found.batches, found.draws) == (5, 4)


def test_seeds_give_the_same_and_other_noise():
    args = (Toy(), toy_loss, _points(6), 3)
    assert quantization_variance(*args, seed=1) == quantization_variance(*args, seed=1)
    assert quantization_variance(*args, seed=1) != quantization_variance(*args, seed=2)


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def _loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _batches(count, n=8):
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)) for _ in range(count)]


def _brute_force(model, batches):
    gradients = []
    for batch in batches:
        grads = torch.autograd.grad(_loss(model, batch), list(model.parameters()))
        gradients.append(torch.cat([g.double().flatten() for g in grads]))
    return torch.stack(gradients)


def test_sampling_variance_and_its_jackknife_equal_brute_force():
    model, batches = _net(), _batches(7)
    gradients = _brute_force(model, batches)
    found = sampling_variance(model, _loss, batches)
    assert found.total.value == pytest.approx(gradients.var(0).sum().item(), rel=1e-10)
    left_out = [gradients[[j for j in range(7) if j != i]].var(0).sum().item() for i in range(7)]
    mean = sum(left_out) / 7
    jackknife = math.sqrt(6 / 7 * sum((v - mean) ** 2 for v in left_out))
    assert found.total.error == pytest.approx(jackknife, rel=1e-9)
    assert sum(p.value for p in found.parameters.values()) == pytest.approx(found.total.value, rel=1e-12)
    assert math.isnan(sampling_variance(model, _loss, batches[:2]).total.error)


def test_an_exact_gradient_has_no_quantization_variance():
    found = quantization_variance(fqt.quantize_(_net(), "qat"), _loss, _batches(3), draws=3)
    assert found.total.value == 0
    assert found.total.error == 0


def test_quantized_layers_are_measured_and_fewer_bits_cost_more():
    values = [
        quantization_variance(fqt.quantize_(_net(), recipe), _loss, _batches(4), draws=6).total.value
        for recipe in ("ptq8", "ptq4")
    ]
    assert 0 < values[0] < values[1] / 10


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_state_are_left_as_they_were(fails):
    model, batches = _net(), _batches(3)
    if fails:
        batches[1] = (batches[1][0] * float("nan"), batches[1][1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(FqtError, match="the loss is nan"):
            quantization_variance(model, _loss, batches, draws=2)
    else:
        quantization_variance(model, _loss, batches, draws=2)
        sampling_variance(model, _loss, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model(batches[0][0])
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])  # the check above can fail


def test_errors():
    model, batches = _net(), _batches(3)
    with pytest.raises(FqtError, match="at least 2 draws"):
        quantization_variance(model, _loss, batches, draws=1)
    with pytest.raises(FqtError, match="at least 2 batches"):
        quantization_variance(model, _loss, batches[:1], draws=2)
    with pytest.raises(FqtError, match="at least 2 batches"):
        sampling_variance(model, _loss, batches[:1])
    with pytest.raises(FqtError, match="scalar"):
        sampling_variance(model, lambda m, b: m(b[0]), batches)
    with pytest.raises(FqtError, match="eval mode"):
        quantization_variance(model.eval(), _loss, batches, draws=2)
    with pytest.raises(FqtError, match="no parameter"):
        sampling_variance(model.requires_grad_(False), _loss, batches)


def test_noise_that_is_not_quantization_is_refused() -> None:
    """In eval mode its module leaves the quantizers' noise alone."""
    torch.manual_seed(0)
    model = fqt.quantize_(nn.Sequential(nn.Linear(6, 8), nn.RReLU(), nn.Linear(8, 2)), "psq4").train()
    batches = [torch.randn(5, 6) for _ in range(2)]

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().sum()

    with pytest.raises(FqtError, match="without dropout, which is off here"):
        quantization_variance(model, loss, batches, 2)
    model[1].eval()
    assert quantization_variance(model, loss, batches, 2).total.value > 0
    fqt.quantize_(model, "qat")
    assert quantization_variance(model, loss, batches, 2).total.value == 0
