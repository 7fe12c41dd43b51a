"""What is kept of a tensor for a backward pass, and the gradients that are made of it, on memory in one run.

Flags are bits. Numbers are codes in groups of 256 neighbours that share a step and an offset, rounded with
subtractive dither: an entry's error is uniform on one step whatever the entry, so that its variance, step²/12, is
known when the codes are read; the errors of any two entries are independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.kernels import ops, packing
from fqt.kernels.codes import ROW, Entries, Levels, Scales
from fqt.kernels.op import Op
from fqt.kernels.rounding import DITHERED, Coding
from fqt.kernels.tensor import QuantizedTensor, RowView

GROUP = 256
"""Neighbours that share a step: 8 bytes for 256 numbers are a quarter of a bit each."""


@dataclass(frozen=True)
class Codes:
    """Numbers as codes.

    Attributes:
        packed: (⌈n / 256⌉ · 256 · bits / 8,) uint8.
        step, offset: (⌈n / 256⌉, 1) each, in the compute dtype.
        seed: int64 scalar, of the dither.
        bits: of a code: 2, 4 or 8.
        n: how many numbers.
    """

    packed: Tensor
    step: Tensor
    offset: Tensor
    seed: Tensor
    bits: int
    n: int

    @staticmethod
    def of(x: Tensor, bits: int, seed: Tensor) -> Codes:
        """The codes of x (n,), any real floating dtype; n > 0."""
        rest = -x.numel() % GROUP
        whole = F.pad(x, (0, rest)) if rest else x
        if rest:
            whole[x.numel() :] = x[-1]  # no zero that would widen the last group's range
        coding = Coding("affine", Levels(0, 2**bits - 2), DITHERED)  # a code may round up once more
        found = ops.quantize(Entries(whole.view(-1, GROUP)), ROW, coding, seed.to(x.device))
        return Codes(
            pack(found.codes.view(-1), bits), found.scales.step, found.scales.offset, seed, bits, x.numel()
        )

    def read(self, codes: Tensor) -> QuantizedTensor:
        """What codes (⌈n / 256⌉, 256), one in a byte, stand for."""
        dtype, shape = self.step.dtype, torch.Size((self.step.shape[0], GROUP))
        noise = ops.dither(self.seed.to(codes.device), Entries(codes), dtype)
        return QuantizedTensor(RowView(shape, (0,)), dtype, codes, Scales(self.step, self.offset, ROW), noise)

    def values(self) -> Tensor:
        """(n,): unbiased estimates, in the step's dtype. NaN in a group that holds what is not finite."""
        codes = packing.unpack(self.packed, self.bits, self.step.numel() * GROUP)
        return self.read(codes.view(-1, GROUP)).decode().view(-1)[: self.n]

    def variance(self) -> Tensor:
        """(n,): step²/12 of each."""
        return self.step.square().div(12).expand(-1, GROUP).reshape(-1)[: self.n]


pack = Op(packing.pack)


@Op
def positive(x: Tensor) -> Tensor:
    """Where a ReLU of x (n,) lets the gradient through, which a NaN does, as bits: (⌈n/8⌉,) uint8."""
    return packing.pack(~(x <= 0), 1)


@Op
def gate(grad: Tensor, flags: Tensor) -> Tensor:
    """(n,): entries whose bit is set, zeros in place of the others."""
    return torch.where(packing.unpack(flags, 1, grad.numel()).view(torch.bool), grad, 0.0)


@Op
def times(grad: Tensor, kept: Codes) -> Tensor:
    """(n,): grad · kept, in grad's dtype."""
    return (grad * kept.values()).to(grad.dtype)


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of the input, in the dtype of the gradient from above; of weight and bias, in the compute dtype."""


@Op
def batch_norm(
    grad: Tensor, kept: Codes, mean: Tensor, rstd: Tensor, weight: Tensor | None, inner: int
) -> Gradients:
    """The gradients of batch normalization, unbiased over the dither.

    With x̂ = (x − mean) · rstd and M entries of a channel, d_x = weight · rstd · (g − Σg/M − x̂ · Σ(g·x̂)/M). An entry
    of x̂ meets itself in the sum, which adds g · Var[x̂]/M on the average; that is taken off.

    Args:
        grad: (n,), from above.
        kept: of the input, in the same order.
        mean, rstd: (C,), of the input, exact.
        weight: (C,).
        inner: how many neighbours have the same channel.
    """
    shape = (-1, mean.numel(), inner)
    g, x, v = (t.view(shape) for t in (grad.to(kept.step.dtype), kept.values(), kept.variance()))
    r = rstd.view(-1, 1)
    unit, count = (x - mean.view(-1, 1)) * r, kept.n // mean.numel()
    d_weight, d_bias = (g * unit).sum((0, 2)), g.sum((0, 2))
    scale = r if weight is None else r * weight.view(-1, 1)
    d_x = scale * (g - (d_bias.view(-1, 1) + unit * d_weight.view(-1, 1) - g * r * r * v) / count)
    return d_x.to(grad.dtype).view(-1), d_weight, d_bias


@Op
def row_norm(grad: Tensor, kept: Codes, mean: Tensor | None, rstd: Tensor, weight: Tensor | None) -> Gradients:
    """The gradients of layer normalization, or by the root mean square where there is no mean; unbiased.

    As `batch_norm`, the sums being over the features of a row.

    Args:
        grad: (rows · features,), from above.
        kept: of the input, in the same order.
        mean, rstd: (rows,), of the input, exact.
        weight: (features,).
    """
    r = rstd.view(-1, 1)
    g, x, v = (t.view(r.shape[0], -1) for t in (grad.to(kept.step.dtype), kept.values(), kept.variance()))
    unit = x * r if mean is None else (x - mean.view(-1, 1)) * r
    d_weight, d_bias = (g * unit).sum(0), g.sum(0)
    g = g if weight is None else g * weight.view(-1)
    shift = 0.0 if mean is None else g.mean(1, keepdim=True)
    d_x = r * (g - shift - unit * (g * unit).mean(1, keepdim=True) + g * r * r * v / g.shape[1])
    return d_x.to(grad.dtype).view(-1), d_weight, d_bias
