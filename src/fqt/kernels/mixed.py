"""Transform, guard, ranges and codes of a matrix in one call of the native kernels, where they can.

What they compute is defined step by step in `fqt.quant.transform`: parameters, codes and the guard's choice are
equal to that bit for bit. In one call mixed rows stay in the cache, and some sixty small operations are saved.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels import native
from fqt.kernels.memory import empty
from fqt.kernels.native import ROUNDINGS, block_sizes, source_of

_P, _I = ctypes.c_void_p, ctypes.c_int32


@dataclass(frozen=True)
class Rounding:
    """How mixed rows are rounded, on affine scales.

    Attributes:
        guard: whether plain rows stay where the step bound says so.
        levels: steps of a range for that bound.
        high: the greatest position, and the steps of a range for the codes.
        rounding: "nearest", "stochastic" or "dithered".
        seed: int64 scalar; None only where nothing is drawn.
    """

    guard: bool
    levels: int
    high: int
    rounding: str
    seed: Tensor | None


@dataclass(frozen=True)
class MixedCodes:
    """Codes of mixed rows, and what undoes the mixing.

    Attributes:
        codes: (N, D) uint8.
        step, offset: (N, 1), of the codes.
        dither: dithered rounding's noise in steps, (N, 1) and (1, D); None without.
        inverse_scale, row_offset: (N, 1), 1/s and what is added back; 1 and 0 where rows stay plain.
        cost: (N,) float64, of a step on the transformed row; 1 where it stays plain.
        keep: (N, 1) bool, whether the row is mixed.
        range: the least and the greatest entry before mixing.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor
    dither: tuple[Tensor, Tensor] | None
    inverse_scale: Tensor
    row_offset: Tensor
    cost: Tensor
    keep: Tensor
    range: tuple[float, float]


class _Mixed(ctypes.Structure):
    """`Mixed` of csrc/mixed.h."""

    _fields_ = [
        ("seed", _P),
        ("guard", _I),
        ("levels", _I),
        ("high", _I),
        ("rounding", _I),
        ("inverse", _P),
        ("middle", _P),
        ("cost", _P),
        ("step", _P),
        ("offset", _P),
        ("row_dither", _P),
        ("column_dither", _P),
        ("keep", _P),
        ("codes", _P),
        ("finite", _I),
        ("lo", ctypes.c_float),
        ("hi", ctypes.c_float),
    ]


def hadamard_codes(
    x: Tensor, factor: Tensor | None, deal: Tensor, blocks: tuple[int, ...], how: Rounding
) -> tuple[MixedCodes, Tensor] | None:
    """Codes of rows scaled and mixed by Hadamard blocks, as `ScaledHadamard` has it.

    Args:
        x: (N, D), any real floating dtype.
        factor: as in `reference.values`.
        deal: (N,) int64 on the CPU, which rank by size each position takes.
        blocks: block sizes, powers of two that sum to N.
        how: the rest.

    Returns:
        The codes and (N,) int64, the rows block by block; None where this must be done step by step: other than
        plain CPU tensors of float32 or bfloat16, no entries, or some that are not finite.
    """
    if not _takes(x, factor, how):
        return None
    work = _Work(x, factor, how, more=0)
    order = torch.empty(x.shape[0], dtype=torch.int64, device="cpu")
    sizes = block_sizes(blocks)
    lists = (native.expect("deal", deal, x.shape[:1], torch.int64), ctypes.addressof(sizes), len(blocks))
    native.call("fqt_hadamard_codes", *work.arguments, *lists, work.how, order.data_ptr())
    return (work.result(), order) if work.finite else None


def householder_codes(
    x: Tensor, factor: Tensor | None, rigorous: bool, how: Rounding
) -> tuple[MixedCodes, Tensor, Tensor, Tensor] | None:
    """Codes of rows mixed by block reflections, as `BlockHouseholder` has it.

    Returns:
        The codes, and the reflections: (N,) int64 the rows' groups, (N, 1) the normal, 0 where rows stay plain, and
        (N, 1) the groups' factor. None as for `hadamard_codes`.
    """
    if not _takes(x, factor, how):
        return None
    work = _Work(x, factor, how, more=2)
    group = torch.empty(x.shape[0], dtype=torch.int64, device="cpu")
    normal, length = work.more
    pointers = (group.data_ptr(), normal.data_ptr(), length.data_ptr())
    native.call("fqt_householder_codes", *work.arguments, int(rigorous), work.how, *pointers)
    return (work.result(), group, normal, length) if work.finite else None


def _takes(x: Tensor, factor: Tensor | None, how: Rounding) -> bool:
    return x.numel() > 0 and native.takes_source(x, factor) and native.takes(integers=how.seed)


class _Work:
    """The arguments of a call, and its results."""

    def __init__(self, x: Tensor, factor: Tensor | None, how: Rounding, more: int) -> None:
        n, d = x.shape
        if not 0 < how.high + (how.rounding == "dithered") <= 255 or how.levels < 1:
            raise ValueError(
                f"codes 0 … {how.high} of {how.rounding} rounding, {how.levels} levels: no byte holds them"
            )
        self._source, self._alive = source_of(x.detach(), factor)
        self._seed = how.seed
        dithered = how.rounding == "dithered"
        self._parts = torch.empty((5 + more, n, 1), dtype=torch.float32, device="cpu").unbind(0)
        inverse, offset_back, step, offset, row_dither = self._parts[:5]
        self.more = self._parts[5:]
        self._column = torch.empty((1, d if dithered else 0), dtype=torch.float32, device="cpu")
        self._cost = torch.empty(n, dtype=torch.float64, device="cpu")
        self._keep = torch.empty((n, 1), dtype=torch.bool, device="cpu")
        self._codes = empty(x.shape, torch.uint8)
        self._how = _Mixed(
            native.key_of(how.seed, how.rounding),
            int(how.guard),
            how.levels,
            how.high,
            ROUNDINGS[how.rounding],
            *(t.data_ptr() for t in (inverse, offset_back, self._cost, step, offset, row_dither, self._column)),
            self._keep.data_ptr(),
            self._codes.data_ptr(),
        )
        self._dither = (row_dither, self._column) if dithered else None
        self.arguments = (ctypes.addressof(self._source), n, d)
        self.how = ctypes.addressof(self._how)

    @property
    def finite(self) -> bool:
        """Whether there are results."""
        return bool(self._how.finite)

    def result(self) -> MixedCodes:
        """The results, once the call is over."""
        inverse, offset_back, step, offset, _ = self._parts[:5]
        rest = (inverse, offset_back, self._cost, self._keep, (self._how.lo, self._how.hi))
        return MixedCodes(self._codes, step, offset, self._dither, *rest)
