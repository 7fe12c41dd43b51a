"""What a layer accepts: unbatched, empty, single, any dtype and memory layout; and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fqt

from .cases import FEW, FORMATS, LAYERS, NOISY, Case, converted, equal, gradients, ids

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
RECIPES = ("qat", "psq4", "bhq4", "shq4d", "default")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("case", [c for c in LAYERS if len(c.shape) != 2], ids=ids)
def test_unbatched_is_a_batch_of_one(case: Case) -> None:
    if case.make is nn.Linear:
        x = case.input()[0, 0] if len(case.shape) == 3 else case.input()[0, 0, 0]
    else:
        x = case.input()[0]
    torch.manual_seed(1)
    single = gradients(converted(case, NOISY), x)
    torch.manual_seed(1)
    batch = gradients(converted(case, NOISY), x[None])
    batch[0], batch[1] = batch[0][0], batch[1][0]
    assert equal(single, batch)
    assert single[0].shape == case.layer()(x).shape


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_empty_batch(case: Case, recipe: str) -> None:
    x = case.input(torch.float32)[:0]
    truth = gradients(case.layer(torch.float32), x)
    mine = gradients(converted(case, recipe, torch.float32), x)
    assert equal(mine, [torch.zeros_like(t) for t in truth])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("recipe", ["default", "psq4", "shq4d"])
@pytest.mark.parametrize("sizes", [(4, 0), (0, 4)])
def test_a_layer_without_features(sizes: tuple[int, int], recipe: str) -> None:
    model = nn.Sequential(nn.Linear(*sizes))
    fqt.quantize_(model, recipe)
    x = torch.randn(3, sizes[0], requires_grad=True)
    output = model(x)
    output.sum().backward()
    assert output.shape == (3, sizes[1])
    assert equal([x.grad, model[0].weight.grad], [torch.zeros(3, sizes[0]), torch.zeros(sizes[::-1])])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_batch_of_one(case: Case, recipe: str) -> None:
    x = case.input(torch.float32)[:1]
    truth = gradients(converted(case, "qat", torch.float32), x)
    mine = gradients(converted(case, recipe, torch.float32), x)
    for a, b in zip(mine, truth, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= 0.5 * b.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_dtypes(case: Case, recipe: str, dtype: torch.dtype) -> None:
    """Every result has the float layer's dtype and shape, and 8 bits' worth of its value."""
    layer, x = case.layer(dtype), case.input(dtype)
    truth = gradients(layer, x)
    mine = gradients(fqt.quantize_(layer, recipe), x)
    for a, b in zip(mine, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.isfinite().all()
    error = (mine[0].double() - truth[0].double()).norm()
    assert error <= 0.03 * truth[0].double().norm()


def test_float64_is_computed_in_float64() -> None:
    """Gradients of a constant upstream are exact for any quantizer, to float64 rounding."""
    case = next(c for c in LAYERS if c.name == "linear")
    layer, x = converted(case, "ptq4"), case.input()
    up = torch.full((5, 3), 1 / 3, dtype=torch.float64)
    a, b = gradients(layer, x, upstream=up), gradients(layer.eval(), x, upstream=up)
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("recipe", ["psq4", "bhq4", "default"])
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_strides_do_not_matter(case: Case, recipe: str) -> None:
    """A transposed, a sliced, an expanded-and-copied and a channels_last input give the same bits."""
    x = case.input(torch.float32)
    transposed = x.transpose(0, -1).contiguous().transpose(0, -1)
    sliced = torch.stack([x, x + 1], dim=-1)[..., 0]
    views = [transposed, sliced]
    if x.ndim == 4:
        views.append(x.contiguous(memory_format=torch.channels_last))
    torch.manual_seed(2)
    truth = gradients(converted(case, recipe, torch.float32), x)
    for view in views:
        assert view.stride() != x.stride()
        torch.manual_seed(2)
        mine = gradients(converted(case, recipe, torch.float32), view)
        for a, b in zip(mine, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()))


def test_channels_last_model_and_expanded_upstream() -> None:
    case = next(c for c in LAYERS if c.name == "conv2d_groups")
    x = case.input(torch.float32)
    plain, last = (converted(case, "psq4", torch.float32) for _ in range(2))
    last.to(memory_format=torch.channels_last)
    up = torch.tensor(0.7).expand(2, 6, 2, 2)
    torch.manual_seed(2)
    a = gradients(plain, x, upstream=up)
    torch.manual_seed(2)
    b = gradients(last, x.to(memory_format=torch.channels_last), upstream=up)
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-6 * float(right.abs().max()))


REFUSED = {
    "features": (nn.Linear(4, 2), torch.ones(3, 5)),
    "scalar": (nn.Linear(1, 2), torch.tensor(1.0)),
    "integers": (nn.Linear(4, 2), torch.ones(3, 4, dtype=torch.long)),
    "double": (nn.Linear(4, 2), torch.ones(3, 4, dtype=torch.float64)),
    "complex": (nn.Linear(4, 2), torch.ones(3, 4, dtype=torch.complex64)),
    "channels": (nn.Conv2d(2, 2, 3), torch.ones(1, 3, 5, 5)),
    "too_few_axes": (nn.Conv2d(2, 2, 3), torch.ones(5, 5)),
    "too_many_axes": (nn.Conv2d(2, 2, 3), torch.ones(1, 1, 2, 5, 5)),
    "conv1d_4d": (nn.Conv1d(2, 2, 3), torch.ones(1, 2, 5, 5)),
    "small_image": (nn.Conv2d(2, 2, 3), torch.ones(1, 2, 2, 5)),
    "conv_integers": (nn.Conv1d(2, 2, 3), torch.ones(1, 2, 5, dtype=torch.long)),
    "transposed_channels": (nn.ConvTranspose1d(2, 2, 3), torch.ones(1, 3, 5)),
    "transposed_axes": (nn.ConvTranspose1d(2, 2, 3), torch.ones(1, 2, 5, 5)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_float_layer_refuses_is_refused(name: str) -> None:
    layer, x = REFUSED[name]
    with pytest.raises((RuntimeError, ValueError)):
        layer(x)
    fqt.quantize_(layer, "psq8")
    try:
        with pytest.raises((RuntimeError, ValueError)):
            layer(x)
    finally:
        fqt.restore_(layer)


@pytest.mark.parametrize("size", [(9, 9), (10, 9), (2, 3, 10, 10)])
def test_output_size(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(2, 2, 5, 5)
    truth = layer(x, output_size=size)
    out = fqt.quantize_(layer, "psq8")(x, output_size=size)
    assert out.shape == truth.shape
    assert (out - truth).norm() <= 0.03 * truth.norm()
    out.sum().backward()
    assert layer.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=(99, 99))
    assert layer(x[0], output_size=[10, 10]).shape == (3, 10, 10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_nonfinite_input_gives_nan_and_no_error(case: Case, value: float) -> None:
    x = case.input(torch.float32)
    x.view(-1)[1] = value
    out, grad_x, grad_w, grad_b = gradients(converted(case, "psq8", torch.float32), x)
    assert out.isnan().any()
    assert grad_w.isnan().any()
    assert grad_x.isfinite().all()
    assert grad_b.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_nonfinite_gradient_passes_through(case: Case, value: float, recipe: str) -> None:
    """GradScaler has to see it in every gradient it checks; nothing hangs, nothing raises."""
    layer, x = converted(case, recipe, torch.float32), case.input(torch.float32)
    up = torch.randn_like(layer(x)).detach()
    up.view(-1)[0] = value
    for grad in gradients(layer, x, upstream=up)[1:]:
        assert not grad.isfinite().all()


def test_constant_and_zero_operands() -> None:
    layer = fqt.quantize_(nn.Linear(3, 2), "default")
    for x in (torch.zeros(4, 3), torch.full((4, 3), 1e30), torch.full((4, 3), 1e-40)):
        assert all(g.isfinite().all() for g in gradients(layer, x, upstream=torch.zeros(4, 2)))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert not layer(torch.randn(4, 3)).any()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_outputs_can_be_modified_in_place(case: Case, dtype: torch.dtype, last: bool) -> None:
    """By a ReLU right behind the layer, as in many published networks."""
    x = case.input(dtype)
    if last and x.ndim not in FORMATS:
        pytest.skip("no such format")
    x = x.contiguous(memory_format=FORMATS[x.ndim]) if last else x
    found = []
    for inplace in (False, True):
        layer = converted(case, NOISY, dtype)
        torch.manual_seed(1)
        found.append(gradients(nn.Sequential(layer, nn.ReLU(inplace=inplace)), x))
    assert equal(*found)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("kind", [lambda: nn.Linear(4, 2), lambda: nn.Conv1d(4, 2, 1)])
def test_inputs_that_are_no_real_numbers(kind: Any, dtype: torch.dtype) -> None:
    """Autocast would not help, and is not said to; of another floating-point dtype it is."""
    layer, x = fqt.quantize_(kind(), "psq8"), torch.ones(3, 4, 4)
    for enabled in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled),
            pytest.raises(RuntimeError, match=r"float\(\)") as error,
        ):
            layer(x.to(dtype))
        assert "autocast" not in str(error.value)
    with pytest.raises(RuntimeError, match=r"use torch\.autocast"):
        layer(x.double())
