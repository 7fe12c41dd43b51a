"""The matrices and the quantizers that the tests of this folder share. Adding coverage is adding a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fqt import Quantizer, quantizer
from fqt.quant import BlockHouseholder, Identity, Integers, Scale, ScaledHadamard
from fqt.quant.best import rounded

BITS = (2, 3, 4, 5, 6, 7, 8)
METHODS = ("ptq", "psq", "bhq", "shq")
PAPER = ("ptq", "psq", "bhq")
SUFFIXES = ("", "d", "x")  # stochastic, dithered, the better of both
NAMES_4BIT = tuple(f"{m}4{s}" for m in METHODS for s in (*SUFFIXES, "n") if f"{m}4{s}" != "shq4n")
SHAPES = ((0, 0), (0, 5), (5, 0), (1, 0), (1, 1), (1, 7), (2, 1), (2, 9), (3, 4), (5, 3), (7, 1), (13, 6), (33, 5))


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=gen(seed), dtype=dtype)


def _rows(scale: Callable[[int, torch.Generator], Tensor]) -> Callable[[int, int, int], Tensor]:
    return lambda n, d, seed: gaussian(n, d, seed) * scale(n, gen(seed + 1000))[:, None]


def _lognormal(n: int, g: torch.Generator) -> Tensor:
    return torch.exp(2.0 * torch.randn(n, generator=g))


def _one_large(n: int, g: torch.Generator) -> Tensor:
    return torch.full((n,), 1e-2).index_fill_(0, torch.tensor([n // 3]), 1.0)


def _half_zero(n: int, g: torch.Generator) -> Tensor:
    return (torch.arange(n) % 2).float()


def _constant_rows(n: int, d: int, seed: int) -> Tensor:
    x = gaussian(n, d, seed)
    x[::3] = x[::3, :1] * 7.3
    return x


def _one_hot(n: int, d: int, seed: int) -> Tensor:
    return torch.eye(n, d) - 0.001


def _two_valued(n: int, d: int, seed: int) -> Tensor:
    return (torch.rand(n, d, generator=gen(seed)) < 0.3).float() * 2 - 0.7


def _sparse(n: int, d: int, seed: int) -> Tensor:
    return gaussian(n, d, seed) * (torch.rand(n, d, generator=gen(seed + 1)) < 0.1)


def _coherent(n: int, d: int, seed: int) -> Tensor:
    return gaussian(1, d, seed) + 0.01 * gaussian(n, d, seed + 1)


FAMILIES: dict[str, Callable[[int, int, int], Tensor]] = {
    "gaussian": gaussian,
    "heavy_rows": _rows(_lognormal),
    "one_large": _rows(_one_large),
    "zero_rows": _rows(_half_zero),
    "constant_rows": _constant_rows,
    "one_sided": lambda n, d, seed: 3 + gaussian(n, d, seed).abs() ** 3,
    "one_hot": _one_hot,
    "two_valued": _two_valued,
    "sparse": _sparse,
    "coherent": _coherent,
}


def gradient_like(n: int, d: int, seed: int) -> Tensor:
    """Like a network's activation gradient: few samples carry it, features share directions, half is zero."""
    g = gen(seed)
    rows = torch.exp(1.3 * torch.randn(n, 1, generator=g))
    rank = 6
    shared = torch.randn(n, rank, generator=g) @ torch.randn(rank, d, generator=g) / rank**0.5
    x = rows * (shared + 0.5 * torch.randn(n, d, generator=g))
    x = x * (torch.rand(n, d, generator=g) < 0.5)
    return (x * 1e-5 + rows * 1e-7).float()


def build(
    name: str, *, guard: bool | str = True, small_rows: str = "released", mode: str | None = None, **kw: object
) -> Quantizer:
    """A catalog quantizer with the options that names do not reach."""
    q = quantizer(name)
    transform = q.transform
    if isinstance(transform, BlockHouseholder):
        transform = BlockHouseholder(guard=guard, small_rows=small_rows)
    elif isinstance(transform, ScaledHadamard):
        transform = ScaledHadamard(guard=guard)
    scale = q.scale if mode is None else Scale(q.scale.group, mode)
    return rounded(transform, scale, q.grid, q.rounding_name)


def plain(
    mode: str, group: str | tuple[int, int] = "row", bits: int = 4, rounding: str = "stochastic"
) -> Quantizer:
    """A quantizer without transform."""
    return rounded(Identity(), Scale(group, mode), Integers(bits), rounding)


PLAIN = tuple(
    plain(mode, group, 4, rounding)
    for group in ("tensor", "row", "column")
    for mode in ("affine", "zero", "symmetric")
    for rounding in ("stochastic", "nearest", "dithered", "best")
    if mode != "symmetric" or rounding in ("stochastic", "nearest")
)


def plain_id(q: Quantizer) -> str:
    return f"{q.scale.group}-{q.scale.mode}-{q.rounding_name}"
