"""What the kernels read: a matrix times factors, and the parameters of its blocks, as tuples of arguments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels.codes import Blocks, Entries, Scales
from fqt.kernels.triton.device import takes

VALUES = (torch.float32, torch.bfloat16, torch.float16)
"""What is read as values; float64 has a compute dtype of its own and stays with the reference."""


def takes_entries(x: Entries) -> bool:
    """Whether the kernels can read these entries."""
    return takes(x.matrix, x.factor, dtypes=VALUES) and takes(x.factor)


def takes_scales(scales: Scales) -> bool:
    """Whether the kernels can read these parameters."""
    return takes(scales.step, scales.offset)


def source_of(x: Entries) -> tuple:
    """Matrix, factor, the two strides, the factor's period: whatever the strides, nothing is copied."""
    factor = x.factor if x.factor is not None and x.factor.numel() else None
    if factor is not None:
        factor = factor.contiguous()
        if factor.ndim != 1 or x.shape[1] % factor.numel():
            raise ValueError(f"factors of shape {tuple(factor.shape)} for rows of {x.shape[1]}")
    return (x.matrix, factor, *x.matrix.stride(), 1 if factor is None else factor.numel())


@triton.jit
def values(source, rows, columns, inside):
    """x[row, column] · factor[column mod period] in float32; 0 outside."""
    x, factor, row_stride, column_stride, period = source
    value = tl.load(x + rows * row_stride + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
    if factor is not None:
        value = value * tl.load(factor + columns % period)
    return value


def parameter_of(parameter: Tensor, blocks: Blocks, shape: tuple[int, int]) -> tuple:
    """A parameter per block, or one that broadcasts: the tensor, and along each axis how many entries share a
    number (None: all do) and the stride."""
    sizes, along = (blocks.rows or 1, blocks.columns or 1), []
    for size, length, count, stride in zip(sizes, shape, parameter.shape, parameter.stride(), strict=True):
        share = 1 if count == length else size
        if count not in (1, -(-length // share)):
            raise ValueError(
                f"parameters of shape {tuple(parameter.shape)} for a matrix of {shape[0]} × {shape[1]}"
            )
        along += [None if count == 1 else share, stride]
    return (parameter, *along)


@triton.jit
def parameter(of, rows, columns, inside_rows, inside_columns):
    """The parameter of each entry, of the least shape that broadcasts against the tile."""
    number, row_share, row_stride, column_share, column_stride = of
    if row_share is None and column_share is None:
        return tl.load(number)
    elif column_share is None:
        return tl.load(number + rows // row_share * row_stride, mask=inside_rows, other=0.0)
    elif row_share is None:
        return tl.load(number + columns // column_share * column_stride, mask=inside_columns, other=0.0)
    else:
        place = rows // row_share * row_stride + columns // column_share * column_stride
        return tl.load(number + place, mask=inside_rows & inside_columns, other=0.0)
