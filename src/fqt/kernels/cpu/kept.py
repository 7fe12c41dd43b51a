"""What is kept for a backward pass by the C++ kernels: of float32 and bfloat16."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fqt.kernels import kept as operations
from fqt.kernels.cpu.library import BACKEND, call, expect, plain, takes
from fqt.kernels.cpu.memory import empty
from fqt.kernels.cpu.source import source_of, takes_source
from fqt.kernels.kept import GROUP, Codes, Gradients


def _takes_kept(grad: Tensor, kept: Codes, *parameters: Tensor | None) -> bool:
    floats = [p for p in parameters if p is not None]
    return takes_source(grad) and takes(kept.step, kept.offset, *floats, integers=kept.packed) and plain(kept.seed)


def _numbers(kept: Codes) -> tuple[tuple, tuple[Tensor, ...]]:
    """The C form of kept numbers, and what must outlive it."""
    groups = kept.step.numel()
    found = kept.read(kept.packed.new_empty(1).expand(groups, GROUP))
    dither = found.matrix_dither
    assert dither is not None
    step, offset, dither = kept.step.contiguous(), found.matrix_scales.offset.contiguous(), dither.contiguous()
    packed = kept.packed.contiguous()
    pointers = (
        expect("codes", packed, (groups * GROUP * kept.bits // 8,), torch.uint8),
        kept.bits,
        expect("step", step, (groups, 1)),
        expect("offset", offset, (groups, 1)),
        expect("dither", dither, (1, GROUP)),
    )
    return pointers, (packed, step, offset, dither)


def _parameter(name: str, x: Tensor | None, count: int) -> tuple[int | None, Tensor | None]:
    if x is None:
        return None, None
    x = x.detach().reshape(-1).contiguous()
    return expect(name, x, (count,)), x


@operations.pack.on(
    BACKEND,
    when=lambda numbers, bits: (
        bits in (2, 4) and takes(integers=numbers) and numbers.dtype == torch.uint8 and not numbers.numel() % GROUP
    ),
)
def _pack(numbers: Tensor, bits: int) -> Tensor:
    numbers = numbers.contiguous()
    packed = empty((numbers.numel() * bits // 8,), torch.uint8)
    call("fqt_pack", numbers.data_ptr(), numbers.numel(), bits, packed.data_ptr())
    return packed


@operations.positive.on(BACKEND, when=takes_source)
def _positive(x: Tensor) -> Tensor:
    source, _alive = source_of(x.view(1, -1))
    flags = empty((-(-x.numel() // 8),), torch.uint8)
    call("fqt_positive", ctypes.addressof(source), x.numel(), flags.data_ptr())
    return flags


@operations.gate.on(BACKEND, when=lambda grad, flags: takes_source(grad) and takes(integers=flags))
def _gate(grad: Tensor, flags: Tensor) -> Tensor:
    source, _alive = source_of(grad.view(1, -1))
    out, flags = empty(grad.shape, grad.dtype), flags.contiguous()
    address = expect("flags", flags, (-(-grad.numel() // 8),), torch.uint8)
    call("fqt_gate", ctypes.addressof(source), grad.numel(), address, out.data_ptr())
    return out


@operations.times.on(BACKEND, when=_takes_kept)
def _times(grad: Tensor, kept: Codes) -> Tensor:
    (source, _alive), (numbers, _held) = source_of(grad.view(1, -1)), _numbers(kept)
    out = empty(grad.shape, grad.dtype)
    call("fqt_kept_times", ctypes.addressof(source), kept.n, *numbers, out.data_ptr())
    return out


@operations.batch_norm.on(
    BACKEND, when=lambda grad, kept, mean, rstd, weight, inner: _takes_kept(grad, kept, mean, rstd, weight)
)
def _batch_norm(
    grad: Tensor, kept: Codes, mean: Tensor, rstd: Tensor, weight: Tensor | None, inner: int
) -> Gradients:
    (source, _alive), (numbers, _held) = source_of(grad.view(1, -1)), _numbers(kept)
    channels = mean.numel()
    if kept.n != grad.numel() or kept.n % (channels * inner):
        raise ValueError(f"{grad.numel()} gradients and {kept.n} numbers of {channels} channels, {inner} in a run")
    parameters, _kept = zip(*(_parameter("parameter", p, channels) for p in (mean, rstd, weight)), strict=True)
    d_x, (d_weight, d_bias) = empty(grad.shape, grad.dtype), torch.empty((2, channels), device="cpu")
    results = [t.data_ptr() for t in (d_x, d_weight, d_bias)]
    sizes = (channels, inner)
    call("fqt_kept_batch_norm", ctypes.addressof(source), kept.n, *numbers, *sizes, *parameters, *results)
    return d_x, d_weight, d_bias


@operations.row_norm.on(
    BACKEND, when=lambda grad, kept, mean, rstd, weight: _takes_kept(grad, kept, mean, rstd, weight)
)
def _row_norm(grad: Tensor, kept: Codes, mean: Tensor | None, rstd: Tensor, weight: Tensor | None) -> Gradients:
    (source, _alive), (numbers, _held) = source_of(grad.view(1, -1)), _numbers(kept)
    rows = rstd.numel()
    features = kept.n // rows
    if kept.n != grad.numel() or kept.n != rows * features:
        raise ValueError(f"{grad.numel()} gradients and {kept.n} numbers in {rows} rows")
    given = ((mean, rows), (rstd, rows), (weight, features))
    parameters, _kept = zip(*(_parameter("parameter", p, count) for p, count in given), strict=True)
    d_x, (d_weight, d_bias) = empty(grad.shape, grad.dtype), torch.empty((2, features), device="cpu")
    results = [t.data_ptr() for t in (d_x, d_weight, d_bias)]
    call("fqt_kept_row_norm", ctypes.addressof(source), rows, features, *numbers, *parameters, *results)
    return d_x, d_weight, d_bias
