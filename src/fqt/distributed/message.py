"""A quantized matrix as bytes, and back on another process.

    seed | variance | which rounding | steps | offsets | state of the transform | codes
    8      8          1                as stored         4 bytes a number         packed to their bits

Dither and random signs are not sent: the seed stands for them. All sizes follow from the quantizer and the matrix's
shape, so that every process's message about a matrix of one shape has the same length, which collectives need.
Pickled objects were rejected: their lengths differ, and a receiver would run what a sender wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fqt.distributed import bits
from fqt.kernels import ops
from fqt.kernels.codes import Dither, Entries, Levels
from fqt.kernels.mixing import Butterflies, Mixing, Reflections
from fqt.kernels.rotation import Rotation
from fqt.kernels.rounding import DITHERED
from fqt.quant import QuantizedTensor, Quantizer

_SENT = {
    Mixing: ("inverse_scale", "offset", "matrix"),
    Reflections: ("group", "normal", "beta"),
    Butterflies: ("order", "keep"),
}
"""What undoing a transform over rows reads, of all that describes it."""


def write(found: QuantizedTensor, quantizer: Quantizer, seed: Tensor, variance: Tensor) -> Tensor:
    """The bytes of a matrix's codes.

    Args:
        found: `quantizer.quantize(x, seed)` of a float32 matrix (N, D).
        quantizer: one that both sides know.
        seed: int64 scalar.
        variance: float64 scalar, of this message; NaN where nobody has computed it.

    Returns:
        uint8, of a length that depends on the quantizer, N and D only.
    """
    device = found.matrix_codes.device
    half = 0.0 if found.noise is None else found.noise.half
    parts = [_bytes(t.to(device)) for t in (seed, variance)]
    parts.append(_bytes(torch.as_tensor(half, device=device) > 0))
    parts.append(quantizer.scale.stored.packed(found.scales.step))
    if quantizer.scale.mode != "symmetric":
        parts.append(_bytes(found.scales.offset))
    if found.mixing is not None:
        parts += map(_bytes, _leaves(found.mixing))
    parts.append(bits.packed(_places(found.matrix_codes, _levels(quantizer)), quantizer.bits))
    return torch.cat(parts)


def read(data: Tensor, quantizer: Quantizer, like: QuantizedTensor) -> tuple[QuantizedTensor, Tensor]:
    """What another process wrote, and its variance (float64 scalar).

    Args:
        data: uint8, from `write`.
        quantizer: the one that wrote it.
        like: a matrix of the same shape, quantized by it; its values are not looked at.
    """
    rest = _Reader(data)
    like_seed, scales, stored = torch.zeros((), dtype=torch.int64), like.scales, quantizer.scale.stored
    seed, variance = rest.tensor(like_seed), rest.tensor(like_seed.double())
    dithered = rest.tensor(like_seed.bool())
    step = stored.unpacked(rest.bytes(stored.bytes_packed(scales.step.numel())), scales.step.shape)
    offset = torch.zeros_like(step) if quantizer.scale.mode == "symmetric" else rest.tensor(scales.offset)
    mixing = None if like.mixing is None else rest.refill(like.mixing)
    count = like.matrix_codes.numel()
    packed = rest.bytes(bits.length(count, quantizer.bits))
    codes = _numbers_at(bits.unpacked(packed, quantizer.bits, count), _levels(quantizer))
    found = replace(
        like,
        matrix_codes=codes.view(like.matrix_codes.shape),
        scales=replace(scales, step=step, offset=offset),
        noise=_dither(quantizer, seed, like).where(dithered) if _may_dither(quantizer) else None,
        mixing=mixing,
        rotation=None if like.rotation is None else _rotation(seed, like.rotation),
    )
    return found, variance


class _Reader:
    """Bytes, taken from the front."""

    def __init__(self, data: Tensor) -> None:
        self._data, self._at = data, 0

    def bytes(self, count: int) -> Tensor:
        """The next ones, as a copy, so that other dtypes find them aligned."""
        self._at += count
        return self._data[self._at - count : self._at].clone()

    def tensor(self, like: Tensor) -> Tensor:
        """The next tensor, of a shape and dtype like another's."""
        kind = _sent_as(like.dtype, like.ndim)
        found = self.bytes(like.numel() * kind.itemsize)
        return (found if kind == torch.bool else found.view(kind)).view(like.shape).to(like.dtype)

    def refill(self, state: Any) -> Any:
        """The state of a transform like another's."""
        values = {name: getattr(state, name) for name in _SENT[type(state)]}
        return replace(
            state, **{n: self.tensor(v) if isinstance(v, Tensor) else self.refill(v) for n, v in values.items()}
        )


def _leaves(state: Any) -> Iterator[Tensor]:
    """The tensors that are sent, in the order of `_Reader.refill`."""
    for name in _SENT[type(state)]:
        value = getattr(state, name)
        yield from (value,) if isinstance(value, Tensor) else _leaves(value)


def _sent_as(dtype: torch.dtype, ndim: int) -> torch.dtype:
    """Rows are counted in 32 bits; a scalar int64 is a seed."""
    return torch.int32 if dtype == torch.int64 and ndim else dtype


def _bytes(x: Tensor) -> Tensor:
    return x.to(_sent_as(x.dtype, x.ndim)).reshape(-1).view(torch.uint8)


def _levels(quantizer: Quantizer) -> Levels:
    """Of all its roundings: dithered codes use one more than positions do."""
    return quantizer.grid.levels(quantizer.scale.mode)


def _places(codes: Tensor, levels: Levels) -> Tensor:
    """Which level each code is, from 0."""
    if levels.uniform:
        return codes if levels.low == 0 else codes.to(torch.int32) - levels.low
    return torch.searchsorted(torch.tensor(levels.numbers, dtype=torch.float32, device=codes.device), codes.float())


def _numbers_at(places: Tensor, levels: Levels) -> Tensor:
    """The codes, from which levels they are."""
    if levels.uniform:
        return places if levels.low == 0 else (places.to(torch.int32) + levels.low).to(levels.dtype)
    return torch.tensor(levels.numbers, dtype=torch.float32, device=places.device)[places.long()].to(levels.dtype)


def _may_dither(quantizer: Quantizer) -> bool:
    return any(coding.rounding == DITHERED for coding in quantizer.codings)


def _dither(quantizer: Quantizer, seed: Tensor, like: QuantizedTensor) -> Dither:
    step = like.scales.step
    return ops.dither(seed, Entries(step.new_empty(()).expand(like.matrix_codes.shape)), step.dtype)


def _rotation(seed: Tensor, like: Rotation) -> Rotation:
    return Rotation.draw(seed, like.signs.numel(), max(like.blocks, default=1), like.signs.dtype)
