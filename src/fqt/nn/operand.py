"""The operands that a layer's forward pass multiplies, and what backward products multiply in their place.

They stay what the forward pass made of them, codes of one byte, until a product asks for their values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels.linear_map import rows
from fqt.kernels.rotation import Rotation
from fqt.kernels.tensor import QuantizedTensor, Seen
from fqt.nn.call import Call
from fqt.nn.sharing import shared
from fqt.nn.turning import turned_input, turned_weight
from fqt.quant.keep import Keep
from fqt.quant.quantizer import Quantizer


@dataclass(frozen=True)
class ForwardOperand:
    """A forward operand: float, or codes of the operand laid out.

    Attributes:
        tensor: as the layer got it, if it stays float.
        codes: what is multiplied in its place, if it does not.
        is_input: whether it is the input, not the weight.
    """

    tensor: Tensor | None
    codes: QuantizedTensor | None
    is_input: bool

    @staticmethod
    def input(x: Tensor, call: Call, share: bool) -> ForwardOperand:
        """Of a layer; with `share`, in the codes of a layer that read it before."""
        q = call.recipe.operand("input")
        if q is None:
            return ForwardOperand(x, None, True)
        axis = rows(call.map, q.scale.row_axis, x.ndim)

        def quantize() -> QuantizedTensor:
            return q.quantize(
                turned_input(call.map.lay(x), call.map, call.recipe.rotate), axis=axis, nonfinite="propagate"
            )

        kind = (type(call.map), call.recipe.rotate, call.recipe.rotate and call.map.groups)
        return ForwardOperand(None, shared(x, q, axis, kind, quantize) if share else quantize(), True)

    @staticmethod
    def weight(w: Tensor, call: Call) -> ForwardOperand:
        """Of a layer."""
        q = call.recipe.operand("weight")
        if q is None:
            return ForwardOperand(w, None, False)
        by_channel, axis = call.map.weight_by_channel(w)
        turned = turned_weight(by_channel, call.map, call.recipe.rotate)
        return ForwardOperand(None, q.quantize(turned, axis=axis, nonfinite="propagate"), False)

    @property
    def dtype(self) -> torch.dtype:
        """Of what was given."""
        given = self.tensor if self.codes is None else self.codes
        assert given is not None
        return given.dtype

    def value(self, dtype: torch.dtype, call: Call) -> Tensor:
        """The operand as floats."""
        if self.codes is None:
            assert self.tensor is not None
            return self.tensor.to(dtype)
        value = self.codes.dequantize(dtype)
        return call.map.unlay(value) if self.is_input else call.map.weight_restored(value)

    def laid(self, dtype: torch.dtype, call: Call, keep: Keep | None) -> tuple[Tensor, tuple[int, ...]]:
        """The operand as floats laid out for a backward product, and the axes that this contracts.

        Args:
            dtype: of the floats.
            call: of the layer.
            keep: what is kept of grad_output's rows: an input is turned as these are. None for all of them.
        """
        value = self.value(dtype, call)
        if not self.is_input:
            return call.map.weight_by_channel(value)
        laid = call.map.lay(value) if keep is None else keep.turned(call.map.lay(value))
        return laid, tuple(range(laid.ndim - 1))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What must be kept: the floats, or codes, step and offset."""
        if self.codes is None:
            assert self.tensor is not None
            return (self.tensor,)
        return self.codes.matrix_codes, self.codes.matrix_step, self.codes.group_offset

    @property
    def seen(self) -> Seen | None:
        """What must be kept beside these; None of floats."""
        q = self.codes
        return None if q is None else Seen.of(q)

    @staticmethod
    def unpacked(saved: Sequence[Tensor | None], seen: Seen | None) -> ForwardOperand:
        """The input again, from its tensors."""
        if seen is None:
            return ForwardOperand(saved[0], None, True)
        codes, step, offset = saved
        assert codes is not None
        assert step is not None
        assert offset is not None
        return ForwardOperand(None, seen.quantized(codes, step, offset), True)


@dataclass(frozen=True)
class Requantized:
    """A forward operand quantized again for one backward product, laid out; turned as its grad_output is.

    Attributes:
        codes: of the operand, rotated along its first axis if there is a `rotation`.
        rotation: of what the product contracts; None without.
        dtype: that products are computed in.
    """

    codes: QuantizedTensor
    rotation: Rotation | None
    dtype: torch.dtype

    @staticmethod
    def of(
        operand: ForwardOperand,
        quantizer: Quantizer,
        seed: Tensor,
        call: Call,
        rotation: Rotation | None,
        keep: Keep | None,
        dtype: torch.dtype,
    ) -> Requantized:
        """Quantized from the values of the forward's codes, which an unbiased quantizer estimates: so the product
        remains an unbiased estimate of the QAT gradient's.

        Args:
            operand: of the forward pass.
            quantizer, seed: by what it is quantized again.
            call: of the layer.
            rotation: what grad_output takes along the contraction too; None without.
            keep: what is kept of grad_output's rows; None for all of them.
            dtype: that products are computed in.
        """
        laid, contracted = operand.laid(dtype, call, keep)
        if rotation is not None and operand.is_input:  # of a Linear, as its gradient
            laid, contracted = laid.flatten(0, -2), (0,)
        if rotation is not None:
            # Along tokens, or the first axis of a weight that is neither grouped nor transposed.
            laid = rotation.rows(laid.reshape(laid.shape[0], math.prod(laid.shape[1:]))).view(laid.shape)
        others = tuple(d for d in range(laid.ndim) if d not in contracted)
        axis = contracted if quantizer.scale.group == "tensor" else others
        return Requantized(quantizer.quantize(laid, seed, axis=axis, nonfinite="propagate"), rotation, dtype)

    def value(self) -> Tensor:
        """What the codes stand for, turned back."""
        value = self.codes.dequantize(self.dtype)
        if self.rotation is None:
            return value
        return self.rotation.undo_rows(value.reshape(value.shape[0], math.prod(value.shape[1:]))).view(value.shape)
