"""The layers, inputs and recipes that the tests of this folder share. Adding coverage is adding a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import Quantizer, Recipe
from fqt.nn.call import Call
from fqt.quant import Identity, Integers, Scale


@dataclass(frozen=True)
class Case:
    """One layer and the shape of its input."""

    name: str
    make: Callable[..., nn.Module]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    kwargs: dict[str, Any]

    def layer(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make(*self.args, **self.kwargs).to(dtype)

    def input(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (x + 0.3).to(dtype)  # off centre, so that offsets matter


def _case(name: str, make: Callable[..., nn.Module], args: tuple, shape: tuple[int, ...], **kwargs: Any) -> Case:
    return Case(name, make, args, shape, kwargs)


LINEAR = (
    _case("linear", nn.Linear, (7, 3), (5, 7)),
    _case("linear_no_bias", nn.Linear, (4, 6), (3, 4), bias=False),
    _case("linear_1x1", nn.Linear, (1, 1), (9, 1)),
    _case("linear_tokens", nn.Linear, (6, 5), (2, 3, 6)),
    _case("linear_4d", nn.Linear, (3, 2), (2, 3, 2, 3)),
)
CONV = (
    _case("conv1d", nn.Conv1d, (3, 4, 3), (2, 3, 8), padding=1),
    _case("conv1d_strided", nn.Conv1d, (2, 4, 4), (3, 2, 11), stride=3, padding=2, dilation=2, groups=2),
    _case("conv2d", nn.Conv2d, (3, 4, 3), (2, 3, 5, 7), padding=1),
    _case("conv2d_1x1", nn.Conv2d, (3, 2, 1), (2, 3, 4, 5), stride=2),
    _case("conv2d_whole", nn.Conv2d, (2, 3, (3, 4)), (3, 2, 3, 4)),
    _case("conv2d_mixed", nn.Conv2d, (2, 4, (3, 2)), (3, 2, 9, 8), stride=(2, 1), padding=(1, 2), dilation=(1, 3)),
    _case("conv2d_remainder", nn.Conv2d, (2, 3, 3), (2, 2, 8, 10), stride=3, padding=1),
    _case("conv2d_groups", nn.Conv2d, (4, 6, 3), (2, 4, 5, 5), groups=2, stride=2, bias=False),
    _case("conv2d_depthwise", nn.Conv2d, (3, 6, 3), (2, 3, 6, 5), groups=3, padding=1),
    _case("conv2d_wide_padding", nn.Conv2d, (1, 2, 2), (2, 1, 2, 3), padding=3),
    _case("conv3d", nn.Conv3d, (2, 3, 3), (2, 2, 4, 5, 3), padding=1),
    _case("conv3d_strided", nn.Conv3d, (2, 2, (1, 2, 3)), (2, 2, 3, 6, 7), stride=(1, 2, 3), groups=2),
)
PADDED = (
    _case("valid", nn.Conv2d, (2, 3, 3), (2, 2, 5, 6), padding="valid"),
    _case("same_odd", nn.Conv2d, (2, 3, 3), (2, 2, 5, 6), padding="same"),
    _case("same_even", nn.Conv2d, (2, 3, (2, 4)), (2, 2, 5, 6), padding="same"),
    _case("same_even_1d", nn.Conv1d, (2, 2, 4), (3, 2, 7), padding="same", dilation=3, groups=2),
    _case("same_mixed_3d", nn.Conv3d, (1, 2, (2, 3, 4)), (2, 1, 5, 4, 6), padding="same", dilation=(2, 1, 1)),
    _case("circular", nn.Conv2d, (2, 3, 3), (2, 2, 5, 6), padding=(1, 2), padding_mode="circular", stride=2),
    _case("reflect", nn.Conv2d, (2, 3, 3), (2, 2, 5, 6), padding=(2, 1), padding_mode="reflect"),
    _case("replicate", nn.Conv1d, (2, 3, 3), (2, 2, 6), padding=2, padding_mode="replicate"),
    _case("replicate_3d", nn.Conv3d, (1, 2, 2), (2, 1, 3, 4, 3), padding=1, padding_mode="replicate"),
    _case("same_circular", nn.Conv2d, (2, 2, (2, 3)), (2, 2, 4, 5), padding="same", padding_mode="circular"),
    _case("same_reflect", nn.Conv1d, (2, 2, 4), (2, 2, 9), padding="same", padding_mode="reflect"),
)
TRANSPOSED = (
    _case("transposed1d", nn.ConvTranspose1d, (3, 4, 3), (2, 3, 5)),
    _case("transposed1d_groups", nn.ConvTranspose1d, (4, 6, 4), (3, 4, 6), stride=3, padding=2, groups=2),
    _case("transposed2d", nn.ConvTranspose2d, (3, 2, 3), (2, 3, 4, 5), stride=2, padding=1, output_padding=1),
    _case("transposed2d_mixed", nn.ConvTranspose2d, (2, 4, (2, 3)), (2, 2, 3, 4), stride=(1, 3), dilation=(2, 1)),
    _case("transposed2d_depthwise", nn.ConvTranspose2d, (3, 6, 2), (2, 3, 3, 3), groups=3, stride=2, bias=False),
    _case("transposed3d", nn.ConvTranspose3d, (2, 4, 2), (2, 2, 3, 2, 3), stride=2, groups=2),
)
LAYERS = LINEAR + CONV + PADDED + TRANSPOSED
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes
FEW = tuple(c for c in LAYERS if c.name in ("linear_tokens", "conv2d_mixed", "same_even", "transposed2d"))


def ids(case: Case) -> str:
    return case.name


def q(
    group: str, mode: str = "affine", axis: str | None = None, bits: int = 8, rounding: str = "stochastic"
) -> Quantizer:
    return Quantizer(transform=Identity(), scale=Scale(group, mode, axis), grid=Integers(bits), rounding=rounding)


# Forward operands that reach every axis a layer knows.
FORWARD = {
    "tensor": Recipe(),
    "rows": Recipe(input="psq8", weight="psq8"),
    "sample": Recipe(input="psq8@sample", weight="psq4@channel"),
    "token": Recipe(input="psq8@token", weight="psq8"),
    "zero": Recipe(input=q("row", "zero", rounding="nearest"), weight=q("row", "affine", rounding="nearest")),
    "column": Recipe(input=q("column", rounding="nearest"), weight=q("column", "symmetric", rounding="nearest")),
    "input_only": Recipe(weight=None),
    "weight_only": Recipe(input=None),
}
FLOAT_OPERANDS = Recipe(input=None, weight=None, grad_input="psq8", grad_weight="ptq8")
NOISY = "psq4"  # a recipe whose gradients differ visibly from draw to draw


def converted(case: Case, recipe: Recipe | str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return fqt.quantize_(case.layer(dtype), recipe)


def gradients(module: nn.Module, *inputs: Tensor, upstream: Tensor | None = None, **kwargs: Any) -> list[Tensor]:
    """Output, gradients of the inputs and of every parameter, for one fixed upstream gradient."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    module.zero_grad()
    out = module(*leaves, **kwargs)
    if upstream is None:
        generator = torch.Generator().manual_seed(7)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64) + 0.2
    out.backward(upstream.to(out.dtype))
    found = [out.detach(), *(x.grad for x in leaves), *(p.grad for p in module.parameters())]
    assert all(g is not None for g in found)
    return [g.clone() for g in found]


def simulate(patch: pytest.MonkeyPatch) -> None:
    """All products in float, on the values of codes."""
    patch.setattr(Call, "on_integers", lambda self, product, values: False)


def both(module: nn.Module, x: Tensor, patch: pytest.MonkeyPatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Output and gradients: on integers, and simulated."""
    torch.manual_seed(5)
    on_integers = gradients(module, x)
    with patch.context() as context:
        simulate(context)
        torch.manual_seed(5)
        simulated = gradients(module, x)
    return zip(on_integers, simulated, strict=True)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    assert len(a) == len(b)
    same = (x.dtype == y.dtype and x.shape == y.shape for x, y in zip(a, b, strict=True))
    return all(same) and all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in zip(a, b, strict=True))


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Convolution, batch norm, convolution, linear: 8 samples of 2 × 6 × 6 to 3 classes."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),  # a bias before batch norm has no gradient
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).to(dtype)


def small_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 2, 6, 6, generator=generator) * torch.logspace(-1, 0.5, 8).view(-1, 1, 1, 1)
    return x.to(dtype), torch.randint(0, 3, (8,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def parameter_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad.detach().double().flatten() for name, p in model.named_parameters()}
