"""Convolutions with nothing in them, or whose kernel does not fit: what torch's own layers give or say."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import fqt


def _case(r: random.Random) -> tuple[str, dict, list[int], int]:
    """A class of `nn`, its arguments, a spatial size and a batch size; many do not fit."""
    dims, transposed = r.choice([1, 2, 3]), r.random() < 0.6
    draw = lambda values: [r.choice(values) for _ in range(dims)]
    how = {
        "kernel_size": draw([1, 2, 3]),
        "stride": draw([1, 2]),
        "dilation": draw([1, 2]),
        "groups": r.choice([1, 2]),
    }
    how["padding"] = draw([0, 1, 2, 3, 4]) if transposed else draw([0, 0, 1])
    if transposed:
        how["output_padding"] = [int(max(s, d) > 1) for s, d in zip(how["stride"], how["dilation"], strict=True)]
    return f"Conv{'Transpose' * transposed}{dims}d", how, draw([0, 1, 1, 2, 3]), r.choice([0, 1, 2])


def _outcome(layer: nn.Module, x: Tensor) -> tuple:
    x = x.clone().requires_grad_()
    try:
        y = layer(x)
        y.sum().backward()
    except RuntimeError as error:
        return (str(error),)
    assert x.grad is not None
    return y.shape, x.grad.shape


@pytest.mark.parametrize("recipe", ["qat", "psq8", "default"])
def test_sizes_as_torch_has_them(recipe: str) -> None:
    r, refused = random.Random(recipe), 0
    for _ in range(120):
        kind, how, size, samples = _case(r)
        float_layer, layer = (getattr(nn, kind)(2, 2, **how) for _ in range(2))
        converted = fqt.quantize_(nn.Sequential(layer), recipe)
        x = torch.randn(samples, 2, *size)
        wanted = _outcome(float_layer, x)
        assert _outcome(converted, x) == wanted, (kind, how, size, samples)
        refused += len(wanted) == 1
    assert refused > 30


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_negative_output_of_a_transposed_convolution_is_refused(dims: int) -> None:
    layer = getattr(nn, f"ConvTranspose{dims}d")(2, 2, 1, padding=3)
    x = torch.randn(1, 2, *[2] * dims)
    with pytest.raises(RuntimeError) as wanted:
        layer(x)
    fqt.quantize_(layer, "qat")
    with pytest.raises(RuntimeError) as found:
        layer(x)
    assert str(found.value) == str(wanted.value)


def test_an_empty_batch_has_zero_gradients() -> None:
    layer = fqt.quantize_(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), "default")
    layer(torch.randn(0, 3, 5, 5)).sum().backward()
    assert torch.equal(layer[0].weight.grad, torch.zeros(4, 3, 3, 3))
