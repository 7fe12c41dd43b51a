"""A Linear's three products with few launches, with the bits of `fqt.kernels.integer`'s formulas.

Evaluated one by one, the formulas' vectors are a hundred small operations per step, each of which costs the host
what a large product costs the device. Here the codes are laid as the tensor cores want them, which gives the sums
of codes on the way; one kernel makes of these all that the epilogue reads; one multiplies. What this has no kernel
for is left to the formulas: convolutions, steps by blocks, and for the weight's gradient rows that were mixed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels import integer
from fqt.kernels.codes import DITHER_LEVELS
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.fold import Folded
from fqt.kernels.integer import by_blocks
from fqt.kernels.linear_map import DenseMap, LinearMap
from fqt.kernels.products import CODES, most_terms
from fqt.kernels.tensor import QuantizedTensor
from fqt.kernels.triton import tune
from fqt.kernels.triton.device import launch, takes
from fqt.kernels.triton.epilogue import SHIFT
from fqt.kernels.triton.levels import even
from fqt.kernels.triton.products import Side, multiplied_signed

_SHIFT = tl.constexpr(SHIFT)
_LEVELS = tl.constexpr(float(DITHER_LEVELS))
_SIZE = 256
_ROWS = 8


@triton.jit
def _of_output(
    left,  # (tokens,): the input's offset by rows
    right,  # (outputs,): 1 · w times the weight's step
    shift,  # (outputs,) or None
    codes,  # (outputs, features)
    step,
    offset,
    outputs,
    features,
    tokens,
    span,  # tokens of a program
    STEP: tl.constexpr,  # 0 where one number is for all
    OFFSET: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * R + tl.arange(0, R)
    sums = tl.zeros((R, C), tl.int32)
    for start in range(0, features, C):
        column = start + tl.arange(0, C)
        inside = (row < outputs)[:, None] & (column < features)[None, :]
        sums += tl.load(codes + row[:, None] * features + column[None, :], inside, 0).to(tl.int32)
    total = tl.sum(sums, 1).to(tl.int64)
    tl.store(right + row, total.to(tl.float32) * tl.load(step + row * STEP, row < outputs, 0.0), row < outputs)
    if shift is not None:
        tl.store(shift + row, total * _SHIFT, row < outputs)
    for start in range(0, span, C):
        at = start + tl.arange(0, C)
        token = program * span + at
        there = (at < span) & (token < tokens)
        tl.store(left + token, tl.load(offset + token * OFFSET, there, 0.0), there)


@triton.jit
def _of_grad_input(
    left,  # (tokens, 1), with dither (tokens, 2)
    right,  # (1, features), with dither (2, features)
    shift,  # (features,) or None
    plain,
    weighted,
    weight_step,  # one number, or None where it is folded
    step,
    offset,
    dither,
    half,  # of `Dither` where it is known on the device alone, else None
    tokens,
    features,
    STEP: tl.constexpr,
    CENTRE: tl.constexpr,  # the other, or what half is multiplied by
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < features
    total = tl.load(plain + at, there, 0)
    times = 1.0 if weight_step is None else tl.load(weight_step)
    tl.store(right + at, total.to(tl.float32) * times, there)
    if shift is not None:
        tl.store(shift + at, total * _SHIFT, there)
    there = at < tokens
    steps, value = tl.load(step + at * STEP, there, 0.0), tl.load(offset + at * STEP, there, 0.0)
    if dither is not None:
        centre = CENTRE if half is None else tl.load(half) * CENTRE
        value = value + steps * (centre - tl.load(dither + at, there, 0.0))
        tl.store(left + at * RANK + 1, -steps, there)
        heavy = tl.load(weighted + at, at < features, 0).to(tl.float64) / _LEVELS
        tl.store(right + features + at, heavy.to(tl.float32) * times, at < features)
    tl.store(left + at * RANK, value, there)


@triton.jit
def _of_tokens(
    totals,  # (2,) int64 zeros, to which are added: Σ centre (or 1), Σ noise · centre
    fractions,  # (tokens,) of 2²⁴: the centres; None without
    centre,  # (tokens,) int32, or None
    noise,  # (tokens,) fractions, or None
    tokens,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < tokens
    count = there.to(tl.int64)
    if centre is not None:
        count = tl.load(centre + at, there, 0).to(tl.int64)
        tl.store(fractions + at, count.to(tl.float32) * (1.0 / _LEVELS), there)
    tl.atomic_add(totals, tl.sum(count, 0), sem="relaxed")
    if noise is not None:
        drawn = (tl.load(noise + at, there, 0.0) * _LEVELS).to(tl.int32).to(tl.int64)
        tl.atomic_add(totals + 1, tl.sum(drawn * count, 0), sem="relaxed")


@triton.jit
def _of_grad_weight(
    left,  # (outputs, RANK): what is left of the offset about the zero code; with dither −step; the input's share
    right,  # (RANK, features): 1 · X; with dither a · X; 1
    row_shift,  # (outputs,) or None
    column_shift,  # (features,) or None
    zero,  # (outputs,) int32
    ones,  # (features,) int64
    grad_sums,  # of the signed codes
    input_sums,
    grad_centred,  # (outputs,) Σ centre · code, or None
    input_weighted,  # (features,) Σ noise · code, or None
    step,
    offset,
    dither,  # (outputs,) along the channels, or None
    half,  # as in `_of_grad_input`
    input_step,  # one number; None where it is folded
    input_offset,
    share,  # (outputs,) or None
    totals,  # of `_of_tokens`; None without centre and dither
    outputs,
    features,
    tokens,
    STEP: tl.constexpr,
    CENTRE: tl.constexpr,
    RANK: tl.constexpr,
    GRAD_SHIFTED: tl.constexpr,
    INPUT_SHIFTED: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    count = tl.full((), 1, tl.int64) * tokens
    met = count if totals is None else tl.load(totals)
    # Folded, codes count from their row's centre, in steps of 1.
    step_x = tl.full((), 1.0, tl.float32) if input_step is None else tl.load(input_step)
    if input_step is not None:
        offset_x = tl.load(input_offset)
    else:
        offset_x = tl.full((), 0.0 if grad_centred is None else -1.0, tl.float32)
    there = at < features
    total = tl.load(input_sums + at, there, 0)
    if column_shift is not None:
        moved = total * _SHIFT
        if INPUT_SHIFTED:
            moved += count * (_SHIFT * _SHIFT)
        tl.store(column_shift + at, moved, there)
    if INPUT_SHIFTED:
        total += count * _SHIFT
    tl.store(ones + at, total, there)
    sums = step_x.to(tl.float64) * total.to(tl.float64) + offset_x.to(tl.float64) * met.to(tl.float64)
    tl.store(right + at, sums.to(tl.float32), there)
    if dither is not None:
        heavy = step_x.to(tl.float64) * tl.load(input_weighted + at, there, 0).to(tl.float64)
        heavy = (heavy + offset_x.to(tl.float64) * tl.load(totals + 1).to(tl.float64)) / _LEVELS
        tl.store(right + features + at, heavy.to(tl.float32), there)
    tl.store(right + (RANK - 1) * features + at, tl.full((SIZE,), 1.0, tl.float32), there)

    there = at < outputs
    total = tl.load(grad_sums + at, there, 0)
    if row_shift is not None:
        tl.store(row_shift + at, total * _SHIFT, there)
    if grad_centred is not None:
        total = tl.load(grad_centred + at, there, 0)
    elif GRAD_SHIFTED:
        total += count * _SHIFT
    steps, value = tl.load(step + at * STEP, there, 0.0), tl.load(offset + at * STEP, there, 0.0)
    if dither is not None:
        centre = CENTRE if half is None else tl.load(half) * CENTRE
        value = value + steps * (centre - tl.load(dither + at, there, 0.0))
        tl.store(left + at * RANK + 1, -steps, there)
    nearest = even(tl.where(steps > 0.0, tl.div_rn(-value, tl.where(steps > 0.0, steps, 1.0)), 0.0))
    nearest = tl.where(nearest < 0.0, 0.0, tl.where(nearest > 255.0, 255.0, nearest))
    code = nearest.to(tl.int32)
    tl.store(zero + at, code, there)
    tl.store(left + at * RANK, value + steps * nearest, there)
    tap = (total - code.to(tl.int64) * met).to(tl.float32) * (steps * offset_x)
    if share is not None:
        tap = tap + tl.load(share + at, there, 0.0)
    tl.store(left + at * RANK + RANK - 1, tap, there)


def _readable(*operands: QuantizedTensor) -> bool:
    """Codes that lie row by row on a GPU, with steps that are not by blocks."""
    return not by_blocks(*operands) and all(
        takes(q.matrix_codes, dtypes=CODES)
        and takes(q.matrix_step, q.group_offset, *(() if q.noise is None else (q.noise.row, q.noise.column)))
        and q.matrix_codes.is_contiguous()
        and (q.noise is None or isinstance(q.noise.half, float) or takes(q.noise.half))
        and q.matrix_step.numel() == q.group_offset.numel()
        and q.matrix_codes.numel() > 0
        for q in operands
    )


def _worth(a: QuantizedTensor, b: QuantizedTensor, rows: int, columns: int, terms: int) -> bool:
    """Whether int32 holds the sums, and the result has tiles enough that no sum need be shared out."""
    codes = a.matrix_codes
    return terms <= most_terms(codes.dtype, b.matrix_codes.dtype) and not tune.few_tiles(
        codes, rows, columns, terms
    )


def takes_output(
    map: LinearMap, x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype
) -> bool:
    """A Linear's operands without noise; a step per token, or one."""
    if not isinstance(map, DenseMap) or x.noise is not None or w.noise is not None or not _readable(x, w):
        return False
    tokens, outputs = x.shape[:-1].numel(), w.shape[0]
    shapes = x.matrix_codes.shape == (tokens, w.shape[1]) and w.matrix_codes.shape == w.shape
    shapes = shapes and not x.view.transposed and not w.view.transposed and w.matrix_codes.dtype == torch.int8
    known = x.matrix_step.numel() in (1, tokens) and w.matrix_step.numel() in (1, outputs)
    fits = bias is None or bias.shape == (outputs,)
    return shapes and known and fits and _worth(x, w, tokens, outputs, w.shape[1])


def output(
    map: LinearMap, x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As the formulas, bit for bit."""
    (outputs, features), tokens = w.shape, x.matrix_codes.shape[0]
    given = Side(x.matrix_codes)
    left, right = _floats(x, (tokens, 1), (1, outputs))
    shift = x.matrix_codes.new_empty(outputs, dtype=torch.int64) if given.shifted else None
    step, offset = w.matrix_step, x.group_offset
    programs = triton.cdiv(outputs, _ROWS)
    sizes = (outputs, features, tokens, triton.cdiv(tokens, programs))
    how = {"STEP": int(step.numel() > 1), "OFFSET": int(offset.numel() > 1), "R": _ROWS, "C": 512}
    launch(_of_output, programs, left, right, shift, w.matrix_codes, step, offset, *sizes, on=left, **how)
    epilogue = Epilogue(
        row_scale=x.matrix_step.flatten(),
        column_scale=step.flatten(),
        left=left,
        right=right,
        bias=None if bias is None else bias.detach().float(),
        dtype=dtype,
    )
    # A weight's codes are signed, so there is nothing by rows.
    product = multiplied_signed(
        given.ready(), Side(w.matrix_codes).ready(), (None, shift), dtype, epilogue.arguments()
    )
    return product.view(*x.shape[:-1], outputs)


def takes_grad_input(
    map: LinearMap, g: QuantizedTensor, w: QuantizedTensor, folded: bool, shape: torch.Size, dtype: torch.dtype
) -> bool:
    """A Linear's operands; a row is a token, and the weight has one step unless they are folded."""
    if not isinstance(map, DenseMap) or g.view.transposed or w.noise is not None or not _readable(g, w):
        return False
    tokens, (outputs, features) = g.shape[:-1].numel(), w.shape
    shapes = g.matrix_codes.shape == (tokens, outputs) and w.matrix_codes.shape == w.shape
    shapes = shapes and shape[-1] == features and shape[:-1].numel() == tokens and not w.view.transposed
    known = g.matrix_step.numel() in (1, tokens) and (folded or w.matrix_step.numel() == 1)
    return shapes and known and w.matrix_codes.dtype == torch.int8 and _worth(g, w, tokens, features, outputs)


def grad_input(
    map: LinearMap, g: QuantizedTensor, w: QuantizedTensor, folded: bool, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """As the formulas, bit for bit."""
    tokens, features = g.matrix_codes.shape[0], w.shape[1]
    given = Side(g.matrix_codes)
    right_side = Side(w.matrix_codes.T).turned(True, None if g.noise is None else g.noise.column.flatten())
    rank = 1 if g.noise is None else 2
    left, right = _floats(g, (tokens, rank), (rank, features))
    shift = g.matrix_codes.new_empty(features, dtype=torch.int64) if given.shifted else None
    step = g.matrix_step
    half, centre = _half(g)
    sums = (right_side.totals, right_side.weighted)
    scales = (None if folded else w.matrix_step, step, g.group_offset, None if g.noise is None else g.noise.row)
    arguments = (left, right, shift, *sums, *scales, half, tokens, features)
    how: dict[str, Any] = {"STEP": int(step.numel() > 1), "CENTRE": centre, "RANK": rank, "SIZE": _SIZE}
    launch(_of_grad_input, triton.cdiv(max(tokens, features), _SIZE), *arguments, on=left, **how)
    written = dtype if g.mixing is None else torch.float32
    epilogue = Epilogue(
        row_scale=step.flatten(),
        column_scale=None if folded else w.matrix_step.flatten(),
        left=left,
        right=right,
        dtype=written,
    )
    product = multiplied_signed(given.ready(), right_side, (None, shift), written, epilogue.arguments()).view(shape)
    return product if g.mixing is None else integer.unmixed(map, g, product, right[0], dtype)


def takes_grad_weight(
    map: LinearMap, g: QuantizedTensor, x: QuantizedTensor, folded: Folded | None, shape: torch.Size
) -> bool:
    """A Linear's operands, the input without noise; grad_output has a step per channel, or one."""
    if not isinstance(map, DenseMap) or g.mixing is not None or x.noise is not None or not _readable(g, x):
        return False
    tokens, (outputs, features) = x.shape[:-1].numel(), shape
    codes = g.matrix_codes if g.view.transposed else g.matrix_codes.T
    shapes = codes.shape == (tokens, outputs) and x.matrix_codes.shape == (tokens, features)
    shapes = shapes and not x.view.transposed and g.matrix_step.numel() in (1, outputs)
    if folded is None:
        known = x.matrix_step.numel() == 1
    else:
        known = folded.centre is None or (folded.centre.shape == (tokens,) and folded.centre.dtype == torch.int32)
        known = known and (folded.share is None or folded.share.shape == (1, outputs))
    return shapes and known and _worth(g, x, outputs, features, tokens)


def grad_weight(
    map: LinearMap, g: QuantizedTensor, x: QuantizedTensor, folded: Folded | None, shape: torch.Size
) -> Tensor:
    """As the formulas, bit for bit."""
    codes = g.matrix_codes if g.view.transposed else g.matrix_codes.T
    tokens, (outputs, features) = codes.shape[0], shape
    token_noise, channel_noise = (None, None) if g.noise is None else (g.noise.row, g.noise.column)
    if not g.view.transposed:
        token_noise, channel_noise = channel_noise, token_noise
    centre, share = (None, None) if folded is None else (folded.centre, folded.share)
    fractions, totals = _token_sums(codes, centre, token_noise)
    above, given = Side(codes.T), Side(x.matrix_codes.T)
    left_side = above.turned(True, fractions)
    right_side = given.turned(True, None if token_noise is None else token_noise.flatten())
    rank = 2 if g.noise is None else 3
    left, right = _floats(x, (outputs, rank), (rank, features))
    whole = lambda n: torch.empty(n, dtype=torch.int64, device=left.device)
    by_row = whole(outputs) if given.shifted else None
    by_column = whole(features) if above.shifted else None
    zero, ones = torch.empty(outputs, dtype=torch.int32, device=left.device), whole(features)
    half, middle = _half(g)
    step, step_x, offset_x = (
        g.matrix_step,
        *(None if folded is not None else v for v in (x.matrix_step, x.group_offset)),
    )
    found = (left, right, by_row, by_column, zero, ones)
    sums = (left_side.totals, right_side.totals, left_side.weighted, right_side.weighted)
    scales = (step, g.group_offset, channel_noise, half, step_x, offset_x, share, totals)
    how: dict[str, Any] = {"STEP": int(step.numel() > 1), "CENTRE": middle, "RANK": rank, "SIZE": _SIZE}
    how |= {"GRAD_SHIFTED": above.shifted, "INPUT_SHIFTED": given.shifted}
    programs = triton.cdiv(max(outputs, features), _SIZE)
    launch(_of_grad_weight, programs, *found, *sums, *scales, outputs, features, tokens, on=left, **how)
    epilogue = Epilogue(
        row_scale=step.flatten(),
        column_scale=left.new_ones(1) if step_x is None else step_x.flatten(),
        left=left,
        right=right,
        zero=zero,
        ones=ones,
    )
    shift = (by_row, by_column)
    return multiplied_signed(left_side, right_side, shift, torch.float32, epilogue.arguments())


def _token_sums(codes: Tensor, centre: Tensor | None, noise: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The centres as fractions of 2²⁴, and (2,) int64: Σ over tokens of the centre, 1 without, and of it times the
    noise; None and None where neither is there.
    """
    if centre is None and noise is None:
        return None, None
    tokens, device = codes.shape[0], codes.device
    fractions = None if centre is None else torch.empty(tokens, dtype=torch.float32, device=device)
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    centre = None if centre is None else centre.contiguous()
    launch(_of_tokens, triton.cdiv(tokens, 1024), totals, fractions, centre, noise, tokens, on=codes, SIZE=1024)
    return fractions, totals


def _half(g: QuantizedTensor) -> tuple[Tensor | None, float]:
    """`Dither.half` if it is on the device, and what it is to be multiplied by, or else `Dither.centre`."""
    if g.noise is None:
        return None, 0.0
    share = 1.0 - 1.0 / DITHER_LEVELS
    return (None, g.noise.half * share) if isinstance(g.noise.half, float) else (g.noise.half, share)


def _floats(q: QuantizedTensor, *shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float32, device=q.matrix_codes.device) for shape in shapes]
