"""A layer as two ops of `torch.library`, one per direction, for whatever sees a model as ops: `torch.compile`,
export, `torch.jit.trace`, a dispatch mode that counts FLOPs or makes fake tensors.

The graph holds one opaque op per layer instead of what is inside: there is nothing in it for a compiler to fuse,
and much (random numbers, sums in a fixed order) that it must not touch. A graph outlives the process that made it,
in a compiler's cache or a file, and may run on another rank. So an op's arguments mean the same everywhere: the
recipe is written out, and the rank is asked for when the op runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels.codes import compute_dtype
from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.nn.call import Call
from fqt.nn.function import backward, forward, input_parts, input_seen
from fqt.nn.recipe import Recipe

_library = torch.library.Library("fqt", "FRAGMENT")
_CALL = "Tensor? seed, str recipe, int[]? map, ScalarType dtype, bool channels_last"
_library.define(
    f"layer(Tensor input, Tensor weight, Tensor? bias, bool keep, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "layer_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor codes, Tensor step, Tensor offset, "
    "SymInt[] input_shape, SymInt[] weight_shape, ScalarType input_dtype, ScalarType weight_dtype, "
    f"ScalarType bias_dtype, bool needs_input, bool needs_weight, bool needs_bias, {_CALL}) "
    "-> (Tensor, Tensor, Tensor)"
)


def numbers(map: LinearMap) -> list[int] | None:
    """A map as the ops take it: None for a Linear (AOTInductor takes no empty list)."""
    if isinstance(map, DenseMap):
        return None
    more = [*map.output_padding, *map.extra]
    sizes = [len(map.stride), len(map.output_padding), map.groups, int(map.transposed), map.group_channels]
    return [*sizes, *map.stride, *map.padding, *map.dilation, *more]


def _map(values: list[int] | None) -> LinearMap:
    if values is None:
        return DenseMap()
    (dims, output, groups, transposed, channels), rest = values[:5], tuple(values[5:])
    parts = [rest[i * dims : (i + 1) * dims] for i in range(3)]
    more = rest[3 * dims :]
    return ConvMap(parts[0], parts[1], parts[2], groups, bool(transposed), more[:output], more[output:], channels)


def _call(seed: Tensor | None, recipe: str, map: list[int] | None, dtype: torch.dtype, channels_last: bool) -> Call:
    known = _map(None if map is None else list(map))
    return Call(known, Recipe.of_text(recipe), seed, dtype, channels_last)


def arguments(call: Call) -> tuple[Any, ...]:
    """The last arguments of both ops."""
    if call.ranges is not None:
        raise FqtError(
            "a layer whose recipe remembers ranges cannot be trained as ops (is_grads_batched, on meta, in a mode "
            "that counts): take gradients one by one, or call the model in eval mode"
        )
    text = call.recipe.text
    if not text:
        raise FqtError("a recipe with a transform that no word stands for cannot be traced, compiled or exported")
    return call.seed, text, numbers(call.map), call.dtype, call.channels_last


def layer(input: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """As `fqt.nn.autograd.linear_products`, traceable."""
    traced = not torch.compiler.is_compiling()  # by torch.jit.trace, whose graph is for either mode
    if traced:
        _check_target()
    keep = weight.requires_grad and (traced or torch.is_grad_enabled())
    return torch.ops.fqt.layer(input, weight, bias, keep, *arguments(call))[0]


def _check_target() -> None:
    """Raises FqtError where a graph is made that can have no such op."""
    onnx = sys.modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        raise FqtError("ONNX has no op for a layer that fqt converted: call fqt.restore_(model) before the export")


def _layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _call(*rest)
    output, x = forward(input, weight, bias, call)
    output = _as_told(output, call)
    if not keep or x.codes is None:
        return output, input.new_empty(0), input.new_empty(0), input.new_empty(0)
    return output, x.codes.matrix_codes, x.codes.matrix_step, x.codes.group_offset


def _layer_shape(
    input: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_target()
    call = _call(*rest)
    shape = call.map.output(input.float(), weight.float()).shape
    output = call.as_laid_out(input.new_empty(shape, dtype=call.dtype))
    seen, q = input_seen(input.shape, input.dtype, call), call.recipe.operand("input")
    if not keep or seen is None or q is None:
        return output, input.new_empty(0), input.new_empty(0), input.new_empty(0)
    codes = input.new_empty(seen.view.size, dtype=q.code_dtype)
    counts = seen.blocks.count(seen.view.size)
    step, offset = (input.new_empty(counts, dtype=compute_dtype(input.dtype)) for _ in range(2))
    return output, codes, step, offset


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, keep, seed, *rest = inputs
    has_codes = keep and Recipe.of_text(rest[0]).operand("input") is not None
    needs = ctx.needs_input_grad
    ctx.save_for_backward(
        None if has_codes or not needs[1] else input, weight if needs[0] else None, seed, *output[1:]
    )
    ctx.rest, ctx.shapes, ctx.stride = rest, (input.shape, weight.shape), weight.stride()
    ctx.dtypes = [input.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    needs = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 9
    input, weight, seed, codes, step, offset = ctx.saved_tensors
    saved = (codes, step, offset) if input is None else (input,)
    found = layer_backward(grad, weight, saved, ctx.shapes, ctx.dtypes, needs, (seed, *ctx.rest))
    return found[0], strided_as(found[1], ctx.stride), found[2], *(None,) * 6


def strided_as(grad: Tensor | None, stride: Sequence[int]) -> Tensor | None:
    """The gradient of a weight with that weight's strides, where sizes of 1 leave it open which they are.

    Autograd takes such strides for equal and hands the gradient on; who compares them (`DistributedDataParallel`,
    with the view of its bucket) warns and copies. Where they really differ autograd itself lays `.grad` out.
    """
    if grad is None or grad.stride() == stride:
        return grad
    same = all(a == b or n == 1 for a, b, n in zip(grad.stride(), stride, grad.shape, strict=True))
    return grad.as_strided(grad.shape, stride) if same else grad


def _no_second(ctx: Any, *grads: Tensor | None) -> tuple:
    raise FqtError(
        "a converted layer has no double backward in a compiled graph or under is_grads_batched: call the model in "
        "eval mode, uncompiled (torch.func.hessian is vectorized too), or fqt.restore_(model)"
    )


def layer_backward(
    grad: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor | None],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype | None],
    needs: Sequence[bool],
    last: tuple[Any, ...],
) -> tuple[Tensor | None, ...]:
    """As `fqt.nn.function.backward`, by way of the op; `last` as `arguments` gives it."""
    input, codes = (None, saved) if len(saved) == 3 else (saved[0] if saved else None, (grad.new_empty(0),) * 3)
    sizes, types = (list(s) for s in shapes), (d or grad.dtype for d in dtypes)
    found = torch.ops.fqt.layer_backward(grad, input, weight, *codes, *sizes, *types, *needs, *last)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def _layer_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    codes: Tensor,
    step: Tensor,
    offset: Tensor,
    input_shape: list[int],
    weight_shape: list[int],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes, needs, call = rest[:3], rest[3:6], _call(*rest[6:])
    shapes = torch.Size(input_shape), torch.Size(weight_shape)
    parts = input_seen(shapes[0], dtypes[0], call)
    saved: Sequence[Tensor | None] = (input,) if parts is None else (codes, step, offset)
    if input is not None and parts is not None:  # run forward by a graph that was not made to be differentiated
        saved, parts = input_parts(input, call)
    found = backward(grad, weight, saved, parts, shapes, dtypes, needs, call)
    none = grad.new_empty(0)
    laid = (None if g is None else _as_told(g, call) for g in found[:2])
    return tuple(none if g is None else g for g in (*laid, found[2]))  # type: ignore[return-value]


def _as_told(x: Tensor, call: Call) -> Tensor:
    """A result laid out as its fake one was, down to the strides of sizes of 1: a compiler has planned by them."""
    told = call.as_laid_out(x.new_empty(x.shape, device="meta"))
    found = strided_as(call.as_laid_out(x), told.stride())
    assert found is not None
    return found


def _layer_backward_shape(
    grad: Tensor, input: Any, weight: Any, codes: Any, step: Any, offset: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    input_shape, weight_shape, dtypes, needs, call = rest[0], rest[1], rest[2:5], rest[5:8], _call(*rest[8:])
    map = call.map
    transposed = isinstance(map, ConvMap) and map.transposed
    channels = weight_shape[1] * map.groups if transposed else weight_shape[0]
    none = grad.new_empty(0)
    return (
        call.as_laid_out(grad.new_empty(input_shape, dtype=dtypes[0])) if needs[0] else none,
        call.as_laid_out(grad.new_empty(weight_shape, dtype=dtypes[1])) if needs[1] else none,
        grad.new_empty((channels,), dtype=dtypes[2]) if needs[2] else none,
    )


for _name, _run, _shape in (
    ("layer", _layer, _layer_shape),
    ("layer_backward", _layer_backward, _layer_backward_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fqt::{_name}", _shape, lib=_library)
torch.library.register_autograd("fqt::layer", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("fqt::layer_backward", _no_second, lib=_library)


@cache
def count_flops() -> None:
    """Tells torch's FLOP counter what a converted layer's ops count: what the float layer's do.

    Called when a model is converted, not when this is imported: torch's counter imports Triton where it is
    installed. A process that only loads an exported or pickled model imports `torch.utils.flop_counter` before fqt.
    """
    from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula

    @register_flop_formula(torch.ops.fqt.layer)
    def forward_flops(input: Any, weight: Any, bias: Any, keep: bool, *rest: Any, out_shape: Any, **_: Any) -> int:
        map = _map(rest[2])
        if isinstance(map, DenseMap):
            return 2 * math.prod(input) * weight[0]
        return conv_flop_count(input, weight, out_shape[0], transposed=map.transposed)

    @register_flop_formula(torch.ops.fqt.layer_backward)
    def backward_flops(grad: Any, *rest: Any, **_: Any) -> int:
        input, weight, needs, map = rest[5], rest[6], rest[10:12], _map(rest[15])
        if isinstance(map, DenseMap):
            return sum(needs) * 2 * math.prod(grad) * weight[1]
        unused = (None,) * 4  # bias and geometry: shapes say it all
        given: Any = (grad, input, weight, *unused, map.transposed, None, None, needs)
        return conv_backward_flop(*given, out_val=(input, weight))


if "torch.utils.flop_counter" in sys.modules:
    count_flops()
