"""The C++ kernels of the products, on arguments that `fqt.kernels.products` has checked."""

from __future__ import annotations

from ctypes import Structure, addressof, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fqt.kernels import products
from fqt.kernels.codes import range_of
from fqt.kernels.cpu.library import BACKEND, Range, call, takes_codes
from fqt.kernels.cpu.memory import empty
from fqt.kernels.cpu.source import OUT_TYPES
from fqt.kernels.products import Shapes

_LONGEST, _WIDEST = 1 << 23, 1 << 15


class _Epilogue(Structure):
    """`Epilogue` of csrc/products/epilogue.h."""

    _fields_ = [
        ("out", c_void_p),
        ("type", c_int32),
        ("rank", c_int32),
        ("columns", c_int64),
        ("period", c_int64),
        ("row_scale", c_void_p),
        ("column_scale", c_void_p),
        ("row_scale_step", c_int64),
        ("column_scale_step", c_int64),
        ("left", c_void_p),
        ("right", c_void_p),
        ("bias", c_void_p),
        ("zero", c_void_p),
        ("ones", c_void_p),
        ("zero_step", c_int64),
    ]


def _finishing(out: Tensor, columns: int, period: int, epilogue: tuple) -> tuple[_Epilogue, list[Tensor]]:
    """The C form of an epilogue that writes to `out`, and the tensors that must outlive it."""
    parts = [None if x is None else x.detach().contiguous() for x in epilogue[:7]]
    pointers = [None if x is None else x.data_ptr() for x in parts]
    steps = [int(x is not None and x.numel() > 1) for x in parts]
    rank = 0 if parts[2] is None else parts[2].shape[1]
    sizes = (OUT_TYPES[out.dtype], rank, columns, period)
    result = _Epilogue(out.data_ptr(), *sizes, *pointers[:2], *steps[:2], *pointers[2:], steps[5])
    return result, [x for x in parts if x is not None]


def _range(codes: Tensor) -> Range:
    """Every code that a byte of this dtype holds."""
    return Range(*range_of(codes.dtype))


def _writes(dtype: torch.dtype) -> bool:
    return dtype in OUT_TYPES


def as_matrix(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A matrix with a stride of 1, and its strides; the stride of an axis of length 1 does not matter."""
    rows, columns = x.shape
    if x.stride(1) == 1 or columns <= 1:
        return x, (x.stride(0), 1)
    if x.stride(0) == 1 or rows <= 1:
        return x, (1, x.stride(1))
    x = x.contiguous()
    return x, (x.stride(0), 1)


@products.matmul_of.on(
    BACKEND, when=lambda a, b, dtype, epilogue: _writes(dtype) and takes_codes(a, b) and a.shape[1] < _LONGEST
)
def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, epilogue: tuple) -> Tensor:
    """`products.matmul`."""
    (a, a_strides), (b, b_strides) = as_matrix(a), as_matrix(b)
    (m, k), n = a.shape, b.shape[1]
    _has("a", a, m * k)
    _has("b", b, k * n)
    out = empty((m, n), dtype)
    finish, _alive = _finishing(out, n, 1, epilogue)
    left, right = (a.data_ptr(), _range(a), *a_strides), (b.data_ptr(), _range(b), *b_strides)
    call("fqt_matmul", *left, *right, m, n, k, addressof(finish))
    return out


class Sizes(NamedTuple):
    """How many entries a convolution's operands have."""

    input: int
    weight: int
    output: int


class Conv(Structure):
    """`Conv` of csrc/products/conv.h."""

    _names = "samples height width channels out_height out_width out_channels kernel_height kernel_width"
    _more = "stride_height stride_width padding_height padding_width dilation_height dilation_width groups"
    _fields_ = [(name, c_int64) for name in f"{_names} {_more}".split()]

    def sizes(self) -> Sizes:
        """How many entries the operands have.

        Raises:
            ValueError: sizes that are not those of one convolution; the kernels would read beyond the operands.
        """
        names = ("height", "width")
        for out, n, k, s, p, d in [
            [
                getattr(self, f"{field}{name}")
                for field in ("out_", "", "kernel_", "stride_", "padding_", "dilation_")
            ]
            for name in names
        ]:
            if min(k, s, d) < 1 or p < 0 or out < 0 or out != (n + 2 * p - d * (k - 1) - 1) // s + 1:
                raise ValueError(f"{k} taps on {n} pixels, stride {s}, padding {p}, dilation {d}: not {out} pixels")
        channels, outputs, groups = self.channels, self.out_channels, self.groups
        if groups < 1 or channels % groups or outputs % groups or min(self.samples, channels, outputs) < 0:
            raise ValueError(f"{channels} channels and {outputs} output channels in {groups} groups")
        return Sizes(
            self.samples * self.height * self.width * channels,
            outputs * self.kernel_height * self.kernel_width * (channels // groups),
            self.samples * self.out_height * self.out_width * outputs,
        )

    @classmethod
    def of(cls, shapes: Any) -> Conv:
        """From checked shapes."""
        (n, c, h, w), (_, o, out_h, out_w), (_, _, kh, kw) = shapes.input, shapes.output, shapes.weight
        g = shapes.geometry
        return cls(n, h, w, c, out_h, out_w, o, kh, kw, *g.stride, *g.padding, *g.dilation, g.groups)


def _image(codes: Tensor) -> Tensor:
    """(N, H, W, C), contiguous."""
    return codes.permute(0, 2, 3, 1).contiguous()


def _has(name: str, codes: Tensor, count: int) -> None:
    if codes.numel() != count or codes.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"{name} is {codes.dtype} of shape {tuple(codes.shape)}; the product takes {count} codes")


def _takes(codes: Tensor, weight: Tensor) -> bool:
    return takes_codes(codes, weight) and weight.numel() > 0


@products.conv2d_of.on(
    BACKEND, when=lambda input, weight, shapes, dtype, epilogue: _writes(dtype) and _takes(input, weight)
)
def _conv2d(input: Tensor, weight: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple) -> Tensor:
    return conv2d(input, weight, shapes, dtype, epilogue, backward=False)


@products.conv2d_grad_input_of.on(
    BACKEND, when=lambda grad, weight, shapes, dtype, epilogue: _writes(dtype) and _takes(grad, weight)
)
def _conv2d_grad_input(grad: Tensor, weight: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple) -> Tensor:
    return conv2d(grad, weight, shapes, dtype, epilogue, backward=True)


def conv2d(
    codes: Tensor, weight: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple, backward: bool
) -> Tensor:
    """`products.conv2d`, or with `backward` `products.conv2d_grad_input`."""
    n, channels, h, w = shapes.input if backward else shapes.output
    codes, weight, conv = _image(codes), _image(weight), Conv.of(shapes)
    sizes = conv.sizes()
    _has("codes", codes, sizes.output if backward else sizes.input)
    _has("weight", weight, sizes.weight)
    out = empty((n, h, w, channels), dtype)
    finish, _alive = _finishing(out, channels, h * w, epilogue)
    operands = (codes.data_ptr(), _range(codes), weight.data_ptr(), _range(weight))
    if out.numel():
        call("fqt_conv2d", *operands, addressof(conv), int(backward), addressof(finish))
    return out.permute(0, 3, 1, 2)


@products.conv2d_grad_weight_of.on(
    BACKEND,
    when=lambda grad, input, shapes, dtype, epilogue: (
        _writes(dtype) and takes_codes(grad, input) and shapes.output[3] <= _WIDEST
    ),
)
def conv2d_grad_weight(grad: Tensor, input: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple) -> Tensor:
    """`products.conv2d_grad_weight`."""
    o, depth, kh, kw = shapes.weight
    grad, input, conv = _image(grad), _image(input), Conv.of(shapes)
    sizes = conv.sizes()
    _has("grad_output", grad, sizes.output)
    _has("input", input, sizes.input)
    out = torch.empty((o, kh, kw, depth), dtype=dtype, device="cpu")
    finish, _alive = _finishing(out, kh * kw * depth, 1, epilogue)
    operands = (grad.data_ptr(), _range(grad), input.data_ptr(), _range(input))
    call("fqt_conv2d_grad_weight", *operands, addressof(conv), addressof(finish))
    return out.permute(0, 3, 1, 2)
