"""The three products in one native call each, where that can be, with the bits of `fqt.kernels.integer`'s formulas.

Python and small torch operations between the kernels were an eighth of a layer's step: several times slower there
than alone, since the kernels empty the caches. Operands that the kernels cannot read (`_fits`) do not come here;
where they have no call for a product (a weight gradient whose channels are mixed), the answer is None. Then the
formulas are evaluated one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.kernels import integer, transposed
from fqt.kernels.cpu import quantized as kernels
from fqt.kernels.cpu.library import BACKEND, narrow_steps, status, takes
from fqt.kernels.cpu.products import Conv
from fqt.kernels.fold import Folded
from fqt.kernels.integer import by_blocks
from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.kernels.low_rank import ConvCodes, at_least_two
from fqt.kernels.narrow_groups import Wide
from fqt.kernels.tensor import QuantizedTensor

_LONGEST_DENSE, _LONGEST_LINE, _LARGEST_KERNEL = 1 << 23, 1 << 15, 1 << 12


def output(
    map: LinearMap, x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """As `integer.output`."""
    if x.noise is not None or w.noise is not None:
        return None
    if bias is not None:
        bias = bias.detach().float().contiguous()
        if bias.shape != w.shape[:1] or not takes(bias):
            return None  # the formulas say what is wrong
    if isinstance(map, DenseMap):
        tokens = x.shape[:-1].numel()
        run = tokens // x.matrix_step.numel()
        sizes = (tokens, x.shape[-1], w.shape[0])
        _meet("weight", w.shape, (sizes[2], sizes[1]))
        out = kernels.dense_output(_operand(x), _operand(w), bias, sizes, run, dtype)
        return out.view(*x.shape[:-1], w.shape[0])
    if not _is_planar(map) or Wide.of_laid(map, w.shape) is not None:
        return None
    conv = _conv(map, x.shape[0], x.shape[1:-1], w.shape)
    if conv is None:
        return None
    _meet("input", x.shape[-1:], (conv.channels,))
    return _image(kernels.conv_output(_operand(x), _operand(w), bias, conv, dtype), map)


def grad_input(
    map: LinearMap, g: QuantizedTensor, w: QuantizedTensor, folded: bool, shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None] | None:
    """As `integer.grad_input` before a transform is undone; with a transform also what it needs, 1·w by column."""
    if g.view.transposed or w.noise is not None:
        return None
    dtype, wants_ones = (dtype, False) if g.mixing is None else (torch.float32, True)
    if isinstance(map, DenseMap):
        sizes = (g.shape[:-1].numel(), shape[-1], w.shape[0])
        if g.matrix_codes.shape != (sizes[0], g.shape[-1]):  # a token is no row
            return None
        _meet("weight", w.shape, (g.shape[-1], sizes[1]))
        _meet("input", shape, (*g.shape[:-1], sizes[1]))
        out, ones = kernels.dense_grad_input(_operand(g), _operand(w), sizes, folded, dtype, wants_ones)
        return out.view(shape), ones
    if not _is_planar(map) or Wide.of_laid(map, w.shape) is not None:
        return None
    conv = _conv(map, shape[0], shape[2:], w.shape)
    if conv is None or g.view.axis != (0,):
        return None
    _meet("grad_output", g.shape, _output_shape(conv, map))
    _meet("input", shape[1:2], (conv.channels,))
    out, ones = kernels.conv_grad_input(_operand(g), _operand(w), conv, folded, dtype, wants_ones)
    return _image(out, map), ones


def grad_weight(
    map: LinearMap, g: QuantizedTensor, x: QuantizedTensor, folded: Folded | None, shape: torch.Size
) -> Tensor | None:
    """As `integer.grad_weight`."""
    if not g.view.transposed or x.noise is not None:
        return None
    if x.matrix_step.numel() > 1 and folded is None:
        return None
    if isinstance(map, DenseMap):
        sizes = (g.shape[:-1].numel(), shape[1], shape[0])
        if sizes[0] >= _LONGEST_DENSE:
            return None
        _meet("grad_output", g.shape, (*x.shape[:-1], sizes[2]))
        _meet("input", x.shape[-1:], (sizes[1],))
        fold, _alive = _fold(folded, sizes[0], (1, sizes[2]))
        return kernels.dense_grad_weight(_operand(g), _operand(x), sizes, fold)
    if not _is_planar(map) or Wide.of(map, shape) is not None or transposed.serves(map, shape):
        return None
    conv = _conv(map, x.shape[0], x.shape[1:-1], (shape[0], *shape[2:], shape[1]))
    if conv is None or conv.out_width > _LONGEST_LINE or g.matrix_codes.dtype != torch.uint8:
        return None
    _meet("grad_output", g.shape, _output_shape(conv, map))
    _meet("input", x.shape[-1:], (conv.channels,))
    fold, _alive = _fold(folded, conv.samples, (conv.kernel_height * conv.kernel_width, conv.out_channels))
    return _image(kernels.conv_grad_weight(_operand(g), _operand(x), conv, fold), map)


def _is_planar(map: ConvMap) -> bool:
    """Whether a convolution is one that the kernels have a call for: others are made of such, by the formulas."""
    return not map.transposed and len(map.stride) < 3


def _fold(folded: Folded | None, rows: int, share: tuple[int, int]) -> tuple[kernels.Fold, list[Tensor]]:
    """The C form, with a centre for each of `rows` rows, and the tensors that must outlive it."""
    if folded is None:
        return kernels.Fold.of(False, None, None), []
    centre, by_tap = folded.centre, folded.share
    if centre is not None:
        centre = centre.repeat_interleave(rows // max(centre.numel(), 1)).contiguous()
        _meet("centre", centre.shape, (rows,))
    if by_tap is not None:
        by_tap = by_tap.contiguous()
        _meet("share", by_tap.shape, share)
    return kernels.Fold.of(True, centre, by_tap), [t for t in (centre, by_tap) if t is not None]


def _fits(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether the kernels can read both: codes with data on the CPU, in float32 steps, none empty."""
    return _readable(a) and _readable(b)


def _readable(q: QuantizedTensor) -> bool:
    floats = [q.matrix_step, q.group_offset]
    if q.noise is not None:
        floats += [q.noise.row, q.noise.column]
    return (
        q.scales.blocks.plain
        and takes(*floats, integers=q.matrix_codes)
        and floats[0].shape == floats[1].shape
        and q.matrix_codes.numel() > 0
        and q.matrix_codes.is_contiguous()
        and all([t.is_contiguous() for t in floats])  # a list: half a generator's time
    )


def _operand(q: QuantizedTensor) -> kernels.Coded:
    noise = None if q.noise is None else (q.noise.row, q.noise.column)
    return kernels.Coded.of(q.matrix_codes, q.matrix_step, q.group_offset, noise, q.code_range)


def _conv(map: ConvMap, samples: int, size: tuple[int, ...], weight: tuple[int, ...]) -> Conv | None:
    """The geometry in two dimensions; None where the products refuse it.

    size: of the input; weight: (O, *, C/groups).
    """
    how, plane, kernel = ConvCodes.of(map).geometry, at_least_two(size, 1), at_least_two(weight[1:-1], 1)
    out = how.output_size(plane, kernel)
    if min(*out, *kernel) < 1 or max(kernel) > _LARGEST_KERNEL or weight[0] % map.groups:
        return None
    sizes = (samples, *plane, weight[-1] * map.groups, *out, weight[0], *kernel)
    return Conv(*sizes, *how.stride, *how.padding, *how.dilation, how.groups)


def _output_shape(conv: Conv, map: ConvMap) -> tuple[int, ...]:
    """Of the output, laid out."""
    size = (conv.out_width,) if len(map.stride) == 1 else (conv.out_height, conv.out_width)
    return (conv.samples, *size, conv.out_channels)


def _meet(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """The kernels see no shapes: what does not fit must not reach them."""
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"{name} has shape {tuple(shape)} where the other operands ask for {tuple(wanted)}")


def _image(x: Tensor, map: ConvMap) -> Tensor:
    """(N, C, *) from (N, H, W, C)."""
    image = x.permute(0, 3, 1, 2)
    return image.squeeze(2) if len(map.stride) == 1 else image


@integer.output.on(BACKEND, when=lambda map, x, w, bias, dtype: _fits(x, w) and not by_blocks(x, w))
def _output(
    map: LinearMap, x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    found = output(map, x, w, bias, dtype)
    return integer.output.reference(map, x, w, bias, dtype) if found is None else found


@integer.grad_input.on(
    BACKEND,
    when=lambda map, g, w, folded, shape, dtype: _fits(g, w) and not by_blocks(*((g,) if folded else (g, w))),
)
def _grad_input(
    map: LinearMap, g: QuantizedTensor, w: QuantizedTensor, folded: bool, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    found = grad_input(map, g, w, folded, shape, dtype)
    if found is None:
        return integer.grad_input.reference(map, g, w, folded, shape, dtype)
    result, of_ones = found
    return result if of_ones is None else integer.unmixed(map, g, result, of_ones, dtype)


@integer.grad_weight.on(BACKEND, when=lambda map, g, x, folded, shape: _fits(g, x) and not by_blocks(g, x))
def _grad_weight(
    map: LinearMap, g: QuantizedTensor, x: QuantizedTensor, folded: Folded | None, shape: torch.Size
) -> Tensor:
    found = grad_weight(map, g, x, folded, shape)
    return integer.grad_weight.reference(map, g, x, folded, shape) if found is None else found


def _obstacle() -> str:
    found = status()
    return f"no integer kernels: {found.reason}" if found.level == "reference" else ""


def _kernel(left: tuple[int, int], right: tuple[int, int]) -> str:
    if status().level != "avx2":
        return ""
    steps = narrow_steps(left, right)
    if not steps:
        return "16-bit multiplications (AVX2; codes of 7 bits in one operand would take 8-bit ones)"
    return (
        "8-bit multiplications (AVX2)"
        if steps == 1
        else f"8-bit multiplications (AVX2), {4 * steps} terms in 16 bits"
    )


integer.serve(BACKEND, _obstacle, (torch.bfloat16,), _kernel)
