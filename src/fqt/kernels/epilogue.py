"""What becomes of a product's exact sums: the floats made of them in the same pass.

In that order of float32 operations,

    (sum − zero · ones) · row_scale · column_scale + Σ_r left_r · right_r + bias,

rounded once more if the result is bfloat16 or float16. Offsets, dither and transforms of the operands are rank-one
terms of that kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RESULTS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What becomes of a product's sums; see the module for the order of operations.

    Rows are the result's rows (`matmul`), its samples (`conv2d`, `conv2d_grad_input`) or output channels
    (`conv2d_grad_weight`). Columns are columns, channels, or the entries (kernel_height, kernel_width, channel) of
    a filter, in that order.

    Attributes:
        row_scale, column_scale: float32, one number or one per row or column; None is 1.
        left: (rows, R) float32; None is no correction.
        right: (R, columns) float32, for `conv2d` and `conv2d_grad_input` (R, height, width, channels).
        bias: (columns,) float32 or None.
        zero: int32, one number or one per row; with it
        ones: int64, (columns,) or `right`'s shape less its first axis. zero · ones is what a code that stands for 0
            adds, an operand's centre times the other's sums.
        dtype: of the result, float32, bfloat16 or float16.
    """

    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    bias: Tensor | None = None
    zero: Tensor | None = None
    ones: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def arguments(self) -> tuple:
        """As the ops take it."""
        return (
            self.row_scale,
            self.column_scale,
            self.left,
            self.right,
            self.bias,
            self.zero,
            self.ones,
            self.dtype,
        )


def check_epilogue(rows: int, columns: int, place: tuple[int, ...], device: torch.device, epilogue: tuple) -> None:
    """Raises for what fits no result of these rows and columns.

    Args:
        rows, columns: of the result.
        place: the shape of a correction's right factor, less its first axis.
        device: the codes'.
        epilogue: `Epilogue.arguments`.

    Raises:
        TypeError, ValueError: a part has the wrong dtype, shape or device, or lacks its other half.
    """
    row_scale, column_scale, left, right, bias, zero, ones, dtype = epilogue
    if dtype is None:
        if any(x is not None for x in epilogue):
            raise ValueError("an epilogue needs the dtype of its result")
        return
    if dtype not in _RESULTS:
        raise TypeError(f"a result of {dtype}: give float32, bfloat16 or float16")
    if (left is None) != (right is None):
        raise ValueError("a correction needs both its left and its right factor")
    if (zero is None) != (ones is None):
        raise ValueError("zero · ones needs both its factors")
    rank = 0 if left is None or left.ndim != 2 else left.shape[1]
    for name, x, kind, shapes in (
        ("row_scale", row_scale, torch.float32, [(), (1,), (rows,)]),
        ("column_scale", column_scale, torch.float32, [(), (1,), (columns,)]),
        ("left", left, torch.float32, [(rows, rank)]),
        ("right", right, torch.float32, [(rank, *place)]),
        ("bias", bias, torch.float32, [(columns,)]),
        ("zero", zero, torch.int32, [(), (1,), (rows,)]),
        ("ones", ones, torch.int64, [place]),
    ):
        if x is None:
            continue
        if x.dtype != kind:
            raise TypeError(f"{name} holds {x.dtype}: give {str(kind).removeprefix('torch.')}")
        if x.device != device:
            raise ValueError(f"{name} lies on {x.device}, the codes on {device}")
        if tuple(x.shape) not in shapes:
            wanted = " or ".join(str(s) for s in dict.fromkeys(shapes))
            raise ValueError(f"{name} has shape {tuple(x.shape)}, not {wanted}")


def finish(sums: Tensor, out: torch.dtype, epilogue: tuple) -> Tensor:
    """The reference's epilogue on float64 sums of shape (rows, …, columns), any number of places in between."""
    row_scale, column_scale, left, right, bias, zero, ones, dtype = epilogue
    if dtype is None:
        return sums.to(out)
    places, columns = math.prod(sums.shape[1:-1]), sums.shape[-1]
    exact = sums.to(torch.int64).reshape(sums.shape[0], places, columns)
    if zero is not None:
        exact = exact - zero.view(-1, 1, 1).to(torch.int64) * ones.reshape(1, places, columns)
    value = exact.to(torch.float32)
    if row_scale is not None:
        value = value * row_scale.view(-1, 1, 1)
    if column_scale is not None:
        value = value * column_scale.view(-1)
    if left is not None:
        for r in range(left.shape[1]):
            value = value + left[:, r].view(-1, 1, 1) * right[r].reshape(1, places, columns)
    if bias is not None:
        value = value + bias
    return value.view(sums.shape).to(out)
