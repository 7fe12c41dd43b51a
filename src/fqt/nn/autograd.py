"""The layer as autograd sees it: one function for plain eager calls, one for all that transforms functions.

`_Products` is the fast one, and keeps codes. `torch.func` (grad, vmap, jvp and what is made of them) and
forward-mode differentiation ask for functions of another form, whose call alone costs what a small layer does: they
get `_Transformable`, which keeps the float input and quantizes it again. Both give the same numbers.

What a transform means here:

- Forward quantizers count as the identity (straight-through), in every order and mode of differentiation.
- A tangent (forward mode) is exact: only a backward pass is quantized.
- `vmap` is a loop: each sample is quantized as if the layer had been called on it alone, with its own steps. So a
  per-sample gradient, vmap(grad), is the gradient of the sample's own loss; under a recipe with one step per batch
  it is not the sample's share of the batch's gradient. Noise is drawn as torch.func draws any: with
  `vmap(…, randomness="different")` each sample has its own, with "same" all have one.
- A second derivative exists where the gradient is exact: in eval mode, or without gradient quantizers. The
  derivative of a rounded gradient means nothing: who asks for it gets an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fqt.errors import FqtError
from fqt.kernels.codes import compute_dtype
from fqt.kernels.tensor import Seen
from fqt.nn import compiled
from fqt.nn.call import Call
from fqt.nn.eager import not_compiled
from fqt.nn.function import backward, forward, input_parts, input_seen, multiplied, no_autocast
from fqt.nn.turning import turned_back

_Saved = Sequence[Tensor | None]
_View = Seen | None


def linear_products(input: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """The output of a linear layer, differentiable.

    Args:
        input, weight, bias: as the layer's float form takes them.
        call: the rest.

    Returns:
        As the layer's float form, in `call.dtype`.
    """
    if is_transformed() or forward_ad._current_level >= 0:
        return _transformable(input, weight, bias, call.seed, replace(call, seed=None))
    link = None
    if call.is_exact and torch.is_grad_enabled() and input.requires_grad and weight.requires_grad:
        link = _Link.apply(input)
    return _Products.apply(input, weight, bias, link, call)


def is_transformed() -> bool:
    """Whether a transform of torch.func is under way."""
    return torch._C._are_functorch_transforms_active()


@dataclass(frozen=True)
class _Parts:
    """What a backward pass needs beside tensors; arguments as `function.backward` has them."""

    call: Call
    shapes: tuple[torch.Size, torch.Size]
    stride: tuple[int, ...]  # of the weight
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]
    needs: tuple[bool, ...]
    view: _View = None


class _Products(torch.autograd.Function):
    """The layer in the fast form; `link` stands for the input in second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, link: Tensor | None, call: Call
    ) -> Tensor:
        needs = ctx.needs_input_grad
        output, saved, view = _forward(input, weight, bias, call, keep=needs[1])
        dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.parts = _Parts(call, (input.shape, weight.shape), weight.stride(), dtypes, needs[:3], view)
        # The input is needed only for the weight's gradient, and the other way round.
        ctx.save_for_backward(weight if needs[0] else None, link, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, link, *saved = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(grad_output):  # is_grads_batched: it knows only ops
            parts, last = ctx.parts, compiled.arguments(ctx.parts.call)
            found = compiled.layer_backward(
                grad_output, weight, saved, parts.shapes, parts.dtypes, parts.needs, last
            )
            return *found, None, None
        if not torch.is_grad_enabled() and not is_transformed():
            return *_backward(grad_output, weight, saved, ctx.parts), None, None
        input, codes = (link, saved) if len(saved) == 3 else (saved[0] if saved else None, (None,) * 3)
        seed = ctx.parts.call.seed
        return *_gradients(grad_output, input, weight, seed, *codes, ctx.parts), None, None


class _Link(torch.autograd.Function):
    """Zeros in the shape of an input, without memory, whose gradient is the input's.

    A layer keeps its input's codes, of which autograd knows nothing; with this beside them, a second derivative
    finds its way to the input, whose values it does not need.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return input.new_zeros(()).expand(input.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


class _Transformable(torch.autograd.Function):
    """As `_Products`, in the form that transforms take."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, call: Call) -> Tensor:
        return _forward(input, weight, bias, replace(call, seed=seed), keep=False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, bias, seed, ctx.call = inputs
        ctx.dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.output_shape = output.shape
        ctx.save_for_backward(input, weight, seed)
        ctx.save_for_forward(input, weight, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        input, weight, seed = ctx.saved_tensors
        shapes = input.shape, weight.shape
        parts = _Parts(ctx.call, shapes, weight.stride(), ctx.dtypes, ctx.needs_input_grad[:3])
        return *_gradients(grad_output, input, weight, seed, None, None, None, parts), None, None

    @staticmethod
    def jvp(ctx: Any, d_input: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None, *_: Any) -> Tensor:
        input, weight, _ = ctx.saved_tensors
        x = None if d_weight is None else _Values.apply(input, ctx.call, True)
        w = None if d_input is None else _Values.apply(weight, ctx.call, False)
        return _output(ctx.call, (d_input, w), (x, d_weight), d_bias, ctx.output_shape).to(ctx.call.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> Any:
        return _each(_Transformable, info.batch_size, in_dims, arguments)


class _Gradients(torch.autograd.Function):
    """A backward pass as a function: the gradients of input, weight and bias, None where they are not needed.

    Takes grad_output; the input, or zeros with its place in the graph beside its codes; the weight; the seed; the
    input's codes, step and offset, or None each; and `_Parts`.
    """

    @staticmethod
    def forward(
        grad: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        seed: Tensor | None,
        codes: Tensor | None,
        step: Tensor | None,
        offset: Tensor | None,
        parts: _Parts,
    ) -> tuple[Tensor | None, ...]:
        parts = replace(parts, call=replace(parts.call, seed=seed))
        saved: _Saved = () if codes is None else (codes, step, offset)
        if codes is None and input is not None and parts.needs[1]:
            saved, view = input_parts(input, parts.call)
            parts = replace(parts, view=view)
        return _backward(grad, weight, saved, parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple) -> None:
        *tensors, ctx.parts = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *to: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivatives of ⟨to, gradients⟩."""
        grad, input, weight, seed, *codes = ctx.saved_tensors
        parts, needs = ctx.parts, ctx.needs_input_grad
        call = _exact(parts.call, seed)
        to_input, to_weight, to_bias = to
        x = None if to_weight is None else _input_values(input, codes, parts)
        w = None if to_input is None else _Values.apply(weight, call, False)
        d_grad = _output(call, (to_input, w), (x, to_weight), to_bias, grad.shape).to(grad.dtype)
        return (
            d_grad if needs[0] else None,
            _grad_input(parts, grad, to_weight) if needs[1] and to_weight is not None else None,
            _grad_weight(parts, grad, to_input) if needs[2] and to_input is not None else None,
            *(None,) * 5,
        )

    @staticmethod
    def jvp(
        ctx: Any, d_grad: Tensor | None, d_input: Tensor | None, d_weight: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        grad, input, weight, seed, *codes = ctx.saved_tensors
        parts = ctx.parts
        call = _exact(parts.call, seed)
        found: list[Tensor | None] = [None, None, None]
        if parts.needs[0]:
            w = None if d_grad is None else _Values.apply(weight, call, False)
            found[0] = _sum(_grad_input(parts, d_grad, w), _grad_input(parts, grad, d_weight))
        if parts.needs[1]:
            x = None if d_grad is None else _input_values(input, codes, parts)
            found[1] = _sum(_grad_weight(parts, d_grad, x), _grad_weight(parts, grad, d_input))
        if parts.needs[2] and d_grad is not None:
            found[2] = call.map.lay(d_grad).flatten(0, -2).sum(0).to(parts.dtypes[2])
        # None for an output that does not change is an internal error of torch's.
        shapes = (*parts.shapes, call.map.lay(grad).shape[-1:])
        outputs = zip(found, parts.needs, shapes, parts.dtypes, strict=True)
        return tuple(
            grad.new_zeros(shape, dtype=dtype) if tangent is None and needed else tangent
            for tangent, needed, shape, dtype in outputs
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> Any:
        return _each(_Gradients, info.batch_size, in_dims, arguments)


# No compiler looks into these two, nor into what they call: a compiled function runs its transforms eagerly.


@not_compiled("fqt: under torch.func a converted layer runs eagerly; or fqt.restore_(model) first")
def _transformable(*arguments: Any) -> Tensor:
    return _Transformable.apply(*arguments)


@not_compiled("fqt: under torch.func a converted layer runs eagerly; or fqt.restore_(model) first")
def _gradients(*arguments: Any) -> tuple[Tensor | None, ...]:
    return _Gradients.apply(*arguments)


def _refuse_to_be_traced() -> None:
    """Raises FqtError where a graph is recorded: it would hold the memory that kernels write to, not their work."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        raise FqtError(
            "torch.func.linearize and make_fx cannot record forward-mode or second derivatives of a converted "
            "layer: take them by torch.func.jvp or hessian as they are, or fqt.restore_(model) first"
        )


class _Values(torch.autograd.Function):
    """`function.multiplied`, whose derivative is the identity."""

    @staticmethod
    def forward(x: Tensor, call: Call, is_input: bool) -> Tensor:
        _refuse_to_be_traced()
        return multiplied(x, call, is_input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.dtypes = (inputs[0].dtype, output.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtypes[0]), None, None

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor, *_: Any) -> Tensor:
        return d_x.to(ctx.dtypes[1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> Any:
        return _each(_Values, info.batch_size, in_dims, arguments)


def _each(function: Any, count: int, in_dims: tuple, arguments: tuple) -> Any:
    """The rule of vmap: the function on one sample after the other."""
    if count == 0:
        arguments = tuple(
            a if d is None else a.new_zeros((*a.shape[:d], 1, *a.shape[d + 1 :]))
            for a, d in zip(arguments, in_dims, strict=True)
        )
    found = [
        function.apply(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(max(count, 1))
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found)[:count], 0
    columns = list(zip(*found, strict=True))
    stacked = tuple(None if column[0] is None else torch.stack(column)[:count] for column in columns)
    return stacked, tuple(None if column is None else 0 for column in stacked)


def _exact(call: Call, seed: Tensor | None) -> Call:
    """The call with its seed, if it has a second derivative."""
    call = replace(call, seed=seed)
    if not call.is_exact:
        raise FqtError(
            "double backward through a quantized gradient is not defined: call model.eval() for this pass, whose "
            "gradient is exact, or fqt.restore_(model)"
        )
    return call


# Products of any two of the three operands, in float, made of torch's own ops: they can be differentiated further.


def _output(
    call: Call,
    left: tuple[Tensor | None, Tensor | None],
    right: tuple[Tensor | None, Tensor | None],
    bias: Tensor | None,
    shape: torch.Size,
) -> Tensor:
    """The sum of the outputs of two pairs of input and weight, and of a bias; a pair with None counts as 0."""
    there = next(t for t in (left[0], right[1], bias) if t is not None)
    with no_autocast(there.device.type):
        total = None
        for input, weight in (left, right):
            if input is not None and weight is not None:
                total = _sum(total, call.map.output(*_alike(input, weight)))
        if bias is not None:
            total = _sum(total, call.map.per_channel(_computed(bias), len(shape)).expand(shape))
    assert total is not None
    return total


def _grad_input(parts: _Parts, grad: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if grad is None or weight is None:
        return None
    with no_autocast(grad.device.type):
        return parts.call.map.grad_input(*_alike(grad, weight), parts.shapes[0]).to(parts.dtypes[0])


def _grad_weight(parts: _Parts, grad: Tensor | None, input: Tensor | None) -> Tensor | None:
    if grad is None or input is None:
        return None
    with no_autocast(grad.device.type):
        return parts.call.map.grad_weight(*_alike(grad, input), parts.shapes[1]).to(parts.dtypes[1])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _computed(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(torch.promote_types(a.dtype, b.dtype))
    return a.to(dtype), b.to(dtype)


def _input_values(input: Tensor | None, codes: Sequence[Tensor | None], parts: _Parts) -> Tensor:
    """What the layer multiplied; differentiating it leads to the input."""
    if codes[0] is None:
        return _Values.apply(input, parts.call, True)
    assert parts.view is not None
    quantized = parts.view.quantized(*codes)  # type: ignore[arg-type]
    dtype = compute_dtype(quantized.dtype)
    map, block = parts.call.map, parts.call.recipe.rotate
    values = turned_back(map.unlay(quantized.dequantize(dtype)), map, block, is_input=True)
    return values if input is None else values + input.to(dtype)


# The two passes: as they are, or as ops where torch's dispatcher has a say: on meta, where a mode looks on (which
# counts, traces or fakes), for a tensor with a dispatch of its own (the result of a collective that is under way).


def _as_ops(x: Tensor, call: Call) -> bool:
    if x.is_meta or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and call.observer is None and call.witness is None


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, call: Call, keep: bool
) -> tuple[Tensor, _Saved, _View]:
    """The output, and if asked to `keep`, what `_backward` needs of the input."""
    if _as_ops(input, call):
        output, *codes = torch.ops.fqt.layer(input, weight, bias, keep, *compiled.arguments(call))
        seen = input_seen(input.shape, input.dtype, call)
        saved: _Saved = () if not keep else (input,) if seen is None else codes
        return output, saved, seen
    output, x = forward(input, weight, bias, call, share=keep)
    # A result that is a view of its memory could not be modified in place; nothing that is saved shares it.
    return output.data, x.tensors if keep else (), x.seen


def _backward(grad: Tensor, weight: Tensor | None, saved: _Saved, parts: _Parts) -> tuple[Tensor | None, ...]:
    call, rest = parts.call, (parts.shapes, parts.dtypes, parts.needs)
    if _as_ops(grad, call):
        found = compiled.layer_backward(grad, weight, saved, *rest, compiled.arguments(call))
    else:
        found = backward(grad, weight, saved, parts.view, *rest, call)
    to_weight = compiled.strided_as(found[1], parts.stride)
    return found[0], None if to_weight is None else to_weight.data, found[2]  # no view, as above
