"""torch.func, forward mode, Jacobians and second derivatives of a converted layer: exact, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fqt
from fqt import FqtError
from fqt.kernels.linear_map import DenseMap
from fqt.nn.autograd import _Values
from fqt.nn.call import Call
from fqt.nn.function import multiplied

# torch's own, as it loads its forward-mode formulas.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), (4, 5)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 2, 2)), (3, 2, 4, 4)),
    "attention": (lambda: Attention(), (2, 3, 4)),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


@pytest.fixture(params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A network in training mode and an input."""
    make, shape = NETS[request.param]
    torch.manual_seed(0)
    return fqt.quantize_(make(), "default"), torch.randn(shape)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x,)).square().sum()


def eager_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize("train", [True, False])
def test_grad_is_backward(case: tuple[nn.Module, Tensor], train: bool) -> None:
    """With the same seed, bit for bit."""
    model, x = case
    model.train(train)
    torch.manual_seed(3)
    wanted = eager_gradients(model, x)
    torch.manual_seed(3)
    assert_equal(grad(lambda p: loss(model, p, x))(state(model)), wanted)


def test_per_sample_gradients_are_those_of_each_sample_alone(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    model.eval()
    found = vmap(grad(lambda p, x: loss(model, p, x)), in_dims=(None, 0))(state(model), x.unsqueeze(1))
    for i, sample in enumerate(x):
        assert_equal({n: g[i] for n, g in found.items()}, eager_gradients(model, sample.unsqueeze(0)))


def test_vmap_is_a_loop(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    wanted = torch.stack([model(sample.unsqueeze(0)) for sample in x])
    draw = {"randomness": "different"}
    assert torch.equal(vmap(model, **draw)(x.unsqueeze(1)), wanted)  # noise is of the gradient alone
    assert torch.equal(vmap(model, in_dims=1, **draw)(x.unsqueeze(0)), wanted)
    nested = vmap(vmap(model, **draw), **draw)(x[:, None, None])
    assert torch.equal(nested.squeeze(1), wanted)
    assert vmap(model, **draw)(x[:0].unsqueeze(1)).shape == (0, *wanted.shape[1:])


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_noise_under_vmap_is_as_asked(randomness: str) -> None:
    layer = fqt.quantize_(nn.Linear(6, 5), "psq4")
    x = torch.randn(1, 3, 6).expand(4, 3, 6)
    sample = vmap(grad(lambda p, x: loss(layer, p, x)), (None, 0), randomness=randomness)
    found = sample(state(layer), x)["weight"]
    assert (found == found[0]).all() == (randomness == "same")


def test_training_under_plain_vmap_says_what_to_do(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    with pytest.raises(FqtError, match=r"randomness='different'.*model\.eval\(\)"):
        vmap(model)(x.unsqueeze(1))


def test_an_ensemble(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    for i, member in enumerate(models):
        for p in member.parameters():
            p.data.mul_(i + 1)
        member.eval()
    stacked = stack_module_state(models)
    found = vmap(lambda p, b: functional_call(model, (p, b), (x,)))(*stacked)
    assert torch.equal(found, torch.stack([member(x) for member in models]))


@pytest.mark.parametrize("train", [True, False])
def test_jacobians_are_loops_over_backward(case: tuple[nn.Module, Tensor], train: bool) -> None:
    """All rows of one graph draw the same noise."""
    model, x = case
    model.train(train)
    torch.manual_seed(4)
    x = x.requires_grad_()
    output = model(x)
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in output.flatten()]
    wanted = torch.stack(rows)
    basis = torch.eye(output.numel()).view(-1, *output.shape)
    (batched,) = torch.autograd.grad(output, x, basis, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, wanted, rtol=1e-6, atol=1e-6)
    torch.manual_seed(4)
    found = jacrev(model)(x.detach()).view_as(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_tangent_is_the_exact_derivative(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(jvp(model, (x,), (tangent,))[1], found)
    model.eval()
    jacobian = jacrev(model)(x)
    torch.testing.assert_close((jacobian.flatten(-x.ndim) @ tangent.flatten()), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(jacfwd(model)(x), jacobian, rtol=1e-4, atol=1e-5)


def test_a_tangent_of_the_parameters(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    model.eval()
    p = state(model)
    tangent = {name: torch.randn_like(t) for name, t in p.items()}
    found = jvp(lambda p: loss(model, p, x), (p,), (tangent,))[1]
    wanted = sum((g * tangent[name]).sum() for name, g in eager_gradients(model, x).items())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Straight(nn.Module):
    """A float network with the values that a converted one multiplies: its derivatives are the definition."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            if not hasattr(layer, "fqt_recipe"):
                x = layer(x)
                continue
            call = Call(fqt.nn.layers.linear_map(layer), layer.fqt_recipe, None, x.dtype)
            values = [
                t + (multiplied(t.detach(), call, i) - t).detach() for t, i in ((x, True), (layer.weight, False))
            ]
            x = call.map.output(*values)
            if layer.bias is not None:
                x = x + call.map.per_channel(layer.bias, x.ndim)
        return x


@pytest.mark.parametrize("recipe", ["default", "qat"])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_second_derivatives_are_those_of_the_forward_quantized_network(name: str, recipe: str) -> None:
    """A penalty on gradients of input and weights, a Hessian: in eval mode, or without gradient quantizers."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = fqt.quantize_(make().double(), recipe)
    model.train(recipe == "qat")
    x = torch.randn(shape, dtype=torch.float64)

    def second(module: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *model.parameters()]
        first = torch.autograd.grad(module(leaf).square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(3).sum() for g in first), inputs))

    def block(module: nn.Module) -> Tensor:
        return hessian(lambda x: module(x).square().sum())(x)

    def of_sum(module: nn.Module) -> Tensor:  # whose gradient of the output does not change
        return hessian(lambda x: module(x).sum())(x)

    straight = Straight(model)  # type: ignore[arg-type]
    for found, wanted in zip(second(model), second(straight), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    if recipe == "default":
        torch.testing.assert_close(block(model), block(straight), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(of_sum(model), of_sum(straight), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_graphs_of_forward_mode_are_refused(training: bool) -> None:
    """They would hold the memory that kernels write to, not what they write; the derivative itself is there."""
    layer, x = fqt.quantize_(nn.Linear(8, 3)).train(training), torch.randn(8)
    with pytest.raises(FqtError, match=r"linearize and make_fx cannot record .* take them by torch\.func\.jvp"):
        linearize(layer, x)
    if not training:
        assert jvp(layer, (x,), (torch.ones(8),))[1].isfinite().all()
        with pytest.raises(FqtError, match="cannot record"):
            make_fx(lambda x: hessian(lambda x: layer(x).square().sum())(x))(x)


def test_a_second_derivative_of_a_rounded_gradient_is_refused(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    (first,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(FqtError, match=r"double backward.*model\.eval\(\).*fqt\.restore_"):
        first.square().sum().backward()
    with pytest.raises(FqtError, match="double backward"):
        jvp(grad(lambda x: model(x).square().sum()), (x.detach(),), (torch.ones_like(x),))


def test_vectorized_second_derivatives_are_refused_by_name() -> None:
    model, x = fqt.quantize_(nn.Linear(3, 2), "qat").eval(), torch.randn(2, 3, requires_grad=True)
    y = model(x).square()
    (first,) = torch.autograd.grad(y, x, torch.eye(4).view(4, 2, 2), is_grads_batched=True, create_graph=True)
    with pytest.raises(FqtError, match=r"is_grads_batched.*torch\.func"):
        first.square().sum().backward()


def test_values_are_straight_through() -> None:
    call = Call(DenseMap(), fqt.Recipe(), None, torch.float32)
    x = torch.randn(3, 4, requires_grad=True)
    up = torch.randn(3, 4)
    values = _Values.apply(x, call, True)
    assert not torch.equal(values, x)
    values.backward(up)
    assert torch.equal(x.grad, up)  # type: ignore[arg-type]


def test_a_transform_inside_a_compiled_function_runs_eagerly() -> None:
    model, x = fqt.quantize_(nn.Linear(3, 2), "default").eval(), torch.randn(2, 3)
    torch._dynamo.reset()
    inside = torch.compile(lambda x: grad(lambda x: model(x).square().sum())(x), backend="aot_eager")
    assert torch.equal(inside(x), grad(lambda x: model(x).square().sum())(x))
