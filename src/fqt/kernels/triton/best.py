"""The best of several codings, taken without asking the host: variances of all, codes of one.

Which coding is taken is known on the device alone. One program adds up the variances and chooses, one kernel makes
the parameters and the dither of the one taken, and one rounds by it: a branch that all programs take alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.codes import DITHER_LEVELS, Blocks, Dither, Entries, Findings, Quantized, Scales
from fqt.kernels.rounding import DITHERED, STOCHASTIC, Coding, dither_streams
from fqt.kernels.triton.device import launch, takes
from fqt.kernels.triton.encode import TILE, programs_of, tile
from fqt.kernels.triton.levels import ROUNDINGS, position, rounded
from fqt.kernels.triton.noise import dither_at
from fqt.kernels.triton.quantize import takes_quantize
from fqt.kernels.triton.ranges import parameters_of
from fqt.kernels.triton.source import parameter, parameter_of, source_of, values

_LEVELS = tl.constexpr(float(DITHER_LEVELS))
_DITHERED = tl.constexpr(ROUNDINGS[DITHERED.name])
_SIZE = 256


@triton.jit
def _choose(
    taken,
    steps,
    sums,  # of each coding, (n,) int64; any where the variance does not depend on the entries
    cost,  # (N,) float64, or None
    shape,
    block,
    count,
    VARIES: tl.constexpr,
    BOUND: tl.constexpr,  # the variance of an entry of the others, in squared steps
    SIZE: tl.constexpr,
):
    """One program, so that equal variances are found equal. Else the order of its sums matters to 2⁻⁵⁰ of them."""
    n = tl.full((), 1, tl.int64) * count[0] * count[1]
    place, least = tl.zeros((), tl.int64), tl.zeros((), tl.float64)
    for each in tl.static_range(len(VARIES)):
        total = tl.zeros((SIZE,), tl.float64)
        for start in range(0, n, SIZE):
            at = start + tl.arange(0, SIZE)
            there = at < n
            down, across = at // count[1], at % count[1]
            step = tl.load(steps + each * n + at, there, 0.0).to(tl.float64)
            if VARIES[each]:
                mine = tl.load(sums[each] + at, there, 0).to(tl.float64) / _LEVELS * (step * step)
            else:
                rows = tl.minimum(shape[0] - down * block[0], block[0])
                columns = tl.minimum(shape[1] - across * block[1], block[1])
                mine = step * step * (rows.to(tl.float64) * columns.to(tl.float64) * BOUND)
            if cost is not None:
                mine = mine * tl.load(cost + down, there, 0.0)
            total += tl.where(there, mine, 0.0)
        found = tl.sum(total, 0)
        if each == 0:
            least = found
        else:
            place, least = tl.where(found < least, each, place), tl.where(found < least, found, least)
    tl.store(taken, place)


@triton.jit
def _settled(
    step,  # (n,) of the coding taken
    offset,
    noise,  # (rows + columns,) its dither, 0 where it has none
    half,  # scalar
    taken,
    steps,  # (codings, n)
    offsets,
    seed,
    n,
    rows,
    columns,
    VARIES: tl.constexpr,  # which of them are not dithered
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    place = tl.load(taken)
    tl.store(step + at, tl.load(steps + place * n + at, at < n, 0.0), at < n)
    tl.store(offset + at, tl.load(offsets + place * n + at, at < n, 0.0), at < n)
    dithered = 0.0
    for each in tl.static_range(len(VARIES)):
        if not VARIES[each]:
            dithered = tl.where(place == each, 1.0, dithered)
    tl.store(noise + at, dither_at(seed, at, rows, ROW, COLUMN) * dithered, at < rows + columns)
    tl.store(half + at, tl.zeros((SIZE,), tl.float32) + 0.5 * dithered, at < 1)


@triton.jit
def _encode_either(
    codes,
    source,
    step,
    offset,
    seed,
    noise,
    half,
    N,
    D,
    R: tl.constexpr,
    C: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,  # of the codings that are not dithered
    HIGH_DITHERED: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    rows, start, columns, inside = tile(N, D, R, C)
    value = values(source, rows, columns, inside)
    step = parameter(step, rows, columns, rows < N, columns < D)
    offset = parameter(offset, rows, columns, rows < N, columns < D)
    if tl.load(half) > 0.0:
        t = position(value, step, offset, LOW, HIGH_DITHERED)
        code = rounded(t, noise, rows, start, N, D, C, _DITHERED, ALIGNED, -1, ())
    else:
        t = position(value, step, offset, LOW, HIGH)
        code = rounded(t, seed, rows, start, N, D, C, ROUNDING, ALIGNED, -1, ())
    tl.store(codes + rows * D + columns, code.to(codes.dtype.element_ty), mask=inside)


def takes_quantize_best(
    x: Entries,
    blocks: Blocks,
    codings: Sequence[Coding],
    seed: Tensor | None,
    cost: Tensor | None = None,
    known: Findings | None = None,
) -> bool:
    """Codings of uniform levels with steps in float32, stochastic and dithered ones."""
    grids = {(c.rounding, c.levels.low, c.levels.high) for c in codings}
    alike = {c.rounding for c in codings} == {STOCHASTIC, DITHERED} and len(grids) == 2
    alike = alike and len({(c.levels.low, c.levels.dtype) for c in codings}) == 1
    plain = all(c.levels.uniform and c.store == "float32" for c in codings)
    weighed = takes(cost, dtypes=(torch.float64,)) and (cost is None or blocks.count(x.shape)[0] == cost.numel())
    return alike and plain and weighed and all(takes_quantize(x, blocks, c, seed, known) for c in codings)


def quantize_best(
    x: Entries,
    blocks: Blocks,
    codings: Sequence[Coding],
    seed: Tensor | None,
    cost: Tensor | None = None,
    known: Findings | None = None,
) -> Quantized:
    """As the reference, bit for bit, but where two codings' variances differ by less than their sums' rounding."""
    assert seed is not None
    lo, hi = (v.contiguous() for v in ops.value_range(x, blocks))
    device, (rows, columns), n = x.matrix.device, x.shape, lo.numel()
    grids = [(coding.mode, coding.levels.high) for coding in codings]
    steps, offsets = parameters_of(lo, hi, grids)

    varies = tuple(coding.rounding.varies for coding in codings)
    sums: list[Tensor] = []
    for coding, varying, *scales in zip(codings, varies, steps, offsets, strict=True):
        given = (x, Scales(scales[0], scales[1], blocks), coding.levels)
        sums.append(ops.variance_sums(*given) if varying else lo)
    taken = torch.empty((), dtype=torch.int64, device=device)
    cost = None if cost is None else cost.contiguous()
    sizes = (x.shape, (blocks.rows or rows, blocks.columns or columns), tuple(lo.shape))
    how: dict[str, Any] = {"VARIES": varies, "BOUND": DITHERED.unit_bound, "SIZE": 1024}
    launch(_choose, 1, taken, steps, tuple(sums), cost, *sizes, on=lo, warps=8, **how)

    step, offset = torch.empty((2, *lo.shape), dtype=torch.float32, device=device)
    noise, half = (torch.empty(size, dtype=torch.float32, device=device) for size in ((rows + columns,), ()))
    along_rows, along_columns = dither_streams(x.transposed)
    how = {"VARIES": varies, "ROW": along_rows, "COLUMN": along_columns, "SIZE": _SIZE}
    found = (step, offset, noise, half, taken, steps, offsets, seed)
    programs = triton.cdiv(max(n, noise.numel()), _SIZE)
    launch(_settled, programs, *found, n, rows, columns, on=lo, **how)

    other = next(coding for coding in codings if coding.rounding != DITHERED)
    high = next(coding.levels.high for coding in codings if coding.rounding == DITHERED)
    codes = torch.empty(x.shape, dtype=other.levels.dtype, device=device)
    arguments = (source_of(x), *(parameter_of(p, blocks, x.shape) for p in (step, offset)), seed, noise, half)
    levels = {"LOW": other.levels.low, "HIGH": other.levels.high, "HIGH_DITHERED": high}
    order = {"ROUNDING": ROUNDINGS[other.rounding.name], "ALIGNED": columns % 8 == 0}
    launch(_encode_either, programs_of(x.shape), codes, *arguments, *x.shape, on=codes, **TILE, **levels, **order)
    dither = Dither(noise[:rows, None], noise[None, rows:], half)
    return Quantized(codes, Scales(step, offset, blocks), dither, known)
