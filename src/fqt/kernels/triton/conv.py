"""Convolutions of codes as implicit products on integer tensor cores: no matrix of patches is written.

Images are channels-last, so that a tap's channels are neighbours in memory. The output is one product of pixels by
output channels, whose contraction runs over taps and input channels; grad_input is the same with the roles of the
images exchanged, for each residue of the stride by itself, so that no tap is met that the stride passes over;
grad_weight sums over pixels, in parts that meet in integers. A kernel of one pixel, without stride or padding, is a
matrix product and goes there.

A tap on padding is code 0. Where codes are unsigned it is read as 0 − 128 like every other, and the shift's
correction counts it too. Images are made signed in a pass of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.products import CODES, Shapes, most_terms
from fqt.kernels.triton import device, products, tune
from fqt.kernels.triton.epilogue import ROUNDED, SHIFT, complete, finish, wants
from fqt.kernels.triton.products import NEIGHBOURS, part_of, signed, tile_of
from fqt.kernels.triton.sums import column_sums, row_sums
from fqt.kernels.triton.tune import Tiles

_MOST = (1 << 31) - (1 << 17)  # pixels of a batch, so that the numbers of a tile and of a part fit int32


@triton.jit
def _met(at, tap, stride, padding, dilation, BACKWARD: tl.constexpr):
    """Along one axis: the position that a tap reads for a position of the result, and whether there is one."""
    if BACKWARD:
        steps = at + padding - tap * dilation
        return steps // stride, (steps >= 0) & (steps % stride == 0)
    else:
        position = at * stride - padding + tap * dilation
        return position, position >= 0


@triton.jit
def _images(
    codes,  # (N, H, W, groups · depth) int8
    weight,  # (groups · width of a group, kh, kw, depth)
    out,  # (N, P, Q, groups · width of a group)
    samples,
    source_height,
    source_width,
    depth,  # channels of a group that are summed over
    out_height,
    out_width,
    channels,  # of a group of the result
    kernel_height,
    kernel_width,
    stride_height,
    stride_width,
    padding_height,
    padding_width,
    dilation_height,
    dilation_width,
    groups,
    residue_height,  # of how many residues each axis of the result is made up; 1 but for a strided grad_input
    residue_width,
    column_shift,  # (residues, groups · channels) int64, or None
    row_scale,
    column_scale,
    left,
    right,
    bias,
    zero,
    ones,
    rank,
    places,
    width,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    PLACED: tl.constexpr,
    FINISH: tl.constexpr,
    SHIFTED: tl.constexpr,  # whether the codes are unsigned ones less 128
    BACKWARD: tl.constexpr,
    FLAT: tl.constexpr,  # few channels: a step of the sum runs across taps
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    group = tl.program_id(1) % groups
    residue = tl.program_id(1) // groups
    first_y, first_x = residue // residue_width, residue % residue_width
    height, breadth = tl.cdiv(out_height, residue_height), tl.cdiv(out_width, residue_width)
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(samples * height * breadth, BM), tl.cdiv(channels, BN), GROUP
    )
    pixel = row_tile * BM + tl.arange(0, BM)
    sample, place = pixel // (height * breadth), pixel % (height * breadth)
    y = place // breadth * residue_height + first_y
    x = place % breadth * residue_width + first_x
    row_in = (sample < samples) & (y < out_height) & (x < out_width)
    column = column_tile * BN + tl.arange(0, BN)
    column_in = column < channels

    # The taps that this residue meets: from the first in steps of the residues.
    first_i = (first_y + padding_height) % residue_height
    first_j = (first_x + padding_width) % residue_width
    taps_i = tl.maximum(tl.cdiv(kernel_height - first_i, residue_height), 0)
    taps_j = tl.maximum(tl.cdiv(kernel_width - first_j, residue_width), 0)
    taps = taps_i * taps_j
    runs = tl.cdiv(depth, BK)
    steps = tl.cdiv(taps * depth, BK) if FLAT else taps * runs

    image = codes + (sample.to(tl.int64) * source_height * source_width * groups * depth)[:, None] + group * depth
    filters = weight + ((group * channels + column).to(tl.int64) * kernel_height * kernel_width * depth)[None, :]
    sums = tl.zeros((BM, BN), tl.int32)
    for step in range(steps):
        if FLAT:
            number = step * BK + tl.arange(0, BK)
            channel = number % depth
            met = number // depth
            term_in = met < taps
            i, j = first_i + met // taps_j * residue_height, first_j + met % taps_j * residue_width
            tap = i * kernel_width + j
            source_y, y_in = _met(y[:, None], i[None, :], stride_height, padding_height, dilation_height, BACKWARD)
            source_x, x_in = _met(x[:, None], j[None, :], stride_width, padding_width, dilation_width, BACKWARD)
        else:
            channel = step % runs * BK + tl.arange(0, BK)
            met = step // runs
            term_in = channel < depth
            i, j = first_i + met // taps_j * residue_height, first_j + met % taps_j * residue_width
            tap = i * kernel_width + j
            source_y, y_in = _met(y[:, None], i, stride_height, padding_height, dilation_height, BACKWARD)
            source_x, x_in = _met(x[:, None], j, stride_width, padding_width, dilation_width, BACKWARD)
        inside = y_in & x_in & (source_y < source_height) & (source_x < source_width) & row_in[:, None]
        at = (source_y.to(tl.int64) * source_width + source_x) * (groups * depth) + channel[None, :]
        read = tl.load(image + at, inside & term_in[None, :], -128 if SHIFTED else 0)
        terms = (tap * depth + channel)[:, None]
        factor = tl.load(filters + terms, term_in[:, None] & column_in[None, :], 0)
        sums = tl.dot(read, factor, sums, out_dtype=tl.int32)

    pixel_out = (sample * out_height + y) * out_width + x
    row = tl.where(row_in, pixel_out, 0)
    column = group * channels + column
    if column_shift is not None:
        column_shift += residue * groups * channels
    value = complete(
        sums, row, row_in, column, column_in, None, column_shift,
        row_scale, column_scale, left, right, bias, zero, ones, rank, places, width,
        ROW_STEP, COLUMN_STEP, ZERO_STEP, PLACED, FINISH,
    )  # fmt: skip
    to = row.to(tl.int64)[:, None] * (groups * channels) + column[None, :]
    tl.store(out + to, value.to(out.dtype.element_ty), row_in[:, None] & column_in[None, :])


@triton.jit
def _filters(
    grad,  # (N, P, Q, groups · width of a group)
    image,  # (N, H, W, groups · depth)
    sums,  # (groups · width of a group, kh, kw, depth), to which is added
    samples,
    height,
    breadth,
    depth,
    out_height,
    out_width,
    channels,
    kernel_height,
    kernel_width,
    stride_height,
    stride_width,
    padding_height,
    padding_width,
    dilation_height,
    dilation_width,
    groups,
    part,  # pixels of a part
    GRAD_SHIFTED: tl.constexpr,
    IMAGE_SHIFTED: tl.constexpr,
    FLAT: tl.constexpr,  # few channels: a tile's columns run across taps
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    group = tl.program_id(2)
    taps = kernel_height * kernel_width
    runs = tl.cdiv(depth, BN)
    column_tiles = tl.cdiv(taps * depth, BN) if FLAT else taps * runs
    tile = tl.program_id(0) % column_tiles
    row = tl.program_id(0) // column_tiles * BM + tl.arange(0, BM)
    row_in = row < channels
    if FLAT:
        number = tile * BN + tl.arange(0, BN)
        tap, channel = number // depth, number % depth
        column_in = tap < taps
        i, j = (tap // kernel_width)[None, :], (tap % kernel_width)[None, :]
    else:
        tap, channel = tile // runs, tile % runs * BN + tl.arange(0, BN)
        column_in = channel < depth
        i, j = tap // kernel_width, tap % kernel_width
    pixels = samples * out_height * out_width
    start = tl.program_id(1) * part
    stop = tl.minimum(start + part, pixels)
    from_grad = grad + (group * channels + row)[:, None]
    from_image = image + (group * depth + channel)[None, :]
    found = tl.zeros((BM, BN), tl.int32)
    for first in range(start, stop, BK):
        pixel = first + tl.arange(0, BK)
        pixel_in = pixel < stop
        far = pixel.to(tl.int64)
        # A pixel beyond the part must add nothing whatever it meets: signed, it is 0.
        other = 128 if GRAD_SHIFTED else 0
        above = tl.load(
            from_grad + (far * (groups * channels))[None, :], row_in[:, None] & pixel_in[None, :], other
        )
        sample, place = pixel // (out_height * out_width), pixel % (out_height * out_width)
        at_y, at_x = (place // out_width)[:, None], (place % out_width)[:, None]
        y, y_in = _met(at_y, i, stride_height, padding_height, dilation_height, False)
        x, x_in = _met(at_x, j, stride_width, padding_width, dilation_width, False)
        inside = y_in & x_in & (y < height) & (x < breadth) & pixel_in[:, None]
        at = ((sample.to(tl.int64)[:, None] * height + y) * breadth + x) * (groups * depth)
        read = tl.load(from_image + at, inside & column_in[None, :], 0)
        found = tl.dot(signed(above, GRAD_SHIFTED), signed(read, IMAGE_SHIFTED), found, out_dtype=tl.int32)
    to = ((group * channels + row).to(tl.int64) * taps * depth)[:, None] + (tap * depth + channel)[None, :]
    tl.atomic_add(sums + to, found.to(sums.dtype.element_ty), row_in[:, None] & column_in[None, :], sem="relaxed")


def takes_conv2d_of(input: Tensor, weight: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple) -> bool:
    """Whether the kernels can run on these."""
    terms = weight.shape[1] * weight.shape[2] * weight.shape[3]
    return _takes(input, weight, shapes) and terms <= most_terms(input.dtype, weight.dtype)


def takes_conv2d_grad_input_of(
    grad: Tensor, weight: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple
) -> bool:
    """Whether the kernels can run on these."""
    terms = weight.shape[0] // shapes.geometry.groups * weight.shape[2] * weight.shape[3]
    return _takes(grad, weight, shapes) and terms <= most_terms(grad.dtype, weight.dtype)


def takes_conv2d_grad_weight_of(
    grad: Tensor, input: Tensor, shapes: Shapes, dtype: torch.dtype, epilogue: tuple
) -> bool:
    """Whether the kernels can run on these."""
    return _takes(grad, input, shapes)


def _takes(a: Tensor, b: Tensor, shapes: Shapes) -> bool:
    filled = a.numel() > 0 and b.numel() > 0 and 0 not in shapes.output
    pixels = max(shapes.input[0] * size[2] * size[3] for size in (shapes.input, shapes.output))
    return filled and pixels < _MOST and device.takes(a, b, dtypes=CODES)


def conv2d_of(
    input: Tensor,
    weight: Tensor,
    shapes: Shapes,
    dtype: torch.dtype,
    epilogue: tuple,
    tiles: Tiles | None = None,
) -> Tensor:
    """`fqt.kernels.products.conv2d_of`; `tiles` says how the kernel cuts its work, None is the fastest."""
    n, o, p, q = shapes.output
    image, filters = _channels_last(input), _channels_last(weight)
    with torch.cuda.device_of(input):
        if _is_matrix_product(shapes):
            flat = products.matmul_of(
                image.view(n * p * q, -1), filters.view(o, -1).T, dtype, epilogue, places=p * q
            )
            return flat.view(n, p, q, o).permute(0, 3, 1, 2)
        shift = SHIFT * row_sums(filters.view(o, -1))[None] if image.dtype == torch.uint8 else None
        return _image(image, filters, shapes, dtype, epilogue, shift, (1, 1), False, tiles)


def conv2d_grad_input_of(
    grad: Tensor,
    weight: Tensor,
    shapes: Shapes,
    dtype: torch.dtype,
    epilogue: tuple,
    tiles: Tiles | None = None,
) -> Tensor:
    """`fqt.kernels.products.conv2d_grad_input_of`; `tiles` as in `conv2d_of`."""
    (n, c, h, w), groups = shapes.input, shapes.geometry.groups
    image = _channels_last(grad)
    with torch.cuda.device_of(grad):
        if _is_matrix_product(shapes):
            flat = products.matmul_of(image.view(n * h * w, -1), weight.view(-1, c), dtype, epilogue, places=h * w)
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        # (groups · depth, kh, kw, width of a group): what is summed over is last.
        filters = weight.unflatten(0, (groups, -1)).permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous()
        geometry = shapes.geometry
        residues = geometry.stride if geometry.dilation == (1, 1) else (1, 1)
        shift = _shift_by_residue(filters, residues, geometry.padding) if grad.dtype == torch.uint8 else None
        return _image(image, filters, shapes, dtype, epilogue, shift, residues, True, tiles)


def conv2d_grad_weight_of(
    grad: Tensor,
    input: Tensor,
    shapes: Shapes,
    dtype: torch.dtype,
    epilogue: tuple,
    tiles: Tiles | None = None,
) -> Tensor:
    """`fqt.kernels.products.conv2d_grad_weight_of`; `tiles` as in `conv2d_of`."""
    o, depth, kh, kw = shapes.weight
    above, image, groups = _channels_last(grad), _channels_last(input), shapes.geometry.groups
    columns = kh * kw * depth
    with torch.cuda.device_of(grad):
        if _is_matrix_product(shapes):
            a, b = above.view(-1, o).T, image.view(-1, depth)
            return products.matmul_of(a, b, dtype, epilogue).view(o, kh, kw, depth).permute(0, 3, 1, 2)
        sums = _filter_sums(above, image, shapes, tiles)
        shifted = above.dtype == torch.uint8, image.dtype == torch.uint8
        row_shift = column_shift = None
        totals = column_sums(above.view(-1, o))[0]
        if shifted[1]:
            count = above.numel() // o if shifted[0] else 0
            row_shift = SHIFT * (totals - SHIFT * count)
        if shifted[0]:
            column_shift = SHIFT * _patch_sums(image, shapes)
            if groups == 1:
                column_shift = column_shift.flatten()
            else:  # each group's rows have columns of their own
                sums = sums.to(torch.int64) + column_shift[:, None]
                column_shift = None
        flat = finish(sums.view(o, columns), dtype, row_shift, column_shift, wants(epilogue, columns))
    return flat.view(o, kh, kw, depth).permute(0, 3, 1, 2)


def _channels_last(codes: Tensor) -> Tensor:
    """(N, H, W, C), contiguous."""
    return codes.permute(0, 2, 3, 1).contiguous()


def _is_matrix_product(shapes: Shapes) -> bool:
    """Whether every pixel meets one tap, and no other pixel's."""
    g = shapes.geometry
    return shapes.weight[2:] == (1, 1) and (g.stride, g.padding, g.groups) == ((1, 1), (0, 0), 1)


def _shift_by_residue(filters: Tensor, residues: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """(residues, channels) int64: 128 times the sum of the weights that each residue's pixels meet."""
    by_tap = filters.sum(3, dtype=torch.int64)
    met = [
        by_tap[:, (y + padding[0]) % residues[0] :: residues[0], (x + padding[1]) % residues[1] :: residues[1]]
        for y in range(residues[0])
        for x in range(residues[1])
    ]
    return SHIFT * torch.stack([taps.sum((1, 2)) for taps in met])


def _patch_sums(image: Tensor, shapes: Shapes) -> Tensor:
    """(groups, kh · kw · depth) int64: the sum over output pixels of the codes that each tap reads."""
    (_, depth, kh, kw), (p, q) = shapes.weight, shapes.output[2:]
    g = shapes.geometry
    (sh, sw), (ph, pw), (dh, dw) = g.stride, g.padding, g.dilation
    summed = column_sums(image.view(len(image), -1))[0].view(image.shape[1:])
    summed = torch.nn.functional.pad(summed, (0, 0, pw, pw, ph, ph))
    row, column, _ = summed.stride()
    size = (kh, p, kw, q, g.groups, depth)
    windows = summed.as_strided(size, (dh * row, sh * row, dw * column, sw * column, depth, 1))
    return windows.sum((1, 3)).permute(2, 0, 1, 3).reshape(g.groups, -1)


def _image(
    codes: Tensor,
    filters: Tensor,
    shapes: Shapes,
    dtype: torch.dtype,
    epilogue: tuple,
    shift: Tensor | None,
    residues: tuple[int, int],
    backward: bool,
    tiles: Tiles | None,
) -> Tensor:
    """An image (N, C, H, W), channels-last, from the other side's image and the filters."""
    result = shapes.input if backward else shapes.output
    geometry = shapes.geometry
    n, channels, height, width = result
    out = torch.empty(n, height, width, channels, dtype=dtype, device=codes.device)
    if not out.numel():
        return out.permute(0, 3, 1, 2)
    per_group, depth = channels // geometry.groups, filters.shape[3]
    finishing = wants(epilogue, channels, height * width)
    shifted = codes.dtype == torch.uint8
    if shifted:  # in a pass of its own: tensor cores read a tile as it lies in memory
        codes = (codes ^ SHIFT).view(torch.int8)
    pixels = n * -(-height // residues[0]) * -(-width // residues[1])

    def run(tiles: Tiles) -> Tensor:
        blocks = tiles.blocks()
        grid = (
            -(-pixels // blocks["BM"]) * -(-per_group // blocks["BN"]),
            geometry.groups * residues[0] * residues[1],
        )
        _images[grid](
            codes, filters, out, n, *codes.shape[1:3], depth, height, width, per_group, *filters.shape[1:3],
            *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups, *residues, shift,
            **finishing, SHIFTED=shifted, BACKWARD=backward, FLAT=depth < blocks["BK"] // 2,
            GROUP=NEIGHBOURS, **blocks, **tiles.launch(), **ROUNDED,
        )  # fmt: skip
        return out.permute(0, 3, 1, 2)

    if tiles is None:
        key = ("image", backward, tune.bucket(n), shapes.input[1:], shapes.weight, geometry, shifted, dtype)
        macs = pixels * filters.numel()
        tiles = tune.fastest(key, codes, tune.image_tiles(tune.capability(codes), per_group), run, macs)
    return run(tiles)


def _filter_sums(above: Tensor, image: Tensor, shapes: Shapes, tiles: Tiles | None) -> Tensor:
    """(groups, channels of a group, kh · kw · depth): the signed codes' sums over pixels, int32 or int64."""
    (n, o, p, q), (_, depth, kh, kw), geometry = shapes.output, shapes.weight, shapes.geometry
    per_group, pixels = o // geometry.groups, n * p * q
    fits = pixels <= most_terms(above.dtype, image.dtype)
    shape = (geometry.groups, per_group, kh * kw * depth)

    def run(tiles: Tiles) -> Tensor:
        blocks = tiles.blocks()
        flat = depth < blocks["BN"] // 2
        columns = -(-kh * kw * depth // blocks["BN"]) if flat else kh * kw * -(-depth // blocks["BN"])
        count = -(-per_group // blocks["BM"]) * columns
        part = part_of(pixels, blocks["BK"], count * geometry.groups, tune.processors(above))
        sums = torch.zeros(shape, dtype=torch.int32 if fits else torch.int64, device=above.device)
        _filters[(count, -(-pixels // part), geometry.groups)](
            above, image, sums, n, *image.shape[1:3], depth, p, q, per_group, kh, kw,
            *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups, part,
            GRAD_SHIFTED=above.dtype == torch.uint8, IMAGE_SHIFTED=image.dtype == torch.uint8, FLAT=flat,
            **blocks, **tiles.launch(),
        )  # fmt: skip
        return sums

    if tiles is None:
        key: tuple[Any, ...] = ("filters", tune.bucket(n), shapes.output[1:], shapes.weight, geometry)
        key = (*key, above.dtype, image.dtype)
        choices = tune.filter_tiles(tune.capability(above), per_group)
        tiles = tune.fastest(key, above, choices, run, pixels * o * depth * kh * kw)
    return run(tiles)
