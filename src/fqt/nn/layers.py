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
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from fqt.errors import FqtError
from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.nn import compiled, sharded
from fqt.nn.autograd import is_transformed, linear_products
from fqt.nn.function import Call
from fqt.nn.recipe import Recipe

_SEED_RANGE = 2**63 - 1


def _output_dtype(layer: nn.Module, input: Tensor, weight: Tensor) -> torch.dtype:
    """What the float layer would return; the float layer's error where it would raise one."""
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
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


_PLAIN = (Tensor, nn.Parameter)


def foreign(weight: Tensor) -> str:
    """Why the floats of a weight cannot be read: its class stands for other data. Empty if they can."""
    kind = type(weight)
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or sharded.is_sharded(weight):
        return ""
    if isinstance(weight, FakeTensor):
        return ""
    return f"its weight is a {kind.__name__} of {kind.__module__.split('.')[0]}, which holds no plain floats"


def _drawn_seed() -> Tensor:
    try:
        return torch.randint(-_SEED_RANGE, _SEED_RANGE, (), dtype=torch.int64, device="cpu")
    except RuntimeError as error:
        if "randomness error mode" not in str(error):
            raise
        raise FqtError(
            "a converted layer in training mode draws noise, and vmap must be told how: "
            "vmap(…, randomness='different'); or call model.eval() first, whose gradient is exact"
        ) from None


_eager_products = torch.compiler.disable(
    linear_products,
    reason="fqt: a converted layer that is observed, or under torch.func, runs eagerly: compile without fullgraph",
)


def products(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None, map: LinearMap) -> Tensor:
    """One linear map of a converted layer. Draws its seed from torch's generator, in training mode only.

    The seed is drawn whether or not a gradient will be asked for, so that an activation checkpoint's two
    forward passes draw the same one.
    """
    recipe: Recipe = layer.fqt_recipe  # type: ignore[assignment]
    if type(input) not in _PLAIN or type(weight) not in _PLAIN:
        if sharded.is_sharded(input) or sharded.is_sharded(weight):
            exact = not layer.training or not (recipe.grad_input or recipe.grad_weight)
            return sharded.products(lambda x, w, b: products(layer, x, w, b, map), input, weight, bias, map, exact)
        if why := foreign(weight):
            raise FqtError(f"{type(layer).__name__}: {why}: fqt.restore_(model) first")
    seed = _drawn_seed() if layer.training else None
    compiling = torch.compiler.is_compiling()
    # A compiler guards what getattr finds or misses, which costs an eager layer more than a look into its dict.
    look = (lambda name: getattr(layer, name, None)) if compiling else layer.__dict__.get
    told = look("fqt_observer"), look("fqt_witness")
    # As torch's own layers have it: channels-last if an operand is.
    dense = isinstance(map, DenseMap)
    channels_last = not dense and not is_transformed() and (_is_channels_last(input) or _is_channels_last(weight))
    call = Call(map, recipe, seed, _output_dtype(layer, input, weight), channels_last, *told)
    if torch._C._get_tracing_state() is not None or (compiling and told == (None, None) and not is_transformed()):
        return compiled.layer(input, weight, bias, call)
    return (_eager_products if compiling else linear_products)(input, weight, bias, call)


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


def _convolve(layer: nn.modules.conv._ConvNd, input: Tensor, dims: int) -> Tensor:
    batched = _batched(layer, input, dims)
    if layer.padding_mode != "zeros":
        batched = F.pad(batched, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    output = products(layer, batched, layer.weight, layer.bias, linear_map(layer))
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
