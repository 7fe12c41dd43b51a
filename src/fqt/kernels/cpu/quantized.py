"""The C++ kernels of products of quantized matrices: sums of codes, corrections and product in one call each."""

from __future__ import annotations

from ctypes import Structure, addressof, c_int32, c_void_p

import torch
from torch import Tensor

from fqt.kernels.cpu.library import call, expect, narrow_steps
from fqt.kernels.cpu.memory import empty
from fqt.kernels.cpu.products import Conv
from fqt.kernels.cpu.source import OUT_TYPES


class Coded(Structure):
    """`Quantized` of csrc/products/quantized.h. The tensors it is made of must outlive it."""

    shape: tuple[int, int]
    groups: int
    dithered: bool

    _fields_ = [
        ("codes", c_void_p),
        ("step", c_void_p),
        ("offset", c_void_p),
        ("row_noise", c_void_p),
        ("column_noise", c_void_p),
        ("low", c_int32),
        ("high", c_int32),
        ("many", c_int32),
    ]

    @classmethod
    def of(
        cls,
        codes: Tensor,
        step: Tensor,
        offset: Tensor,
        noise: tuple[Tensor, Tensor] | None,
        range: tuple[int, int],
    ) -> Coded:
        """From contiguous codes (N, D), float32 step and offset of one shape, and dither (N, 1) and (1, D).

        range: the least and the greatest code that there can be.

        Raises:
            ValueError: they are something else.
        """
        if codes.ndim != 2 or codes.dtype not in (torch.uint8, torch.int8):
            raise ValueError(
                f"codes are {codes.dtype} of shape {tuple(codes.shape)}; give a matrix of uint8 or int8"
            )
        shape = codes.shape
        pointers = [
            expect("codes", codes, shape, codes.dtype),
            expect("step", step, step.shape),
            expect("offset", offset, step.shape),
        ]
        rows = columns = None
        if noise is not None:
            rows = expect("row dither", noise[0], (shape[0], 1))
            columns = expect("column dither", noise[1], (1, shape[1]))
        groups = step.numel()
        result = cls(*pointers, rows, columns, *range, int(groups > 1))
        result.shape, result.groups, result.dithered = (shape[0], shape[1]), groups, noise is not None
        return result

    def fit(self, name: str, size: int, groups: int, matrix: tuple[int, int] | None = None) -> int:
        """The address, if there are so many codes, one step or `groups`, and that matrix where it matters.

        With dither, and with steps by row or column, it does.
        """
        rows, columns = self.shape
        fits = rows * columns == size and self.groups in (1, groups)
        if not fits or (matrix is not None and self.shape != matrix and (self.dithered or self.groups > 1)):
            raise ValueError(
                f"{name} has codes of shape {self.shape} with {self.groups} steps; the product takes {size} codes"
                f"{'' if matrix is None else f' of shape {matrix}'} with 1 or {groups} steps"
            )
        return addressof(self)


def _narrow(left: Coded, right: Coded) -> bool:
    """Whether the kernels of narrow codes take a product of these."""
    return narrow_steps((left.low, left.high), (right.low, right.high)) > 0


class Fold(Structure):
    """`Fold` of csrc/products/quantized.h. The tensors it is made of must outlive it."""

    _fields_ = [("folded", c_int32), ("centre", c_void_p), ("share", c_void_p)]

    @classmethod
    def of(cls, folded: bool, centre: Tensor | None, share: Tensor | None) -> Fold:
        """From contiguous tensors: int32, one per row of the input; float32 (taps, O)."""
        pointers = (
            None if centre is None else expect("centre", centre, tuple(centre.shape), torch.int32),
            None if share is None else expect("share", share, tuple(share.shape)),
        )
        result = cls(int(folded), *pointers)
        result.sizes = tuple(None if t is None else t.numel() for t in (centre, share))
        return result

    def fit(self, rows: int, taps: int, channels: int) -> int:
        """The address, if there is a centre for every row of the input, and a share for every tap and channel."""
        centres, shares = self.sizes
        if centres not in (None, rows) or shares not in (None, taps * channels):
            raise ValueError(
                f"{centres} centres and {shares} shares; the product takes {rows} and {taps} × {channels}"
            )
        return addressof(self)


def dense_output(
    x: Coded, w: Coded, bias: Tensor | None, sizes: tuple[int, int, int], run: int, dtype: torch.dtype
) -> Tensor:
    """(T, O): x · wᵀ + bias. sizes: T, I, O; run: tokens per step of x, if it has many; bias: float32."""
    t, i, o = sizes
    if run * x.groups != t and x.groups != 1:
        raise ValueError(f"{x.groups} steps of {run} tokens each for {t} tokens")
    operands = (x.fit("input", t * i, x.groups), w.fit("weight", o * i, o, (o, i)))
    out = empty((t, o), dtype)
    pointer = None if bias is None else expect("bias", bias, (o,))
    rest = (run, OUT_TYPES[dtype], out.data_ptr())
    call("fqt_dense_output", *operands, pointer, *sizes, *rest, narrow=_narrow(x, w))
    return out


def dense_grad_input(
    g: Coded, w: Coded, sizes: tuple[int, int, int], folded: bool, dtype: torch.dtype, wants_ones: bool
) -> tuple[Tensor, Tensor | None]:
    """(T, I): g · w; and 1 · w (I,) if wanted."""
    t, i, o = sizes
    operands = (g.fit("grad_output", t * o, t, (t, o)), w.fit("weight", o * i, o, (o, i)))
    out = empty((t, i), dtype)
    ones = torch.empty(i, dtype=torch.float32, device="cpu") if wants_ones else None
    rest = (None if ones is None else ones.data_ptr(), OUT_TYPES[dtype], out.data_ptr())
    call("fqt_dense_grad_input", *operands, *sizes, int(folded), *rest, narrow=_narrow(g, w))
    return out, ones


def dense_grad_weight(g: Coded, x: Coded, sizes: tuple[int, int, int], fold: Fold) -> Tensor:
    """(O, I) float32: gᵀ · x."""
    t, i, o = sizes
    steps = x.groups if fold.folded else 1
    operands = (g.fit("grad_output", t * o, o, (t, o)), x.fit("input", t * i, steps))
    out = empty((o, i), torch.float32)
    rest = (fold.fit(t, 1, o), out.data_ptr())
    call("fqt_dense_grad_weight", *operands, *sizes, *rest, narrow=_narrow(g, x))
    return out


def conv_output(x: Coded, w: Coded, bias: Tensor | None, conv: Conv, dtype: torch.dtype) -> Tensor:
    """(N, H', W', O)."""
    sizes = conv.sizes()
    operands = (x.fit("input", sizes.input, conv.samples), w.fit("weight", sizes.weight, conv.out_channels))
    out = empty((conv.samples, conv.out_height, conv.out_width, conv.out_channels), dtype)
    pointer = None if bias is None else expect("bias", bias, (conv.out_channels,))
    arguments = (addressof(conv), OUT_TYPES[dtype], out.data_ptr())
    call("fqt_conv_output", *operands, pointer, *arguments, narrow=_narrow(x, w))
    return out


def conv_grad_input(
    g: Coded, w: Coded, conv: Conv, folded: bool, dtype: torch.dtype, wants_ones: bool
) -> tuple[Tensor, Tensor | None]:
    """(N, H, W, C); and the gradient (H, W, C) of a g of ones if wanted."""
    sizes = conv.sizes()
    by_sample = (conv.samples, sizes.output // max(conv.samples, 1))
    operands = (
        g.fit("grad_output", sizes.output, conv.samples, by_sample),
        w.fit("weight", sizes.weight, conv.out_channels),
    )
    map = (conv.height, conv.width, conv.channels)
    out = empty((conv.samples, *map), dtype)
    ones = torch.empty(map, dtype=torch.float32, device="cpu") if wants_ones else None
    rest = (None if ones is None else ones.data_ptr(), OUT_TYPES[dtype], out.data_ptr())
    call("fqt_conv_grad_input", *operands, addressof(conv), int(folded), *rest, narrow=_narrow(g, w))
    return out, ones


def conv_grad_weight(g: Coded, x: Coded, conv: Conv, fold: Fold) -> Tensor:
    """(O, kh, kw, C/groups) float32."""
    sizes = conv.sizes()
    by_channel = (sizes.output // conv.out_channels, conv.out_channels)
    operands = (
        g.fit("grad_output", sizes.output, conv.out_channels, by_channel),
        x.fit("input", sizes.input, x.groups if fold.folded else 1),
    )
    depth = conv.channels // conv.groups
    out = empty((conv.out_channels, conv.kernel_height, conv.kernel_width, depth), torch.float32)
    taps = conv.kernel_height * conv.kernel_width
    call(
        "fqt_conv_grad_weight",
        *operands,
        addressof(conv),
        fold.fit(conv.samples, taps, conv.out_channels),
        out.data_ptr(),
        narrow=_narrow(g, x),
    )
    return out
