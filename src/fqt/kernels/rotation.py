"""Rotation of features: a randomized Hadamard matrix along the columns, x·R, R = diag(signs)·H/√m in blocks.

R is orthonormal, so that it changes no variance: what a step on a rotated entry costs is its square. It spreads a
large feature over its block, whose range falls; along the contraction of a product, a·b = (a·R)·(Rᵀ·b), both sides
take it and it cancels. Signs are ±1 from a Philox stream of the seed; an estimate of x·R that is unbiased gives one
of x for every sign pattern, to the rounding of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.philox import STREAM_ROTATION
from fqt.kernels.reference import Scaling, Unscaling, equal_runs


@lru_cache(maxsize=64)
def powers_of_two(length: int, largest: int) -> tuple[int, ...]:
    """Powers of two, none above `largest`, that sum to `length`: the largest first."""
    rest = length % largest
    return (largest,) * (length // largest) + tuple(
        1 << b for b in reversed(range(rest.bit_length())) if rest >> b & 1
    )


@dataclass(frozen=True)
class Rotation:
    """One draw of R, for runs of P neighbouring columns (or rows).

    Attributes:
        signs: (P,) float32 or float64, ±1.
        blocks: sizes of the Hadamard blocks, powers of two that sum to P.
    """

    signs: Tensor
    blocks: tuple[int, ...]

    @staticmethod
    def draw(seed: Tensor, length: int, largest: int, dtype: torch.dtype) -> Rotation:
        """The rotation of runs of `length` that a seed stands for, in blocks of at most `largest`."""
        top = ops.random_u24(seed, STREAM_ROTATION, length) >> 23
        return Rotation(1.0 - 2.0 * top.to(dtype), powers_of_two(length, largest))

    @property
    def _roots(self) -> Tensor:
        """(P,): 1/√m of each entry's block."""
        like = self.signs
        parts = [like.new_full((m * n,), m**-0.5) for m, n in equal_runs(self.blocks)]
        return torch.cat(parts) if parts else like

    def columns(self, x: Tensor) -> Tensor:
        """x·R of a matrix (N, D), D a multiple of P."""
        return ops.rotate(x, self.signs * self._roots, None, self.blocks)

    def undo_columns(self, y: Tensor) -> Tensor:
        """y·Rᵀ of a matrix (N, D)."""
        return ops.rotate(y, self._roots, self.signs, self.blocks)

    def rows(self, x: Tensor) -> Tensor:
        """Rᵀ·x of a matrix (P, D)."""
        scale = (self.signs * self._roots)[:, None]
        order = torch.arange(x.shape[0], device=x.device)
        return ops.hadamard(x, order, self.blocks, Scaling(torch.ones_like(scale), torch.zeros_like(scale), scale))

    def undo_rows(self, y: Tensor) -> Tensor:
        """R·y of a matrix (P, D)."""
        scale = (self.signs * self._roots)[:, None]
        order = torch.arange(y.shape[0], device=y.device)
        after = Unscaling(scale, torch.zeros_like(scale), dtype=y.dtype)
        return ops.hadamard(y, order, self.blocks, after=after)

    def block_means(self, weight: Tensor) -> Tensor:
        """What an error of a rotated entry weighs where entries weigh `weight` (N, D): its block's mean."""
        if not weight.numel():
            return weight
        runs = weight.reshape(-1, self.signs.numel())
        parts = [p.mean(1, keepdim=True).expand(p.shape) for p in runs.split(list(self.blocks), 1)]
        return torch.cat(parts, 1).reshape(weight.shape)
