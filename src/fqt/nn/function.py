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

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels import integer, ops
from fqt.kernels.codes import Findings, compute_dtype
from fqt.kernels.fold import Folded, Split
from fqt.kernels.linear_map import DenseMap, LinearMap, rows
from fqt.kernels.philox import fork_seed
from fqt.kernels.ranges import RangeState
from fqt.kernels.rotation import Rotation
from fqt.kernels.tensor import QuantizedTensor, RowView, Seen
from fqt.nn.arithmetic import again, folds, on_integers, operands, rotates
from fqt.nn.ranges import Ranges
from fqt.nn.recipe import Recipe
from fqt.nn.sharing import shared
from fqt.nn.turning import turned_back, turned_input, turned_weight
from fqt.nn.witness import Witness
from fqt.quant.keep import Keep
from fqt.quant.quantizer import Quantizer
from fqt.quant.transform import Rotated

_ROLES = {"grad_input": 0, "grad_weight": 1}
_RIGHT, _KEEP = 0, 1
"""Who draws from a product's seed beside the quantizer of grad_output: that of the right operand, the sampler."""


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
        seed: of the noise: `quantizer.quantize(gradient, seed, axis=rows, range=range)` gives the very codes of the
            product.
        weight: shape of the weight that the layer multiplied by in this call; None if the layer did not say.
        range: what the layer remembers, if the quantizer's range is not the tensor's own.
        kept: whether `gradient` is a sample of grad_output's rows, or a part of their spectrum (`Product.keep`).
    """

    role: str
    gradient: Tensor
    folded: Tensor | None
    quantizer: Quantizer
    rows: tuple[int, ...]
    seed: Tensor
    weight: torch.Size | None = None
    range: RangeState | None = None
    kept: bool = False


@dataclass(frozen=True)
class Call:
    """What one call of a layer adds to its operands.

    Attributes:
        map: the layer's linear map.
        recipe: its quantizers.
        seed: int64 scalar on the CPU: the source of this call's gradient noise; None in eval mode, whose
            gradient is exact.
        dtype: of the output.
        channels_last: whether the output and the input's gradient are laid out so, and the weight's in a compiled
            graph; else they are contiguous.
        observer: told of every gradient operand before it is quantized.
        witness: told of every product that has run.
        ranges: what the layer remembers; None where its recipe remembers nothing, or the gradient is exact.
    """

    map: LinearMap
    recipe: Recipe
    seed: Tensor | None
    dtype: torch.dtype
    channels_last: bool = False
    observer: Callable[[GradientOperand], None] | None = None
    witness: Witness | None = None
    ranges: Ranges | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the gradient is that of the forward-quantized network, without noise."""
        return self.seed is None or not (self.recipe.grad_input or self.recipe.grad_weight)

    def on_integers(self, product: str, values: Tensor) -> bool:
        """Whether a product of these values runs on integer codes."""
        found = on_integers(product, self.map, self.recipe, values)
        if self.witness is not None and None not in operands(product, self.map, self.recipe):
            self.witness.decided(found and not integer.machine_obstacle(values.device.type))
        return found

    def at_work(self) -> AbstractContextManager:
        """Lasts while the layer computes."""
        return nullcontext() if self.witness is None else self.witness

    def ran(self, product: str, output: torch.Size, input: torch.Size, weight: torch.Size) -> None:
        """A product has run, in a layer of these shapes; all three have as many multiplications."""
        if self.witness is not None:
            self.witness.ran(product, math.prod(input if self.map.transposed else output) * math.prod(weight[1:]))

    def as_laid_out(self, x: Tensor) -> Tensor:
        """x in the memory format of this call's results."""
        if not self.channels_last:
            return x.contiguous()
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)

    def noise(self, role: str, device: torch.device) -> Tensor:
        """The seed of one operand's quantizer.

        The distributed rank is mixed in, so that equal seeds on all ranks stay independent: the rank that draws,
        not the one where a graph was made.
        """
        return self._noise(role).to(device)

    def right_noise(self, role: str, device: torch.device) -> Tensor:
        """The seed of the quantizer of a product's right operand, where that is quantized again."""
        return fork_seed(self._noise(role), _RIGHT).to(device)

    def keep_noise(self, role: str, device: torch.device) -> Tensor:
        """The seed of a product's sampler of rows."""
        return fork_seed(self._noise(role), _KEEP).to(device)

    def _noise(self, role: str) -> Tensor:
        assert self.seed is not None
        return fork_seed(self.seed, 2 * _rank() + _ROLES[role])


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, call: Call, share: bool = False
) -> tuple[Tensor, _Operand]:
    """The output, and the input as it was multiplied; with `share`, in the codes of a layer that read it before."""
    with no_autocast(input.device.type), call.at_work():
        x, w = _Operand.input(input, call, share), _Operand.weight(weight, call)
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
        saved: of the input, `_Operand.tensors`, with `seen` None if they are floats; for the weight's gradient
            only.
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
            grad_output = call.map.unlay(call.map.lay(grad_output).contiguous())
        known = Findings(channels=shapes[1][0] if needs[2] and not call.map.transposed else 0)
        if needs[0]:
            assert weight is not None
            w = _Operand.weight(weight, call)
            dtype = input_dtype if call.recipe.rotate is None else compute_dtype(input_dtype)
            grad_input, found = _grad_input(grad_output, w, call, shapes[0], dtype, known)
            known = known if call.recipe.product("grad_input").keep is not None else found
            grad_input = call.as_laid_out(
                turned_back(grad_input, call.map, call.recipe.rotate, is_input=True).to(input_dtype)
            )
            call.ran("grad_input", grad_output.shape, *shapes)
        if needs[1]:
            x = _Operand.unpacked(saved, seen)
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
    x = _Operand.input(input, call, share=False)
    return x.tensors, x.seen


def multiplied(x: Tensor, call: Call, is_input: bool) -> Tensor:
    """The values that the layer multiplies in place of an input or a weight: those that its codes stand for."""
    operand = _Operand.input(x, call, share=False) if is_input else _Operand.weight(x, call)
    return turned_back(operand.value(compute_dtype(x.dtype), call), call.map, call.recipe.rotate, is_input)


def input_seen(shape: torch.Size, dtype: torch.dtype, call: Call) -> Seen | None:
    """How an input of this shape is seen when it is quantized; None if it stays float."""
    q = call.recipe.operand("input")
    if q is None:
        return None
    laid = torch.Size(shape if call.map.habit == "token" else (shape[0], *shape[2:], shape[1]))
    view = RowView.of(laid, rows(call.map, q.scale.row_axis, len(laid)), may_transpose=True)
    return Seen(view, dtype, q.scale.blocks(view.transposed), q.code_range)


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
        axis = rows(call.map, q.scale.row_axis, x.ndim)

        def quantize() -> QuantizedTensor:
            return q.quantize(
                turned_input(call.map.lay(x), call.map, call.recipe.rotate), axis=axis, nonfinite="propagate"
            )

        kind = (type(call.map), call.recipe.rotate, call.recipe.rotate and call.map.groups)
        return _Operand(None, shared(x, q, axis, kind, quantize) if share else quantize(), True)

    @staticmethod
    def weight(w: Tensor, call: Call) -> _Operand:
        q = call.recipe.operand("weight")
        if q is None:
            return _Operand(w, None, False)
        by_channel, axis = call.map.weight_by_channel(w)
        turned = turned_weight(by_channel, call.map, call.recipe.rotate)
        return _Operand(None, q.quantize(turned, axis=axis, nonfinite="propagate"), False)

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
    def unpacked(saved: Sequence[Tensor | None], seen: Seen | None) -> _Operand:
        """The input again, from its tensors."""
        if seen is None:
            return _Operand(saved[0], None, True)
        codes, step, offset = saved
        assert codes is not None
        assert step is not None
        assert offset is not None
        return _Operand(None, seen.quantized(codes, step, offset), True)


def _output(x: _Operand, w: _Operand, bias: Tensor | None, call: Call) -> Tensor:
    if x.codes is not None and w.codes is not None and call.on_integers("output", x.codes.matrix_step):
        return integer.output(call.map, x.codes, w.codes, bias, _result_dtype(call.dtype))
    compute = compute_dtype(torch.promote_types(x.dtype, w.dtype))
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

    def kept(self, operand: _Operand) -> _Gradient:
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
    grad: Tensor, weight: _Operand, call: Call, shape: torch.Size, dtype: torch.dtype, known: Findings
) -> tuple[Tensor, Findings]:
    gradient = _Gradient.of(grad, "grad_input", call, known).kept(weight)
    if gradient.keep is not None and gradient.keep.turns:
        grad_input, known = _from_gradient(
            gradient, weight, torch.Size((*gradient.values.shape[:-1], shape[-1])), gradient.compute
        )
        return gradient.keep.back(grad_input, shape[-2]).to(dtype), known
    return _from_gradient(gradient, weight, shape, dtype)


def _from_gradient(
    gradient: _Gradient, weight: _Operand, shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Findings]:
    """The input's gradient, of `shape`, from what is quantized of grad_output."""
    call, known = gradient.call, gradient.known
    split, right = _split(gradient, weight), _quantized_again(gradient, weight)
    if gradient.on_integers():
        codes, known = gradient.codes(None if split is None else split.step)
        w = _multiplied(weight, split, right)
        folded = split is not None
        return integer.grad_input(call.map, codes, w, folded, shape, _result_dtype(dtype)).to(dtype), known
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
    grad: Tensor, input: _Operand, call: Call, shape: torch.Size, known: Findings
) -> tuple[Tensor, Findings]:
    gradient = _Gradient.of(grad, "grad_weight", call, known).kept(input).in_one_run()
    split, right = _split(gradient, input), _quantized_again(gradient, input)
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
    value = input.value(gradient.compute, call)
    if split is None:
        estimate, known = gradient.value(None)
        return call.map.grad_weight(estimate, value, shape), known
    laid = call.map.lay(value)
    moved, rest, offset = _moved(gradient, split, split.along_rows(split.step), laid)
    estimate, known = gradient.value(moved)
    result = call.map.grad_weight(estimate, call.map.unlay(rest), shape)
    if offset is not None:
        exact = call.map.unlay(offset.expand(laid.shape))
        result = result + call.map.grad_weight(gradient.exact(), exact, shape)
    return result, known


@dataclass(frozen=True)
class _Again:
    """A forward operand quantized again for one backward product, laid out; turned as its grad_output is.

    Attributes:
        codes: of the operand, rotated along its first axis if there is a `rotation`.
    """

    codes: QuantizedTensor
    rotation: Rotation | None
    dtype: torch.dtype

    def value(self) -> Tensor:
        """What the codes stand for, turned back."""
        value = self.codes.dequantize(self.dtype)
        if self.rotation is None:
            return value
        return self.rotation.undo_rows(value.reshape(value.shape[0], math.prod(value.shape[1:]))).view(value.shape)


def _quantized_again(gradient: _Gradient, operand: _Operand) -> _Again | None:
    """The right operand where this product does not take the codes of the forward pass.

    Quantized again from the values of these codes, which an unbiased quantizer estimates: the product remains an
    unbiased estimate of the QAT gradient's.
    """
    call, role = gradient.call, gradient.role
    q = again(role, call.map, call.recipe) if call.seed is not None else None
    if q is None:
        return None
    value = operand.value(gradient.compute, call)
    if operand.is_input:
        laid = call.map.lay(value)
        contracted: tuple[int, ...] = tuple(range(laid.ndim - 1))
    else:
        laid, contracted = call.map.weight_by_channel(value)
    rotation = gradient.rotation()
    if gradient.keep is not None and operand.is_input:
        laid = gradient.keep.turned(laid)
    if rotation is not None and operand.is_input:  # of a Linear, as its gradient
        laid, contracted = laid.flatten(0, -2), (0,)
    if rotation is not None:  # along tokens, or the first axis of a weight that is neither grouped nor transposed
        laid = rotation.rows(laid.reshape(laid.shape[0], math.prod(laid.shape[1:]))).view(laid.shape)
    others = tuple(d for d in range(laid.ndim) if d not in contracted)
    axis = contracted if q.scale.group == "tensor" else others
    seed = call.right_noise(role, laid.device)
    return _Again(q.quantize(laid, seed, axis=axis, nonfinite="propagate"), rotation, gradient.compute)


def _multiplied(operand: _Operand, split: Split | None, again: _Again | None) -> QuantizedTensor:
    """The codes of a product's right operand."""
    if again is not None:
        return again.codes
    codes = operand.codes if split is None else split.codes
    assert codes is not None
    return codes


def _split(gradient: _Gradient, operand: _Operand) -> Split | None:
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
    if call.recipe.fold == "always":
        return step, rest, offset
    assert q is not None
    noise = call.noise(gradient.role, gradient.values.device)
    values = gradient.values.to(gradient.compute)

    def bound(g: Tensor, operand: Tensor) -> Tensor:
        return q.variance_bound(g, noise, axis=gradient.axis) * operand.square().sum()

    better = bound(values * step, rest) <= bound(values, value)
    offset = None if offset is None else torch.where(better, offset, 0.0)
    return torch.where(better, step, torch.ones_like(step)), torch.where(better, rest, value), offset
