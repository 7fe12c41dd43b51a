"""A layer on tensors that are spread over a mesh of processes (`DTensor`): tensor parallel, and what goes with it.

Every process multiplies the shards it holds, so that what is quantized is a local shard, with steps of its own and
noise of its own. Along one axis of the mesh:

    input                 weight             output                gradients of input and weight
    whole                 output channels    output channels       to be summed, as the weight    ColwiseParallel
    input channels        input channels     to be summed          as the input, as the weight    RowwiseParallel
    any axis but those    whole              as the input          as the input, to be summed     data, sequence
    whole                 whole              whole                 to be averaged (without noise: whole)

Sums are of independent unbiased estimates, so they are unbiased too. In the last row all processes compute the
same, but each draws its own noise: their gradients are averaged, which makes them equal again, of as many times
less variance. Equal noise instead was rejected: it needs seeds that agree, which no process knows of the others
unless it asks them in every forward pass. A layer of plain tensors that a tensor parallel program runs on every
process alike is such a layer too, and nothing shows it: distribute it, leave it float by a rule, or average its
gradients.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels.linear_map import DenseMap, LinearMap

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def is_sharded(x: Tensor | None) -> bool:
    """Whether this is a DTensor; its package is slow to import, and nothing is one before it is."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(x, package.DTensor)


@dataclass(frozen=True)
class _Placements:
    """Along one axis of the mesh, in torch's words; whether processes' gradients are estimates of the same."""

    output: Any
    grad_input: Any
    grad_weight: Any
    grad_bias: Any
    averaged: bool = False


def products(run: Run, input: Any, weight: Any, bias: Any, map: LinearMap, exact: bool) -> Tensor:
    """The output of a layer as a DTensor.

    Args:
        run: the layer on local tensors.
        input, weight, bias: DTensors on one mesh; the bias or None.
        map: the layer's linear map.
        exact: whether the gradient has no noise.

    Raises:
        FqtError: an operand is not spread, or spread in a way that is not in the table.
    """
    from torch.distributed.tensor import DTensor

    operands = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    plain = [name for name, t in operands.items() if not is_sharded(t)]
    if plain or any(t.device_mesh != weight.device_mesh for t in operands.values()):
        raise FqtError(
            f"a converted layer's input and parameters must all be DTensors of one mesh; plain: "
            f"{', '.join(plain) or 'none'}"
        )
    mesh = weight.device_mesh
    along = [
        _placements(x, w, input.ndim, isinstance(map, DenseMap), exact)
        for x, w in zip(input.placements, weight.placements, strict=True)
    ]
    replicas, local_bias = math.prod(mesh.size(i) for i, a in enumerate(along) if a.averaged), None
    if bias is not None:
        local_bias = _shared(bias.to_local(grad_placements=[a.grad_bias for a in along]), along, mesh)
    x = input.to_local(grad_placements=[a.grad_input for a in along])
    w = weight.to_local(grad_placements=[a.grad_weight for a in along])
    if replicas > 1:
        x, w = _Share.apply(x, replicas), _Share.apply(w, replicas)
    local = run(x, w, local_bias)
    dense = isinstance(map, DenseMap)
    shape = torch.Size((*input.shape[:-1], weight.shape[0]) if dense else (input.shape[0], *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    placements = [a.output for a in along]
    return DTensor.from_local(local.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)


def _placements(x: Any, w: Any, ndim: int, dense: bool, exact: bool) -> _Placements:
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, last = Replicate(), Shard(ndim - 1)
    if dense and x == whole and w == Shard(0):
        return _Placements(last, Partial(), w, Shard(0))
    if dense and x in (last, Shard(-1)) and w == Shard(1):
        return _Placements(Partial(), last, w, whole)
    if isinstance(x, Shard) and w == whole and x.dim in (range(ndim - 1) if dense else (0,)):
        return _Placements(x, x, Partial(), Partial())
    if x == w == whole:
        if exact:
            return _Placements(whole, whole, whole, whole)
        return _Placements(whole, Partial(), Partial(), whole, averaged=True)
    raise FqtError(
        f"a converted layer cannot multiply an input placed {x} by a weight placed {w}: "
        "use ColwiseParallel or RowwiseParallel, or fqt.restore_ the layer"
    )


class _Share(torch.autograd.Function):
    """x itself, whose gradient is divided by a number: what one of so many processes adds to their mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.count, None


def _shared(bias: Tensor, along: list[_Placements], mesh: Any) -> Tensor:
    """What one process adds where outputs are to be summed: a share of the bias, with the gradient of the whole."""
    from torch.distributed.tensor import Partial

    count = 1
    for i, a in enumerate(along):
        count *= mesh.size(i) if isinstance(a.output, Partial) else 1
    return bias if count == 1 else (bias / count).detach() + (bias - bias.detach())
