"""Pooling of images as autograd sees it: torch's own, bit for bit, from less than it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.kernels import pooling, results
from fqt.kernels.packing import PACKED
from fqt.kernels.pooling import Windows
from fqt.nn.between.codes import Layout, chosen, packed, unpacked

_aten = torch.ops.aten
_Gradients = tuple[Tensor | None, ...]


class Pooled(torch.autograd.Function):
    """Max pooling of images: which tap of a window was greatest, in as many bits as that needs.

    A few samples at a time: torch counts places in int64, so that those of a whole batch, and what is made of them,
    would take many times the memory of the bits that are kept, and be the peak of a step.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, size: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil: bool
    ) -> Tensor:
        """(N, C, H, W); sizes as pairs."""
        ctx.window = window = (size, stride, padding, dilation, ceil)
        ctx.bits = next(bits for bits in PACKED if size[0] * size[1] <= 2**bits)
        ctx.input, ctx.dtype = Layout.of(x), x.dtype
        windows, outputs, taps, ctx.layouts = _windows(ctx), [], [], []
        for part in _parts(x):
            output, places = _aten.max_pool2d_with_indices(part, *window)
            pixels = _pixels(places)
            outputs.append(output)
            taps.append(packed(chosen(pooling.taps)(pixels, windows).view(-1), ctx.bits))
            ctx.layouts.append((places.shape, pixels.shape))
        ctx.save_for_backward(*taps)
        return results.cat(outputs) if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """To the greatest entry of each window, as torch's own."""
        windows, blank, start = _windows(ctx), _blank(ctx, grad), 0
        d_x = chosen(results.empty_like)(blank)
        for taps, (shape, laid) in zip(ctx.saved_tensors, ctx.layouts, strict=True):
            tap = unpacked(taps, ctx.bits, laid.numel()).view(laid)
            places, end = _images(chosen(pooling.places)(tap, windows), shape), start + shape[0]
            found = _aten.max_pool2d_with_indices_backward(grad[start:end], blank[start:end], *ctx.window, places)
            if len(ctx.layouts) == 1:
                return found, *(None,) * 5
            d_x[start:end] = found
            start = end
        return d_x, *(None,) * 5


def _windows(ctx: Any) -> Windows:
    size, stride, padding, dilation, _ = ctx.window
    return Windows(size, stride, padding, dilation, ctx.input.shape[-1])


_PART = 1 << 19
"""Entries of a batch that are pooled at a time, if a sample has not more."""


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """The samples, a few at a time; all of them for a compiler, which makes one loop of what follows."""
    whole = torch.compiler.is_compiling()
    return (x,) if whole else x.split(max(1, x.shape[0] * _PART // x.numel()))


def _pixels(images: Tensor) -> Tensor:
    """(N, C, H, W) as contiguous (N, H, W, C) if they lie so, else as (N · C, H, W, 1)."""
    last = images.permute(0, 2, 3, 1)
    return last if last.is_contiguous() else images.reshape(-1, *images.shape[2:], 1)


def _images(pixels: Tensor, shape: torch.Size) -> Tensor:
    """The inverse, of the shape (N, C, H, W)."""
    if pixels.shape == (shape[0], *shape[2:], shape[1]):
        return pixels.permute(0, 3, 1, 2)
    return pixels.view(shape)


class Averaged(torch.autograd.Function):
    """Average pooling of images, whose gradient needs nothing of the input but its shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *window: Any) -> Tensor:
        """As `F.avg_pool2d`, all arguments given."""
        ctx.window, ctx.input, ctx.dtype = window, Layout.of(x), x.dtype
        return F.avg_pool2d(x, *window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """As torch's own."""
        return _aten.avg_pool2d_backward(grad, _blank(ctx, grad), *ctx.window), *(None,) * len(ctx.window)


def _blank(ctx: Any, grad: Tensor) -> Tensor:
    """A tensor of the input's shape and layout whose values nobody reads: memory that is never touched."""
    return ctx.input.shaped(torch.empty(ctx.input.count, dtype=ctx.dtype, device=grad.device))
