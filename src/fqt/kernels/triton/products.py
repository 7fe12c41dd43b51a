"""Matrix products of codes on integer tensor cores, with the epilogue in the same kernel.

Three ways, of which the fastest is taken by measurement (`fqt.kernels.triton.tune`): one program per tile of the
result, which takes any strides; one program per multiprocessor, which goes from tile to tile and loads through
tensor descriptors (the copy engine of sm_90 and later), for operands whose terms are neighbours in memory; and
`torch._int_mm` with the epilogue after it. All give the reference's bits.

Tensor cores want the terms of a sum to be neighbours in memory in both operands; on sm_90 another layout does not
fail but falls back to slower instructions. `_turned` copies an operand so, signed, in one pass that also gives the
sums which the shift by 128 needs.

A sum longer than int32 holds whatever the codes is cut into parts along the contraction, which meet in int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fqt.kernels.products import CODES, most_terms
from fqt.kernels.triton import device, tune
from fqt.kernels.triton.epilogue import LONGEST_PART, ROUNDED, SHIFT, complete, finish, wants
from fqt.kernels.triton.sums import column_sums, row_sums
from fqt.kernels.triton.tune import Schedule

_ALIGNED = 16  # bytes: what descriptors ask of an address and of every stride but the last
NEIGHBOURS = 8  # row tiles that share the columns they read while they are in the cache
_MOST_LINES = (1 << 31) - (1 << 10)  # so that the numbers of a tile's rows fit int32


@triton.jit
def signed(codes, SHIFTED: tl.constexpr):
    """int8 from codes; uint8 codes less 128."""
    if SHIFTED:
        return (codes ^ 128).to(tl.int8, bitcast=True)
    else:
        return codes


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Which tile is a program's: neighbours in time share rows and columns in the cache."""
    width = GROUP * column_tiles
    first = program // width * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + program % width % size, program % width // size


@triton.jit
def write(
    sums,
    out,
    row,
    rows,
    first,  # of the tile's columns
    columns,
    row_shift,
    column_shift,
    row_scale,
    column_scale,
    left,
    right,
    bias,
    zero,
    ones,
    rank,
    places,
    width,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    PLACED: tl.constexpr,
    FINISH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Completes a tile and stores it; a wide one in halves, since its sums alone fill half of the registers."""
    if BN > 128:
        low, high = sums.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        write(
            low, out, row, rows, first, columns, row_shift, column_shift,
            row_scale, column_scale, left, right, bias, zero, ones, rank, places, width,
            ROW_STEP, COLUMN_STEP, ZERO_STEP, PLACED, FINISH, BM, BN // 2,
        )  # fmt: skip
        write(
            high, out, row, rows, first + BN // 2, columns, row_shift, column_shift,
            row_scale, column_scale, left, right, bias, zero, ones, rank, places, width,
            ROW_STEP, COLUMN_STEP, ZERO_STEP, PLACED, FINISH, BM, BN // 2,
        )  # fmt: skip
    else:
        column = first + tl.arange(0, BN)
        row_in, column_in = row < rows, column < columns
        value = complete(
            sums, row, row_in, column, column_in, row_shift, column_shift,
            row_scale, column_scale, left, right, bias, zero, ones, rank, places, width,
            ROW_STEP, COLUMN_STEP, ZERO_STEP, PLACED, FINISH,
        )  # fmt: skip
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), row_in[:, None] & column_in[None, :])


@triton.jit
def _tiles(
    a,
    b,
    out,  # the result; with PARTS the sums, to which is added
    rows,
    columns,
    terms,
    part,  # terms of a part
    a_row,
    a_term,
    b_term,
    b_column,
    row_shift,
    column_shift,
    row_scale,
    column_scale,
    left,
    right,
    bias,
    zero,
    ones,
    rank,
    places,
    width,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    PLACED: tl.constexpr,
    FINISH: tl.constexpr,
    A_SHIFTED: tl.constexpr,
    B_SHIFTED: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,  # whether steps divide the parts and the terms
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP)
    row = row_tile * BM + tl.arange(0, BM)
    column = column_tile * BN + tl.arange(0, BN)
    row_in, column_in = row < rows, column < columns
    # Beyond the matrices some row and column are read again: loads need no mask then.
    safe_row, safe_column = tl.where(row_in, row, 0).to(tl.int64), tl.where(column_in, column, 0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * part
    count = tl.minimum(terms - start, part).to(tl.int32)
    term = tl.arange(0, BK)
    one = tl.full((), 1, tl.int64)  # strides can exceed int32
    from_a = a + (safe_row * a_row)[:, None] + ((start + term) * a_term)[None, :]
    from_b = b + ((start + term) * b_term)[:, None] + (safe_column * b_column)[None, :]
    sums = tl.zeros((BM, BN), tl.int32)
    for done in range(0, count, BK):
        if EVEN:
            x, y = tl.load(from_a), tl.load(from_b)
        else:
            term_in = term < count - done
            x = tl.load(from_a, term_in[None, :], 128 if A_SHIFTED else 0)
            y = tl.load(from_b, term_in[:, None], 128 if B_SHIFTED else 0)
        sums = tl.dot(signed(x, A_SHIFTED), signed(y, B_SHIFTED), sums, out_dtype=tl.int32)
        from_a += one * BK * a_term
        from_b += one * BK * b_term
    if PARTS:
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = row_in[:, None] & column_in[None, :]
        tl.atomic_add(out + at, sums.to(out.dtype.element_ty), inside, sem="relaxed")
    else:
        write(
            sums, out, row, rows, column_tile * BN, columns, row_shift, column_shift,
            row_scale, column_scale, left, right, bias, zero, ones, rank, places, width,
            ROW_STEP, COLUMN_STEP, ZERO_STEP, PLACED, FINISH, BM, BN,
        )  # fmt: skip


@triton.jit
def _persistent(
    a,  # descriptor of (BM, BK) in (rows, terms)
    b,  # of (BN, BK) in (columns, terms)
    out,
    rows,
    columns,
    terms,
    row_shift,
    column_shift,
    row_scale,
    column_scale,
    left,
    right,
    bias,
    zero,
    ones,
    rank,
    places,
    width,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    PLACED: tl.constexpr,
    FINISH: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_of(tile, row_tiles, column_tiles, GROUP)
        sums = tl.zeros((BM, BN), tl.int32)
        for step in range(tl.cdiv(terms, BK)):
            x = a.load([row_tile * BM, step * BK])
            y = b.load([column_tile * BN, step * BK])
            sums = tl.dot(x, y.T, sums, out_dtype=tl.int32)
        write(
            sums, out, row_tile * BM + tl.arange(0, BM), rows, column_tile * BN, columns, row_shift, column_shift,
            row_scale, column_scale, left, right, bias, zero, ones, rank, places, width,
            ROW_STEP, COLUMN_STEP, ZERO_STEP, PLACED, FINISH, BM, BN,
        )  # fmt: skip


@triton.jit
def _turn(
    codes,
    out,
    totals,  # (lines,) or None
    weighted,  # (lines,) or None: the sums of codes, as they are, times a term's fraction of 2²⁴
    fractions,  # (terms,)
    lines,
    terms,
    line_stride,
    term_stride,
    padded,
    SHIFTED: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
):
    tiles = tl.cdiv(padded, BK)
    line = tl.program_id(0) // tiles * BL + tl.arange(0, BL)
    term = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    line_in = line < lines
    wide, far = line.to(tl.int64), term.to(tl.int64)
    inside = line_in[:, None] & (term < terms)[None, :]
    code = tl.load(
        codes + (wide * line_stride)[:, None] + (far * term_stride)[None, :], inside, 128 if SHIFTED else 0
    )
    x = signed(code, SHIFTED)
    tl.store(out + (wide * padded)[:, None] + far[None, :], x, line_in[:, None] & (term < padded)[None, :])
    if totals is not None:
        tl.atomic_add(totals + line, tl.sum(x.to(tl.int32), 1).to(tl.int64), line_in, sem="relaxed")
    if weighted is not None:
        heavy = (tl.load(fractions + term, term < terms, 0.0) * 16777216.0).to(tl.int32)
        # In halves of 12 bits, whose products' sums over a tile fit int32: products in int64 are several of these.
        high = tl.sum(code.to(tl.int32) * (heavy >> 12)[None, :], 1).to(tl.int64)
        low = tl.sum(code.to(tl.int32) * (heavy & 4095)[None, :], 1).to(tl.int64)
        tl.atomic_add(weighted + line, high * 4096 + low, line_in, sem="relaxed")


@dataclass(frozen=True)
class Side:
    """One side of a product: a line of codes, whose terms are summed over, per row or column of the result.

    Attributes:
        codes: (lines, terms) uint8 or int8, any strides.
        totals: (lines,) int64, Σ over the terms of the signed codes; None if not known.
        weighted: (lines,) int64, Σ over the terms of the codes times `turned`'s fractions; None if not wanted.
    """

    codes: Tensor
    totals: Tensor | None = None
    weighted: Tensor | None = None

    @property
    def shifted(self) -> bool:
        """Whether kernels read the codes less 128."""
        return self.codes.dtype == torch.uint8

    def described(self) -> bool:
        """Whether a tensor descriptor can be made of the codes."""
        x = self.codes
        aligned = x.data_ptr() % _ALIGNED == 0 and x.stride(0) % _ALIGNED == 0
        return x.stride(1) == 1 and x.stride(0) >= x.shape[1] and aligned

    def ready(self) -> Side:
        """As the tensor cores want it: itself, or a signed copy with neighbouring terms."""
        return self.turned(False) if self.shifted or not self.described() else self

    def turned(self, totals: bool, fractions: Tensor | None = None) -> Side:
        """The signed codes with neighbouring terms, and in the same pass sums over the terms.

        Args:
            totals: whether the signed codes' sums are wanted.
            fractions: (terms,) float32, multiples of 2⁻²⁴ below 1: the sums of the codes, as they are, times these,
                are wanted too, in 2⁻²⁴.
        """
        lines, terms = self.codes.shape
        padded = -(-terms // _ALIGNED) * _ALIGNED
        out = torch.empty(lines, padded, dtype=torch.int8, device=self.codes.device)
        asked = (totals, fractions is not None)
        sums = torch.zeros(sum(asked), lines, dtype=torch.int64, device=out.device) if any(asked) else None
        found, weighted = (
            sums[end] if ask and sums is not None else None for end, ask in zip((0, -1), asked, strict=True)
        )
        blocks = {"BL": 64, "BK": 128, "num_warps": 8} if out.is_cuda else {"BL": 64, "BK": 512}
        grid = (-(-lines // blocks["BL"]) * -(-padded // blocks["BK"]),)
        _turn[grid](
            self.codes, out, found, weighted, fractions, lines, terms, *self.codes.stride(), padded, self.shifted,
            **blocks,
        )  # fmt: skip
        return Side(out[:, :terms], found, weighted)

    def summed(self) -> Tensor:
        """(lines,) int64: Σ over the terms of the signed codes."""
        if self.totals is not None:
            return self.totals
        lines = self.codes
        total = row_sums(lines) if lines.stride(1) == 1 else column_sums(lines.T)[0]
        return total - SHIFT * self.codes.shape[1] if self.shifted else total


def takes_matmul_of(a: Tensor, b: Tensor, dtype: torch.dtype, epilogue: tuple) -> bool:
    """Whether the kernels can run on these."""
    filled = a.numel() > 0 and b.numel() > 0 and max(a.shape[0], b.shape[1]) < _MOST_LINES
    return filled and device.takes(a, b, dtypes=CODES)


def matmul_of(
    a: Tensor, b: Tensor, dtype: torch.dtype, epilogue: tuple, schedule: Schedule | None = None, places: int = 1
) -> Tensor:
    """`fqt.kernels.products.matmul_of`.

    Args:
        a: (M, K), b: (K, N), uint8 or int8, any strides.
        dtype: of the result.
        epilogue: as `Epilogue.arguments` has it; its rows are the result's divided by `places`.
        schedule: how; None for the fastest.
        places: of how many rows of the result a number per row speaks (a convolution's pixels).
    """
    rows, columns, terms = a.shape[0], b.shape[1], a.shape[1]
    finishing = wants(epilogue, columns, places)
    left, right = Side(a), Side(b.T)
    with torch.cuda.device_of(a):
        long = terms > most_terms(a.dtype, b.dtype)
        if schedule is None and (long or tune.few_tiles(a, rows, columns, terms)):
            schedule = tune.in_parts(tune.capability(a))
        if schedule is None:
            choices = [p for p in tune.schedules(tune.capability(a), rows, columns) if _fits(p, rows, columns)]
            strides = (a.stride(1) == 1, b.stride(0) == 1)
            key = (
                "matmul",
                tune.bucket(rows),
                columns,
                terms,
                a.dtype,
                b.dtype,
                dtype,
                strides,
                finishing["FINISH"],
            )
            run = lambda each: _multiplied(left, right, dtype, finishing, each)
            schedule = tune.fastest(key, a, choices, run, rows * columns * terms)
        return _multiplied(left, right, dtype, finishing, schedule)


def _fits(schedule: Schedule, rows: int, columns: int) -> bool:
    """Whether `torch._int_mm` takes these sizes; the kernels take all."""
    return schedule.kind != "library" or (rows > 16 and columns % 8 == 0)


def _multiplied(
    left: Side, right: Side, dtype: torch.dtype, finishing: dict[str, Any], schedule: Schedule
) -> Tensor:
    if schedule.kind == "parts":
        return _in_parts(left, right, dtype, finishing, schedule)
    shifted = left.shifted, right.shifted
    left, right = _laid(left, right, schedule)
    return _launched(left, right, _shifts(left, right, shifted), dtype, finishing, schedule)


def multiplied_signed(
    left: Side, right: Side, shift: tuple[Tensor | None, Tensor | None], dtype: torch.dtype, epilogue: tuple
) -> Tensor:
    """`matmul_of` of sides that are as the tensor cores want them (`Side.turned`), by the fastest way.

    Args:
        left, right: int8, terms neighbours; no more terms than int32 holds the sums of.
        shift: what is added to the sums first, by rows and by columns, int64; None is nothing.
        dtype: of the result.
        epilogue: as `Epilogue.arguments` has it.
    """
    a = left.codes
    rows, columns, terms = a.shape[0], right.codes.shape[0], a.shape[1]
    finishing = wants(epilogue, columns)
    with torch.cuda.device_of(a):
        choices = [p for p in tune.schedules(tune.capability(a), rows, columns) if _fits(p, rows, columns)]
        choices = [p for p in choices if p.turned]
        key = ("signed", tune.bucket(rows), columns, terms, dtype, finishing["FINISH"])
        run = lambda each: _launched(left, right, shift, dtype, finishing, each)
        schedule = tune.fastest(key, a, choices, run, rows * columns * terms)
        return _launched(left, right, shift, dtype, finishing, schedule)


def _launched(
    left: Side,
    right: Side,
    shift: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
    finishing: dict[str, Any],
    schedule: Schedule,
) -> Tensor:
    """Of sides laid as the schedule wants them."""
    if schedule.kind == "library":
        sums = torch._int_mm(_padded(left), _padded(right).T)
        return finish(sums, dtype, *shift, finishing)
    assert schedule.tiles is not None
    out = torch.empty(len(left.codes), len(right.codes), dtype=dtype, device=left.codes.device)
    blocks, launch = schedule.tiles.blocks(), schedule.tiles.launch()
    tiles = -(-out.shape[0] // blocks["BM"]) * -(-out.shape[1] // blocks["BN"])
    sizes, terms = out.shape, left.codes.shape[1]
    more = {**finishing, "GROUP": NEIGHBOURS, **blocks, **launch, **ROUNDED}
    if schedule.kind == "persistent":
        described = [
            TensorDescriptor(side.codes, list(side.codes.shape), list(side.codes.stride()), [lines, blocks["BK"]])
            for side, lines in ((left, blocks["BM"]), (right, blocks["BN"]))
        ]
        grid = (min(tiles, tune.processors(out)),)
        _persistent[grid](*described, out, *sizes, terms, *shift, **more)
        return out
    strides = (*left.codes.stride(), *reversed(right.codes.stride()))
    even = terms % blocks["BK"] == 0
    _tiles[(tiles, 1)](
        left.codes,
        right.codes,
        out,
        *sizes,
        terms,
        terms,
        *strides,
        *shift,
        A_SHIFTED=left.shifted,
        B_SHIFTED=right.shifted,
        PARTS=False,
        EVEN=even,
        **more,
    )
    return out


def _laid(left: Side, right: Side, schedule: Schedule) -> tuple[Side, Side]:
    """The sides as the schedule wants them; where one is copied anyway, its sums come with the copy if wanted."""
    if not schedule.turned:
        return left, right
    if schedule.kind in ("library", "persistent"):
        # A copy costs a tenth of what it costs to take 128 off on the way from memory to the tensor cores.
        turn = [side.shifted or not side.described() for side in (left, right)]
    else:
        turn = [side.codes.stride(1) != 1 for side in (left, right)]
    # A side's sums correct the other's shift.
    first = left.turned(totals=right.shifted) if turn[0] else left
    second = right.turned(totals=left.shifted) if turn[1] else right
    return first, second


def _shifts(left: Side, right: Side, shifted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """What the shift by 128 takes off the sums, by rows and by columns; see `fqt.kernels.triton.epilogue`.

    shifted: whether the codes of each side were unsigned at first.
    """
    by_row = SHIFT * left.summed() if shifted[1] else None
    by_column = SHIFT * right.summed() if shifted[0] else None
    if by_column is not None and shifted[1]:
        by_column += SHIFT * SHIFT * left.codes.shape[1]
    return by_row, by_column


def _padded(side: Side) -> Tensor:
    """With terms in number a multiple of 16, as `turned` leaves room for; zeros beyond their own."""
    lines, terms = side.codes.shape
    if terms % _ALIGNED == 0:
        return side.codes
    wide = side.codes.as_strided((lines, -(-terms // _ALIGNED) * _ALIGNED), side.codes.stride())
    return wide if side.codes.stride(0) == wide.shape[1] else side.turned(False).codes


def _in_parts(left: Side, right: Side, dtype: torch.dtype, finishing: dict[str, Any], schedule: Schedule) -> Tensor:
    """Parts of the contraction summed by themselves, added up in integers."""
    shape = len(left.codes), len(right.codes)
    terms, device = left.codes.shape[1], left.codes.device
    assert schedule.tiles is not None
    blocks = schedule.tiles.blocks()
    count = -(-shape[0] // blocks["BM"]) * -(-shape[1] // blocks["BN"])
    part = part_of(terms, blocks["BK"], count, tune.processors(left.codes))
    fits = terms <= most_terms(left.codes.dtype, right.codes.dtype)
    sums = torch.zeros(shape, dtype=torch.int32 if fits else torch.int64, device=device)
    strides = (*left.codes.stride(), *reversed(right.codes.stride()))
    shift = _shifts(left, right, (left.shifted, right.shifted))
    nothing = wants((None,) * 8, shape[1])
    _tiles[(count, -(-terms // part))](
        left.codes, right.codes, sums, *shape, terms, part, *strides, None, None, **nothing,
        A_SHIFTED=left.shifted, B_SHIFTED=right.shifted, PARTS=True, EVEN=terms % blocks["BK"] == 0,
        GROUP=NEIGHBOURS, **blocks, **schedule.tiles.launch(), **ROUNDED,
    )  # fmt: skip
    return finish(sums, dtype, *shift, finishing)


def part_of(terms: int, step: int, tiles: int, processors: int) -> int:
    """Terms of a part: few enough for int32, a multiple of a step, and so many parts that all processors work."""
    wanted = max(1, 2 * processors // max(tiles, 1))
    part = -(-terms // wanted)
    part = max(part, 8 * step)
    return min(-(-part // step) * step, LONGEST_PART)
