"""torch's own functions, with results in the memory of `fqt.kernels.cpu.memory`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fqt.kernels import results as operations
from fqt.kernels.cpu.library import BACKEND, plain, takes
from fqt.kernels.cpu.memory import LEAST, empty
from fqt.kernels.results import Normalized

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _large(x: Tensor) -> bool:
    return plain(x) and x.numel() * x.dtype.itemsize >= LEAST and takes()


def _format(x: Tensor) -> torch.memory_format | None:
    """In which of torch's formats x lies; None for another."""
    last = _CHANNELS_LAST.get(x.ndim)
    formats = (torch.contiguous_format,) if last is None else (torch.contiguous_format, last)
    return next((f for f in formats if x.is_contiguous(memory_format=f)), None)


def _lies_so(x: Tensor) -> bool:
    return _large(x) and _format(x) is not None


def _empty(shape: Sequence[int], dtype: torch.dtype, format: torch.memory_format | None) -> Tensor:
    """No view, which could not be modified in place where autograd looks on."""
    if format == torch.contiguous_format:
        return empty(tuple(shape), dtype).data
    return empty((shape[0], *shape[2:], shape[1]), dtype).movedim(-1, 1).data


@operations.empty_like.on(BACKEND, when=_lies_so)
def _empty_like(x: Tensor) -> Tensor:
    return _empty(x.shape, x.dtype, _format(x))


@operations.contiguous.on(
    BACKEND,
    when=lambda x, format=torch.contiguous_format: _large(x) and not x.is_contiguous(memory_format=format),
)
def _contiguous(x: Tensor, format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return _empty(x.shape, x.dtype, format).copy_(x.detach())


@operations.reshape.on(BACKEND, when=lambda x, shape: _large(x) and not x.is_contiguous())
def _reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return x.view(shape)
    except RuntimeError:  # no view has this shape
        return _contiguous(x).view(shape)


@operations.cat.on(
    BACKEND, when=lambda parts: takes() and all([plain(x) and _format(x) == _format(parts[0]) for x in parts])
)
def _cat(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    shape = (sum(len(x) for x in parts), *first.shape[1:])
    return torch.cat(list(parts), out=_empty(shape, first.dtype, _format(first)))


@operations.relu.on(BACKEND, when=_lies_so)
def _relu(x: Tensor) -> Tensor:
    return torch.clamp_min(x, 0, out=_empty_like(x))  # what torch's relu is


@operations.batch_norm.on(BACKEND, when=lambda x, weight, *_: weight is not None and _lies_so(x))
def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Normalized:
    assert weight is not None
    found = [torch.empty(0, dtype=weight.dtype, device="cpu") for _ in range(2)]
    results = {"out": _empty_like(x), "save_mean": found[0], "save_invstd": found[1]}
    return torch.ops.aten.native_batch_norm.out(x, weight, bias, mean, var, training, momentum, eps, **results)
