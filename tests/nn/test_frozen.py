"""An operand that needs no gradient skips its product and keeps nothing; a noisy gradient has no derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fqt import FqtError
from fqt.kernels import integer
from fqt.kernels.linear_map import ConvMap, DenseMap
from fqt.kernels.op import Op

from .cases import FEW, Case, converted, ids

PRODUCTS = ("output", "grad_input", "grad_weight", "grad_bias")


def _counted(method: Callable, name: str, names: list[str]) -> Callable:
    def counted(*args: object, **kwargs: object) -> object:
        names.append(name)
        return method(*args, **kwargs)

    if isinstance(method, Op):  # whose definition a backend may fall back on
        counted.reference = method.reference  # type: ignore[attr-defined]
    return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the products, on integers or in float, as they are formed."""
    names: list[str] = []
    for product in PRODUCTS[:3]:
        monkeypatch.setattr(integer, product, _counted(getattr(integer, product), product, names))
    for cls in (DenseMap, ConvMap):
        for product in PRODUCTS:
            monkeypatch.setattr(cls, product, _counted(getattr(cls, product), product, names))
    return names


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_products_that_run(case: Case, frozen: tuple[int, ...], calls: list[str]) -> None:
    layer, x = converted(case, "default", torch.float32), case.input(torch.float32)
    leaves = (x, layer.weight, layer.bias)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i not in frozen)
    layer(x).sum().backward()
    wanted, ran = [p for i, p in enumerate(PRODUCTS) if i - 1 not in frozen], list(dict.fromkeys(calls))
    if "grad_weight" in ran and "grad_bias" in wanted:  # its pass over grad_output may have found the sums
        wanted, ran = wanted[:-1], [p for p in ran if p != "grad_bias"]
    assert ran == wanted
    assert [leaf.grad is None for leaf in leaves] == [i in frozen for i in range(3)]


@pytest.mark.parametrize("case", FEW, ids=ids)
def test_nothing_is_kept_without_gradient(case: Case) -> None:
    layer, x = converted(case, "default", torch.float32), case.input(torch.float32)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    for p in layer.parameters():
        p.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize("case", FEW, ids=ids)
def test_double_backward_through_noise_raises(case: Case) -> None:
    layer, x = converted(case, "psq8", torch.float32), case.input(torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(FqtError, match=r"double backward.*model.eval\(\)"):
        grad.sum().backward()


@pytest.mark.parametrize("case", FEW, ids=ids)
def test_backward_twice_over_one_graph_is_the_same(case: Case) -> None:
    layer, x = converted(case, "psq4", torch.float32), case.input(torch.float32).requires_grad_()
    out = layer(x).square().sum()
    first = torch.autograd.grad(out, [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(out, [x, *layer.parameters()])
    assert all(map(torch.equal, first, second))


def test_partial_gradient_equals_the_whole_one() -> None:
    for case in FEW:
        x = case.input(torch.float32)
        found = []
        for needs in (True, False):
            layer = converted(case, "psq4", torch.float32)
            torch.manual_seed(4)
            layer(x.detach().requires_grad_(needs)).square().sum().backward()
            found.append(layer.weight.grad)
        assert torch.equal(*found)
