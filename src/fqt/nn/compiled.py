"""A layer as two ops of `torch.library`, one per direction, for `torch.compile`.

The graph holds one opaque op per layer instead of what is inside: there is nothing in it for a compiler to fuse,
and much (random numbers, sums in a fixed order) that it must not touch. Eager layers call the same two functions
through an autograd function, which shows saved tensors to hooks and knows observers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fqt.kernels.linear_map import ConvMap, DenseMap, LinearMap
from fqt.nn import masks
from fqt.nn.function import Call, backward, forward, input_view
from fqt.nn.recipe import Recipe

_library = torch.library.Library("fqt", "FRAGMENT")
_CALL = "Tensor? seed, int recipe, int[] map, int rank, ScalarType dtype, bool channels_last"
_library.define(
    f"layer(Tensor input, Tensor weight, Tensor? bias, bool keep, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "layer_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor codes, Tensor step, Tensor offset, "
    "SymInt[] input_shape, SymInt[] weight_shape, ScalarType input_dtype, ScalarType weight_dtype, "
    f"ScalarType bias_dtype, bool needs_input, bool needs_weight, bool needs_bias, {_CALL}) "
    "-> (Tensor, Tensor, Tensor)"
)


def numbers(map: LinearMap) -> list[int]:
    """A map as the ops take it: nothing for a Linear."""
    if isinstance(map, DenseMap):
        return []
    more = [*map.output_padding, *map.extra]
    sizes = [len(map.stride), len(map.output_padding), map.groups, int(map.transposed), map.group_channels]
    return [*sizes, *map.stride, *map.padding, *map.dilation, *more]


def _map(values: list[int]) -> LinearMap:
    if not values:
        return DenseMap()
    (dims, output, groups, transposed, channels), rest = values[:5], tuple(values[5:])
    parts = [rest[i * dims : (i + 1) * dims] for i in range(3)]
    more = rest[3 * dims :]
    return ConvMap(parts[0], parts[1], parts[2], groups, bool(transposed), more[:output], more[output:], channels)


def _call(
    seed: Tensor | None, recipe: int, map: list[int], rank: int, dtype: torch.dtype, channels_last: bool
) -> Call:
    return Call(_map(list(map)), Recipe.by_key(recipe), seed, rank, dtype, channels_last)


def layer(input: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """As `fqt.nn.function.linear_products`, traceable."""
    keep = torch.is_grad_enabled() and weight.requires_grad
    rest = (call.seed, call.recipe.key, numbers(call.map), call.rank, call.dtype, call.channels_last)
    return torch.ops.fqt.layer(input, weight, bias, keep, *rest)[0]


def _layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, x = forward(input, weight, bias, _call(*rest))
    if not keep or x.codes is None:
        return output, input.new_empty(0), input.new_empty(0), input.new_empty(0)
    return output, x.codes.matrix_codes, x.codes.matrix_step, x.codes.group_offset


def _empty(shape: Any, dtype: torch.dtype, like: Tensor, channels_last: bool) -> Tensor:
    x = like.new_empty(shape, dtype=dtype)
    if not channels_last:
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _layer_shape(
    input: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masks.install()
    call = _call(*rest)
    shape = call.map.output(input.float(), weight.float()).shape
    output = _empty(shape, call.dtype, input, call.channels_last)
    view = input_view(input.shape, call)
    q = call.recipe.operand("input")
    if not keep or view is None or q is None:
        return output, input.new_empty(0), input.new_empty(0), input.new_empty(0)
    size = view.size
    step_shape = q.scale.blocks(view.transposed).count(size)
    codes = input.new_empty(size, dtype=q.code_dtype)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    step, offset = (input.new_empty(step_shape, dtype=compute) for _ in range(2))
    return output, codes, step, offset


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, _, seed, *rest = inputs
    view_known = Recipe.by_key(rest[0]).operand("input") is not None
    needs = ctx.needs_input_grad
    ctx.save_for_backward(
        None if view_known or not needs[1] else input, weight if needs[0] else None, seed, *output[1:]
    )
    ctx.rest, ctx.shapes = rest, (input.shape, weight.shape)
    ctx.dtypes = [input.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    needs = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 10
    input, weight, seed, codes, step, offset = ctx.saved_tensors
    shapes = [list(s) for s in ctx.shapes]
    found = torch.ops.fqt.layer_backward(
        grad, input, weight, codes, step, offset, *shapes, *ctx.dtypes, *needs, seed, *ctx.rest
    )
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 7


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
    view = input_view(shapes[0], call)
    saved = (input,) if view is None else (codes, step, offset)
    q = call.recipe.operand("input")
    seen = None if view is None or q is None else (view, dtypes[0], q.scale.blocks(view.transposed))
    found = backward(grad, weight, saved, seen, shapes, dtypes, needs, call)
    none = grad.new_empty(0)
    grad_weight = None if found[1] is None else call.as_laid_out(found[1])
    return tuple(none if g is None else g for g in (found[0], grad_weight, found[2]))  # type: ignore[return-value]


def _layer_backward_shape(
    grad: Tensor, input: Any, weight: Any, codes: Any, step: Any, offset: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    input_shape, weight_shape, dtypes, needs, call = rest[0], rest[1], rest[2:5], rest[5:8], rest[8:]
    map = _map(list(call[2]))
    transposed = isinstance(map, ConvMap) and map.transposed
    channels = weight_shape[1] * map.groups if transposed else weight_shape[0]  # type: ignore[union-attr]
    none = grad.new_empty(0)
    return (
        _empty(input_shape, dtypes[0], grad, call[5]) if needs[0] else none,
        _empty(weight_shape, dtypes[1], grad, call[5]) if needs[1] else none,
        grad.new_empty((channels,), dtype=dtypes[2]) if needs[2] else none,
    )


for _name, _run, _shape in (
    ("layer", _layer, _layer_shape),
    ("layer_backward", _layer_backward, _layer_backward_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fqt::{_name}", _shape, lib=_library)
torch.library.register_autograd("fqt::layer", _backward, setup_context=_setup, lib=_library)
