"""Observers see what is quantized, and change nothing."""

import torch
from torch import Tensor, nn

import fqt
from fqt.nn import GradientOperand, observe


def _backward(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    x = torch.randn(6, 5)
    torch.manual_seed(4)
    model(x).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


def _model() -> nn.Module:
    torch.manual_seed(0)
    return fqt.quantize_(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), "psq4d")


def test_sees_every_quantized_gradient_once() -> None:
    model, seen = _model(), []
    with observe(model, lambda name, operand: seen.append((name, operand.role, tuple(operand.gradient.shape)))):
        _backward(model)
    # The first layer's input needs no gradient, so its grad_input is not computed.
    assert sorted(seen) == [("0", "grad_weight", (6, 4)), ("2", "grad_input", (6, 3)), ("2", "grad_weight", (6, 3))]
    seen.clear()
    _backward(model)
    assert not seen


def test_changes_nothing() -> None:
    def meddle(name: str, operand: GradientOperand) -> None:
        torch.rand(7)
        operand.quantizer.quantize(operand.gradient, operand.seed, axis=operand.rows)

    model = _model()
    plain = _backward(model)
    with observe(model, meddle):
        observed = _backward(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, observed, strict=True))


def test_gives_what_reproduces_the_product() -> None:
    model, operands = _model(), {}
    with observe(model, lambda name, operand: operands.update({(name, operand.role): operand})):
        gradients = _backward(model)
    operand = operands["2", "grad_weight"]
    codes = operand.quantizer.quantize(operand.gradient, operand.seed, axis=operand.rows)
    inputs = []
    handle = model[2].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    torch.manual_seed(3)
    x = torch.randn(6, 5)
    model(x)
    handle.remove()
    saved = fqt.quantizer("ptq8n").quantize(inputs[0].detach()).dequantize()
    expected = codes.dequantize().T @ saved
    assert torch.allclose(gradients[2], expected, rtol=1e-5, atol=1e-6)


def test_ends_with_its_context_and_restores_an_outer_one() -> None:
    model, outer, inner = _model(), [], []
    with observe(model, lambda name, operand: outer.append(name)):
        with observe(model, lambda name, operand: inner.append(name)):
            _backward(model)
        assert len(inner) == 3
        assert not outer
        _backward(model)
    assert len(outer) == 3
    assert "fqt_observer" not in model[0].__dict__
