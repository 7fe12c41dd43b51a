"""Planted defects: each breaks the library in one small way, and some check must notice.

A mutant takes pytest's monkeypatch and leaves the library broken until it is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fqt.kernels import choice, mixing, ops
from fqt.kernels.codes import COLUMN, TENSOR, Blocks, Dither, Entries, Levels, Scales
from fqt.quant import Integers

Patch = pytest.MonkeyPatch
Rounding = Callable[[Tensor, Tensor], Tensor]


def _step_by_step(patch: Patch) -> None:
    """Nothing in one call, so that a defect planted in a step shows."""
    for op in (ops.quantize, choice.quantize_best, mixing.hadamard_codes, mixing.householder_codes):
        patch.setattr(op, "implementations", [])


def _rounding(rule: Rounding, noise_shape: Callable[[Tensor], tuple[int, ...]] = lambda t: tuple(t.shape)):
    """A mutant whose stochastic rounding is `rule(t, uniform)`."""

    def mutant(patch: Patch) -> None:
        def encode(x: Entries, scales: Scales, levels: Levels, rounding: object, seed: Tensor) -> Tensor:
            step, offset = scales.spread(x.shape)
            t = ((x.values() - offset) / torch.where(step == 0, 1.0, step)).clamp(levels.low, levels.high)
            u = torch.rand(noise_shape(t), generator=torch.Generator().manual_seed(int(seed)))
            return rule(t, u.to(t.dtype).expand(t.shape)).clamp(levels.low, levels.high).to(torch.uint8)

        patch.setattr(ops, "encode", encode)
        _step_by_step(patch)

    return mutant


right_rounding = _rounding(lambda t, u: t.floor() + (u < t - t.floor()))  # no defect: the control
biased_up = _rounding(lambda t, u: t.floor() + (u < t - t.floor() + 0.02))
always_up = _rounding(lambda t, u: t.ceil())
nearest = _rounding(lambda t, u: t.round())
down = _rounding(lambda t, u: t.floor())
noise_too_narrow = _rounding(lambda t, u: (t + 0.8 * (u - 0.5)).round())
noise_per_row = _rounding(lambda t, u: t.floor() + (u < t - t.floor()), lambda t: (t.shape[0], 1))


def _steps(factor: float) -> Callable[[Patch], None]:
    def mutant(patch: Patch) -> None:
        right = ops.parameters

        def parameters(lo, hi, mode, steps):  # type: ignore[no-untyped-def]
            step, offset = right(lo, hi, mode, steps)
            return step * factor, offset

        patch.setattr(ops, "parameters", parameters)
        _step_by_step(patch)

    return mutant


step_too_small = _steps(0.93)  # clips the top
step_too_large = _steps(1.08)  # unbiased, but wasteful


def _decoding(patch: Patch, change: Callable[[Scales], Scales]) -> None:
    """Codes are turned back by other scales than they were made with."""
    right = ops.decode
    patch.setattr(ops, "decode", lambda codes, scales, dither: right(codes, change(scales), dither))


def decode_scale_off(patch: Patch) -> None:
    _decoding(patch, lambda scales: replace(scales, step=scales.step * 1.01))


def power_of_two_bins(patch: Patch) -> None:
    patch.setattr(Integers, "affine_steps", property(lambda self: 2 ** (self.bits - 1)))


def offset_lost(patch: Patch) -> None:
    _decoding(patch, lambda scales: replace(scales, offset=scales.offset * 0.99))


def transform_not_undone(patch: Patch) -> None:
    patch.setattr(mixing.Mixing, "undo", lambda self, y: y * self.inverse_scale + self.offset)


def transform_dropped(patch: Patch) -> None:
    """Rows are scaled and unscaled but never mixed: unbiased, and no better than PSQ."""

    def reflect(x, group, normal, factor, before=None, after=None):  # type: ignore[no-untyped-def]
        x = x if before is None else before(x)
        return x if after is None else after(x)

    patch.setattr(ops, "reflect", reflect)
    _step_by_step(patch)


def reflection_too_long(patch: Patch) -> None:
    right = ops.reflect
    patch.setattr(
        ops, "reflect", lambda x, group, normal, factor, *a, **kw: right(x, group, normal, factor * 1.05, *a, **kw)
    )
    _step_by_step(patch)


def _grouping(change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    def mutant(patch: Patch) -> None:
        right = mixing.householder_blocks
        patch.setattr(mixing, "householder_blocks", lambda size: right(change(size)))
        _step_by_step(patch)

    return mutant


absolute_epsilon = _grouping(lambda size: size + 1e-3)
smallest_is_large = _grouping(lambda size: 1 / size.clamp(min=1e-12))
squared_sizes = _grouping(lambda size: size.square())


def no_guard(patch: Patch) -> None:
    patch.setattr(mixing.Guard, "keeps", lambda self, x, y, cost, group: torch.ones_like(group, dtype=torch.bool))
    _step_by_step(patch)


def column_steps_shared(patch: Patch) -> None:
    """Per-column quantizers quietly use the tensor's range."""
    right = ops.value_range

    def value_range(x: Entries, blocks: Blocks) -> tuple[Tensor, Tensor]:
        lo, hi = right(x, TENSOR if blocks == COLUMN else blocks)
        return (lo.expand(1, x.shape[1]), hi.expand(1, x.shape[1])) if blocks == COLUMN else (lo, hi)

    patch.setattr(ops, "value_range", value_range)
    _step_by_step(patch)


def dither_not_subtracted(patch: Patch) -> None:
    right = ops.decode
    patch.setattr(ops, "decode", lambda codes, scales, dither: right(codes, scales, None))


def dither_shared_by_rows(patch: Patch) -> None:
    """One row dither for all rows: every entry still unbiased, every column's errors equal."""
    right = ops.dither

    def dither(seed: Tensor, x: Entries, dtype: torch.dtype) -> Dither:
        noise = right(seed, x, dtype)
        return replace(noise, row=noise.row[:1].expand(x.shape[0], 1).contiguous())

    patch.setattr(ops, "dither", dither)
    _step_by_step(patch)
