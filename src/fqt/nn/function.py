"""One autograd function: a linear layer's three products on quantized operands.

The gradient is an unbiased estimate of the straight-through gradient of the forward-quantized network (QAT),
up to the rounding of the output dtype; its two quantizers of grad_output are independent. Saved for backward
are 8-bit codes, not floats. The arithmetic is float on integer-valued codes times their steps.

The noise belongs to the forward call: a second backward through the same graph (`retain_graph=True`) draws the
same noise again, as activation checkpointing needs.

A hook pair around an ordinary layer (two forward passes to quantize one gradient twice) was rejected: it
doubles the forward cost and keeps float activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fqt.kernels import reference
from fqt.kernels.philox import fork_seed
from fqt.nn.linear_map import LinearMap
from fqt.nn.recipe import Recipe
from fqt.quant.quantizer import Quantizer
from fqt.quant.tensor import QuantizedTensor

_ROLES = {"grad_input": 0, "grad_weight": 1}


@dataclass(frozen=True)
class GradientOperand:
    """grad_output as it is about to be quantized for one product.

    Attributes:
        role: "grad_input" or "grad_weight": the product it is for.
        gradient: float, of grad_output's shape; what `quantizer` gets: folded steps are multiplied in already.
        folded: what was multiplied in, broadcasting against `gradient`; None if nothing was.
        quantizer: the recipe's for this role.
        rows: the axes of `gradient` that are its rows.
        seed: of the noise: `quantizer.quantize(gradient, seed, axis=rows)` gives the very codes of the product.
    """

    role: str
    gradient: Tensor
    folded: Tensor | None
    quantizer: Quantizer
    rows: tuple[int, ...]
    seed: Tensor


@dataclass(frozen=True)
class Call:
    """What one call of a layer adds to its operands.

    Attributes:
        map: the layer's linear map.
        recipe: its quantizers.
        seed: int64 scalar on the CPU: the source of this call's gradient noise; None in eval mode, whose
            gradient is exact.
        rank: the distributed rank, mixed into the noise so that equal seeds on all ranks stay independent.
        dtype: of the output.
        observer: told of every gradient operand before it is quantized.
    """

    map: LinearMap
    recipe: Recipe
    seed: Tensor | None
    rank: int
    dtype: torch.dtype
    observer: Callable[[GradientOperand], None] | None = None

    def noise(self, role: str, device: torch.device) -> Tensor:
        """The seed of one operand's quantizer."""
        assert self.seed is not None
        return fork_seed(self.seed, 2 * self.rank + _ROLES[role]).to(device)


def linear_products(input: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """The output of a linear layer, differentiable once.

    Args:
        input, weight, bias: as the layer's float form takes them.
        call: the rest.

    Returns:
        As the layer's float form, in `call.dtype`.
    """
    return _Products.apply(input, weight, bias, call)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.call, ctx.shapes = call, (input.shape, weight.shape)
        ctx.dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype)
        compute = reference.compute_dtype(torch.promote_types(input.dtype, weight.dtype))
        with torch.autocast(input.device.type, enabled=False):
            x, w = _Operand.input(input, call), _Operand.weight(weight, call)
            output = call.map.output(x.value(compute), w.value(compute))
            if bias is not None:
                output = output + call.map.per_channel(bias.to(compute), output.ndim)
        # An operand is needed only for the other one's gradient.
        keep_x, keep_w = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        tensors_x, ctx.input = x.pack(keep_x)
        tensors_w, ctx.weight = w.pack(keep_w)
        ctx.save_for_backward(*tensors_x, *tensors_w)
        return output.to(call.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved, call = ctx.saved_tensors, ctx.call
        compute = reference.compute_dtype(torch.promote_types(ctx.dtypes[0], ctx.dtypes[1]))
        grad_input = grad_weight = grad_bias = None
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_output = grad_output.to(compute)
            if ctx.needs_input_grad[0]:
                weight = ctx.weight.unpack(saved[-3:])
                grad_input = _grad_input(grad_output, weight, call, ctx.shapes[0]).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                input = ctx.input.unpack(saved[:3])
                grad_weight = _grad_weight(grad_output, input, call, ctx.shapes[1]).to(ctx.dtypes[1])
            if ctx.needs_input_grad[2]:
                grad_bias = call.map.grad_bias(grad_output).to(ctx.dtypes[2])
        return grad_input, grad_weight, grad_bias, None


@dataclass(frozen=True)
class _Operand:
    """A forward operand: float, or quantized with its own shape back at hand."""

    tensor: Tensor | None
    codes: QuantizedTensor | None
    shape: torch.Size

    @staticmethod
    def input(x: Tensor, call: Call) -> _Operand:
        q = call.recipe.operand("input")
        if q is None:
            return _Operand(x, None, x.shape)
        rows = call.map.rows(q.scale.axis, x.ndim)
        return _Operand(None, q.quantize(x, axis=rows, nonfinite="propagate"), x.shape)

    @staticmethod
    def weight(w: Tensor, call: Call) -> _Operand:
        q = call.recipe.operand("weight")
        if q is None:
            return _Operand(w, None, w.shape)
        by_channel, rows = call.map.weight_by_channel(w)
        return _Operand(None, q.quantize(by_channel, axis=rows, nonfinite="propagate"), w.shape)

    def value(self, dtype: torch.dtype) -> Tensor:
        """The operand as floats."""
        if self.codes is None:
            assert self.tensor is not None
            return self.tensor.to(dtype)
        return self.codes.dequantize(dtype).reshape(self.shape)

    def row_step(self) -> Tensor | None:
        """(N,) steps, if every row has its own; 1 where a group is constant."""
        if self.codes is None or self.codes.matrix_step.numel() == 1 or self.codes.matrix_step.shape[1] != 1:
            return None
        step = self.codes.matrix_step.flatten()
        return torch.where(step == 0, 1.0, step)

    def pack(self, keep: bool) -> tuple[tuple[Tensor | None, ...], _Packed]:
        """Three tensors to save (None where there is none), and the rest."""
        if not keep:
            return (None, None, None), _Packed(None, self.shape)
        if self.codes is None:
            return (self.tensor, None, None), _Packed(None, self.shape)
        q = self.codes
        return (q.matrix_codes, q.matrix_step, q.matrix_offset), _Packed(q, self.shape)


class _Packed:
    """An operand without its tensors, which the autograd graph holds (so that saved-tensor hooks see them)."""

    def __init__(self, codes: QuantizedTensor | None, shape: torch.Size) -> None:
        self.view = None if codes is None else (codes.view, codes.dtype)
        self.shape = shape

    def unpack(self, saved: tuple[Tensor, ...]) -> _Operand:
        """The operand again."""
        if self.view is None:
            return _Operand(saved[0], None, self.shape)
        codes, step, offset = saved
        return _Operand(None, QuantizedTensor(*self.view, codes, step, offset), self.shape)


def _gradient_quantizer(role: str, call: Call, ndim: int) -> tuple[Quantizer, tuple[int, ...]] | None:
    """The quantizer of grad_output for `role` and its row axes; None where the gradient is exact.

    Output channels are not contracted in grad_weight: a row means a channel there, if the recipe does not say.
    One group per tensor has no rows to speak of; the layout that needs no transposition is taken.
    """
    q = call.recipe.operand(role)
    if q is None or call.seed is None:
        return None
    habit = "channel" if role == "grad_weight" and q.scale.group != "tensor" else None
    return q, call.map.rows(q.scale.axis or habit, ndim)


def _quantized(grad: Tensor, role: str, call: Call, folded: Tensor | None) -> Tensor:
    """The gradient as its quantizer for `role` returns it; `folded` is what was multiplied into it."""
    found = _gradient_quantizer(role, call, grad.ndim)
    if found is None:
        return grad
    q, rows = found
    seed = call.noise(role, grad.device)
    if call.observer is not None:
        call.observer(GradientOperand(role, grad, folded, q, rows, seed))
    return q.quantize(grad, seed, axis=rows, nonfinite="propagate").dequantize()


def _grad_input(grad: Tensor, weight: _Operand, call: Call, shape: torch.Size) -> Tensor:
    value, folded = weight.value(grad.dtype), None
    step = weight.row_step() if _folds(call, "grad_input") else None
    if step is not None:
        by_channel, rows = call.map.weight_by_channel(value)
        view = [by_channel.shape[d] if d in rows else 1 for d in range(by_channel.ndim)]
        norms = by_channel.square().sum([d for d in range(by_channel.ndim) if d not in rows]).flatten()
        factor = _fold(call, "grad_input", grad, call.map.per_channel(step, grad.ndim), norms, step)
        folded = call.map.per_channel(factor, grad.ndim)
        grad = grad * folded
        value = (by_channel / factor.view(view)).reshape(value.shape)
    return call.map.grad_input(_quantized(grad, "grad_input", call, folded), value, shape)


def _grad_weight(grad: Tensor, input: _Operand, call: Call, shape: torch.Size) -> Tensor:
    value, folded = input.value(grad.dtype), None
    step = input.row_step() if _folds(call, "grad_weight") else None
    if step is not None and input.codes is not None:
        rows = input.codes.view.axis
        if call.map.aligned_tokens or rows == (0,):
            view = [value.shape[d] if d in rows else 1 for d in range(value.ndim)]
            norms = value.square().sum([d for d in range(value.ndim) if d not in rows]).flatten()
            folded = _fold(call, "grad_weight", grad, step.view(view), norms, step).view(view)
            grad, value = grad * folded, value / folded
    return call.map.grad_weight(_quantized(grad, "grad_weight", call, folded), value, shape)


def _folds(call: Call, role: str) -> bool:
    return call.recipe.fold != "never" and call.seed is not None and call.recipe.operand(role) is not None


def _fold(call: Call, role: str, grad: Tensor, step: Tensor, norms: Tensor, vector: Tensor) -> Tensor:
    """The factor per channel or row that moves into grad_output: the steps, or ones where that would cost.

    The product's variance is bounded by (Σ squared steps of grad_output) × (Σ_k ‖operand_k‖²), k over the
    contracted axis; folding turns it into the same with grad·s and operand/s.

    Args:
        call, role: whose product.
        grad: grad_output, unfolded.
        step: the steps, broadcasting against grad.
        norms: (K,) squared norm of the operand along the contracted axis.
        vector: (K,) the steps.
    """
    if call.recipe.fold == "always":
        return vector
    found = _gradient_quantizer(role, call, grad.ndim)
    assert found is not None
    q, rows = found
    noise = call.noise(role, grad.device)

    def bound(g: Tensor, n: Tensor) -> Tensor:
        return q.variance_bound(g, noise, axis=rows) * n.sum()

    better = bound(grad * step, norms / vector.square()) <= bound(grad, norms)
    return torch.where(better, vector, torch.ones_like(vector))
