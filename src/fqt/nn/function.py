"""One autograd function: a linear layer's three products on quantized operands.

The gradient is an unbiased estimate of the straight-through gradient of the forward-quantized network (QAT),
up to the rounding of the output dtype; its two quantizers of grad_output are independent. Saved for backward
are the input's 8-bit codes, not floats (in eager mode once for all layers that read it), and the weight itself,
whose codes are made again: they would cost memory that the weight does not. Products run on integer codes where
`fqt.nn.arithmetic` says so, else on the values that the codes stand for.

The noise belongs to the forward call: a second backward through the same graph (`retain_graph=True`) draws the
same noise again, as activation checkpointing needs.

A hook pair around an ordinary layer (two forward passes to quantize one gradient twice) was rejected: it
doubles the forward cost and keeps float activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fqt.kernels import reference
from fqt.kernels.ops import Findings
from fqt.kernels.philox import fork_seed
from fqt.nn import integer
from fqt.nn.arithmetic import on_integers
from fqt.nn.linear_map import LinearMap, rows
from fqt.nn.recipe import Recipe
from fqt.nn.sharing import shared
from fqt.quant.quantizer import Quantizer
from fqt.quant.tensor import QuantizedTensor, RowView

_ROLES = {"grad_input": 0, "grad_weight": 1}


@dataclass(frozen=True)
class GradientOperand:
    """grad_output as it is about to be quantized for one product.

    Attributes:
        role: "grad_input" or "grad_weight": the product it is for.
        gradient: float, grad_output with its channels as last axis; what `quantizer` gets: folded steps are
            multiplied in already.
        folded: what was multiplied in, broadcasting against `gradient`; None if nothing was.
        quantizer: the recipe's for this role.
        rows: the axes of `gradient` that are its rows.
        seed: of the noise: `quantizer.quantize(gradient, seed, axis=rows)` gives the very codes of the product.
        weight: shape of the weight that the layer multiplied by in this call; None if the layer did not say.
    """

    role: str
    gradient: Tensor
    folded: Tensor | None
    quantizer: Quantizer
    rows: tuple[int, ...]
    seed: Tensor
    weight: torch.Size | None = None


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
        channels_last: whether the output and the input's gradient are laid out so, and the weight's in a compiled
            graph; else they are contiguous.
        observer: told of every gradient operand before it is quantized.
    """

    map: LinearMap
    recipe: Recipe
    seed: Tensor | None
    rank: int
    dtype: torch.dtype
    channels_last: bool = False
    observer: Callable[[GradientOperand], None] | None = None

    def on_integers(self, product: str, values: Tensor) -> bool:
        """Whether a product of these values runs on integer codes."""
        return on_integers(product, self.map, self.recipe, values)

    def as_laid_out(self, x: Tensor) -> Tensor:
        """x in the memory format of this call's results."""
        if not self.channels_last:
            return x.contiguous()
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)

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
        output, x = forward(input, weight, bias, call, share=ctx.needs_input_grad[1])
        # The input is needed only for the weight's gradient, and the other way round.
        saved = x.tensors if ctx.needs_input_grad[1] else ()
        ctx.view = None if x.codes is None else (x.codes.view, x.codes.dtype)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *saved)
        # A result that is a view of its memory could not be modified in place; nothing that is saved shares it.
        return output.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        rest = (ctx.view, ctx.shapes, ctx.dtypes, ctx.needs_input_grad, ctx.call)
        return *backward(grad_output, weight, saved, *rest), None


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, call: Call, share: bool = False
) -> tuple[Tensor, _Operand]:
    """The output, and the input as it was multiplied; with `share`, in the codes of a layer that read it before."""
    with _no_autocast(input.device.type):
        x, w = _Operand.input(input, call, share), _Operand.weight(weight, call)
        output = _output(x, w, bias, call)
    return call.as_laid_out(output.to(call.dtype)), x


def backward(
    grad_output: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor | None],
    view: tuple[RowView, torch.dtype] | None,
    shapes: tuple[torch.Size, torch.Size],
    dtypes: Sequence[torch.dtype | None],
    needs: Sequence[bool],
    call: Call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, where they are needed.

    Args:
        grad_output: of the output's shape.
        weight: needed for the input's gradient only.
        saved: of the input, `_Operand.tensors`, with `view` None if they are floats; for the weight's gradient
            only.
        shapes, dtypes: of input and weight; of input, weight and bias.
        needs: which gradients.
        call: of the forward pass.
    """
    input_dtype, weight_dtype, bias_dtype = dtypes
    assert input_dtype is not None
    assert weight_dtype is not None
    grad_input = grad_weight = grad_bias = None
    with _no_autocast(grad_output.device.type):
        if reference.compute_dtype(torch.promote_types(input_dtype, weight_dtype)) == torch.float64:
            grad_output = grad_output.double()
        if call.seed is not None and (call.recipe.grad_input or call.recipe.grad_weight):  # laid out once for both
            grad_output = call.map.unlay(call.map.lay(grad_output).contiguous())
        findings = Findings(shapes[1][0] if needs[2] and not call.map.transposed else 0)
        if needs[0]:
            assert weight is not None
            w = _Operand.weight(weight, call)
            grad_input = call.as_laid_out(_grad_input(grad_output, w, call, shapes[0], input_dtype, findings))
        if needs[1]:
            x = _Operand.unpacked(saved, view)
            grad_weight = _grad_weight(grad_output, x, call, shapes[1], findings).to(weight_dtype)
        if needs[2]:
            assert bias_dtype is not None
            sums = call.map.grad_bias(grad_output) if findings.sums is None else findings.sums
            grad_bias = sums.to(bias_dtype)
    return grad_input, grad_weight, grad_bias


def _no_autocast(device: str) -> AbstractContextManager:
    """Operands keep their dtype; entering torch's context costs something even where nothing changes."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def input_view(shape: torch.Size, call: Call) -> RowView | None:
    """How an input of this shape is seen when it is quantized; None if it stays float."""
    q = call.recipe.operand("input")
    if q is None:
        return None
    laid = torch.Size(shape if call.map.habit == "token" else (shape[0], *shape[2:], shape[1]))
    return RowView.of(laid, rows(call.map, q.scale.axis, len(laid)), may_transpose=True)


@dataclass(frozen=True)
class _Operand:
    """A forward operand: float, or codes of the operand laid out."""

    tensor: Tensor | None
    codes: QuantizedTensor | None
    is_input: bool

    @staticmethod
    def input(x: Tensor, call: Call, share: bool) -> _Operand:
        q = call.recipe.operand("input")
        if q is None:
            return _Operand(x, None, True)
        axis = rows(call.map, q.scale.axis, x.ndim)

        def quantize() -> QuantizedTensor:
            return q.quantize(call.map.lay(x), axis=axis, nonfinite="propagate")

        return _Operand(None, shared(x, q, axis, type(call.map), quantize) if share else quantize(), True)

    @staticmethod
    def weight(w: Tensor, call: Call) -> _Operand:
        q = call.recipe.operand("weight")
        if q is None:
            return _Operand(w, None, False)
        by_channel, axis = call.map.weight_by_channel(w)
        return _Operand(None, q.quantize(by_channel, axis=axis, nonfinite="propagate"), False)

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

    def row_step(self) -> Tensor | None:
        """(N,) steps, if every row has its own; 1 where a group is constant."""
        if self.codes is None or self.codes.matrix_step.numel() == 1 or self.codes.matrix_step.shape[1] != 1:
            return None
        step = self.codes.matrix_step.flatten()
        return torch.where(step == 0, 1.0, step)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What must be kept: the floats, or codes, step and offset."""
        if self.codes is None:
            assert self.tensor is not None
            return (self.tensor,)
        return self.codes.matrix_codes, self.codes.matrix_step, self.codes.group_offset

    @staticmethod
    def unpacked(saved: Sequence[Tensor | None], view: tuple[RowView, torch.dtype] | None) -> _Operand:
        """The input again, from its tensors."""
        if view is None:
            return _Operand(saved[0], None, True)
        codes, step, offset = saved
        assert codes is not None
        assert step is not None
        assert offset is not None
        return _Operand(None, QuantizedTensor(*view, codes, step, offset), True)


def _output(x: _Operand, w: _Operand, bias: Tensor | None, call: Call) -> Tensor:
    if x.codes is not None and w.codes is not None and call.on_integers("output", x.codes.matrix_step):
        return integer.output(call.map, x.codes, w.codes, bias, _result_dtype(call.dtype))
    compute = reference.compute_dtype(torch.promote_types(x.dtype, w.dtype))
    output = call.map.output(x.value(compute, call), w.value(compute, call))
    return output if bias is None else output + call.map.per_channel(bias.to(compute), output.ndim)


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an integer product writes for a result of `dtype`: bfloat16 at once, all others by way of float32."""
    return dtype if dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class _Gradient:
    """grad_output for one product, laid out, with how it is quantized; `factor` is folded in, `values` is not."""

    values: Tensor
    role: str
    call: Call
    quantizer: Quantizer | None
    axis: tuple[int, ...]
    findings: Findings

    @staticmethod
    def of(grad: Tensor, role: str, call: Call, findings: Findings) -> _Gradient:
        """No quantizer where the gradient is exact.

        Output channels are not contracted in grad_weight: a row means a channel there, if the recipe does not say.
        """
        q = call.recipe.operand(role) if call.seed is not None else None
        habit = "channel" if role == "grad_weight" else None
        axis = () if q is None else rows(call.map, q.scale.axis or habit, grad.ndim)
        return _Gradient(call.map.lay(grad), role, call, q, axis, findings)

    @property
    def compute(self) -> torch.dtype:
        return reference.compute_dtype(self.values.dtype)

    def on_integers(self) -> bool:
        return self.quantizer is not None and self.call.on_integers(self.role, self.values)

    def codes(self, factor: Tensor | None) -> QuantizedTensor:
        """Of the gradient times a factor that broadcasts against it."""
        assert self.quantizer is not None
        seed = self.call.noise(self.role, self.values.device)
        values, per_channel = self.values, factor
        if factor is not None and factor.ndim != 1:
            values, per_channel = values.to(self.compute) * factor, None
        if self.call.observer is not None:
            seen = reference.values(values) if per_channel is None else values.to(self.compute) * per_channel
            self.call.observer(GradientOperand(self.role, seen, factor, self.quantizer, self.axis, seed))
        findings = self.findings if factor is None else None  # they are of the values alone
        return self.quantizer.quantize(
            values, seed, axis=self.axis, nonfinite="propagate", factor=per_channel, findings=findings
        )

    def value(self, factor: Tensor | None) -> Tensor:
        """The same as floats of the layer's own layout: as its quantizer returns it, or exact."""
        if self.quantizer is None:
            exact = self.values.to(self.compute)
            return self.call.map.unlay(exact if factor is None else exact * factor)
        return self.call.map.unlay(self.codes(factor).dequantize(self.compute))


def _grad_input(
    grad: Tensor, weight: _Operand, call: Call, shape: torch.Size, dtype: torch.dtype, findings: Findings
) -> Tensor:
    gradient = _Gradient.of(grad, "grad_input", call, findings)
    step = weight.row_step() if _folds(gradient) else None
    if weight.codes is not None and gradient.on_integers():
        result = _result_dtype(dtype)
        return integer.grad_input(call.map, gradient.codes(step), weight.codes, step is not None, shape, result).to(
            dtype
        )
    value = weight.value(gradient.compute, call)
    factor: Tensor | None = None
    if step is not None:
        by_channel, axis = call.map.weight_by_channel(value)
        view = [by_channel.shape[d] if d in axis else 1 for d in range(by_channel.ndim)]
        norms = by_channel.square().sum([d for d in range(by_channel.ndim) if d not in axis]).flatten()
        factor = _fold(gradient, step, norms, step)
        value = call.map.weight_restored(by_channel / factor.view(view))
    return call.map.grad_input(gradient.value(factor), value, shape).to(dtype)


def _grad_weight(grad: Tensor, input: _Operand, call: Call, shape: torch.Size, findings: Findings) -> Tensor:
    gradient = _Gradient.of(grad, "grad_weight", call, findings)
    step, view = (input.row_step() if _folds(gradient) else None), []
    if step is not None and input.codes is not None:
        axis = input.codes.view.axis
        view = [n if d in axis else 1 for d, n in enumerate(input.codes.shape)]
        if not (call.map.aligned_tokens or axis == (0,)):
            step = None
    if input.codes is not None and gradient.on_integers():
        codes = gradient.codes(None if step is None else step.view(view))
        return integer.grad_weight(call.map, codes, input.codes, step is not None, shape)
    value = input.value(gradient.compute, call)
    factor: Tensor | None = None
    if step is not None:
        laid = call.map.lay(value)
        norms = laid.square().sum([d for d in range(laid.ndim) if view[d] == 1]).flatten()
        factor = _fold(gradient, step.view(view), norms, step).view(view)
        value = call.map.unlay(laid / factor)
    return call.map.grad_weight(gradient.value(factor), value, shape)


def _folds(gradient: _Gradient) -> bool:
    return gradient.call.recipe.fold != "never" and gradient.quantizer is not None


def _fold(gradient: _Gradient, step: Tensor, norms: Tensor, vector: Tensor) -> Tensor:
    """The factor per channel or row that moves into grad_output: the steps, or ones where that would cost.

    The product's variance is bounded by (Σ squared steps of grad_output) × (Σ_k ‖operand_k‖²), k over the
    contracted axis; folding turns it into the same with grad·s and operand/s.

    Args:
        gradient: grad_output, unfolded.
        step: the steps, broadcasting against it.
        norms: (K,) squared norm of the operand along the contracted axis.
        vector: (K,) the steps.
    """
    call, q = gradient.call, gradient.quantizer
    if call.recipe.fold == "always":
        return vector
    assert q is not None
    noise = call.noise(gradient.role, gradient.values.device)
    values = gradient.values.to(gradient.compute)

    def bound(g: Tensor, n: Tensor) -> Tensor:
        return q.variance_bound(g, noise, axis=gradient.axis) * n.sum()

    better = bound(values * step, norms / vector.square()) <= bound(values, norms)
    return torch.where(better, vector, torch.ones_like(vector))
