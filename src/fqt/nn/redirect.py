"""A layer's own forward, with the products in it on quantized operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fqt.nn.layers import conv_map, convolve, is_restored, linear

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def own_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer's float class, with `F.linear`, `F.conv1d` to `F.conv3d`, and `torch.bmm` by a
    parameter, on quantized operands.

    For `fqt.register`, where a class computes its weight, or pads its input, and then calls one of them, itself or
    through torch's own layer:

        fqt.register(StdConv2d, fqt.own_forward)

    A product by other means (`@`, `torch.einsum`) stays float, and `explain` cannot know: register a forward that
    calls `fqt.linear` for it.
    """
    forward = getattr(type(layer), "fqt_float_form", type(layer)).forward
    if is_restored(layer):
        return forward(layer, *args, **kwargs)
    with _Redirect(layer):
        return forward(layer, *args, **kwargs)


class _Redirect(TorchFunctionMode):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = kwargs or {}
        if function is F.linear:
            return linear(self.layer, *args, **words)
        if function in _CONVOLUTIONS:
            return _convolution(self.layer, *args, **words)
        if function is torch.bmm and len(args) == 2 and isinstance(args[1], nn.Parameter):
            return _batched(self.layer, *args)
        return function(*args, **words)


def _convolution(
    layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **words: Any
) -> Tensor:
    return convolve(layer, input, weight, bias, conv_map(weight, *rest, **words))


def _batched(layer: nn.Module, input: Tensor, weight: Tensor) -> Tensor:
    """(E, T, O) from (E, T, I) and (E, I, O): a linear layer each."""
    return torch.stack([linear(layer, x, w) for x, w in zip(input, weight.mT.unbind(), strict=True)])
