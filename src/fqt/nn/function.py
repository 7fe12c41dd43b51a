"""A linear layer's three products on quantized operands: what runs forward and backward, without autograd.

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

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import integer, ops, results
from fqt.kernels.codes import Findings, compute_dtype
from fqt.kernels.fold import Folded, Split
from fqt.kernels.linear_map import DenseMap, rows
from fqt.kernels.ranges import RangeState
from fqt.kernels.rotation import Rotation
from fqt.kernels.tensor import QuantizedTensor, RowView, Seen
from fqt.nn.arithmetic import again, folds, rotates
from fqt.nn.call import Call, GradientOperand
from fqt.nn.operand import ForwardOperand, Requantized
from fqt.nn.turning import turned_back
from fqt.quant.keep import Keep
from fqt.quant.quantizer import Quantizer
from fqt.quant.transform import Rotated


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, call: Call, share: bool = False
) -> tuple[Tensor, ForwardOperand]:
    """The output, and the input as it was multiplied; with `share`, in the codes of a layer that read it before."""
    with no_autocast(input.device.type), call.at_work():
        x, w = ForwardOperand.input(input, call, share), ForwardOperand.weight(weight, call)
        output = _output(x, w, bias, call)
        call.ran("output", output.shape, input.shape, weight.shape)
    return call.as_laid_out(output.to(call.dtype)), x


def backward(
    grad_output: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor | None],
    seen: Seen | None,
    shapes: tuple[torch.Size, torch.Size],
    dtypes: Sequence[torch.dtype | None],
    needs: Sequence[bool],
    call: Call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, where they are needed.

    Args:
        grad_output: of the output's shape.
        weight: needed for the input's gradient only.
        saved: of the input, `ForwardOperand.tensors`, with `seen` None if they are floats; for the weight's
            gradient only.
        shapes, dtypes: of input and weight; of input, weight and bias.
        needs: which gradients.
        call: of the forward pass.
    """
    input_dtype, weight_dtype, bias_dtype = dtypes
    assert input_dtype is not None
    assert weight_dtype is not None
    grad_input = grad_weight = grad_bias = None
    with no_autocast(grad_output.device.type), call.at_work():
        if compute_dtype(torch.promote_types(input_dtype, weight_dtype)) == torch.float64:
            grad_output = grad_output.double()
        if call.seed is not None and (call.recipe.grad_input or call.recipe.grad_weight):  # laid out once for both
            grad_output = call.map.unlay(results.contiguous(call.map.lay(grad_output)))
        known = Findings(channels=shapes[1][0] if needs[2] and not call.map.transposed else 0)
        if needs[0]:
            assert weight is not None
            w = ForwardOperand.weight(weight, call)
            dtype = input_dtype if call.recipe.rotate is None else compute_dtype(input_dtype)
            grad_input, found = _grad_input(grad_output, w, call, shapes[0], dtype, known)
            known = known if call.recipe.product("grad_input").keep is not None else found
            grad_input = call.as_laid_out(
                turned_back(grad_input, call.map, call.recipe.rotate, is_input=True).to(input_dtype)
            )
            call.ran("grad_input", grad_output.shape, *shapes)
        if needs[1]:
            x = ForwardOperand.unpacked(saved, seen)
            grad_weight, found = _grad_weight(grad_output, x, call, shapes[1], known)
            known = known if call.recipe.product("grad_weight").keep is not None else found
            grad_weight = turned_back(grad_weight, call.map, call.recipe.rotate, is_input=False).to(weight_dtype)
            call.ran("grad_weight", grad_output.shape, *shapes)
        if needs[2]:
            assert bias_dtype is not None
            sums = call.map.grad_bias(grad_output) if known.sums is None else known.sums
            grad_bias = sums.to(bias_dtype)
    return grad_input, grad_weight, grad_bias


def no_autocast(device: str) -> AbstractContextManager:
    """Operands keep their dtype; entering torch's context costs something even where nothing changes."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def input_parts(input: Tensor, call: Call) -> tuple[tuple[Tensor, ...], Seen | None]:
    """What `backward` is given of an input, as `saved` and `seen`."""
    x = ForwardOperand.input(input, call, share=False)
    return x.tensors, x.seen


def multiplied(x: Tensor, call: Call, is_input: bool) -> Tensor:
    """The values that the layer multiplies in place of an input or a weight: those that its codes stand for."""
    operand = ForwardOperand.input(x, call, share=False) if is_input else ForwardOperand.weight(x, call)
    return turned_back(operand.value(compute_dtype(x.dtype), call), call.map, call.recipe.rotate, is_input)


def input_seen(shape: torch.Size, dtype: torch.dtype, call: Call) -> Seen | None:
    """How an input of this shape is seen when it is quantized; None if it stays float."""
    q = call.recipe.operand("input")
    if q is None:
        return None
    laid = torch.Size(shape if call.map.habit == "token" else (shape[0], *shape[2:], shape[1]))
    view = RowView.of(laid, rows(call.map, q.scale.row_axis, len(laid)), may_transpose=True)
    return Seen(view, dtype, q.scale.blocks(view.transposed), q.code_range)


def _output(x: ForwardOperand, w: ForwardOperand, bias: Tensor | None, call: Call) -> Tensor:
    if x.codes is not None and w.codes is not None and call.on_integers("output", x.codes.matrix_step):
        return integer.output(
            call.map, x.codes, w.codes, bias, integer.written(call.dtype, x.codes.matrix_codes.device.type)
        )
    compute = compute_dtype(torch.promote_types(x.dtype, w.dtype))
    output = call.map.output(x.value(compute, call), w.value(compute, call))
    return output if bias is None else output + call.map.per_channel(bias.to(compute), output.ndim)


@dataclass(frozen=True)
class _Gradient:
    """grad_output for one product, laid out, with how it is quantized; `factor` is folded in, `values` is not."""

    values: Tensor
    role: str
    call: Call
    quantizer: Quantizer | None
    axis: tuple[int, ...]
    known: Findings

    @staticmethod
    def of(grad: Tensor, role: str, call: Call, known: Findings) -> _Gradient:
        """No quantizer where the gradient is exact.

        Output channels are not contracted in grad_weight: a row means a channel there, if the recipe does not say.
        """
        q = call.recipe.operand(role) if call.seed is not None else None
        habit = "channel" if role == "grad_weight" else None
        values = call.map.lay(grad)
        axis = () if q is None else rows(call.map, q.scale.row_axis, values.ndim, habit)
        return _Gradient(values, role, call, q, axis, known)

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.values.dtype)

    @property
    def range(self) -> RangeState | None:
        """What is remembered of it; None where it is quantized in its own range."""
        return None if self.call.ranges is None else self.call.ranges.state(self.role)

    @property
    def keep(self) -> Keep | None:
        """What is kept of the rows; None for all of them."""
        return self.call.recipe.product(self.role).keep if self.call.seed is not None else None

    def kept(self, operand: ForwardOperand) -> _Gradient:
        """The same with what the product keeps of its rows, of which nothing is known yet."""
        if self.keep is None:
            return self
        map, x = self.call.map, None
        axes = self.values.ndim - 1 if isinstance(map, DenseMap) else 1
        if operand.is_input and self.keep.sees_input:
            x = map.lay(operand.value(self.compute, self.call))
        seed = self.call.keep_noise(self.role, self.values.device)
        return replace(self, values=self.keep.apply(self.values.to(self.compute), x, seed, axes), known=Findings())

    def in_one_run(self) -> _Gradient:
        """The same, its tokens one run, whatever they belong to, if grad_weight rotates along them."""
        if self.quantizer is None or not rotates(self.role, self.call.map, self.call.recipe):
            return self
        return replace(
            self,
            values=self.values.flatten(0, -2),
            axis=rows(self.call.map, self.quantizer.scale.row_axis, 2, "channel"),
        )

    def on_integers(self) -> bool:
        return self.quantizer is not None and self.call.on_integers(self.role, self.values)

    def rotation(self) -> Rotation | None:
        """That of what the product contracts, which the other operand takes too; None without."""
        transform = None if self.quantizer is None else self.quantizer.transform
        if not isinstance(transform, Rotated) or not rotates(self.role, self.call.map, self.call.recipe):
            return None
        seed = self.call.noise(self.role, self.values.device)
        length = self.values.shape[-1 if self.role == "grad_input" else 0]
        return Rotation.draw(seed, length, transform.block, self.compute)

    def codes(self, factor: Tensor | None) -> tuple[QuantizedTensor, Findings]:
        """Of the gradient times a factor that broadcasts against it; and what is known of the gradient then."""
        if factor is None or factor.ndim == 1:
            return self._codes(self.values, factor, factor)
        return self._codes(self.values.to(self.compute) * factor, None, factor)

    def codes_by_row(self, split: Split) -> tuple[QuantizedTensor, Tensor | None, Findings]:
        """Of the gradient times the input's steps; Σ offset · gradient over its rows, None without offset."""
        shape, step = self.values.shape, split.step
        matrix = self.values.reshape(step.numel(), shape.numel() // max(step.numel(), 1))
        scaled, sums, known = ops.scaled_rows(matrix, step, split.offset, self.known)
        return self._codes(scaled.view(shape), None, split.along_rows(step))[0], sums, known

    def _codes(
        self, values: Tensor, per_channel: Tensor | None, folded: Tensor | None
    ) -> tuple[QuantizedTensor, Findings]:
        """Of the values times a factor per channel; `folded` is what the gradient was multiplied by in all."""
        assert self.quantizer is not None
        seed = self.call.noise(self.role, self.values.device)
        if self.call.observer is not None:
            seen = values.to(self.compute) if per_channel is None else values.to(self.compute) * per_channel
            kept = self.keep is not None
            more: dict[str, Any] = {"range": self.range, "kept": kept}
            operand = GradientOperand(self.role, seen, folded, self.quantizer, self.axis, seed, **more)
            self.call.observer(operand)
        how: dict[str, Any] = {"axis": self.axis, "nonfinite": "propagate", "factor": per_channel}
        if self.quantizer.scale.remembers:
            if self.range is None or self.call.ranges is None:
                raise FqtError(f"a layer's {self.role} has no memory for ranges: give recipes by fqt.quantize_")
            codes, taught = self.quantizer.quantize_measuring(values, self.range, seed, **how)
            self.call.ranges.learn(self.role, self.quantizer, taught)
            return codes, self.known
        if folded is not None:  # what is known is of the gradient alone
            return self.quantizer.quantize(values, seed, **how), self.known
        return self.quantizer.quantize_knowing(values, self.known, seed, **how)

    def value(self, factor: Tensor | None) -> tuple[Tensor, Findings]:
        """The same as floats of the layer's own layout: as its quantizer returns it, or exact."""
        if self.quantizer is None:
            return self.exact(), self.known
        codes, known = self.codes(factor)
        return self.call.map.unlay(codes.dequantize(self.compute)), known

    def exact(self) -> Tensor:
        """The same as floats that no quantizer has touched."""
        return self.call.map.unlay(self.values.to(self.compute))


def _grad_input(
    grad: Tensor, weight: ForwardOperand, call: Call, shape: torch.Size, dtype: torch.dtype, known: Findings
) -> tuple[Tensor, Findings]:
    gradient = _Gradient.of(grad, "grad_input", call, known).kept(weight)
    if gradient.keep is not None and gradient.keep.turns:
        grad_input, known = _from_gradient(
            gradient, weight, torch.Size((*gradient.values.shape[:-1], shape[-1])), gradient.compute
        )
        return gradient.keep.back(grad_input, shape[-2]).to(dtype), known
    return _from_gradient(gradient, weight, shape, dtype)


def _from_gradient(
    gradient: _Gradient, weight: ForwardOperand, shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Findings]:
    """The input's gradient, of `shape`, from what is quantized of grad_output."""
    call, known = gradient.call, gradient.known
    split, right = _split(gradient, weight), _requantized(gradient, weight)
    if gradient.on_integers():
        codes, known = gradient.codes(None if split is None else split.step)
        w = _multiplied(weight, split, right)
        folded = split is not None
        write = integer.written(dtype, codes.matrix_codes.device.type)
        return integer.grad_input(call.map, codes, w, folded, shape, write).to(dtype), known
    if right is not None:
        estimate, known = gradient.value(None)
        return call.map.grad_input(estimate, call.map.weight_restored(right.value()), shape).to(dtype), known
    value = weight.value(gradient.compute, call)
    if split is None:
        estimate, known = gradient.value(None)
        return call.map.grad_input(estimate, value, shape).to(dtype), known
    by_channel = call.map.weight_by_channel(value)[0]
    moved, rest, offset = _moved(gradient, split, split.step, by_channel)
    estimate, known = gradient.value(moved)
    product = call.map.grad_input(estimate, call.map.weight_restored(rest), shape)
    if offset is not None:
        exact = call.map.weight_restored(offset.expand(by_channel.shape))
        product = product + call.map.grad_input(gradient.exact(), exact, shape)
    return product.to(dtype), known


def _grad_weight(
    grad: Tensor, input: ForwardOperand, call: Call, shape: torch.Size, known: Findings
) -> tuple[Tensor, Findings]:
    gradient = _Gradient.of(grad, "grad_weight", call, known).kept(input).in_one_run()
    split, right = _split(gradient, input), _requantized(gradient, input)
    if gradient.on_integers():
        x = _multiplied(input, split, right)
        if split is None:
            codes, known = gradient.codes(None)
            return integer.grad_weight(call.map, codes, x, None, shape), known
        codes, sums, known = gradient.codes_by_row(split)
        share = None if sums is None else integer.share_by_tap(call.map, sums, codes.shape, x.shape, shape)
        return integer.grad_weight(call.map, codes, x, Folded(split.centre, share), shape), known
    if right is not None:
        estimate, known = gradient.value(None)
        return call.map.grad_weight(estimate, call.map.unlay(right.value()), shape), known
    laid, _ = input.laid(gradient.compute, call, gradient.keep)
    if split is None:
        estimate, known = gradient.value(None)
        return call.map.grad_weight(estimate, call.map.unlay(laid), shape), known
    moved, rest, offset = _moved(gradient, split, split.along_rows(split.step), laid)
    estimate, known = gradient.value(moved)
    result = call.map.grad_weight(estimate, call.map.unlay(rest), shape)
    if offset is not None:
        exact = call.map.unlay(offset.expand(laid.shape))
        result = result + call.map.grad_weight(gradient.exact(), exact, shape)
    return result, known


def _requantized(gradient: _Gradient, operand: ForwardOperand) -> Requantized | None:
    """The right operand where this product does not take the codes of the forward pass."""
    call, role = gradient.call, gradient.role
    q = again(role, call.map, call.recipe) if call.seed is not None else None
    if q is None:
        return None
    seed = call.right_noise(role, gradient.values.device)
    return Requantized.of(operand, q, seed, call, gradient.rotation(), gradient.keep, gradient.compute)


def _multiplied(operand: ForwardOperand, split: Split | None, again: Requantized | None) -> QuantizedTensor:
    """The codes of a product's right operand."""
    if again is not None:
        return again.codes
    codes = operand.codes if split is None else split.codes
    assert codes is not None
    return codes


def _split(gradient: _Gradient, operand: ForwardOperand) -> Split | None:
    """The forward operand taken apart, if its steps may move into this gradient."""
    call = gradient.call
    if operand.codes is None or gradient.quantizer is None or not folds(gradient.role, call.map, call.recipe):
        return None
    q = call.recipe.operand("input" if operand.is_input else "weight")
    assert q is not None
    return Split.of(operand.codes, q.grid.levels("symmetric").high)


def _moved(gradient: _Gradient, split: Split, step: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is multiplied into grad_output, what is left of the operand, and its offset, which stays exact; under
    "auto" a factor of 1 and the operand itself where folding would cost.

    The product's variance is bounded by (Σ squared steps of grad_output) × (Σ_k ‖operand_k‖²), k over the
    contracted axis; folding turns it into the same with grad·step and the operand's codes.

    Args:
        gradient: grad_output, unfolded.
        split: the operand, as `value` holds it.
        step: its steps, broadcasting against grad_output.
        value: the operand as its codes are laid out.
    """
    call, q = gradient.call, gradient.quantizer
    rest, offset = split.rest(value.dtype), None
    if split.offset is not None:
        offset = split.along_rows(split.offset).to(value.dtype)
    if call.recipe.product(gradient.role).fold == "always":
        return step, rest, offset
    assert q is not None
    noise = call.noise(gradient.role, gradient.values.device)
    values = gradient.values.to(gradient.compute)

    def bound(g: Tensor, operand: Tensor) -> Tensor:
        return q.variance_bound(g, noise, axis=gradient.axis) * operand.square().sum()

    better = bound(values * step, rest) <= bound(values, value)
    offset = None if offset is None else torch.where(better, offset, 0.0)
    return torch.where(better, step, torch.ones_like(step)), torch.where(better, rest, value), offset
