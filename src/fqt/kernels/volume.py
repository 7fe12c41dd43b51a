"""Products of codes of convolutions of two or three dimensions, the latter made of the former.

A slice of a volume's output is the output of a plane convolution whose channels are those of all slices of
the input that its taps read, one after the other; so is a slice of the input's gradient. A tap along the depth of
the weight's gradient is the weight's gradient of a plane convolution whose samples are all slices that it meets.
Sums stay sums of integers, with the same epilogue (`fqt.kernels.epilogue`): what is exact there is exact here.

Unfolding all taps into a matrix (im2col) was rejected: it copies the codes kd · kh · kw times instead of kd times.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fqt.kernels import products
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.products import Spatial

Meetings = list[tuple[int, int]]
"""Slices of the other map and the taps that meet them."""


def convolve(input: Tensor, weight: Tensor, geometry: Spatial, epilogue: Epilogue | None = None) -> Tensor:
    """The output of a convolution of codes: `products.conv2d` of two dimensions or three.

    Args:
        input: (N, C, *) uint8 or int8; weight: (O, C/groups, *) int8.
        geometry: as many numbers each as there are spatial axes.
        epilogue: see `fqt.kernels.epilogue`; `right` is (R, *, O).

    Returns:
        (N, O, *) of the spatial axes.
    """
    if input.ndim == 4:
        return products.conv2d(input, weight, geometry.plane, epilogue)
    depth, *plane = geometry.output_size(input.shape[2:], weight.shape[2:])
    read: list[Meetings] = [[] for _ in range(depth)]
    for at, tap, slice in _meetings(weight.shape[2], input.shape[2], depth, geometry):
        read[at].append((slice, tap))
    found = []
    for at, meetings in enumerate(read):
        slices, filters = _gathered(input, meetings, geometry.groups), _filters(weight, meetings, None)
        found.append(products.conv2d(slices, filters, geometry.plane, _of_slice(epilogue, at)))
    return _stacked(found, (input.shape[0], weight.shape[0], depth, *plane))


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: tuple[int, ...],
    geometry: Spatial,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """The gradient of a convolution for its input: `products.conv2d_grad_input` of two dimensions or three.

    Args:
        grad_output: (N, O, *) uint8 or int8; weight: (O, C/groups, *) int8.
        input_size: the input's spatial axes.
        geometry, epilogue: as in `convolve`; `right` is (R, *, C).

    Returns:
        (N, C, *).
    """
    if grad_output.ndim == 4:
        height, width = input_size
        return products.conv2d_grad_input(grad_output, weight, (height, width), geometry.plane, epilogue)
    depth, *plane = input_size
    met: list[Meetings] = [[] for _ in range(depth)]
    for at, tap, slice in _meetings(weight.shape[2], depth, grad_output.shape[2], geometry):
        met[slice].append((at, tap))
    found, size = [], (plane[0], plane[1])
    for at, meetings in enumerate(met):
        slices = _gathered(grad_output, meetings, geometry.groups)
        filters = _filters(weight, meetings, geometry.groups)
        found.append(products.conv2d_grad_input(slices, filters, size, geometry.plane, _of_slice(epilogue, at)))
    return _stacked(found, (grad_output.shape[0], weight.shape[1] * geometry.groups, depth, *plane))


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: tuple[int, ...],
    geometry: Spatial,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """The gradient of a convolution for its weight: `products.conv2d_grad_weight` of two dimensions or three.

    Args:
        grad_output: (N, O, *) and input: (N, C, *), uint8 or int8.
        kernel_size: the weight's spatial axes.
        geometry, epilogue: as in `convolve`; columns are (*, C/groups) in that order.

    Returns:
        (O, C/groups, *).
    """
    if input.ndim == 4:
        height, width = kernel_size
        return products.conv2d_grad_weight(grad_output, input, (height, width), geometry.plane, epilogue)
    depth, *kernel = kernel_size
    met: list[Meetings] = [[] for _ in range(depth)]
    for at, tap, slice in _meetings(depth, input.shape[2], grad_output.shape[2], geometry):
        met[tap].append((at, slice))
    columns = kernel[0] * kernel[1] * (input.shape[1] // geometry.groups)
    found, size = [], (kernel[0], kernel[1])
    for tap, meetings in enumerate(met):
        grads = _slices(grad_output, [at for at, _ in meetings])
        inputs = _slices(input, [slice for _, slice in meetings])
        part = _of_columns(epilogue, tap * columns, (tap + 1) * columns)
        found.append(products.conv2d_grad_weight(grads, inputs, size, geometry.plane, part))
    return _stacked(found, (grad_output.shape[1], input.shape[1] // geometry.groups, *kernel_size))


def _meetings(taps: int, size: int, out: int, geometry: Spatial) -> list[tuple[int, int, int]]:
    """Slices of the output, taps, and the slices of the input that they read, along the depth."""
    stride, padding, dilation = (how[0] for how in (geometry.stride, geometry.padding, geometry.dilation))
    every = ((at, tap, at * stride + tap * dilation - padding) for at in range(out) for tap in range(taps))
    return [(at, tap, slice) for at, tap, slice in every if 0 <= slice < size]


def _gathered(map: Tensor, meetings: Meetings, groups: int) -> Tensor:
    """(N, groups · slices · C/groups, H, W): the channels of these slices; with none, of one (see `_filters`)."""
    laid = map.movedim(1, -1).unflatten(-1, (groups, -1))  # (N, D, H, W, groups, C/groups)
    met = [laid[:, slice] for slice, _ in meetings] or [laid[:, 0]]
    return torch.cat(met, -1).flatten(-2).movedim(-1, 1)


def _filters(weight: Tensor, meetings: Meetings, groups: int | None) -> Tensor:
    """The weight of these taps along input channels, or with `groups` along output channels.

    Where a slice meets no tap it is the product with a weight of zeros: its epilogue remains.
    """
    taps = [weight[:, :, tap] for _, tap in meetings] or [torch.zeros_like(weight[:, :, 0])]
    if groups is None:
        return torch.cat(taps, 1)
    return torch.cat([tap.unflatten(0, (groups, -1)) for tap in taps], 1).flatten(0, 1)


def _slices(map: Tensor, which: list[int]) -> Tensor:
    """(slices · N, C, H, W)."""
    laid = map.movedim(1, -1)
    return torch.cat([laid[:, at] for at in which] or [laid[:0, 0]]).movedim(-1, 1)


def _of_slice(epilogue: Epilogue | None, at: int) -> Epilogue | None:
    if epilogue is None or epilogue.right is None:
        return epilogue
    return replace(epilogue, right=epilogue.right[:, at])


def _of_columns(epilogue: Epilogue | None, first: int, last: int) -> Epilogue | None:
    if epilogue is None:
        return None
    scale, right, ones = epilogue.column_scale, epilogue.right, epilogue.ones
    return replace(
        epilogue,
        column_scale=scale if scale is None or scale.numel() == 1 else scale[first:last],
        right=None if right is None else right[:, first:last],
        ones=None if ones is None else ones[first:last],
    )


def _stacked(slices: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """(N, C, D, H, W), channels last."""
    laid = torch.stack([each.movedim(1, -1) for each in slices], 1)
    assert laid.movedim(-1, 1).shape == shape
    return laid.movedim(-1, 1)
