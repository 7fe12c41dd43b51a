"""The operations the other rooms call; each runs on the fastest backend that can take its input.

The plain-torch reference takes everything; the native kernels take float32 on the CPU and give the same bits.
Arguments and results are as in `fqt.kernels.reference`. No gradient flows through any of them.
"""

from __future__ import annotations

from torch import Tensor

from fqt.kernels import native, philox, reference

GROUPS = ("tensor", "row", "column")
ROUNDINGS = ("nearest", "stochastic", "dithered")


def random_u24(seed: Tensor, stream: int, n: int) -> Tensor:
    """As `philox.random_u24`."""
    if native.takes(integers=seed):
        return native.random_words(seed, stream, n, shift=8)
    return philox.random_u24(seed, stream, n)


def dither_noise(seed: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """As `reference.dither_noise`."""
    row = random_u24(seed, philox.STREAM_DITHER_ROW, rows).view(rows, 1)
    column = random_u24(seed, philox.STREAM_DITHER_COLUMN, columns).view(1, columns)
    return row, column


def value_range(x: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """As `reference.value_range`."""
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}; known: {', '.join(GROUPS)}")
    if x.numel() and native.takes(x):
        return native.value_range(x.detach(), group)
    return reference.value_range(x, group)


def encode(
    x: Tensor, step: Tensor, offset: Tensor, low: int, high: int, rounding: str, seed: Tensor | None
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
    if native.takes(x, step, offset, integers=seed) and step.shape == offset.shape:
        return native.encode(x, step, offset, low, high, rounding, seed)
    return reference.encode(x, step, offset, low, high, rounding, seed)


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


def hadamard(x: Tensor, order: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """As `reference.hadamard`."""
    if native.takes(x, integers=order):
        return native.hadamard(x, order, blocks)
    return reference.hadamard(x, order, blocks)


def reflect(x: Tensor, group: Tensor, normal: Tensor, factor: Tensor) -> Tensor:
    """As `reference.reflect`."""
    if native.takes(x, normal, factor, integers=group):
        return native.reflect(x, group, normal, factor)
    return reference.reflect(x, group, normal, factor)


def scale_rows(x: Tensor, half: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """As `reference.scale_rows`."""
    if native.takes(x, half, offset, scale):
        return native.scale_rows(x, half, offset, scale)
    return reference.scale_rows(x, half, offset, scale)


def unscale_rows(y: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """As `reference.unscale_rows`."""
    if native.takes(y, scale, offset):
        return native.unscale_rows(y, scale, offset)
    return reference.unscale_rows(y, scale, offset)


def replace_rows_(y: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """As `reference.replace_rows_`."""
    if native.takes(y, x) and y.is_contiguous() and x.is_contiguous() and x.shape == y.shape:
        return native.replace_rows_(y, keep, x)
    return reference.replace_rows_(y, keep, x)
