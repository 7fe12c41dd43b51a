"""The operations that the other rooms call, each declared once.

What an operation means is said in `fqt.kernels.reference`, whose functions take everything; `fqt.kernels.cpu`
registers the native kernels. No gradient flows through any of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fqt.kernels import philox, reference
from fqt.kernels.codes import (
    DITHER_LEVELS,
    Blocks,
    Dither,
    Entries,
    Findings,
    Levels,
    Quantized,
    Scales,
    is_power_of_two,
)
from fqt.kernels.codes import at_hand as at_hand
from fqt.kernels.op import Op
from fqt.kernels.rounding import DITHERED, Coding, Rounding, dither_streams
from fqt.kernels.steps import stored_step


def _check_encode(x: Entries, scales: Scales, levels: Levels, rounding: Rounding, seed: Tensor | None) -> None:
    if seed is None and rounding.draws:
        raise ValueError(f"{rounding} rounding needs a seed")
    if rounding == DITHERED:
        codes = replace(levels, high=levels.high + rounding.headroom)
        if not codes.uniform or codes.dtype == torch.float32 or codes.dtype != levels.dtype:
            raise ValueError("dithered rounding needs levels that are one apart and fit a byte, with one to spare")
    counts = scales.blocks.count(x.shape)
    if any(tuple(p.shape) not in (counts, x.shape) for p in (scales.step, scales.offset)):
        raise ValueError(
            f"parameters of shape {tuple(scales.step.shape)} for a matrix of {x.shape[0]} × {x.shape[1]}"
        )


def _check_rotate(x: Tensor, before: Tensor, after: Tensor | None, blocks: tuple[int, ...]) -> None:
    period = before.numel()
    if sum(blocks) != period or not all(map(is_power_of_two, blocks)):
        raise ValueError(f"blocks {blocks} are not powers of two that sum to {period}")
    if x.ndim != 2 or (x.shape[1] % period if period else x.shape[1]):
        raise ValueError(f"runs of {period} columns do not divide a matrix of shape {tuple(x.shape)}")


random_u24 = Op(philox.random_u24)
fork_seed = Op(philox.fork_seed)
value_range = Op(reference.value_range)
parameters = Op(reference.parameters)
encode = Op(reference.encode, _check_encode)
decode = Op(reference.decode)
code_variance = Op(reference.code_variance)
variance_sums = Op(reference.variance_sums)
column_sums = Op(reference.column_sums)
row_sums = Op(reference.row_sums)
value_sums = Op(reference.value_sums)
scaled_rows = Op(reference.scaled_rows)
hadamard = Op(reference.hadamard)
rotate = Op(reference.rotate, _check_rotate)
reflect = Op(reference.reflect)
replace_rows_ = Op(reference.replace_rows_)


def dither(seed: Tensor | None, x: Entries, dtype: torch.dtype) -> Dither:
    """What dithered rounding of x adds, of `dtype`."""
    assert seed is not None
    along_rows, along_columns = dither_streams(x.transposed)
    row, column = random_u24(seed, along_rows, x.shape[0]), random_u24(seed, along_columns, x.shape[1])
    return Dither(row.view(-1, 1).to(dtype) / DITHER_LEVELS, column.view(1, -1).to(dtype) / DITHER_LEVELS)


def scales_of(lo: Tensor, hi: Tensor, coding: Coding, blocks: Blocks) -> Scales:
    """The parameters of blocks with the ranges [lo, hi]; steps stored as the coding has it."""
    if coding.store != "float32":
        step = stored_step(lo, hi, coding.levels.high, coding.store)
        return Scales(step, torch.zeros_like(step), blocks)
    return Scales(*parameters(lo, hi, coding.mode, coding.levels.high), blocks)


def encoded(x: Entries, scales: Scales, coding: Coding, seed: Tensor | None) -> Quantized:
    """The codes of x with these parameters, and its dither."""
    codes = encode(x, scales, coding.levels, coding.rounding, seed)
    scales = coding.rounding.settled(x, codes, scales, coding.levels.high, seed)
    return Quantized(codes, scales, dither(seed, x, scales.step.dtype) if coding.rounding == DITHERED else None)


@Op
def quantize(
    x: Entries, blocks: Blocks, coding: Coding, seed: Tensor | None, known: Findings | None = None
) -> Quantized:
    """Codes of a matrix and what they mean: `value_range`, `parameters` and `encode` in one.

    Args:
        x: the entries.
        blocks: who shares a step.
        coding: how their ranges become codes.
        seed: int64 scalar; None only for a rounding that draws nothing.
        known: what is known of x beside it; backends use and complete it where that saves a pass.
    """
    scales = scales_of(*value_range(x, blocks), coding, blocks)
    return encoded(x, scales, coding, seed)._replace(findings=known)
