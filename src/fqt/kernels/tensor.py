"""A quantized tensor: integer codes and what turns them back into values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import ops, results
from fqt.kernels.codes import Blocks, Dither, Quantized, Scales, range_of
from fqt.kernels.mixing import Mixing
from fqt.kernels.rotation import Rotation


@dataclass(frozen=True)
class RowView:
    """How a tensor is seen as a matrix: the axes in `axis` are its rows, all others its columns.

    The matrix is row-major in the order (axis…, other axes…); with the leading axes as rows that is the
    tensor's own logical order, whatever its strides. With `transposed` it lies on its side, in the order
    (other axes…, axis…): so trailing axes as rows are in the tensor's logical order too, and need no copy.
    """

    shape: torch.Size
    axis: tuple[int, ...]
    transposed: bool = False

    @staticmethod
    def of(shape: torch.Size, axis: tuple[int, ...], may_transpose: bool) -> RowView:
        """The view of least copying."""
        trailing = tuple(range(len(shape) - len(axis), len(shape)))
        return RowView(shape, axis, may_transpose and axis == trailing and 0 < len(axis) < len(shape))

    @property
    def others(self) -> tuple[int, ...]:
        """The axes that are columns."""
        return tuple(d for d in range(len(self.shape)) if d not in self.axis)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The permutation of the axes that the matrix has."""
        return self.others + self.axis if self.transposed else self.axis + self.others

    def matrix(self, x: Tensor) -> Tensor:
        """(N, D) from a tensor of `shape`; (D, N) if transposed."""
        return results.reshape(x.permute(self.order), self.size)

    @cached_property
    def size(self) -> tuple[int, int]:
        """The matrix's shape."""
        rows, columns = (math.prod(self.shape[d] for d in axes) for axes in (self.axis, self.others))
        return (columns, rows) if self.transposed else (rows, columns)

    def restore(self, matrix: Tensor) -> Tensor:
        """A tensor of `shape` from the matrix; parameters (N, 1), (1, D), (1, 1) become shapes that broadcast."""
        order = self.order
        first = len(self.others if self.transposed else self.axis)
        permuted = [self.shape[d] if matrix.shape[0 if i < first else 1] != 1 else 1 for i, d in enumerate(order)]
        inverse = [order.index(d) for d in range(len(order))]
        return matrix.reshape(permuted).permute(inverse)


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with their steps and offsets, and the transform to undo. `value = step · (code − dither) + offset`.

    Attributes:
        view: the matrix the tensor was quantized as.
        dtype: the dtype of the tensor that was quantized.
        matrix_codes: (N, D), uint8 (affine), int8 (symmetric), or float32 for levels that fit no byte.
        scales: step and offset of every block of the matrix, float32 or float64. A NaN step marks a block that held
            a value that is not finite.
        noise: dithered rounding's; None without dither.
        mixing: the state of the transform over rows; None without.
        rotation: of the features; None without.
        bounds: the least and the greatest code that its quantizer makes; None where that is not known.
    """

    view: RowView
    dtype: torch.dtype
    matrix_codes: Tensor
    scales: Scales
    noise: Dither | None = None
    mixing: Mixing | None = None
    rotation: Rotation | None = None
    bounds: tuple[int, int] | None = None

    def __repr__(self) -> str:
        more = [name for name in ("noise", "mixing", "rotation") if getattr(self, name) is not None]
        codes = f"{self.matrix_codes.dtype} codes from {self.code_range[0]} to {self.code_range[1]}"
        return f"QuantizedTensor({tuple(self.shape)} of {self.dtype}, {', '.join([codes, *more])})"

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise FqtError("a QuantizedTensor is no array: take .dequantize().numpy(), or .codes.numpy()")

    @staticmethod
    def of(
        found: Quantized,
        view: RowView,
        dtype: torch.dtype,
        mixing: Mixing | None = None,
        rotation: Rotation | None = None,
        bounds: tuple[int, int] | None = None,
    ) -> QuantizedTensor:
        """What a matrix's codes stand for as a tensor."""
        return QuantizedTensor(view, dtype, found.codes, found.scales, found.dither, mixing, rotation, bounds)

    @property
    def matrix_step(self) -> Tensor:
        """One number per block of the matrix."""
        return self.scales.step

    @property
    def group_offset(self) -> Tensor:
        """The value of code 0 (less dither) of every block of the matrix."""
        return self.scales.offset

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that was quantized, and of its codes."""
        return self.view.shape

    @property
    def codes(self) -> Tensor:
        """Integer codes of the tensor's shape. With a transform they are the codes of the mixed rows."""
        return self.view.restore(self.matrix_codes)

    @property
    def code_range(self) -> tuple[int, int]:
        """The least and the greatest code that there can be."""
        return self.bounds or range_of(self.matrix_codes.dtype)

    @property
    def step(self) -> Tensor:
        """The distance between neighbouring codes' values; broadcasts over `codes`."""
        return self.view.restore(self.scales.spread(self.view.size)[0])

    @property
    def offset(self) -> Tensor:
        """The value of code 0 (less its dither); broadcasts over `codes`."""
        return self.view.restore(self.matrix_scales.spread(self.view.size)[1])

    @property
    def dither(self) -> Tensor | None:
        """What is subtracted from a code before scaling; broadcasts over `codes`; None without dither."""
        return None if self.matrix_dither is None else self.view.restore(self.matrix_dither)

    @property
    def _into_offset(self) -> tuple[Tensor, Tensor]:
        """The dither along which the step does not vary, which therefore goes into the offset, and the other."""
        assert self.noise is not None
        row, column = self.noise.row, self.noise.column
        return (column, row) if self.matrix_step.shape[1] != 1 else (row, column)

    @property
    def _spread(self) -> Scales:
        """The scales, one per entry where they are shared by blocks along both axes and dither is to be added."""
        if self.noise is None or self.scales.blocks.plain:
            return self.scales
        return Scales(*self.scales.spread(self.view.size), Blocks(1, 1))

    @property
    def matrix_scales(self) -> Scales:
        """Step and offset of the matrix, with one of the two dithers in the offset."""
        if self.noise is None:
            return self.scales
        scales = self._spread
        # The constant ½ goes with the other dither: so the offset stays inside the block's range, and finite.
        shift = self.noise.half + self.noise.centre - self._into_offset[0]
        return replace(scales, offset=scales.offset + scales.step * shift)

    @property
    def matrix_dither(self) -> Tensor | None:
        """(1, D), or (N, 1) for column groups: the other dither; None without."""
        return None if self.noise is None else self._into_offset[1] + self.noise.half

    def decode(self) -> Tensor:
        """(N, D) in the step's dtype: the values of the codes, before the transform is undone."""
        return ops.decode(self.matrix_codes, self.matrix_scales, self.matrix_dither)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor these codes stand for.

        Args:
            dtype: of the result; by default that of the tensor that was quantized. Rounding to a short dtype
                is deterministic: ask for float32 where an unbiased estimate of a bfloat16 tensor is wanted.
        """
        y = self.decode()
        if self.mixing is not None:
            y = self.mixing.undo(y)
        if self.rotation is not None:
            y = self.rotation.undo_columns(y)
        dtype = dtype or self.dtype
        largest = torch.finfo(dtype).max
        if largest < torch.finfo(y.dtype).max:
            y = y.clamp(-largest, largest)  # noise at the edge of a short dtype must not become infinite
        return self.view.restore(y).to(dtype)


@dataclass(frozen=True)
class Seen:
    """What of a quantized tensor without dither or transform is no tensor: with codes, step and offset it is whole.

    Attributes:
        view, dtype, bounds: as in `QuantizedTensor`.
        blocks: who shares a step.
    """

    view: RowView
    dtype: torch.dtype
    blocks: Blocks
    bounds: tuple[int, int] | None

    @staticmethod
    def of(q: QuantizedTensor) -> Seen:
        """What of this one is no tensor."""
        return Seen(q.view, q.dtype, q.scales.blocks, q.bounds)

    def quantized(self, codes: Tensor, step: Tensor, offset: Tensor) -> QuantizedTensor:
        """The tensor again."""
        scales = Scales(step, offset, self.blocks)
        return QuantizedTensor(self.view, self.dtype, codes, scales, bounds=self.bounds)
