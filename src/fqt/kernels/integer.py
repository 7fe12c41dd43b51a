"""The three products on integer codes, for Linear and Conv.

With c the codes of grad_output, q of the input and w of the weight (symmetric), in float32 but for the sums of
codes, which are exact:

    input        X = s_x·q + z_x                     weight  W = s_w·w
    grad_output  G = s·(c + ½ − 2⁻²⁵ − a − b) + z    a: the dither along rows, b: along columns; s, z by rows

    output       s_x s_w (q·wᵀ) + z_x s_w (1·wᵀ) + bias
    grad_input   s s_w (c·w) + z' s_w (1·w) − s s_w (b·w)              z' = z + s·(½ − 2⁻²⁵ − a); then S⁻¹
    grad_weight  s s_x (cᵀ·q) + z' (1·X) + s z_x (c·1) − s (a·X)       z' = z + s·(½ − 2⁻²⁵ − b); then S⁻¹

Everything but the first term of each line is of low rank: vectors, or for a convolution maps of one sample, in
which a tap that padding left out counts as the value 0, not as code 0. Steps along a contracted axis have been
folded into grad_output before it was quantized: in grad_weight s_x is 1 then, z_x is minus the centre of each row's
codes, and the share of the offsets is added (`fqt.kernels.fold`). A transform S over grad_output's rows is undone
on the product; where its features are rotated, so is the other operand.

A Linear's operands may also be symmetric with steps per block of their matrix, along the contracted axis too: the
product is then summed in blocks (`fqt.kernels.blocked`), which steps that are one step shifted are gathered in.

These formulas are the reference; where a backend evaluates one of them at once (`fqt.kernels.cpu.fused`), it gives
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqt.kernels import blocked, ops, transposed
from fqt.kernels.blocked import Stepped
from fqt.kernels.codes import ROW, TENSOR, Blocks
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.fold import Folded
from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.kernels.low_rank import Channels, ConvCodes, DenseCodes, row_offset
from fqt.kernels.narrow_groups import Wide
from fqt.kernels.op import Op
from fqt.kernels.tensor import QuantizedTensor
from fqt.kernels.transposed import TransposedCodes

CodeRange = tuple[int, int]
"""The least and the greatest code of an operand."""
Kernel = Callable[[CodeRange, CodeRange], str]


@dataclass(frozen=True)
class _Machine:
    """What a backend says of the devices of a type: see `serve`."""

    obstacle: Callable[[], str]
    short: tuple[torch.dtype, ...]
    kernel: Kernel | None


_MACHINES: dict[str, _Machine] = {}


def serve(
    device: str, obstacle: Callable[[], str], short: tuple[torch.dtype, ...], kernel: Kernel | None = None
) -> None:
    """Tells that a backend multiplies codes on devices of this type.

    Args:
        device: "cpu" or "cuda".
        obstacle: says why the one at hand has no integer units for it; empty if it has.
        short: the dtypes beside float32 that its products write.
        kernel: says what multiplies operands of such codes, where that depends on them; else empty.
    """
    _MACHINES[device] = _Machine(obstacle, short, kernel)


def serves(device: str) -> bool:
    """Whether products of codes on devices of this type are products of integers, exact in any case."""
    return device in _MACHINES


def machine_obstacle(device: str) -> str:
    """Why products on devices of this type do not run on integer units here; empty if they do."""
    return _MACHINES[device].obstacle() if device in _MACHINES else f"no integer kernels for {device}"


def written(dtype: torch.dtype, device: str) -> torch.dtype:
    """What products on devices of this type are to write for a result of `dtype`: that, or float32 on the way."""
    return dtype if device in _MACHINES and dtype in _MACHINES[device].short else torch.float32


def kernel_of(device: str, left: CodeRange, right: CodeRange) -> str:
    """What multiplies operands of such codes on devices of this type, where that depends on them; else empty."""
    kernel = _MACHINES[device].kernel if device in _MACHINES else None
    return "" if kernel is None else kernel(left, right)


@Op
def output(
    map: LinearMap, x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The layer's output.

    Args:
        map: the linear map.
        x: the input, laid out; one group, or one per row; or by blocks.
        w: the weight, symmetric; one group, or one per output channel; or by blocks.
        bias: (O,) or None.
        dtype: of the result, float32, bfloat16 or float16.

    Returns:
        Of the float layer's output's shape; channels-last for a convolution.
    """
    if by_blocks(x, w):
        bias = None if bias is None else bias.detach().float()
        return blocked.matmul(*blocked.gathered(_stepped(x), _stepped(w).T), bias, dtype).view(
            *x.shape[:-1], w.shape[0]
        )
    if (wide := Wide.of_laid(map, w.shape)) is not None:
        return output(wide.map, x, wide.weight(w), bias, dtype)
    product = _of(map)
    step, offset, weight_step = (v.flatten() for v in (x.matrix_step, x.group_offset, w.matrix_step))
    left = right = None
    if not _all_zero(offset):
        left = (offset.expand(product.rows(x)) if offset.numel() == 1 else product.by_row(offset, x))[:, None]
        right = (product.ones_times_weight(x, w) * weight_step)[None]
    epilogue = Epilogue(
        row_scale=step if step.numel() == 1 else product.by_row(step, x),
        column_scale=weight_step,
        left=left,
        right=right,
        bias=None if bias is None else bias.detach().float(),
        dtype=dtype,
    )
    return product.output(x, w, epilogue)


@Op
def grad_input(
    map: LinearMap, g: QuantizedTensor, w: QuantizedTensor, folded: bool, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """The gradient for the input.

    Args:
        map: the linear map.
        g: grad_output, laid out; one group, or one per row; or by blocks.
        w: the weight, symmetric.
        folded: whether the weight's steps are in `g` already.
        shape: the input's.
        dtype: of the result, float32, bfloat16 or float16.
    """
    if by_blocks(g) or (by_blocks(w) and not folded):
        return blocked.matmul(*blocked.gathered(_stepped(g), _stepped(w, folded)), None, dtype).view(shape)
    if (wide := Wide.of_laid(map, w.shape)) is not None:
        return grad_input(wide.map, g, wide.weight(w), folded, shape, dtype)
    product = _of(map)
    ones, dithered = product.vectors_times_weight(g, w, shape)
    weight_step = None if folded else w.matrix_step.flatten()
    if weight_step is not None:
        ones, dithered = ones * weight_step, None if dithered is None else dithered * weight_step
    step, n = g.matrix_step.flatten(), product.rows(g)
    left, right = [row_offset(g).expand(n)], [ones]
    if dithered is not None:
        left, right = [*left, -step.expand(n)], [*right, dithered]
    epilogue = Epilogue(
        row_scale=step,
        column_scale=weight_step,
        left=torch.stack(left, 1),
        right=torch.stack(right),
        dtype=dtype if g.mixing is None else torch.float32,
    )
    result = product.grad_input(g, w, shape, epilogue)
    return result if g.mixing is None else unmixed(map, g, result, ones, dtype)


@Op
def grad_weight(
    map: LinearMap, g: QuantizedTensor, x: QuantizedTensor, folded: Folded | None, shape: torch.Size
) -> Tensor:
    """The gradient for the weight, float32.

    Args:
        map: the linear map.
        g: grad_output, laid out; one group, or one per output channel; or by blocks.
        x: the input, laid out; one group unless its steps are folded; or by blocks.
        folded: what goes with the input's codes, if its steps are in `g` already.
        shape: the weight's.
    """
    if by_blocks(g, x):
        return blocked.matmul(*blocked.gathered(_stepped(g).T, _stepped(x, folded is not None)))
    if (wide := Wide.of(map, shape)) is not None:
        return wide.gradient(grad_weight(wide.map, g, x, folded, wide.weight_shape(shape)))
    channels = Channels.of(g)
    if isinstance(map, ConvMap) and transposed.serves(map, shape):
        return _of_exact_sums(map, g, channels, x, folded, shape)
    if isinstance(map, ConvMap) and map.groups > 1:
        # A convolution per group: no transform mixes their channels (`fqt.nn.arithmetic`).
        alone, part = _of(replace(map, groups=1)), torch.Size((shape[0] // map.groups, *shape[1:]))
        each = zip(channels.chunk(map.groups), _chunk(x, map.groups), _shares(folded, map.groups), strict=True)
        assert isinstance(alone, ConvCodes)
        return torch.cat([_weight_product(alone, c, q, f, part)[0] for c, q, f in each])
    product = _of(map)
    assert not isinstance(product, TransposedCodes)
    if g.mixing is None:
        return _weight_product(product, channels, x, folded, shape)[0]
    share = None if folded is None else folded.share
    mixed = folded if folded is None else replace(folded, share=None)
    result, ones = _weight_product(product, channels, x, mixed, shape)
    laid = map.lay(result)
    rows = g.mixing.undo_product(laid.reshape(shape[0], ones.numel()), ones, torch.float32)
    if share is not None:
        rows = rows + share.T @ product.tap_columns(shape, share)
    return map.unlay(rows.view(laid.shape))


def _of_exact_sums(
    map: ConvMap,
    g: QuantizedTensor,
    channels: Channels,
    x: QuantizedTensor,
    folded: Folded | None,
    shape: torch.Size,
) -> Tensor:
    """`grad_weight` where no epilogue has a place for the corrections (`fqt.kernels.transposed`)."""
    rows, ones = transposed.weight_gradient(map, channels, x, folded, shape)
    share = None if folded is None or folded.share is None else folded.share.T  # (O, taps)
    if g.mixing is not None:
        rows = g.mixing.undo_product(rows.float(), ones.float(), torch.float32).double()
    if share is not None:
        rows = rows + share.repeat_interleave(rows.shape[1] // share.shape[1], 1)
    return transposed.as_weight(map, rows.float(), shape)


def by_blocks(*operands: QuantizedTensor) -> bool:
    """Whether steps are shared otherwise than by one for all or one per row."""

    def blocks(q: QuantizedTensor) -> Blocks:
        return q.scales.blocks.turned if q.view.transposed else q.scales.blocks

    return any(blocks(q) not in (TENSOR, ROW) for q in operands)


def _stepped(q: QuantizedTensor, folded: bool = False) -> Stepped:
    """A Linear's symmetric operand, a row per token or output channel; without its steps if they are folded."""
    on_side = not q.view.transposed and q.view.axis == (len(q.shape) - 1,) and len(q.shape) > 1
    codes = q.matrix_codes if on_side else q.matrix_codes.view(q.shape[:-1].numel(), q.shape[-1])
    found = Stepped.plain(codes) if folded else Stepped(codes, q.matrix_step, q.scales.blocks)
    return found.T if on_side else found


def share_by_tap(map: LinearMap, sums: Tensor, g: torch.Size, x: torch.Size, shape: torch.Size) -> Tensor:
    """`Folded.share` from Σ offset · grad_output over the rows of the input, float64 (columns of grad_output,).

    Args:
        map: the linear map.
        sums: for each column of grad_output, seen as a matrix with the input's rows.
        g, x: the shapes of grad_output and input, laid out.
        shape: the weight's.
    """
    return _of(map).values_by_tap(sums, g, x, shape)


def _weight_product(
    product: DenseCodes | ConvCodes, g: Channels, x: QuantizedTensor, folded: Folded | None, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """The weight's gradient before a transform is undone, and 1·X by column."""
    step, offset, centre, share = x.matrix_step.flatten(), x.group_offset.flatten(), None, None
    if folded is not None:
        centre, share = folded.centre, folded.share
        step, offset = step.new_ones(1), offset.new_zeros(1) if centre is None else -offset.new_ones(1)
    o = shape[0]
    scale = g.step.expand(o)
    ones, dithered, sums_of_x = product.vectors_times_input(g, x, step, offset, shape, centre)
    rest, zero = _zero_point(g)
    left, right = [rest.expand(o)], [ones]
    if dithered is not None:
        left, right = [*left, -scale], [*right, dithered]
    by_tap = share
    if not _all_zero(offset):
        by_tap = product.sums_by_tap(g, x, shape, zero.expand(o), centre).T * (scale * offset)
        by_tap = by_tap if share is None else by_tap + share
    if by_tap is not None:
        left, right = [*left, *by_tap], [*right, *product.tap_columns(shape, by_tap)]
    epilogue = Epilogue(
        row_scale=g.step,
        column_scale=step,
        left=torch.stack(left, 1),
        right=torch.stack(right),
        zero=zero,
        ones=sums_of_x,
    )
    return product.grad_weight(g, x, shape, epilogue), ones


def _shares(folded: Folded | None, groups: int) -> list[Folded | None]:
    """The channels' shares in as many equal groups."""
    if folded is None or folded.share is None:
        return [folded] * groups
    return [replace(folded, share=share) for share in folded.share.chunk(groups, 1)]


def _chunk(x: QuantizedTensor, groups: int) -> list[QuantizedTensor]:
    """The input's channels in as many equal groups."""
    shape = torch.Size((*x.shape[:-1], x.shape[-1] // groups))
    view = replace(x.view, shape=shape)
    parts = x.matrix_codes.reshape(x.shape).chunk(groups, -1)
    return [replace(x, view=view, matrix_codes=codes.reshape(view.size)) for codes in parts]


def _zero_point(g: Channels) -> tuple[Tensor, Tensor]:
    """The code nearest to value 0, as int32 in 0 … 255, and what the offset is about it: at most a step or so.

    The sum over tokens is long, and codes are not centred: taken off in float32, the offset would leave the
    rounding of a term hundreds of times the result.
    """
    zero = torch.where(g.step > 0, -g.offset / g.step, 0.0).round().clamp(0, 255)
    return g.offset + g.step * zero, zero.to(torch.int32)  # not addcmul, which may round once only


def _all_zero(offset: Tensor) -> bool:
    """Whether a correction can be left out; asked only where the answer costs nothing."""
    return ops.at_hand(offset) and offset.numel() == 1 and not bool(offset)


def unmixed(map: LinearMap, g: QuantizedTensor, product: Tensor, ones: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_input of a grad_output whose rows were mixed, from the product of the mixed rows and 1·w by column."""
    assert g.mixing is not None
    laid = map.lay(product)
    rows = laid.reshape(g.matrix_codes.shape[0], ones.numel())
    return map.unlay(g.mixing.undo_product(rows, ones.flatten(), dtype).view(laid.shape))


def _of(map: LinearMap) -> DenseCodes | ConvCodes | TransposedCodes:
    if isinstance(map, DenseMap):
        return DenseCodes()
    return TransposedCodes.of(map) if map.transposed else ConvCodes.of(map)
