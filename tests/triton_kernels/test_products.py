"""Matrix products on Triton's kernels: exact sums, and the reference's bits of every epilogue."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fqt.kernels.epilogue import Epilogue
from fqt.kernels.products import matmul_of, most_terms
from tests.backends import moved
from tests.triton_kernels.machine import BYTES, DEVICE, INTERPRETED, QUIET, SHORT, codes

from fqt.kernels.triton import products, tune  # isort: skip
from fqt.kernels.triton.tune import LIBRARY, TINY, Schedule, Tiles  # isort: skip

pytestmark = QUIET
U8, S8 = BYTES
SIGNS = list(itertools.product(BYTES, repeat=2))
SMALL = TINY if INTERPRETED else Tiles(64, 64, 64, 4, 2)
HOPPER = INTERPRETED or torch.cuda.get_device_capability() >= (9, 0)
SCHEDULES = {
    "tiles": Schedule("tiles", SMALL),
    "as it lies": Schedule("tiles", SMALL, turned=False),
    "library": LIBRARY,
    **({"persistent": Schedule("persistent", SMALL)} if HOPPER else {}),
}
LONG = Tiles(64, 64, 4096, 4, 1) if INTERPRETED else SMALL
"""Fewer steps for the interpreter, which takes a while for each."""
NOTHING = (None,) * 8


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same matrix by rows, by columns, with rows at a distance, and with no stride of 1."""
    wide, sparse = x.new_zeros(x.shape[0], x.shape[1] + 3), x.new_zeros(x.shape[0], 2 * x.shape[1])
    wide[:, : x.shape[1]], sparse[:, ::2] = x, x
    return {"rows": x, "columns": x.t().contiguous().t(), "wide": wide[:, : x.shape[1]], "sparse": sparse[:, ::2]}


def epilogue(rows: int, columns: int, dtype: torch.dtype = torch.float32, whole: bool = True) -> Epilogue:
    """With everything in it, or with numbers in place of vectors and nothing else."""
    draw = torch.Generator().manual_seed(7)
    if not whole:
        return Epilogue(row_scale=torch.tensor(0.3), column_scale=torch.tensor([0.7]), dtype=dtype)
    return Epilogue(
        row_scale=torch.rand(rows, generator=draw) * 1e-3,
        column_scale=torch.rand(columns, generator=draw),
        left=torch.randn(rows, 3, generator=draw),
        right=torch.randn(3, columns, generator=draw),
        bias=torch.randn(columns, generator=draw),
        zero=torch.randint(0, 256, (rows,), generator=draw, dtype=torch.int32),
        ones=torch.randint(-(2**40), 2**40, (columns,), generator=draw, dtype=torch.int64),
        dtype=dtype,
    )


def check(a: torch.Tensor, b: torch.Tensor, e: Epilogue | None, schedule: Schedule | None = None) -> None:
    sums = torch.int32 if a.shape[1] <= most_terms(a.dtype, b.dtype) else torch.int64
    dtype, arguments = (sums, NOTHING) if e is None else (e.dtype, e.arguments())
    wanted = matmul_of.reference(a, b, dtype, arguments)
    a, b, arguments = (moved(x, DEVICE) for x in (a, b, arguments))
    found = products.matmul_of(a, b, dtype, arguments, schedule)
    assert found.dtype == wanted.dtype
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("signs", SIGNS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_sign(schedule: str, signs: tuple[torch.dtype, torch.dtype]) -> None:
    """More rows than a tile, a tail along each axis; once sums alone and once with everything."""
    a, b = codes((67, 70), signs[0], 1), codes((70, 24), signs[1], 2)
    check(a, b, None, SCHEDULES[schedule])
    check(layouts(a)["columns"], layouts(b)["columns"], epilogue(67, 24), SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", [p for p in SCHEDULES if p != "tiles"])
def test_layouts(schedule: str) -> None:
    """Forward, grad_input and grad_weight have one each; the others are views that a caller may bring."""
    a, b = codes((20, 33), U8, 3), codes((33, 24), S8, 4)
    for x, y in (
        ("rows", "columns"),
        ("rows", "rows"),
        ("columns", "rows"),
        ("wide", "sparse"),
        ("sparse", "wide"),
    ):
        check(layouts(a)[x], layouts(b)[y], epilogue(20, 24, whole=False), SCHEDULES[schedule])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (65, 1, 17), (1, 65, 3)], ids=str)
def test_tails(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for schedule in SCHEDULES.values():
        if schedule.kind != "library":
            check(codes((m, k), U8, 5), codes((k, n), S8, 6), epilogue(m, n), schedule)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)], ids=str)
def test_empty_operands_are_the_references(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    assert not products.takes_matmul_of(codes((m, k), U8), codes((k, n), S8), torch.int32, NOTHING)


def test_several_tiles_in_each_direction() -> None:
    """Programs in groups: 3 × 3 tiles, of which the last ones are short."""
    a, b = codes((150, 40), U8, 8), codes((40, 140), S8, 9)
    for schedule in SCHEDULES.values():
        if schedule.kind != "library":
            check(a, b, replace(epilogue(150, 140), zero=None, ones=None), schedule)


@pytest.mark.parametrize("dtype", SHORT)
def test_short_results(dtype: torch.dtype) -> None:
    check(codes((18, 30), U8, 8), codes((30, 16), S8, 9), epilogue(18, 16, dtype, whole=False), SCHEDULES["tiles"])


@pytest.mark.parametrize("schedule", [*SCHEDULES, "parts"])
def test_a_number_per_several_rows(schedule: str) -> None:
    """As a convolution of one pixel asks for: rows are pixels, and numbers belong to samples."""
    samples, places, n, k = 3, 7, 16, 20
    e = epilogue(samples, n)
    draw = torch.Generator().manual_seed(1)
    e = replace(
        e, right=torch.randn(3, places, n, generator=draw), ones=torch.randint(9, (places, n), generator=draw)
    )
    a, b = codes((samples * places, k), U8, 1), codes((k, n), S8, 2)
    exact = matmul_of.reference(a, b, torch.int64, NOTHING).view(samples, places, n)
    exact = exact - e.zero.long().view(-1, 1, 1) * e.ones
    value = exact.float() * e.row_scale.view(-1, 1, 1) * e.column_scale
    for r in range(3):
        value = value + e.left[:, r].view(-1, 1, 1) * e.right[r]
    arguments, chosen = moved(e.arguments(), DEVICE), SCHEDULES.get(schedule, Schedule("parts", SMALL))
    found = products.matmul_of(a.to(DEVICE), b.to(DEVICE), torch.float32, arguments, chosen, places)
    assert torch.equal(found.cpu().view(value.shape), value + e.bias)


@pytest.mark.parametrize("signs", [(U8, S8), (U8, U8)], ids=str)
def test_sums_beyond_int32(signs: tuple[torch.dtype, torch.dtype]) -> None:
    """All codes at an end of their range, over two and a half parts."""
    k = 160_001
    ends = {U8: 255, S8: -128}
    a = torch.full((2, k), ends[signs[0]]).to(signs[0])
    b = torch.full((k, 3), ends[signs[1]]).to(signs[1])
    check(a, b, None, Schedule("parts", LONG))
    check(a, b, epilogue(2, 3), Schedule("parts", LONG))


def test_the_longest_sum_that_int32_holds() -> None:
    """On the way to it a sum wraps, by what the shift by 128 adds; the result is right."""
    k = most_terms(U8, S8)
    a, b = torch.full((1, k), 255, dtype=U8), torch.full((k, 1), -128, dtype=S8)
    check(a, b, None, Schedule("tiles", LONG, turned=False))
    check(torch.zeros_like(a), b, None, Schedule("tiles", LONG, turned=False))


@pytest.mark.skipif(INTERPRETED, reason="chosen on a GPU only")
def test_the_choice_changes_no_bit() -> None:
    for shape in ((512, 384, 320), (8192, 256, 512), (96, 64, 20_000)):
        m, n, k = shape
        check(codes((m, k), U8, 1), codes((k, n), S8, 2), epilogue(m, n))


def test_parts_of_a_contraction() -> None:
    assert products.part_of(100_000, 64, 1, 132) % 64 == 0
    assert products.part_of(10**7, 64, 10**4, 132) <= products.LONGEST_PART
    assert products.part_of(100, 64, 1, 132) == 512  # one part


def test_the_table() -> None:
    """Descriptors on the devices that have them, no library where it is slow, a way for every shape."""
    large, small = (8192, 4096), (8, 4096)
    kinds = {
        c: [p.kind for p in tune.schedules(c, *large)] for c in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
    }
    assert all(("persistent" in found) == (c[0] in (9, 10)) for c, found in kinds.items())
    assert all(("library" in found) == (c != (10, 3)) for c, found in kinds.items())
    assert kinds[9, 0][0] == "persistent"
    assert all(found[0] != "library" for found in kinds.values())
    assert tune.schedules((9, 0), *small)[0].kind == "tiles"
    assert not products._fits(LIBRARY, 16, 4096)
    assert not products._fits(LIBRARY, 4096, 12)
    assert [tune.bucket(n) for n in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]
