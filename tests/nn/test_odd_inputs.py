"""What else a float layer takes or refuses: nested, sparse and meta tensors, arrays, weights that were replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fqt

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


def nested(*shapes: tuple[int, ...], layout: torch.layout = torch.strided) -> Tensor:
    parts = [torch.randn(shape) for shape in shapes]
    return torch.nested.as_nested_tensor(parts, layout=layout)


def dense_parts(x: Tensor) -> list[Tensor]:
    return list(x.unbind()) if x.is_nested else [x]


def both(layer: nn.Module, x: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """Output and parameter gradients of the float layer, and of the layer converted."""
    found = []
    for step in (lambda: None, lambda: fqt.quantize_(layer, "qat")):
        step()
        layer.zero_grad()
        out = layer(x)
        sum(part.square().sum() for part in dense_parts(out)).backward()
        found.append((out, [p.grad for p in layer.parameters()]))
    return found


def near(mine: Tensor, truth: Tensor) -> bool:
    return mine.shape == truth.shape and bool((mine - truth).norm() <= 0.05 * truth.norm())


TAKEN: dict[str, Callable[[], Tensor]] = {
    "nested": lambda: nested((2, 4), (3, 4)),
    "nested with an empty part": lambda: nested((0, 4), (3, 4)),
    "jagged": lambda: nested((2, 4), (3, 4), layout=torch.jagged),
    "jagged, 4 axes": lambda: nested((2, 5, 4), (3, 5, 4), layout=torch.jagged),
    "jagged, transposed": lambda: nested((4, 2), (4, 3), layout=torch.jagged).transpose(1, 2),
    "CSR": lambda: torch.randn(5, 4).to_sparse_csr(),
    "CSC": lambda: torch.randn(5, 4).to_sparse_csc(),
    "COO": lambda: torch.randn(5, 4).to_sparse(),
    "subclass": lambda: torch.randn(5, 4).as_subclass(type("Mine", (Tensor,), {})),
    "parameter": lambda: nn.Parameter(torch.randn(5, 4)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_linear_takes_what_the_float_one_takes(name: str) -> None:
    x = TAKEN[name]()
    (truth, exact), (mine, grads) = both(nn.Linear(4, 3), x)
    assert (type(mine), mine.layout, mine.dtype) == (type(truth), truth.layout, truth.dtype)
    if mine.layout == torch.jagged and mine.is_nested:
        assert mine.shape == truth.shape  # the same symbol for the ragged axis: a residual may be added
    assert all(map(near, dense_parts(mine), dense_parts(truth)))
    assert all(map(near, grads, exact))


def test_gradients_reach_the_parts_of_a_nested_input() -> None:
    layer = fqt.quantize_(nn.Linear(4, 3), "qat")
    for layout in (torch.strided, torch.jagged):
        parts = [torch.randn(n, 4, requires_grad=True) for n in (2, 3)]
        out = layer(torch.nested.as_nested_tensor(parts, layout=layout))
        sum(part.sum() for part in out.unbind()).backward()
        for part in parts:
            assert near(part.grad, layer.weight.detach().sum(0).expand(part.shape))


LINEAR, CONV, ATTENTION = (
    lambda **k: nn.Linear(4, 3, **k),
    lambda **k: nn.Conv1d(4, 3, 1, **k),
    lambda **k: nn.MultiheadAttention(4, 2, batch_first=True, **k),
)
REFUSED: dict[str, tuple[Callable[..., nn.Module], Callable[[], Any], type[Exception], str]] = {
    "array": (LINEAR, lambda: np.ones((2, 4), np.float32), TypeError, "torch.Tensor, not ndarray"),
    "list": (LINEAR, lambda: [[1.0, 2.0, 3.0, 4.0]], TypeError, "torch.Tensor, not list"),
    "array into a convolution": (
        CONV,
        lambda: np.ones((2, 4, 3), np.float32),
        TypeError,
        "torch.Tensor, not ndarray",
    ),
    "array into attention": (
        ATTENTION,
        lambda: np.ones((2, 3, 4), np.float32),
        TypeError,
        "torch.Tensor, not ndarray",
    ),
    "nested into a convolution": (CONV, lambda: nested((4, 5), (4, 6)), RuntimeError, "nested"),
    "nested into attention": (ATTENTION, lambda: nested((2, 4), (3, 4)), RuntimeError, "key_padding_mask"),
    "sparse into a convolution": (CONV, lambda: torch.ones(2, 4, 3).to_sparse(), RuntimeError, "sparse_coo"),
    "nested without tokens": (LINEAR, lambda: nested((4,), (4,)), RuntimeError, "2 axes"),
    "ragged features": (
        LINEAR,
        lambda: nested((4, 2), (4, 3), layout=torch.jagged),
        RuntimeError,
        "features must be those of the weight",
    ),
    "features": (LINEAR, lambda: nested((2, 5), (3, 5)), RuntimeError, "features must be those of the weight"),
    "meta input": (LINEAR, lambda: torch.ones(2, 4, device="meta"), RuntimeError, "on meta but weight is on cpu"),
    "meta weight": (
        lambda: LINEAR(device="meta"),
        lambda: torch.ones(2, 4),
        RuntimeError,
        "on cpu but weight is on meta",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_for_the_rest(name: str) -> None:
    make, input, kind, words = REFUSED[name]
    layer, x = fqt.quantize_(make(), "psq4"), input()
    arguments = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    with pytest.raises(kind, match=words) as error:
        layer(*arguments)
    assert "\n" not in str(error.value)


META: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (LINEAR, (5, 4)),
    "one token": (LINEAR, (4,)),
    "convolution": (lambda **k: nn.Conv2d(4, 6, (3, 2), padding="same", **k), (2, 4, 5, 5)),
    "transposed": (lambda **k: nn.ConvTranspose2d(4, 6, 3, stride=2, **k), (2, 4, 5, 5)),
    "attention": (ATTENTION, (2, 3, 4)),
}


@pytest.mark.parametrize("recipe", ["default", "shq4d"])
@pytest.mark.parametrize("name", META)
def test_on_meta_shapes_and_dtypes_are_the_float_layers(name: str, recipe: str) -> None:
    make, shape = META[name]
    found = []
    for convert in (lambda m: m, lambda m: fqt.quantize_(m, recipe)):
        layer = convert(make(device="meta", dtype=torch.bfloat16))
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
        out = layer(x, x, x)[0] if name == "attention" else layer(x)
        out.sum().backward()
        found.append(
            [(t.shape, t.dtype, t.device.type) for t in (out, x.grad, *(p.grad for p in layer.parameters()))]
        )
    assert found[0] == found[1]


def replaced(
    layer: nn.Module, weight: tuple[int, ...], bias: tuple[int, ...] | None = None, **changed: Any
) -> nn.Module:
    """The layer with a weight and a bias of other shapes, as pruning tools leave it: no other attribute changes."""
    layer.weight = nn.Parameter(torch.randn(weight))
    layer.bias = None if bias is None else nn.Parameter(torch.randn(bias))
    for name, value in changed.items():
        setattr(layer, name, value)
    return layer


REPLACED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "features": (lambda: replaced(nn.Linear(4, 3), (2, 6), (2,)), (5, 6)),
    "one bias for all": (lambda: replaced(nn.Linear(4, 3), (3, 4), (1,)), (5, 4)),
    "a bias per token": (lambda: replaced(nn.Linear(4, 3), (3, 4), (5, 3)), (5, 4)),
    "channels": (lambda: replaced(nn.Conv2d(4, 3, 3, padding=1), (7, 6, 3, 3), (7,)), (2, 6, 5, 5)),
    "kernel": (lambda: replaced(nn.Conv2d(4, 3, 3, padding=1), (7, 6, 5, 2)), (2, 6, 5, 5)),
    "kernel, same": (lambda: replaced(nn.Conv2d(4, 3, 3, padding="same"), (7, 6, 5, 4), (7,)), (2, 6, 7, 7)),
    "kernel, valid": (lambda: replaced(nn.Conv1d(4, 3, 3, padding="valid"), (7, 6, 5)), (2, 6, 7)),
    "kernel, circular": (
        lambda: replaced(nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), (7, 6, 5, 5)),
        (2, 6, 5, 5),
    ),
    "groups": (lambda: replaced(nn.Conv2d(4, 4, 3, groups=4), (6, 1, 3, 3), (6,), groups=6), (2, 6, 5, 5)),
    "transposed": (lambda: replaced(nn.ConvTranspose2d(4, 3, 3, stride=2), (6, 7, 3, 3), (7,)), (2, 6, 5, 5)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_tensors_rule_not_attributes(name: str) -> None:
    make, shape = REPLACED[name]
    torch.manual_seed(0)
    (truth, exact), (mine, grads) = both(make(), torch.randn(shape))
    assert near(mine, truth)
    assert all(map(near, grads, exact))


UNFIT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "features": (lambda: replaced(nn.Linear(4, 3), (3, 6)), (5, 4)),
    "bias": (lambda: replaced(nn.Linear(4, 3), (3, 4), (2,)), (5, 4)),
    "bias of more axes": (lambda: replaced(nn.Linear(4, 3), (3, 4), (7, 5, 3)), (5, 4)),
    "channels": (lambda: replaced(nn.Conv1d(4, 3, 1), (3, 6, 1)), (2, 4, 5)),
    "bias of a convolution": (lambda: replaced(nn.Conv1d(4, 3, 1), (3, 4, 1), (1,)), (2, 4, 5)),
    "bias of a transposed convolution": (lambda: replaced(nn.ConvTranspose1d(4, 3, 1), (4, 3, 1), (4,)), (2, 4, 5)),
    "axes": (lambda: replaced(nn.Conv1d(4, 3, 1), (3, 4, 1, 1)), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_as_the_float_layer_does(name: str) -> None:
    make, shape = UNFIT[name]
    layer = make()
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            layer(torch.randn(shape))
        fqt.quantize_(layer, "psq4")
    assert "\n" not in str(error.value)
