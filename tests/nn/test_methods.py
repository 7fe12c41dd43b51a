"""Layers with every row of the catalog as the quantizers of their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fqt
from fqt.nn.explain import ARITHMETIC
from fqt.quant import METHODS

SHOWN = [(name, method) for method in METHODS.values() for name in method.shown]


@pytest.mark.parametrize(("name", "method"), SHOWN, ids=[name for name, _ in SHOWN])
def test_a_small_net_learns_and_explain_says_on_what(name: str, method: object) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 24, generator=g), torch.randn(96, 5, generator=g)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 5))
    recipe = fqt.Recipe(weight="psq8@channel", grad_input=name, grad_weight="ptq8", fold="always")
    fqt.quantize_(net, recipe)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    losses = []
    for _ in range(12):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.79 * losses[0]  # 0.83 with no gradient, or mere noise, for the layer below
    rows = [p for p in fqt.explain(net).products if p.product == "grad_input"]
    assert all(row.arithmetic in ARITHMETIC and row.why for row in rows)
    declared = METHODS[fqt.quant.names.method_of(name).stem].product
    if declared == "integer":
        assert {row.arithmetic for row in rows} <= {"integer", "simulated"}
        assert all(row.arithmetic == "integer" or "kernels" in row.why for row in rows)
    else:
        wanted = ["varies along a contracted axis"] * (declared == "blocked") + ["do not fit a byte"]
        assert all(row.arithmetic == "integer" or any(why in row.why for why in wanted) for row in rows)


@pytest.mark.parametrize(
    "name", ["luq4", "mxfp4", "nvfp4", "tile8", "split4", "shift4", "lns8", "int4rht", "thq4d"]
)
def test_the_gradient_of_a_linear_layer_is_unbiased(name: str) -> None:
    """200 draws; the largest of 480 + 240 z-scores stays below 5, a false alarm in 4e-4 per name."""
    torch.manual_seed(2)
    layer, x = nn.Linear(20, 12), torch.randn(2, 12, 20, requires_grad=True)
    upstream = torch.randn(2, 12, 12) * torch.exp(torch.randn(2, 12, 1))
    fqt.quantize_(layer, "qat")
    layer(x).backward(upstream)
    assert x.grad is not None
    exact = (x.grad.clone(), layer.weight.grad.clone())
    fqt.quantize_(layer, fqt.Recipe(grad_input=name, grad_weight=name))
    draws: tuple[list, list] = ([], [])
    for _ in range(200):
        x.grad = layer.weight.grad = None
        layer(x).backward(upstream)
        for kept, found in zip(draws, (x.grad, layer.weight.grad), strict=True):
            kept.append(found)
    for kept, truth in zip(draws, exact, strict=True):
        sample = torch.stack(kept).double()
        error = sample.std(0) / 200**0.5 + 1e-6 * truth.abs().max()
        assert float(((sample.mean(0) - truth) / error).abs().max()) < 5
