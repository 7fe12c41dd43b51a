"""Profiles against gradients computed by autograd alone, and bins against the variance they stand for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fqt
from fqt import Recipe
from fqt.errors import FqtError
from fqt.paper.profile import code_histogram, gradient_of_layer, layer_profile
from fqt.paper.quantizers import METHODS, Cell, paper_quantizer, paper_quantizers, sweep


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(3 * 16, 5),
    )  # fmt: skip


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, 2, 6, 6, generator=generator), torch.randint(0, 5, (6,), generator=generator))
        for _ in range(count)
    ]


def exact_gradients(batch):
    """grad_output of layers 3 and 6 of the float network, by hooks."""
    model, found = net(), {}
    for name in ("3", "6"):
        model.get_submodule(name).register_full_backward_hook(
            lambda module, inputs, outputs, name=name: found.__setitem__(name, outputs[0].flatten(1))
        )
    loss_fn(model, batch).backward()
    return found


@pytest.fixture
def model():
    # float forward, so that autograd alone is an oracle; the noise of 8 dithered bits is small
    return fqt.quantize_(net(), Recipe(input=None, weight=None, grad_input="shq8d"))


def test_the_profile_is_of_the_gradients_that_flow(model):
    data = batches(2)
    quantizers = {"psq4": fqt.quantizer("psq4"), "ptq6d": fqt.quantizer("ptq6d")}
    found = layer_profile(model, loss_fn, data, quantizers)
    assert [p.layer for p in found] == ["3", "6"]  # the first layer's input needs no gradient
    assert [(p.rows, p.columns) for p in found] == [(6, 48), (6, 5)]
    exact = [exact_gradients(batch) for batch in data]
    for profile in found:
        gradients = [of_batch[profile.layer] for of_batch in exact]
        energy = sum(float(g.double().square().sum()) for g in gradients) / 2
        assert profile.energy == pytest.approx(energy, rel=0.02)
        for name, q in quantizers.items():
            variance = sum(float(q.variance(g)) for g in gradients) / 2
            assert profile.variance[name] == pytest.approx(variance, rel=0.05)


def test_the_last_layers_gradient_is_exact(model):
    batch = batches(1)[0]
    name, gradient = gradient_of_layer(model, loss_fn, batch, "6")
    assert name == "6"
    torch.testing.assert_close(gradient, exact_gradients(batch)["6"], rtol=1e-5, atol=1e-9)
    assert gradient_of_layer(model, loss_fn, batch)[0] == "6"  # the middle one of two


def test_nothing_is_left_behind(model):
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    first = layer_profile(model, loss_fn, batches(1), {"psq4": fqt.quantizer("psq4")}, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert layer_profile(model, loss_fn, batches(1), {"psq4": fqt.quantizer("psq4")}, seed=1) == first


def test_bad_input(model):
    with pytest.raises(FqtError, match="at least one batch"):
        layer_profile(model, loss_fn, [], {})
    with pytest.raises(FqtError, match=r"no layer 'x'.*known: 3, 6"):
        gradient_of_layer(model, loss_fn, batches(1)[0], "x")
    with pytest.raises(FqtError, match="the loss is nan"):
        layer_profile(model, lambda m, b: loss_fn(m, b) * torch.nan, batches(1), {})
    for other in (model.eval(), fqt.quantize_(net(), "qat")):
        with pytest.raises(FqtError, match="no layer of the model quantizes"):
            layer_profile(other, loss_fn, batches(1), {})
        with pytest.raises(FqtError, match="no layer of the model quantizes"):
            gradient_of_layer(other, loss_fn, batches(1)[0])


def matrix(n=9, d=40):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, d, generator=generator) * torch.logspace(0, -3, n)[:, None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bins_and_codes(method, bits):
    x, q = matrix(), paper_quantizer(method, bits)
    found = code_histogram(q, x, seed=7)
    codes = q.quantize(x, seed=7).codes
    assert found.counts == [int((codes == c).sum()) for c in range(2**bits)]
    assert found.counts[0] > 0
    assert found.counts[-1] > 0  # the range is used to its ends
    bins = torch.tensor(found.bins, dtype=torch.float64)
    # ¼ in place of p(1 − p) turns Σ bins² Σ_j p(1 − p) into the bound, which knows nothing of bins
    assert float(bins.square().sum() * x.shape[1] / 4) == pytest.approx(float(q.variance_bound(x, 7)), rel=1e-5)
    assert found.variance == pytest.approx(float(q.variance(x, 7)))


def test_bins_are_the_steps_without_a_transform():
    x = matrix()
    assert len(set(code_histogram(paper_quantizer("ptq", 4), x).bins)) == 1
    rows = code_histogram(paper_quantizer("psq", 4), x).bins
    assert rows == pytest.approx(((x.amax(1) - x.amin(1)) / 15).tolist(), rel=1e-5)
    with pytest.raises(FqtError, match="affine codes"):
        code_histogram(fqt.Quantizer(scale=fqt.quant.Scale("row", "symmetric")), x)


def test_paper_quantizers():
    assert paper_quantizer("psq", 4) == fqt.quantizer("psq4")
    assert paper_quantizer("shq", 4, "dithered") == fqt.quantizer("shq4d")
    assert paper_quantizer("bhq", 4).transform.guard is False
    assert len(paper_quantizers((2, 4), ("stochastic", "dithered"))) == 16


def test_the_sweep():
    cells = sweep((2, 4, 8))
    assert len(cells) == len(set(cells)) == 4 * 3 * 3 + 2 + 4
    recipe = Cell(method="psq", rounding="stochastic", bits=4, grad_weight="column8").recipe()
    assert recipe.operand("grad_input") == fqt.quantizer("psq4")
    assert recipe.operand("grad_weight").scale.group == "column"
    alone = Cell(method=None, rounding=None, bits=None, grad_weight="ptq8").recipe()
    assert alone.operand("grad_input") is None
    assert alone.operand("grad_weight") == fqt.quantizer("ptq8")


def test_the_released_weight_quantizer_has_a_step_per_feature(model):
    """Its codes of a gradient are those of one quantizer per column over the batch."""
    q = Cell(method=None, rounding=None, bits=None, grad_weight="column8").recipe().operand("grad_weight")
    _, x = gradient_of_layer(model, loss_fn, batches(1)[0], "3")
    step = q.quantize(x, seed=0).matrix_step
    assert step.flatten().tolist() == pytest.approx(((x.amax(0) - x.amin(0)) / 255).tolist(), rel=1e-5)
