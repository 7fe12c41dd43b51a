"""Layers whose products run on quantized operands: torch's own, with another `forward`.

A layer is converted by changing its class, so that parameters, buffers, hooks, `state_dict` keys and everyone's
references to it stay what they were. Replacing the module object was rejected: it breaks aliases, and a model
that is itself one layer could not be converted in place. Weight tensor subclasses were rejected: they break
distributed wrappers and checkpoints.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fqt.nn import compiled
from fqt.nn.function import Call, linear_products
from fqt.nn.linear_map import ConvMap, DenseMap, LinearMap
from fqt.nn.recipe import Recipe

_SEED_RANGE = 2**63 - 1


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def _output_dtype(layer: nn.Module, input: Tensor, weight: Tensor) -> torch.dtype:
    """What the float layer would return; the float layer's error where it would raise one."""
    device = input.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) if input.dtype != torch.float64 else torch.float64
    if input.dtype != weight.dtype:
        raise RuntimeError(
            f"{type(layer).__name__}: input is {input.dtype} but weight is {weight.dtype}; "
            "convert one, or use torch.autocast"
        )
    return input.dtype


def _is_channels_last(x: Tensor) -> bool:
    format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return format is not None and x.is_contiguous(memory_format=format) and not x.is_contiguous()


def products(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None, map: LinearMap) -> Tensor:
    """One linear map of a converted layer. Draws its seed from torch's generator, in training mode only.

    The seed is drawn whether or not a gradient will be asked for, so that an activation checkpoint's two
    forward passes draw the same one.
    """
    recipe: Recipe = layer.fqt_recipe  # type: ignore[assignment]
    seed = None
    if layer.training:
        seed = torch.randint(-_SEED_RANGE, _SEED_RANGE, (), dtype=torch.int64, device="cpu")
    observer = layer.__dict__.get("fqt_observer")
    # As torch's own layers have it: channels-last if an operand is.
    dense = isinstance(map, DenseMap)
    channels_last = not dense and (_is_channels_last(input) or _is_channels_last(weight))
    call = Call(map, recipe, seed, _rank(), _output_dtype(layer, input, weight), channels_last, observer)
    if torch.compiler.is_compiling():
        return compiled.layer(input, weight, bias, call)
    return linear_products(input, weight, bias, call)


def _check_size(layer: nn.Module, input: Tensor, axis: int, wanted: int, name: str) -> None:
    """Raises RuntimeError, as torch's own layers do, naming the layer."""
    if input.shape[axis] != wanted:
        kind = type(layer).__name__
        raise RuntimeError(f"{kind}: an input of shape {tuple(input.shape)} does not fit {name} = {wanted}")


class QuantizedLinear(nn.Linear):
    """`torch.nn.Linear` on quantized operands; every token is a row by habit."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        if input.ndim == 0:
            raise RuntimeError("Linear: the input has no axis; give (…, in_features)")
        _check_size(self, input, -1, self.in_features, "in_features")
        rows = input if input.ndim > 1 else input.unsqueeze(0)
        output = products(self, rows, self.weight, self.bias, DenseMap())
        return output if input.ndim > 1 else output.squeeze(0)


def linear_map(layer: nn.Module) -> LinearMap:
    """The linear map of a layer, but for a transposed convolution's output padding, which an input may change."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return DenseMap()
    dims = len(layer.kernel_size)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        padding = layer.padding
        return ConvMap(layer.stride, padding, layer.dilation, layer.groups, True, layer.output_padding)  # type: ignore[arg-type]
    padding, extra = layer.padding, ()
    if layer.padding_mode != "zeros":
        padding = (0,) * dims  # the layer pads its input itself
    elif isinstance(padding, str):
        both = layer._reversed_padding_repeated_twice  # last axis first: (left, right) each
        sides = [(both[2 * i], both[2 * i + 1]) for i in reversed(range(dims))]
        if all(left == right for left, right in sides):
            padding = tuple(left for left, _ in sides)
        else:
            padding, extra = (0,) * dims, tuple(both)  # type: ignore[assignment]
    group_channels = min(layer.in_channels, layer.out_channels) // layer.groups
    return ConvMap(layer.stride, padding, layer.dilation, layer.groups, extra=extra, group_channels=group_channels)


def _batched(layer: nn.modules.conv._ConvNd, input: Tensor, dims: int) -> Tensor:
    if input.ndim not in (dims + 1, dims + 2):
        kind = type(layer).__name__
        raise RuntimeError(f"{kind}: an input of shape {tuple(input.shape)} has not {dims + 1} or {dims + 2} axes")
    batched = input if input.ndim == dims + 2 else input.unsqueeze(0)
    _check_size(layer, batched, 1, layer.in_channels, "in_channels")
    return batched


def _is_empty(input: Tensor, weight: Tensor, map: ConvMap) -> bool:
    """Whether nothing is to be quantized, or a kernel does not fit: torch's own layer is exact, or says so."""
    if torch.compiler.is_compiling():
        return False
    return not input.numel() or not weight.numel() or min(map.output_size(input.shape[2:], weight.shape[2:])) < 1


def _convolve(layer: nn.modules.conv._ConvNd, input: Tensor, dims: int) -> Tensor:
    batched = _batched(layer, input, dims)
    if layer.padding_mode != "zeros":
        batched = F.pad(batched, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    map = linear_map(layer)
    assert isinstance(map, ConvMap)
    if _is_empty(batched, layer.weight, map):
        return layer._conv_forward(input, layer.weight, layer.bias)
    output = products(layer, batched, layer.weight, layer.bias, map)
    return output if input.ndim == dims + 2 else output.squeeze(0)


def _convolve_transposed(
    layer: nn.modules.conv._ConvTransposeNd, input: Tensor, output_size: list[int] | None, dims: int
) -> Tensor:
    batched = _batched(layer, input, dims)
    output_padding = layer._output_padding(
        input,
        output_size,
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.kernel_size,  # type: ignore[arg-type]
        dims,
        layer.dilation,  # type: ignore[arg-type]
    )
    map = linear_map(layer)
    assert isinstance(map, ConvMap)
    map = replace(map, output_padding=tuple(output_padding))
    if _is_empty(batched, layer.weight, map):
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        rest = (layer.stride, layer.padding, output_padding, layer.groups, layer.dilation)
        return convolve(input, layer.weight, layer.bias, *rest)  # type: ignore[arg-type]
    output = products(layer, batched, layer.weight, layer.bias, map)
    return output if input.ndim == dims + 2 else output.squeeze(0)


class QuantizedConv1d(nn.Conv1d):
    """`torch.nn.Conv1d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Conv1d`."""
        return _convolve(self, input, 1)


class QuantizedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Conv2d`."""
        return _convolve(self, input, 2)


class QuantizedConv3d(nn.Conv3d):
    """`torch.nn.Conv3d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Conv3d`."""
        return _convolve(self, input, 3)


class QuantizedConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As `torch.nn.ConvTranspose1d`."""
        return _convolve_transposed(self, input, output_size, 1)


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As `torch.nn.ConvTranspose2d`."""
        return _convolve_transposed(self, input, output_size, 2)


class QuantizedConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As `torch.nn.ConvTranspose3d`."""
        return _convolve_transposed(self, input, output_size, 3)
