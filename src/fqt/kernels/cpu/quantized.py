"""The C++ kernels of products of quantized matrices: sums of codes, corrections and product in one call each."""

from __future__ import annotations

from ctypes import Structure, addressof, c_int32, c_void_p

import torch
from torch import Tensor

from fqt.kernels.cpu.library import call
from fqt.kernels.cpu.memory import empty
from fqt.kernels.cpu.products import Conv
from fqt.kernels.cpu.source import OUT_TYPES


class Operand(Structure):
    """`Quantized` of csrc/quantized.h. The tensors it is made of must outlive it."""

    _fields_ = [
        ("codes", c_void_p),
        ("step", c_void_p),
        ("offset", c_void_p),
        ("row_noise", c_void_p),
        ("column_noise", c_void_p),
        ("is_signed", c_int32),
        ("many", c_int32),
    ]

    @classmethod
    def of(cls, codes: Tensor, step: Tensor, offset: Tensor, noise: tuple[Tensor, Tensor] | None) -> Operand:
        """From contiguous codes (N, D), float32 step and offset of one shape, and dither (N, 1) and (1, D)."""
        rows, columns = (None, None) if noise is None else (n.data_ptr() for n in noise)
        many = int(step.numel() > 1)
        pointers = (codes.data_ptr(), step.data_ptr(), offset.data_ptr(), rows, columns)
        return cls(*pointers, int(codes.dtype == torch.int8), many)


class Fold(Structure):
    """`Fold` of csrc/quantized.h. The tensors it is made of must outlive it."""

    _fields_ = [("folded", c_int32), ("centre", c_void_p), ("share", c_void_p)]

    @classmethod
    def of(cls, folded: bool, centre: Tensor | None, share: Tensor | None) -> Fold:
        """From contiguous int32 and float32 tensors."""
        if centre is not None and centre.dtype != torch.int32:
            raise TypeError(f"centre holds {centre.dtype}: give int32")
        if share is not None and share.dtype != torch.float32:
            raise TypeError(f"share holds {share.dtype}: give float32")
        pointers = (None if t is None else t.data_ptr() for t in (centre, share))
        return cls(int(folded), *pointers)


def dense_output(
    x: Operand, w: Operand, bias: Tensor | None, sizes: tuple[int, int, int], run: int, dtype: torch.dtype
) -> Tensor:
    """(T, O): x · wᵀ + bias. sizes: T, I, O; run: tokens per step of x, if it has many; bias: float32."""
    out = empty((sizes[0], sizes[2]), dtype)
    pointer = None if bias is None else bias.data_ptr()
    call("fqt_dense_output", addressof(x), addressof(w), pointer, *sizes, run, OUT_TYPES[dtype], out.data_ptr())
    return out


def dense_grad_input(
    g: Operand, w: Operand, sizes: tuple[int, int, int], folded: bool, dtype: torch.dtype, wants_ones: bool
) -> tuple[Tensor, Tensor | None]:
    """(T, I): g · w; and 1 · w (I,) if wanted."""
    out = empty((sizes[0], sizes[1]), dtype)
    ones = torch.empty(sizes[1], dtype=torch.float32, device="cpu") if wants_ones else None
    rest = (None if ones is None else ones.data_ptr(), OUT_TYPES[dtype], out.data_ptr())
    call("fqt_dense_grad_input", addressof(g), addressof(w), *sizes, int(folded), *rest)
    return out, ones


def dense_grad_weight(g: Operand, x: Operand, sizes: tuple[int, int, int], fold: Fold) -> Tensor:
    """(O, I) float32: gᵀ · x."""
    out = empty((sizes[2], sizes[1]), torch.float32)
    call("fqt_dense_grad_weight", addressof(g), addressof(x), *sizes, addressof(fold), out.data_ptr())
    return out


def conv_output(x: Operand, w: Operand, bias: Tensor | None, conv: Conv, dtype: torch.dtype) -> Tensor:
    """(N, H', W', O)."""
    out = empty((conv.samples, conv.out_height, conv.out_width, conv.out_channels), dtype)
    pointer = None if bias is None else bias.data_ptr()
    arguments = (addressof(conv), OUT_TYPES[dtype], out.data_ptr())
    call("fqt_conv_output", addressof(x), addressof(w), pointer, *arguments)
    return out


def conv_grad_input(
    g: Operand, w: Operand, conv: Conv, folded: bool, dtype: torch.dtype, wants_ones: bool
) -> tuple[Tensor, Tensor | None]:
    """(N, H, W, C); and the gradient (H, W, C) of a g of ones if wanted."""
    map = (conv.height, conv.width, conv.channels)
    out = empty((conv.samples, *map), dtype)
    ones = torch.empty(map, dtype=torch.float32, device="cpu") if wants_ones else None
    rest = (None if ones is None else ones.data_ptr(), OUT_TYPES[dtype], out.data_ptr())
    call("fqt_conv_grad_input", addressof(g), addressof(w), addressof(conv), int(folded), *rest)
    return out, ones


def conv_grad_weight(g: Operand, x: Operand, conv: Conv, fold: Fold) -> Tensor:
    """(O, kh, kw, C/groups) float32."""
    depth = conv.channels // conv.groups
    out = empty((conv.out_channels, conv.kernel_height, conv.kernel_width, depth), torch.float32)
    call("fqt_conv_grad_weight", addressof(g), addressof(x), addressof(conv), addressof(fold), out.data_ptr())
    return out
