"""A quantized tensor: integer codes and what turns them back into values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.quant.transform import Mixing


@dataclass(frozen=True)
class RowView:
    """How a tensor is seen as a matrix: the axes in `axis` are its rows, all others its columns.

    The matrix is row-major in the order (axis…, other axes…); with the leading axes as rows that is the
    tensor's own logical order, whatever its strides.
    """

    shape: torch.Size
    axis: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that brings the row axes to the front."""
        return self.axis + tuple(d for d in range(len(self.shape)) if d not in self.axis)

    def matrix(self, x: Tensor) -> Tensor:
        """(N, D) from a tensor of `shape`."""
        rows = 1
        for d in self.axis:
            rows *= self.shape[d]
        columns = 1
        for d in range(len(self.shape)):
            columns *= 1 if d in self.axis else self.shape[d]
        return x.permute(self.order).reshape(rows, columns)

    def restore(self, matrix: Tensor) -> Tensor:
        """A tensor of `shape` from (N, D); groups (N, 1), (1, D), (1, 1) become shapes that broadcast."""
        order = self.order
        rows = len(self.axis)
        permuted = [self.shape[d] if matrix.shape[0 if i < rows else 1] != 1 else 1 for i, d in enumerate(order)]
        inverse = [order.index(d) for d in range(len(order))]
        return matrix.reshape(permuted).permute(inverse)


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with their steps and offsets, and the transform to undo. `value = step · (code − dither) + offset`.

    Attributes:
        view: the matrix the tensor was quantized as.
        dtype: the dtype of the tensor that was quantized.
        matrix_codes: (N, D), uint8 (affine) or int8 (symmetric).
        matrix_step, matrix_offset: float32 or float64, broadcastable to (N, D). A NaN step marks a group that
            held a non-finite value.
        matrix_dither: dithered rounding's column part (or row part, for column groups); None without dither.
        mixing: the transform's state; None without transform.
    """

    view: RowView
    dtype: torch.dtype
    matrix_codes: Tensor
    matrix_step: Tensor
    matrix_offset: Tensor
    matrix_dither: Tensor | None = None
    mixing: Mixing | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that was quantized, and of its codes."""
        return self.view.shape

    @property
    def codes(self) -> Tensor:
        """Integer codes of the tensor's shape. With a transform they are the codes of the mixed rows."""
        return self.view.restore(self.matrix_codes)

    @property
    def step(self) -> Tensor:
        """The distance between neighbouring codes' values; broadcasts over `codes`."""
        return self.view.restore(self.matrix_step)

    @property
    def offset(self) -> Tensor:
        """The value of code 0 (less its dither); broadcasts over `codes`."""
        return self.view.restore(self.matrix_offset)

    @property
    def dither(self) -> Tensor | None:
        """What is subtracted from a code before scaling; broadcasts over `codes`; None without dither."""
        return None if self.matrix_dither is None else self.view.restore(self.matrix_dither)

    def decode(self) -> Tensor:
        """(N, D) in the step's dtype: the values of the codes, before the transform is undone."""
        return ops.decode(self.matrix_codes, self.matrix_step, self.matrix_offset, self.matrix_dither)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor these codes stand for.

        Args:
            dtype: of the result; by default that of the tensor that was quantized. Rounding to a short dtype
                is deterministic: ask for float32 where an unbiased estimate of a bfloat16 tensor is wanted.
        """
        y = self.decode()
        if self.mixing is not None:
            y = self.mixing.undo(y)
        dtype = dtype or self.dtype
        largest = torch.finfo(dtype).max
        if largest < torch.finfo(y.dtype).max:
            y = y.clamp(-largest, largest)  # noise at the edge of a short dtype must not become infinite
        return self.view.restore(y).to(dtype)
