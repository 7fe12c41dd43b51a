"""The QAT network in plain torch: fake-quantized operands, and autograd straight through them.

Quantization is written again here, in a few lines per axis that share nothing with the library's own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fqt import Quantizer, Recipe

from .cases import gradients


def fake(x: Tensor, bits: int, mode: str, shared: tuple[int, ...]) -> Tensor:
    """x rounded to the nearest value of a uniform grid; entries along the axes in `shared` share a step."""
    if mode == "symmetric":
        n = 2 ** (bits - 1) - 1
        step = x.abs().amax(shared, keepdim=True) / n
        return torch.where(step == 0, x, (x / torch.where(step == 0, 1, step)).round() * step)
    n = 2**bits - 1
    lo, hi = x.amin(shared, keepdim=True), x.amax(shared, keepdim=True)
    if mode == "zero":
        return _zero_on_code(x, lo, hi, n)
    step = torch.where(hi == lo, 1, (hi - lo) / n)
    return torch.where(hi == lo, x, ((x - lo) / step).round() * step + lo)


def _zero_on_code(x: Tensor, lo: Tensor, hi: Tensor, n: int) -> Tensor:
    """The zero code, of all n + 1, that needs the smallest step, by trying each."""
    low, high = (-lo).clamp(min=0)[..., None], hi.clamp(min=0)[..., None]
    z = torch.arange(n + 1, dtype=x.dtype)
    below = torch.where(low > 0, low / z, torch.zeros_like(low))
    above = torch.where(high > 0, high / (n - z), torch.zeros_like(high))
    step, code = torch.maximum(below, above).nan_to_num(nan=torch.inf).min(-1)
    step = step * (1 + 2.0**-45)  # the library rounds the step up by at most 256 units in the last place
    return torch.where(lo == hi, x, ((x / step).round() + code).clamp(0, n).sub(code) * step)


def _shared(group: str, rows: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The axes along which a step is shared."""
    if group == "tensor":
        return tuple(range(ndim))
    return tuple(d for d in range(ndim) if (d in rows) == (group == "column"))


def fake_input(x: Tensor, quantizer: Quantizer | None, dense: bool) -> Tensor:
    if quantizer is None:
        return x
    axis = quantizer.scale.axis or ("token" if dense else "sample")
    if axis == "sample":
        rows: tuple[int, ...] = (0,)
    else:
        rows = tuple(d for d in range(x.ndim) if d != (x.ndim - 1 if dense else 1))
    scale = quantizer.scale
    return fake(x, quantizer.grid.bits, scale.mode, _shared(scale.group, rows, x.ndim))


def fake_weight(w: Tensor, quantizer: Quantizer | None, transposed: bool, groups: int) -> Tensor:
    if quantizer is None:
        return w
    scale, bits = quantizer.scale, quantizer.grid.bits
    if not transposed:
        return fake(w, bits, scale.mode, _shared(scale.group, (0,), w.ndim))
    if scale.group == "tensor":
        return fake(w, bits, scale.mode, tuple(range(w.ndim)))
    parts = []  # (C, O/groups, *): output channel o of group g is column o of the g-th block of rows
    for part in w.chunk(groups):
        columns = [d for d in range(w.ndim) if d != 1]
        if scale.group == "row":
            parts.append(fake(part, bits, scale.mode, tuple(columns)))
        else:
            return _column_transposed(w, bits, scale.mode, groups)
    return torch.cat(parts)


def _column_transposed(w: Tensor, bits: int, mode: str, groups: int) -> Tensor:
    """One step per input channel of a group and tap, shared by all output channels."""
    stacked = torch.stack(w.chunk(groups))  # (groups, C/groups, O/groups, *)
    return torch.cat(list(fake(stacked, bits, mode, (0, 2))))


def straight_through(x: Tensor, fq: Tensor) -> Tensor:
    """The value of `fq`, with the gradient of `x`."""
    return x + (fq - x).detach()


class Straight(nn.Module):
    """A float layer whose operands are fake-quantized with straight-through gradients."""

    def __init__(self, layer: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.layer, self.recipe = copy.deepcopy(layer), recipe
        self.dense = isinstance(layer, nn.Linear)

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        layer, recipe = self.layer, self.recipe
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        groups = 1 if self.dense else layer.groups
        weight = fake_weight(layer.weight, recipe.operand("weight"), transposed, groups)
        xq = straight_through(x, fake_input(x, recipe.operand("input"), self.dense))
        values = {"weight": straight_through(layer.weight, weight)}
        return functional_call(layer, values, (xq,), kwargs)


def qat(layer: nn.Module, recipe: Recipe, x: Tensor, **kwargs: object) -> list[Tensor]:
    """Output and gradients of the float layer under straight-through quantization, as `gradients` orders them."""
    return gradients(Straight(layer, recipe), x, **kwargs)
