"""Products of 8-bit integer codes: exact sums, and the floats made of them in the same pass.

    matmul              (M, K) · (K, N)
    conv2d              a convolution's output
    conv2d_grad_input   its gradient for the input
    conv2d_grad_weight  its gradient for the weight
    conv2d_mask         what the corrections for offsets under padding are made of

Without an epilogue a product returns its exact integer sums: int32 where the longest sum fits whatever the codes
(`most_terms`), else int64. With one (`fqt.kernels.epilogue`) it returns floats. Under padding a missing tap counts
as code 0, so an operand's offset takes the product with the mask of the taps that are there: `conv2d_mask` for
output and grad_input, window sums for grad_weight.

Each product is one op of `torch.library` (namespace `fqt`), with a plain-torch implementation for every device
(in float64, which holds these sums exactly); backends register beside it, and give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fqt.kernels.epilogue import Epilogue, check_epilogue, finish
from fqt.kernels.op import Op

CODES = (torch.uint8, torch.int8)


def most_terms(a: torch.dtype, b: torch.dtype) -> int:
    """How many products of two codes an int32 sum holds whatever their values."""
    largest = (255 if a == torch.uint8 else 128) * (255 if b == torch.uint8 else 128)
    # The sum of s8 × s8 reaches +2¹⁴ per term, of the others ±: the positive limit is the lower one.
    return (2**31 - 1) // largest


@dataclass(frozen=True)
class Geometry:
    """A two-dimensional convolution's stride, padding and dilation (height, width) and its channel groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output for an input and a kernel of these sizes."""
        height, width = _output_size(self, size, kernel)
        return height, width

    def arguments(self) -> tuple:
        """As the ops take it."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


@dataclass(frozen=True)
class Spatial:
    """The same of any number of axes from two on; products of three are made in `fqt.kernels.volume`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Of the output's axes, for an input and a kernel of these sizes."""
        return _output_size(self, size, kernel)

    @property
    def plane(self) -> Geometry:
        """That of the last two axes."""
        (*_, a, b), (*_, c, d), (*_, e, f) = self.stride, self.padding, self.dilation
        return Geometry((a, b), (c, d), (e, f), self.groups)


def _output_size(geometry: Geometry | Spatial, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    axes = zip(size, kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def matmul(a: Tensor, b: Tensor, epilogue: Epilogue | None = None) -> Tensor:
    """a · b on integer codes.

    Args:
        a: (M, K) uint8 or int8; b: (K, N) uint8 or int8. Any strides; one stride of 1 each saves a copy. The
            fastest is a = (M, K) row-major uint8 with b int8; both transposed costs little more.
        epilogue: see its class.

    Returns:
        (M, N), contiguous: int32 or int64 sums, or the epilogue's floats.

    Raises:
        TypeError, ValueError: an operand or a part of the epilogue has the wrong dtype or shape.
    """
    return torch.ops.fqt.matmul(a, b, *_NOTHING if epilogue is None else epilogue.arguments())


def conv2d(input: Tensor, weight: Tensor, geometry: Geometry, epilogue: Epilogue | None = None) -> Tensor:
    """The output of a convolution of codes.

    Args:
        input: (N, C, H, W) uint8 or int8; weight: (O, C/groups, kh, kw) int8. Other strides than channels-last
            cost a copy.
        geometry: stride, padding, dilation, groups.
        epilogue: see its class.

    Returns:
        (N, O, H', W'), channels-last: int32 or int64 sums, or the epilogue's floats.
    """
    arguments = _NOTHING if epilogue is None else epilogue.arguments()
    return torch.ops.fqt.conv2d(input, weight, *geometry.arguments(), *arguments)


def conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: tuple[int, int],
    geometry: Geometry,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """The gradient of a convolution for its input; also the output of a transposed convolution.

    Args:
        grad_output: (N, O, H', W') uint8 or int8; weight: (O, C/groups, kh, kw) int8, both best channels-last.
        input_size: the input's H and W.
        geometry: of the convolution.
        epilogue: see its class.

    Returns:
        (N, C, H, W), channels-last: int32 or int64 sums, or the epilogue's floats.
    """
    arguments = _NOTHING if epilogue is None else epilogue.arguments()
    return torch.ops.fqt.conv2d_grad_input(grad_output, weight, list(input_size), *geometry.arguments(), *arguments)


def conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: tuple[int, int],
    geometry: Geometry,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """The gradient of a convolution for its weight.

    Args:
        grad_output: (N, O, H', W') uint8 or int8; input: (N, C, H, W) uint8 or int8, both best channels-last.
        kernel_size: the weight's kh and kw.
        geometry: of the convolution.
        epilogue: see its class; its columns are (kh, kw, C/groups) in that order.

    Returns:
        (O, C/groups, kh, kw), channels-last: int32 or int64 sums, or the epilogue's floats.
    """
    arguments = _NOTHING if epilogue is None else epilogue.arguments()
    return torch.ops.fqt.conv2d_grad_weight(
        grad_output, input, list(kernel_size), *geometry.arguments(), *arguments
    )


def conv2d_mask(weight: Tensor, input_size: Sequence[int], geometry: Geometry | Spatial, of: str) -> Tensor:
    """The product of the weight's codes with the mask of the taps that are there, for one sample.

    It is what a constant added to every value of the other operand adds to the product: times the offset of
    `input` it corrects the output, times that of `grad_output` it corrects grad_input.

    Args:
        weight: (O, C/groups, kh, kw) int8 codes, or floats; in three dimensions with kd before kh.
        input_size: the input's spatial axes.
        geometry: of the convolution.
        of: "output" or "grad_input".

    Returns:
        (H', W', O) or (H, W, C), after the depth in three dimensions, float32, contiguous: as `Epilogue.right`
        takes it, less its first axis. Exact for codes while sums stay below 2²⁴.
    """
    if of not in ("output", "grad_input"):
        raise ValueError(f"unknown product {of!r}; known: output, grad_input")
    # On a GPU float32 convolutions may round their operands to TF32, which does not hold these sums.
    w, groups = weight.to(torch.float64 if weight.is_cuda else torch.float32), geometry.groups
    dilation, zeros = list(geometry.dilation), [0] * len(geometry.stride)
    if set(w.shape[2:]) == set(geometry.stride) == {1} and not any(geometry.padding):  # each pixel has the one tap
        sums = w.flatten(1).sum(1) if of == "output" else w.unflatten(0, (groups, -1)).sum(1).flatten()
        return sums.float().expand(*input_size, -1).contiguous()
    if of == "output":  # every channel meets the same mask, so the channels can be summed first
        met, filters = w.new_ones(1, 1, *input_size), w.sum(1, keepdim=True)
        stride, padding = list(geometry.stride), list(geometry.padding)
    else:  # as a convolution too: torch's three-dimensional gradient takes a hundred times as long
        summed = w.unflatten(0, (groups, -1)).sum(1).flatten(0, 1).unsqueeze(1)
        met, filters = _met(w, input_size, geometry), summed.flip(tuple(range(2, w.ndim)))
        stride, padding = [1] * len(zeros), zeros
    mask = torch.ops.aten.convolution(met, filters, None, stride, padding, dilation, False, zeros, 1)
    return mask[0].movedim(0, -1).float().contiguous()


def _met(weight: Tensor, input_size: Sequence[int], geometry: Geometry | Spatial) -> Tensor:
    """(1, 1, *): ones where output pixels are, a stride apart, on a ground that filters turned round slide over."""
    size, margins = geometry.output_size(input_size, weight.shape[2:]), []
    pixels = weight.new_zeros(1, 1, *((n - 1) * s + 1 for n, s in zip(size, geometry.stride, strict=True)))
    apart = (slice(None), slice(None), *(slice(None, None, step) for step in geometry.stride))
    pixels[apart].fill_(1)  # assigned, the number would be copied from the host
    for axis in range(len(size) - 1, -1, -1):  # the last one first, as `pad` takes them
        reach = geometry.dilation[axis] * (weight.shape[2 + axis] - 1)
        before = reach - geometry.padding[axis]
        margins += [before, input_size[axis] + reach - before - pixels.shape[2 + axis]]
    return F.pad(pixels, margins)


_NOTHING = (None,) * 8
_EPILOGUE = (
    "Tensor? row_scale, Tensor? column_scale, Tensor? left, Tensor? right, Tensor? bias, Tensor? zero, "
    "Tensor? ones, ScalarType? dtype"
)
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_library = torch.library.Library("fqt", "DEF")
_library.define(f"matmul(Tensor a, Tensor b, {_EPILOGUE}) -> Tensor")
_library.define(f"conv2d(Tensor input, Tensor weight, {_GEOMETRY}, {_EPILOGUE}) -> Tensor")
_library.define(
    f"conv2d_grad_input(Tensor grad_output, Tensor weight, int[2] input_size, {_GEOMETRY}, {_EPILOGUE}) -> Tensor"
)
_library.define(
    f"conv2d_grad_weight(Tensor grad_output, Tensor input, int[2] kernel_size, {_GEOMETRY}, {_EPILOGUE}) -> Tensor"
)


def _check_codes(name: str, codes: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...] = CODES) -> None:
    if codes.dtype not in dtypes:
        known = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} holds {codes.dtype}: give {known} codes")
    if codes.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(codes.shape)}: give {ndim} axes")


def _sum_dtype(terms: int, a: Tensor, b: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.int32 if terms <= most_terms(a.dtype, b.dtype) else torch.int64


def _check_matmul(a: Tensor, b: Tensor, epilogue: tuple) -> torch.dtype:
    _check_codes("a", a, 2)
    _check_codes("b", b, 2)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"cannot multiply {tuple(a.shape)} by {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"a lies on {a.device}, b on {b.device}")
    check_epilogue(a.shape[0], b.shape[1], (b.shape[1],), a.device, epilogue)
    return _sum_dtype(a.shape[1], a, b, epilogue[7])


@Op
def matmul_of(a: Tensor, b: Tensor, dtype: torch.dtype, epilogue: tuple) -> Tensor:
    """`matmul` of checked operands, with the dtype of the result and an epilogue's arguments."""
    return finish(a.double() @ b.double(), dtype, epilogue)


def _matmul(a: Tensor, b: Tensor, *epilogue: object) -> Tensor:
    return matmul_of(a, b, _check_matmul(a, b, epilogue), epilogue)


def _matmul_shape(a: Tensor, b: Tensor, *epilogue: object) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=_check_matmul(a, b, epilogue))


def _check_geometry(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Geometry:
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} {tuple(pair)}: give two numbers, each at least {least}")
    if groups < 1:
        raise ValueError(f"{groups} groups: give at least 1")
    return Geometry((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


@dataclass(frozen=True)
class Shapes:
    """The shapes of one convolution, checked."""

    input: tuple[int, int, int, int]
    output: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    geometry: Geometry


def _check_conv(
    input: tuple[int, ...], output: tuple[int, ...] | None, weight: tuple[int, ...], geometry: Geometry
) -> Shapes:
    n, c, h, w = input
    o, depth, *kernel = weight
    groups = geometry.groups
    if o % groups or c != depth * groups:
        raise ValueError(f"weight {tuple(weight)} in {groups} groups does not fit {c} input channels")
    out_h, out_w = geometry.output_size((h, w), (kernel[0], kernel[1]))
    if min(kernel) < 1 or max(kernel) > 4096 or min(out_h, out_w) < 0:
        raise ValueError(f"a kernel {tuple(kernel)} does not fit an input of {h} × {w} with {geometry}")
    if output is not None and tuple(output) != (n, o, out_h, out_w):
        raise ValueError(f"grad_output has shape {tuple(output)}, not {(n, o, out_h, out_w)}")
    return Shapes((n, c, h, w), (n, o, out_h, out_w), (o, depth, kernel[0], kernel[1]), geometry)


def _same_device(a: Tensor, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"the operands lie on {a.device} and {b.device}")


def _check_conv2d(input: Tensor, weight: Tensor, rest: tuple) -> tuple[Shapes, torch.dtype, tuple]:
    _check_codes("input", input, 4)
    _check_codes("weight", weight, 4, (torch.int8,))
    _same_device(input, weight)
    shapes = _check_conv(input.shape, None, weight.shape, _check_geometry(*rest[:4]))
    n, o, h, w = shapes.output
    check_epilogue(n, o, (h, w, o), input.device, rest[4:])
    terms = weight.shape[1] * weight.shape[2] * weight.shape[3]
    return shapes, _sum_dtype(terms, input, weight, rest[11]), rest[4:]


@Op
def conv2d_of(input: Tensor, weight: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple) -> Tensor:
    """`conv2d` of checked operands."""
    # No terms, where torch.nn.functional.conv2d loses the output's channels, or no output, which it refuses.
    if not weight.numel() or 0 in shapes.output:
        sums = input.new_zeros(shapes.output, dtype=torch.float64)
    else:
        sums = F.conv2d(input.double(), weight.double(), None, *shapes.geometry.arguments())
    return finish(sums.permute(0, 2, 3, 1).contiguous(), dtype, epilogue).permute(0, 3, 1, 2)


def _conv2d(input: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return conv2d_of(input, weight, *_check_conv2d(input, weight, rest))


def _conv2d_shape(input: Tensor, weight: Tensor, *rest: object) -> Tensor:
    shapes, out, _ = _check_conv2d(input, weight, rest)
    return _channels_last(input, shapes.output, out)


def _channels_last(like: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    n, c, h, w = shape
    return like.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)


def _check_grad_input(
    grad: Tensor, weight: Tensor, input_size: list[int], rest: tuple
) -> tuple[Shapes, torch.dtype, tuple]:
    _check_codes("grad_output", grad, 4)
    _check_codes("weight", weight, 4, (torch.int8,))
    _same_device(grad, weight)
    geometry = _check_geometry(*rest[:4])
    n, c = grad.shape[0], weight.shape[1] * geometry.groups
    shapes = _check_conv((n, c, *input_size), grad.shape, weight.shape, geometry)
    check_epilogue(n, c, (*shapes.input[2:], c), grad.device, rest[4:])
    terms = weight.shape[0] // geometry.groups * weight.shape[2] * weight.shape[3]
    return shapes, _sum_dtype(terms, grad, weight, rest[11]), rest[4:]


def _grad_input(
    grad: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    input = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * groups, *input_size)
    zeros = [0] * len(stride)
    arguments = (None, stride, padding, dilation, False, zeros, groups, [True, False, False])
    return torch.ops.aten.convolution_backward(grad, input, weight, *arguments)[0]


@Op
def conv2d_grad_input_of(
    grad: Tensor, weight: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple
) -> Tensor:
    """`conv2d_grad_input` of checked operands."""
    if not weight.numel() or 0 in shapes.output:  # no terms, which convolution_backward refuses
        sums = grad.new_zeros(shapes.input, dtype=torch.float64)
    else:
        size = list(shapes.input[2:])
        sums = _grad_input(grad.double(), weight.double(), size, *shapes.geometry.arguments())
    return finish(sums.permute(0, 2, 3, 1).contiguous(), dtype, epilogue).permute(0, 3, 1, 2)


def _conv2d_grad_input(grad: Tensor, weight: Tensor, input_size: list[int], *rest: object) -> Tensor:
    return conv2d_grad_input_of(grad, weight, *_check_grad_input(grad, weight, input_size, rest))


def _conv2d_grad_input_shape(grad: Tensor, weight: Tensor, input_size: list[int], *rest: object) -> Tensor:
    shapes, out, _ = _check_grad_input(grad, weight, input_size, rest)
    return _channels_last(grad, shapes.input, out)


def _check_grad_weight(
    grad: Tensor, input: Tensor, kernel: list[int], rest: tuple
) -> tuple[Shapes, torch.dtype, tuple]:
    _check_codes("grad_output", grad, 4)
    _check_codes("input", input, 4)
    _same_device(grad, input)
    geometry = _check_geometry(*rest[:4])
    if input.shape[1] % geometry.groups:
        raise ValueError(f"{input.shape[1]} input channels do not divide into {geometry.groups} groups")
    o, depth = grad.shape[1], input.shape[1] // geometry.groups
    shapes = _check_conv(input.shape, grad.shape, (o, depth, *kernel), geometry)
    columns = depth * kernel[0] * kernel[1]
    check_epilogue(o, columns, (columns,), grad.device, rest[4:])
    return shapes, _sum_dtype(grad.shape[0] * grad.shape[2] * grad.shape[3], grad, input, rest[11]), rest[4:]


@Op
def conv2d_grad_weight_of(
    grad: Tensor, input: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple
) -> Tensor:
    """`conv2d_grad_weight` of checked operands."""
    o, depth, kh, kw = shapes.weight
    stride, padding, dilation, groups = shapes.geometry.arguments()
    weight = grad.new_empty(1, dtype=torch.float64).expand(o, depth, kh, kw)
    arguments = (None, stride, padding, dilation, False, [0, 0], groups, [False, True, False])
    if grad.numel() and input.numel():
        sums = torch.ops.aten.convolution_backward(grad.double(), input.double(), weight, *arguments)[1].round()
    else:
        sums = torch.zeros_like(weight)
    flat = finish(sums.permute(0, 2, 3, 1).reshape(o, kh * kw * depth), dtype, epilogue)
    return flat.view(o, kh, kw, depth).permute(0, 3, 1, 2)


def _conv2d_grad_weight(grad: Tensor, input: Tensor, kernel: list[int], *rest: object) -> Tensor:
    return conv2d_grad_weight_of(grad, input, *_check_grad_weight(grad, input, kernel, rest))


def _conv2d_grad_weight_shape(grad: Tensor, input: Tensor, kernel: list[int], *rest: object) -> Tensor:
    shapes, out, _ = _check_grad_weight(grad, input, kernel, rest)
    return _channels_last(grad, shapes.weight, out)


for _name, _run, _shape in (
    ("matmul", _matmul, _matmul_shape),
    ("conv2d", _conv2d, _conv2d_shape),
    ("conv2d_grad_input", _conv2d_grad_input, _conv2d_grad_input_shape),
    ("conv2d_grad_weight", _conv2d_grad_weight, _conv2d_grad_weight_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fqt::{_name}", _shape, lib=_library)
