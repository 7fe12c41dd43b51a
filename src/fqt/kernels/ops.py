"""The operations the other rooms call; each runs on the fastest backend that can take its input.

The plain-torch reference takes everything; the native kernels take float32 on the CPU and give the same bits.
Arguments and results are as in `fqt.kernels.reference`. No gradient flows through any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.kernels import native, philox, reference
from fqt.kernels.native import Findings as Findings
from fqt.kernels.reference import Quantized, Scaling, Unscaling

GROUPS = ("tensor", "row", "column")
ROUNDINGS = ("nearest", "stochastic", "dithered")


def at_hand(x: Tensor) -> bool:
    """Whether asking for x's values costs nothing: it is on the CPU, and neither traced nor batched."""
    return type(x) is Tensor and x.is_cpu and torch._C._functorch.maybe_current_level() is None


def random_u24(seed: Tensor, stream: int, n: int) -> Tensor:
    """As `philox.random_u24`."""
    if native.takes(integers=seed):
        return native.random_words(seed, stream, n, shift=8)
    return philox.random_u24(seed, stream, n)


def dither_noise(seed: Tensor, rows: int, columns: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """As `reference.dither_noise`."""
    along_rows, along_columns = reference.dither_streams(transposed)
    row, column = random_u24(seed, along_rows, rows), random_u24(seed, along_columns, columns)
    return row.view(rows, 1), column.view(1, columns)


def value_range(x: Tensor, group: str, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.value_range`."""
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}; known: {', '.join(GROUPS)}")
    if x.numel() and native.takes_source(x, factor):
        return native.value_range(x.detach(), group, factor)
    return reference.value_range(x, group, factor)


def parameters(lo: Tensor, hi: Tensor, mode: str, steps: int) -> tuple[Tensor, Tensor]:
    """As `reference.parameters`."""
    if native.takes(lo, hi) and lo.shape == hi.shape:
        return native.parameters(lo, hi, mode, steps)
    return reference.parameters(lo, hi, mode, steps)


def encode(
    x: Tensor,
    step: Tensor,
    offset: Tensor,
    low: int,
    high: int,
    rounding: str,
    seed: Tensor | None,
    factor: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """As `reference.encode`.

    Raises:
        ValueError: an unknown rounding, a missing seed, codes that no byte holds, or parameters whose shape is
            not (1, 1), (N, 1) or (1, D).
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDINGS)}")
    if seed is None and rounding != "nearest":
        raise ValueError(f"{rounding} rounding needs a seed")
    last = high + (rounding == "dithered")
    if not (low == 0 <= last <= 255 or -128 <= low <= last <= 127):
        raise ValueError(f"codes {low} … {last} do not fit a byte")
    if _native_groups(x, step, offset, factor) and native.takes(integers=seed):
        return native.encode(x.detach(), step, offset, low, high, rounding, seed, factor, transposed)
    return reference.encode(x, step, offset, low, high, rounding, seed, factor, transposed)


def quantize(
    x: Tensor,
    group: str,
    mode: str,
    low: int,
    high: int,
    rounding: str,
    seed: Tensor | None,
    factor: Tensor | None = None,
    transposed: bool = False,
    findings: Findings | None = None,
) -> Quantized:
    """Codes of a matrix and what they mean: `value_range`, `parameters` with `high` steps, `encode`, in one.

    Arguments and errors are theirs; `findings` are used and added to where that saves a pass.
    """
    known = rounding in ROUNDINGS and (seed is not None or rounding == "nearest")
    if known and quantizes_at_once(x, seed, factor):
        return native.quantize(x.detach(), group, mode, low, high, rounding, seed, factor, transposed, findings)
    return quantize_in_steps(x, group, mode, low, high, rounding, seed, factor, transposed)


def quantizes_at_once(x: Tensor, seed: Tensor | None, factor: Tensor | None) -> bool:
    """Whether `native.quantize` can take these."""
    return x.numel() > 0 and native.takes_source(x, factor) and native.takes(integers=seed)


def quantize_in_steps(
    x: Tensor,
    group: str,
    mode: str,
    low: int,
    high: int,
    rounding: str,
    seed: Tensor | None,
    factor: Tensor | None = None,
    transposed: bool = False,
    findings: Findings | None = None,
) -> Quantized:
    """The same, step by step; finds nothing out for others."""
    step, offset = parameters(*value_range(x, group, factor), mode, high)
    codes = encode(x, step, offset, low, high, rounding, seed, factor, transposed)
    return codes, step, offset, None if rounding != "dithered" else dither(seed, x, step.dtype, transposed)


def dither(
    seed: Tensor | None, matrix: Tensor, dtype: torch.dtype, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """The fractions of a step that dithered rounding of a matrix (N, D) adds: (N, 1) and (1, D), of `dtype`."""
    assert seed is not None
    noise = dither_noise(seed, matrix.shape[0], matrix.shape[1], transposed)
    row, column = (n.to(dtype) / reference.DITHER_LEVELS for n in noise)
    return row, column


def _native_groups(x: Tensor, step: Tensor, offset: Tensor, factor: Tensor | None) -> bool:
    return native.takes_source(x, factor) and native.takes(step, offset) and step.shape == offset.shape


def variance_sums(
    x: Tensor, step: Tensor, offset: Tensor, low: int, high: int, factor: Tensor | None = None
) -> Tensor:
    """As `reference.variance_sums`."""
    if _native_groups(x, step, offset, factor):
        return native.variance_sums(x.detach(), step, offset, low, high, factor)
    return reference.variance_sums(x, step, offset, low, high, factor)


def column_sums(codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """As `reference.column_sums`."""
    if native.takes_codes(codes) and (weights is None or weights.dtype == torch.int32):
        return native.column_sums(codes, weights)
    return reference.column_sums(codes, weights)


def value_sums(x: Tensor) -> Tensor:
    """As `reference.value_sums`."""
    return native.value_sums(x.detach()) if native.takes_source(x, None) else reference.value_sums(x)


def scaled_rows(
    x: Tensor, factor: Tensor, weight: Tensor | None, findings: Findings | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `reference.scaled_rows`; sums of x found on the way go to `findings`."""
    more = () if weight is None else (weight,)
    if native.takes_source(x, None) and native.takes(factor, *more):
        return native.scaled_rows(x.detach(), factor, weight, findings)
    return reference.scaled_rows(x.detach(), factor, weight)


def row_sums(codes: Tensor) -> Tensor:
    """As `reference.row_sums`."""
    return native.row_sums(codes) if native.takes_codes(codes) else reference.row_sums(codes)


def decode(codes: Tensor, step: Tensor, offset: Tensor, dither: Tensor | None) -> Tensor:
    """As `reference.decode`."""
    more = () if dither is None else (dither,)
    if native.takes(step, offset, *more, integers=codes):
        if step.numel() == 1 and offset.shape != step.shape:  # one step, but a dither per row in the offset
            step = step.expand(offset.shape)
        if step.shape == offset.shape:
            return native.decode(codes, step, offset, dither)
    return reference.decode(codes, step, offset, dither)


def code_variance(x: Tensor, step: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """As `reference.code_variance`."""
    if native.takes(x, step, offset) and step.shape == offset.shape:
        return native.code_variance(x, step, offset, low, high)
    return reference.code_variance(x, step, offset, low, high)


def hadamard(
    x: Tensor,
    order: Tensor,
    blocks: tuple[int, ...],
    before: Scaling | None = None,
    keep: Tensor | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """As `reference.hadamard`."""
    if native.takes_source(x, None) and native.takes(*_floats(before, after), integers=order) and _writes(after):
        return native.hadamard(x.detach(), order, blocks, before, keep, after)
    return reference.hadamard(x, order, blocks, before, keep, after)


def reflect(
    x: Tensor,
    group: Tensor,
    normal: Tensor,
    factor: Tensor,
    before: Scaling | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """As `reference.reflect`."""
    floats = (normal, factor, *_floats(before, after))
    if native.takes_source(x, None) and native.takes(*floats, integers=group) and _writes(after):
        return native.reflect(x.detach(), group, normal, factor, before, after)
    return reference.reflect(x, group, normal, factor, before, after)


def _floats(before: Scaling | None, after: Unscaling | None) -> list[Tensor]:
    found = [] if before is None else [before.half, before.offset, before.scale]
    if after is not None:
        found += [after.scale, after.offset, *(() if after.right is None else (after.right,))]
    return found


def _writes(after: Unscaling | None) -> bool:
    return after is None or after.dtype in (torch.float32, torch.bfloat16)


def replace_rows_(y: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """As `reference.replace_rows_`."""
    if native.takes(y) and native.takes_source(x, None) and y.is_contiguous() and x.shape == y.shape:
        return native.replace_rows_(y, keep, x.detach())
    return reference.replace_rows_(y, keep, x)
