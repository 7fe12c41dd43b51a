"""A product in one native call equals the formulas of `fqt.kernels.integer`, evaluated one by one, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.kernels.codes import Findings
from fqt.kernels.cpu import fused, library
from fqt.kernels.linear_map import ConvMap, DenseMap
from fqt.nn import function, layers
from fqt.nn.call import Call
from fqt.quant import Scale

from .cases import FORWARD, LAYERS, Case, converted, equal, gradients
from .test_integers import LARGE, RECIPES, runs

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.skipif(library.status().level == "reference", reason="no native kernels"),
]
PRODUCTS = ("output", "grad_input", "grad_weight")
MORE = (
    Case("conv_wide_dilation", nn.Conv2d, (3, 8, 5), (2, 3, 17, 19), {"stride": 3, "padding": 4, "dilation": 2}),
    Case("conv_strided_1x1", nn.Conv2d, (8, 16, 1), (3, 8, 9, 9), {"stride": 2}),
    Case("conv_only_padding", nn.Conv2d, (2, 3, 3), (2, 2, 1, 1), {"padding": 3, "stride": 2}),
    Case("conv_grouped", nn.Conv2d, (64, 96, 3), (2, 64, 7, 9), {"padding": 1, "stride": 2, "groups": 2}),
    Case("conv1d_grouped", nn.Conv1d, (96, 96, 3), (3, 96, 11), {"padding": 2, "groups": 3}),
    Case("conv1d_dilated", nn.Conv1d, (12, 33, 5), (4, 12, 37), {"padding": 2, "dilation": 2}),
)


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The products that ran in one call."""
    taken: list[str] = []

    def count(name: str, product: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            found = product(*arguments)
            taken.extend([name] if found is not None else [])
            return found

        return counting

    with patch.context() as context:
        for name in PRODUCTS:
            context.setattr(fused, name, count(name, getattr(fused, name)))
        yield taken


def by_formulas(patch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    with patch.context() as context:
        for name in PRODUCTS:
            context.setattr(fused, name, lambda *_: None)
        return run()


def check(module: nn.Module, x: Tensor, patch: pytest.MonkeyPatch, upstream: Tensor | None = None) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(5)
        return gradients(module, x, upstream=upstream)

    with counted(patch) as taken:
        at_once = run()
    map = layers.linear_map(module)
    made_of_others = isinstance(map, ConvMap) and (map.transposed or len(map.stride) == 3)
    expected = set() if made_of_others else runs(module)
    by_channel = isinstance(map, ConvMap) and 1 < map.groups == module.in_channels == module.out_channels
    if by_channel or module.fqt_recipe.grad_weight.transform.__class__.__name__ != "Identity":
        expected -= {"grad_weight"}
    assert set(taken) == expected
    assert equal(at_once, by_formulas(patch, run))


@pytest.mark.parametrize("short", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("case", [*LAYERS, *MORE], ids=lambda case: case.name)
def test_equal_to_the_formulas(case: Case, name: str, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = converted(case, RECIPES[name], torch.float32), case.input(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=short):
        check(layer, x.bfloat16() if short else x, monkeypatch)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["psq4", "dithered", "default", "shq"])
@pytest.mark.parametrize("kind", LARGE)
def test_larger_layers(kind: str, name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = LARGE[kind]
    case = Case(kind, copy.deepcopy, (layer,), shape, {})
    had = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(converted(case, RECIPES[name], torch.float32), case.input(torch.float32), monkeypatch)
    finally:
        torch.set_num_threads(had)


@pytest.mark.parametrize("forward", [name for name in FORWARD if name not in ("input_only", "weight_only")])
@pytest.mark.parametrize("kind", ["linear_tokens", "conv2d"])
def test_every_forward_recipe(kind: str, forward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps per sample, token and channel of the forward operands, and products that one call cannot do."""
    case = next(c for c in LAYERS if c.name == kind)
    layer, x = converted(case, FORWARD[forward], torch.float32), case.input(torch.float32)

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        return gradients(layer, x)

    assert equal(run(), by_formulas(monkeypatch, run))


@pytest.mark.parametrize("name", ["psq4", "dithered", "default"])
@pytest.mark.parametrize("kind", ["zero", "constant", "nan", "inf", "huge", "tiny", "one_hot", "positive"])
@pytest.mark.parametrize("case", [c for c in LAYERS if c.name in ("linear_tokens", "conv2d")])
def test_gradients_and_inputs_at_the_edge(
    case: Case, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = converted(case, RECIPES[name], torch.float32), case.input(torch.float32)
    upstream = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(2))
    first = (0,) * upstream.ndim
    if kind == "zero":
        upstream.zero_()
    elif kind == "constant":
        upstream.fill_(0.7)
        x.fill_(-1.3)
    elif kind in ("nan", "inf"):
        upstream[first] = float(kind)
    elif kind == "one_hot":
        upstream.zero_()[first] = 3.0
    elif kind == "positive":
        x.abs_()
        upstream.abs_()
    else:
        upstream *= 1e30 if kind == "huge" else 1e-38
    check(layer, x, monkeypatch, upstream)


@pytest.mark.parametrize("layer", [nn.Linear(8, 2000), nn.Conv2d(3, 500, 1)], ids=["linear", "conv"])
def test_a_bias_that_does_not_fit(layer: nn.Module) -> None:
    """It must not be read beyond its end: refused by the layer, as torch does, and by the product itself."""
    layer = copy.deepcopy(layer)
    layer.bias = nn.Parameter(torch.zeros(3))
    x = torch.randn(4, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 4, 4)
    fqt.quantize_(layer, "psq8")
    with pytest.raises(RuntimeError, match=r"bias of shape|expanded size"):
        layer(x)
    call = Call(layers.linear_map(layer), layer.fqt_recipe, None, x.dtype)
    with pytest.raises(ValueError, match="bias has shape"):
        layers.linear_products(x, layer.weight, layer.bias, call)


@pytest.mark.parametrize("name", ["psq8", "ptq4", "folded", "folded_input", "shq4", "default", "psq8x"])
@pytest.mark.parametrize("kind", LARGE)
def test_what_one_quantizer_finds_for_the_other_changes_nothing(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gradient quantizer with findings of its own: the same bits, but for the order of the bias's sum."""
    rows = FORWARD["rows"].input
    recipes = {
        "folded": fqt.Recipe(input=rows, weight="psq8", grad_input="psq8", grad_weight="ptq8", fold="always"),
        # grad_input's range is of the gradient itself, grad_weight's of the gradient times the input's steps
        "folded_input": fqt.Recipe(input=rows, grad_input="psq8", grad_weight="ptq8", fold="always"),
    }
    layer, shape = LARGE[kind]
    case = Case(kind, copy.deepcopy, (layer,), shape, {})
    module, x = converted(case, recipes.get(name, name), torch.float32), case.input(torch.float32)
    real = function._Gradient.of

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        return gradients(module, x)

    together = run()
    monkeypatch.setattr(
        function._Gradient,
        "of",
        staticmethod(lambda grad, role, call, _: real(grad, role, call, Findings())),
    )
    apart = run()
    *same, bias = zip(together, apart, strict=True)
    for a, b in same if layer.bias is not None else [*same, bias]:
        assert torch.equal(a, b)
    assert torch.allclose(*bias, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_meet() -> None:
    """The kernels take pointers only: no operand of another shape may reach them."""
    conv, linear = ConvMap((1, 1), (1, 1), (1, 1), 1), DenseMap()
    q, rows = fqt.quantizer("ptq8"), fqt.quantizer("psq8")
    image, wide = q.quantize(torch.randn(2, 6, 5, 3), 0), rows.quantize(torch.randn(2, 6, 4, 7), 0)
    x, g = q.quantize(torch.randn(5, 7), 0), rows.quantize(torch.randn(5, 4), 0)
    by_channel = rows.quantize(torch.randn(5, 4), 0, axis=-1)
    weight = fqt.Quantizer(scale=Scale("tensor", "symmetric"), rounding="nearest").quantize(torch.randn(3, 6))
    filters = fqt.Quantizer(scale=Scale("tensor", "symmetric"), rounding="nearest").quantize(
        torch.randn(7, 3, 3, 4)
    )
    for call in (
        lambda: fused.output(linear, x, weight, None, torch.float32),
        lambda: fused.grad_input(linear, g, weight, False, torch.Size((5, 6)), torch.float32),
        lambda: fused.grad_input(linear, g, weight, False, torch.Size((6, 6)), torch.float32),
        lambda: fused.grad_weight(linear, by_channel, x, None, torch.Size((3, 7))),
        lambda: fused.grad_weight(linear, by_channel, x, None, torch.Size((4, 6))),
        lambda: fused.output(conv, image, filters, None, torch.float32),
        lambda: fused.grad_input(conv, wide, filters, False, torch.Size((2, 4, 6, 5)), torch.float32),
        lambda: fused.grad_input(conv, wide, filters, False, torch.Size((2, 3, 6, 4)), torch.float32),
        lambda: fused.grad_weight(conv, by_channel, image, None, torch.Size((7, 3, 3, 3))),
    ):
        with pytest.raises(ValueError, match="where the other operands ask for"):
            call()
