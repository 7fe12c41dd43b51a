"""Functions of torch's own whose large results should lie in memory that is used again.

Each is torch's function, bit for bit; a backend says where the result goes. Between the products of a convolutional
network these results are the largest that there are. In the C library's memory they alternate with small tensors
that are kept for long, and leave gaps that nothing fits: a fifth of a process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fqt.kernels.op import Op

Normalized = tuple[Tensor, Tensor, Tensor]
"""The output, the mean of each channel, and one over its standard deviation."""


@Op
def empty_like(x: Tensor) -> Tensor:
    """Uninitialised memory for a result of x's shape, dtype and layout."""
    return torch.empty_like(x)


@Op
def contiguous(x: Tensor, format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """x in a memory format; itself where it lies so."""
    return x.contiguous(memory_format=format)


@Op
def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x in another shape, a view where that can be."""
    return x.reshape(shape)


@Op
def cat(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other along their first axis."""
    return torch.cat(list(parts))


@Op
def relu(x: Tensor) -> Tensor:
    """As `torch.relu`."""
    return torch.relu(x)


@Op
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Normalized:
    """As `torch.native_batch_norm`."""
    return torch.ops.aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
