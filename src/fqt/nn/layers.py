"""Layers whose products run on quantized operands: torch's own, with another `forward`.

A layer is converted by changing its class, so that parameters, buffers, hooks, `state_dict` keys and everyone's
references to it stay what they were. Replacing the module object was rejected: it breaks aliases, and a model
that is itself one layer could not be converted in place. Weight tensor subclasses were rejected: they break
distributed wrappers and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from fqt.errors import FqtError
from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.nn import compiled, sharded
from fqt.nn.autograd import is_transformed, linear_products
from fqt.nn.call import Call, GradientOperand
from fqt.nn.eager import not_compiled
from fqt.nn.ranges import Memory, Ranges, check_call
from fqt.nn.recipe import Recipe

_SEED_RANGE = 2**63 - 1


def _output_dtype(layer: nn.Module, input: Tensor, weight: Tensor) -> torch.dtype:
    """What the float layer would return; the float layer's error where it would raise one."""
    device = input.device.type
    if not input.is_floating_point():
        raise RuntimeError(
            f"{type(layer).__name__}: input is {input.dtype}, and must be real floating-point numbers: convert it, "
            "for instance by input.float()"
        )
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


def drawn_seeds(input: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Seeds of calls in training mode, int64, from the generator of the GPU that the input lies on, else from the
    CPU's.

    Drawn on the CPU, they would have to be copied to the GPU: that makes the host wait, and the replays of a
    captured graph would all have one seed. The price: a layer's noise differs between the two kinds of device.

    Raises:
        FqtError: under `vmap`, which must be told how to draw.
    """
    device = input.device if input.is_cuda else "cpu"
    try:
        return torch.randint(-_SEED_RANGE, _SEED_RANGE, shape, dtype=torch.int64, device=device)
    except RuntimeError as error:
        if "randomness error mode" not in str(error):
            raise
        raise FqtError(
            "a converted layer in training mode draws noise, and vmap must be told how: "
            "vmap(…, randomness='different'); or call model.eval() first, whose gradient is exact"
        ) from None


_eager_products = not_compiled(
    "fqt: a converted layer that is observed, or under torch.func, runs eagerly: compile without fullgraph"
)(linear_products)


@not_compiled("fqt: a layer whose recipe remembers ranges trains eagerly: compile without fullgraph")
def _remembering_products(
    layer: nn.Module, memory: Memory, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call
) -> Tensor:
    return linear_products(input, weight, bias, replace(call, ranges=Ranges(layer, memory)))


@dataclass(frozen=True)
class _Weighed:
    """An observer that is also told the weight's shape, which is not always that of the layer's own."""

    observer: Callable[[GradientOperand], None]
    weight: torch.Size

    def __call__(self, operand: GradientOperand) -> None:
        self.observer(replace(operand, weight=self.weight))


def is_restored(layer: nn.Module) -> bool:
    """Whether a layer is float again while something kept the forward of its converted form."""
    return "fqt_recipe" not in layer.__dict__


def products(
    layer: nn.Module,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    map: LinearMap,
    drawn: Tensor | None = None,
) -> Tensor:
    """One linear map of a converted layer. Draws its seed from torch's generator of the input's device, in training
    mode only.

    A caller may have `drawn` it already. The seed is drawn whether or not a gradient will be asked for, so that an
    activation checkpoint's two forward passes draw the same one.
    """
    _check_operands(layer, input, weight, bias, map)
    recipe: Recipe = layer.fqt_recipe  # type: ignore[assignment]
    if type(input) not in _PLAIN or type(weight) not in _PLAIN:
        if sharded.is_sharded(input) or sharded.is_sharded(weight):
            if layer.training and "fqt_ranges" in layer.__dict__:
                check_call("on sharded tensors")
            exact = not layer.training or not (recipe.grad_input or recipe.grad_weight)
            again = lambda x, w, b: products(layer, x, w, b, map, drawn)
            return sharded.products(again, input, weight, bias, map, exact)
        if why := foreign(weight):
            raise FqtError(f"{type(layer).__name__}: {why}: fqt.restore_(model) first")
    seed = None if not layer.training else drawn_seeds(input) if drawn is None else drawn
    compiling = torch.compiler.is_compiling()
    # A compiler guards what getattr finds or misses, which costs an eager layer more than a look into its dict.
    look = (lambda name: getattr(layer, name, None)) if compiling else layer.__dict__.get
    observer, witness = look("fqt_observer"), look("fqt_witness")
    told = None if observer is None else _Weighed(observer, weight.shape), witness
    # As torch's own layers have it: channels-last if an operand is.
    dense = isinstance(map, DenseMap)
    channels_last = not dense and not is_transformed() and (_is_channels_last(input) or _is_channels_last(weight))
    call = Call(map, recipe, seed, _output_dtype(layer, input, weight), channels_last, *told)
    memory = look("fqt_ranges")
    if memory is not None and seed is not None:
        check_call()
        return _remembering_products(layer, memory, input, weight, bias, call)
    if torch._C._get_tracing_state() is not None or (compiling and told == (None, None) and not is_transformed()):
        return compiled.layer(input, weight, bias, call)
    plain = not compiling and torch._C._dynamo.eval_frame.get_eval_frame_callback() is None
    return (linear_products if plain else _eager_products)(input, weight, bias, call)


def _check_operands(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None, map: LinearMap) -> None:
    """What the map itself takes for granted."""
    kind = type(layer).__name__
    if input.device != weight.device:
        raise RuntimeError(f"{kind}: input is on {input.device} but weight is on {weight.device}")
    channels = weight.shape[1] * map.groups if isinstance(map, ConvMap) and map.transposed else weight.shape[0]
    if bias is not None and bias.shape != (channels,):
        raise RuntimeError(f"{kind}: a bias of shape {tuple(bias.shape)} does not fit {channels} output channels")


def check_tensor(layer: nn.Module, input: Tensor) -> None:
    """Raises TypeError, as torch's own layers do, for what is no tensor."""
    if not isinstance(input, Tensor):
        kind = type(layer).__name__
        raise TypeError(f"{kind}: the input must be a torch.Tensor, not {type(input).__name__}")


def linear(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` on quantized operands, for the forward of a converted layer.

    For layers of your own (`fqt.register`). In a layer that has been restored it is torch's function.

    Args:
        layer: whose recipe, mode and random numbers count.
        input: (…, I); every token is a row by habit. Nested tensors are multiplied as the tokens that they hold;
            a sparse one as a dense one.
        weight: (O, I), whatever it was made from; the layer's own attributes are not asked.
        bias: (O,).

    Returns:
        (…, O).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, as torch's function.
    """
    if is_restored(layer):
        return F.linear(input, weight, bias)
    check_tensor(layer, input)
    if input.is_nested:
        return _tokenwise(layer, input, weight, bias)
    if input.layout != torch.strided:
        input = input.to_dense()
    kind = type(layer).__name__
    if input.ndim == 0 or weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
        shapes = f"an input of shape {tuple(input.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        raise RuntimeError(f"{kind}: {shapes}: they are (…, in_features) and (out_features, in_features)")
    later = None
    if bias is not None and bias.shape != weight.shape[:1]:
        bias, later = None, bias  # one value for all features, or some for every token
    rows = input if input.ndim > 1 else input.unsqueeze(0)
    output = products(layer, rows, weight, bias, DenseMap())
    output = output if input.ndim > 1 else output.squeeze(0)
    return output if later is None else output + later.to(output.dtype).expand(output.shape)


def _tokenwise(layer: nn.Module, input: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of a nested tensor (N, tokens, I): all tokens together, since a token is a row."""
    if input.ndim < 3:
        raise RuntimeError(
            f"{type(layer).__name__}: a nested input has {input.ndim} axes; give (N, tokens, features)"
        )
    if input.layout == torch.jagged and input._ragged_idx != input.ndim - 1 and input.lengths() is None:
        values = linear(layer, input.values(), weight, bias)
        return torch.nested.nested_tensor_from_jagged(
            values, input.offsets(), jagged_dim=input._ragged_idx, min_seqlen=None, max_seqlen=None
        )
    parts = [part.contiguous() for part in input.unbind()]
    if any(part.shape[-1] != weight.shape[-1] for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts[:3])
        kind = type(layer).__name__
        raise RuntimeError(f"{kind}: nested parts of shapes {shapes}: features must be those of the weight")
    outputs = linear(layer, torch.cat([part.flatten(0, -2) for part in parts]), weight, bias)
    sizes = [part.shape[:-1] for part in parts]
    split = outputs.split([size.numel() for size in sizes])
    whole = [part.unflatten(0, size) for part, size in zip(split, sizes, strict=True)]
    return torch.nested.as_nested_tensor(whole, layout=input.layout)


class QuantizedLinear(nn.Linear):
    """`torch.nn.Linear` on quantized operands; every token is a row by habit."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        return linear(self, input, self.weight, self.bias)


def transposed_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The forward of a layer whose weight is (in_features, out_features), as GPT-2's `Conv1D`."""
    return linear(layer, x, layer.weight.t(), layer.bias)  # type: ignore[operator, arg-type]


def linear_map(layer: nn.Module, weight: Tensor | None = None) -> LinearMap:
    """The linear map of a layer, but for a transposed convolution's output padding, which an input may change.

    Args:
        layer: any; what is no convolution is dense.
        weight: that it multiplies by, if it is not the layer's own.
    """
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return DenseMap()
    weight = layer.weight if weight is None else weight
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    padding: Any = layer.padding
    if not transposed and layer.padding_mode != "zeros":
        padding = 0  # the layer pads its input itself
    output_padding = layer.output_padding if transposed else ()
    return conv_map(weight, layer.stride, padding, layer.dilation, layer.groups, transposed, output_padding)


def conv_map(
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: Any = (),
) -> ConvMap:
    """The map of a convolution by this weight; the rest as torch's functions take it."""
    dims = weight.ndim - 2

    def each(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, Sequence) else (value,)
        return values * dims if len(values) == 1 else values

    if transposed:
        channels = min(weight.shape[1], weight.shape[0] // groups)
        how = (each(stride), each(padding), each(dilation))
        return ConvMap(*how, groups, True, each(output_padding), group_channels=channels)
    extra: tuple[int, ...] = ()
    if padding == "valid":
        padding = 0
    elif padding == "same":
        both = [d * (k - 1) for d, k in zip(each(dilation), weight.shape[2:], strict=True)]
        padding = tuple(total // 2 for total in both)
        if any(total % 2 for total in both):  # last axis first: (left, right) each, the odd one to the right
            padding, extra = 0, tuple(n for t in reversed(both) for n in (t // 2, t - t // 2))
    channels = min(weight.shape[1], weight.shape[0] // groups)
    return ConvMap(each(stride), each(padding), each(dilation), groups, extra=extra, group_channels=channels)


def _is_empty(input: Tensor, weight: Tensor, map: ConvMap) -> bool:
    """Whether nothing is to be quantized, or a kernel does not fit: torch's own layer is exact, or says so."""
    if torch.compiler.is_compiling():
        return False
    spatial, kernel = input.shape[2 - weight.ndim :], weight.shape[2:]
    return not input.numel() or not weight.numel() or min(map.output_size(spatial, kernel)) < 1


def convolution(
    layer: nn.modules.conv._ConvNd,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    output_size: list[int] | None = None,
) -> Tensor:
    """A convolution layer's own convolution on quantized operands, with a weight and a bias that you give.

    For layers of your own (`fqt.register`). In a layer that has been restored it is torch's function.

    Args:
        layer: an `nn.Conv…` or `nn.ConvTranspose…` of any kind: its stride, padding, padding mode, dilation and
            groups count, and its recipe, mode and random numbers.
        input: (N, C, *) or (C, *); every sample is a row by habit.
        weight: as the layer's own weight, whatever it was made from; channels and kernel are those of its shape.
        bias: (O,).
        output_size: of a transposed convolution, as its forward takes it.

    Returns:
        (N, O, *) or (O, *).

    Raises:
        RuntimeError, ValueError: shapes, dtypes or devices do not fit, as torch's function.
    """
    if is_restored(layer):
        return _float_convolution(layer, input, weight, bias, output_size)
    dims = len(layer.kernel_size)
    if weight.ndim != dims + 2:
        shape = tuple(weight.shape)
        raise RuntimeError(f"{type(layer).__name__}: a weight of shape {shape} has not {dims + 2} axes")
    map = linear_map(layer, weight)
    assert isinstance(map, ConvMap)
    _check_image(layer, input, weight, map)
    padded = input
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        map = replace(map, output_padding=_output_padding(layer, input, output_size))
    elif layer.padding_mode != "zeros":
        padded = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if _is_empty(padded, weight, map):
        if layer.training:
            drawn_seeds(input)  # what is drawn does not depend on the input's size
        return _float_convolution(layer, input, weight, bias, output_size)
    return _convolve(layer, padded, weight, bias, map)


def convolve(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None, map: ConvMap) -> Tensor:
    """The convolution of an input (N, C, *) or (C, *) by any map on quantized operands."""
    _check_image(layer, input, weight, map)
    return _convolve(layer, input, weight, bias, map)


def _convolve(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None, map: ConvMap) -> Tensor:
    if input.ndim == weight.ndim:
        return products(layer, input, weight, bias, map)
    return products(layer, input.unsqueeze(0), weight, bias, map).squeeze(0)


def _check_image(layer: nn.Module, input: Tensor, weight: Tensor, map: ConvMap) -> None:
    """Raises for an input that does not fit a weight (O, C/groups, *), or (C, O/groups, *) if transposed."""
    check_tensor(layer, input)
    kind, dims = type(layer).__name__, weight.ndim - 2
    if input.is_nested or input.layout != torch.strided:
        odd = "nested" if input.is_nested else str(input.layout)
        raise RuntimeError(f"{kind}: the input is {odd}; a convolution takes a dense tensor")
    if input.ndim not in (dims + 1, dims + 2):
        raise RuntimeError(f"{kind}: an input of shape {tuple(input.shape)} has not {dims + 1} or {dims + 2} axes")
    channels = weight.shape[0] if map.transposed else weight.shape[1] * map.groups
    if input.shape[-dims - 1] != channels:
        shapes = f"an input of shape {tuple(input.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        raise RuntimeError(f"{kind}: {shapes}: it wants {channels} channels")


def _output_padding(
    layer: nn.modules.conv._ConvTransposeNd, input: Tensor, output_size: list[int] | None
) -> tuple[int, ...]:
    padding = layer._output_padding(
        input,
        output_size,
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.kernel_size,  # type: ignore[arg-type]
        len(layer.kernel_size),
        layer.dilation,  # type: ignore[arg-type]
    )
    return tuple(padding)


def _float_convolution(
    layer: nn.modules.conv._ConvNd,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: list[int] | None,
) -> Tensor:
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return layer._conv_forward(input, weight, bias)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(layer.kernel_size) - 1]
    extra = _output_padding(layer, input, output_size)
    return function(input, weight, bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)  # type: ignore[arg-type]


class QuantizedConv1d(nn.Conv1d):
    """`torch.nn.Conv1d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Conv1d`."""
        return convolution(self, input, self.weight, self.bias)


class QuantizedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Conv2d`."""
        return convolution(self, input, self.weight, self.bias)


class QuantizedConv3d(nn.Conv3d):
    """`torch.nn.Conv3d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Conv3d`."""
        return convolution(self, input, self.weight, self.bias)


class QuantizedConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As `torch.nn.ConvTranspose1d`."""
        return convolution(self, input, self.weight, self.bias, output_size)


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As `torch.nn.ConvTranspose2d`."""
        return convolution(self, input, self.weight, self.bias, output_size)


class QuantizedConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on quantized operands; every sample is a row by habit."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As `torch.nn.ConvTranspose3d`."""
        return convolution(self, input, self.weight, self.bias, output_size)
