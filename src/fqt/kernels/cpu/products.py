"""The C++ kernels of the products, on arguments that `products` has checked."""

from __future__ import annotations

from ctypes import Structure, addressof, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from fqt.kernels.cpu.library import call
from fqt.kernels.cpu.memory import empty
from fqt.kernels.cpu.source import OUT_TYPES


class _Epilogue(Structure):
    """`Epilogue` of csrc/epilogue.h."""

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


def as_matrix(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A matrix with a stride of 1, and its strides; the stride of an axis of length 1 does not matter."""
    rows, columns = x.shape
    if x.stride(1) == 1 or columns <= 1:
        return x, (x.stride(0), 1)
    if x.stride(0) == 1 or rows <= 1:
        return x, (1, x.stride(1))
    x = x.contiguous()
    return x, (x.stride(0), 1)


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, epilogue: tuple) -> Tensor:
    """`fqt::matmul` on checked arguments."""
    (a, a_strides), (b, b_strides) = as_matrix(a), as_matrix(b)
    (m, k), n = a.shape, b.shape[1]
    out = empty((m, n), dtype)
    finish, _alive = _finishing(out, n, 1, epilogue)
    left = (a.data_ptr(), int(a.dtype == torch.int8), *a_strides)
    right = (b.data_ptr(), int(b.dtype == torch.int8), *b_strides)
    call("fqt_matmul", *left, *right, m, n, k, addressof(finish))
    return out


class Conv(Structure):
    """`Conv` of csrc/conv.h."""

    _names = "samples height width channels out_height out_width out_channels kernel_height kernel_width"
    _more = "stride_height stride_width padding_height padding_width dilation_height dilation_width groups"
    _fields_ = [(name, c_int64) for name in f"{_names} {_more}".split()]

    @classmethod
    def of(cls, shapes: Any) -> Conv:
        """From checked shapes."""
        (n, c, h, w), (_, o, out_h, out_w), (_, _, kh, kw) = shapes.input, shapes.output, shapes.weight
        g = shapes.geometry
        return cls(n, h, w, c, out_h, out_w, o, kh, kw, *g.stride, *g.padding, *g.dilation, g.groups)


def _image(codes: Tensor) -> Tensor:
    """(N, H, W, C), contiguous."""
    return codes.permute(0, 2, 3, 1).contiguous()


def conv2d(
    codes: Tensor, weight: Tensor, shapes: Any, dtype: torch.dtype, epilogue: tuple, backward: bool
) -> Tensor:
    """`fqt::conv2d`, or with `backward` `fqt::conv2d_grad_input`, on checked arguments."""
    n, channels, h, w = shapes.input if backward else shapes.output
    codes, weight, conv = _image(codes), _image(weight), Conv.of(shapes)
    out = empty((n, h, w, channels), dtype)
    finish, _alive = _finishing(out, channels, h * w, epilogue)
    operands = (codes.data_ptr(), int(codes.dtype == torch.int8), weight.data_ptr())
    if out.numel():
        call("fqt_conv2d", *operands, addressof(conv), int(backward), addressof(finish))
    return out.permute(0, 3, 1, 2)


def conv2d_grad_weight(grad: Tensor, input: Tensor, shapes: Any, dtype: torch.dtype, epilogue: tuple) -> Tensor:
    """`fqt::conv2d_grad_weight` on checked arguments."""
    o, depth, kh, kw = shapes.weight
    grad, input, conv = _image(grad), _image(input), Conv.of(shapes)
    out = torch.empty((o, kh, kw, depth), dtype=dtype, device="cpu")
    finish, _alive = _finishing(out, kh * kw * depth, 1, epilogue)
    operands = (grad.data_ptr(), int(grad.dtype == torch.int8), input.data_ptr(), int(input.dtype == torch.int8))
    call("fqt_conv2d_grad_weight", *operands, addressof(conv), addressof(finish))
    return out.permute(0, 3, 1, 2)
