"""Products of codes whose steps vary by blocks: every implementation gives the reference's bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fqt.kernels import blocked
from fqt.kernels.blocked import Stepped, common_block
from fqt.kernels.codes import COLUMN, Blocks
from fqt.kernels.cpu import library
from tests.backends import compare, reference_only

LENGTHS = [16, 32, 64, 128]
SHAPES = [(1, 1, 1), (3, 5, 7), (7, 70, 33), (97, 66, 130), (5, 16, 64), (6, 33, 600), (100, 130, 256)]
EMPTY = [(0, 3, 32), (3, 0, 32), (3, 2, 0)]
NATIVE = "cpu" if library.takes() else None


def matrix(shape: tuple[int, int], blocks: Blocks, seed: int = 0) -> Stepped:
    """Codes over the whole range of int8 with steps of three magnitudes."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, shape, generator=draw, dtype=torch.int32).to(torch.int8)
    count = blocks.count(shape)
    magnitude = torch.randint(-1, 2, count, generator=draw)
    step = torch.rand(count, generator=draw) * 10 ** magnitude.float()
    return Stepped(codes, step, blocks)


def operands(shape: tuple[int, int, int], a: Blocks, b: Blocks) -> tuple[Stepped, Stepped]:
    m, n, k = shape
    return matrix((m, k), a, 1), matrix((k, n), b, 2)


def by_column(x: Stepped) -> Stepped:
    """The same matrix, stored column by column."""
    return replace(x, codes=x.codes.T.contiguous().T)


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_shape(length: int, shape: tuple[int, int, int]) -> None:
    a, b = operands(shape, Blocks(1, length), Blocks(length, 1))
    compare(blocked.matmul, a, b, by=NATIVE)
    compare(blocked.matmul, by_column(a), by_column(b), by=NATIVE)


@pytest.mark.parametrize("rows", [0, 1, 5, 32])
@pytest.mark.parametrize("columns", [0, 1, 5, 16, 32, 128])
def test_whoever_shares_a_step(rows: int, columns: int) -> None:
    for a, b in ((32, 32), (64, 16), (16, 128), (0, 32), (32, 0), (0, 0)):
        x, y = operands((41, 150, 200), Blocks(rows, a), Blocks(b, columns))
        compare(blocked.matmul, x, y, by=NATIVE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_short_results(dtype: torch.dtype) -> None:
    for n in (1, 15, 16, 17, 32, 64, 100):
        a, b = operands((5, n, 70), Blocks(1, 32), Blocks(32, 32))
        compare(blocked.matmul, a, b, torch.randn(n), dtype, by=NATIVE)
        compare(blocked.matmul, a, b, None, dtype, by=NATIVE)


def test_the_sums_are_those_of_the_values() -> None:
    a, b = operands((20, 30, 100), Blocks(1, 32), Blocks(32, 16))
    values = [x.codes.double() * x.blocks.spread(x.step, tuple(x.codes.shape)).double() for x in (a, b)]
    wanted, found = values[0] @ values[1], blocked.matmul(a, b)
    size = values[0].abs() @ values[1].abs()  # each of 4 blocks is rounded three times
    assert bool(((found - wanted).abs() <= 12 * 2.0**-24 * size).all())
    turned = blocked.matmul(b.T, a.T)
    assert torch.equal(turned.T, found)


@pytest.mark.parametrize("length", [64, 65536])
def test_extreme_codes(length: int) -> None:
    """Sums of 2³⁰ in a block; −128 · −128 is the largest product."""
    k = 65536 + 40
    left = torch.tensor([-128, 127, 0]).view(3, 1).expand(3, k).to(torch.int8)
    right = torch.tensor([[-128, 127]]).expand(k, 2).to(torch.int8)
    count = -(-k // length)
    a = Stepped(left, torch.ones(1, count), Blocks(0, length))
    b = Stepped(right, torch.ones(1, 1), Blocks(0, 0))
    compare(blocked.matmul, a, b, by=NATIVE)
    exact = left.double() @ right.double()
    assert bool(((blocked.matmul(a, b) - exact).abs() <= count * 2.0**-24 * exact.abs()).all())


def test_blocks_are_added_in_order() -> None:
    """2²⁴ + 1 − 2²⁴ is 0 from left to right in float32, and 1 in any other order."""
    codes = torch.zeros(1, 96, dtype=torch.int8)
    codes[0, ::32] = torch.tensor([1, 1, -1], dtype=torch.int8)
    a = Stepped(codes, torch.tensor([[2.0**24, 1.0, 2.0**24]]), Blocks(1, 32))
    b = Stepped.plain(torch.ones(96, 1, dtype=torch.int8))
    compare(blocked.matmul, a, b, wanted=torch.zeros(1, 1), by=NATIVE)
    with reference_only():
        assert blocked.matmul(a, b) == 0


def test_a_nan_stays_in_its_rows_and_columns() -> None:
    a, b = operands((70, 90, 100), Blocks(32, 32), Blocks(32, 32))
    a.step[1, 2] = torch.nan
    compare(blocked.matmul, a, b, by=NATIVE)
    assert torch.isnan(blocked.matmul(a, b)).any(1).nonzero().flatten().tolist() == list(range(32, 64))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads: int) -> None:
    a, b = operands((300, 200, 320), Blocks(1, 32), Blocks(32, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x, y in itertools.product((a, by_column(a)), (b, by_column(b))):
            compare(blocked.matmul, x, y, by=NATIVE)
    finally:
        torch.set_num_threads(before)


def test_strides() -> None:
    a, b = operands((9, 20, 64), Blocks(1, 16), Blocks(16, 1))
    wanted = blocked.matmul(a, b)
    wide = torch.zeros(9, 70, dtype=torch.int8)
    wide[:, :64] = a.codes
    sparse = torch.zeros(64, 40, dtype=torch.int8)
    sparse[:, ::2] = b.codes
    step = b.step.T.contiguous().T
    x, y = replace(a, codes=wide[:, :64]), replace(b, codes=sparse[:, ::2], step=step)
    compare(blocked.matmul, x, y, wanted=wanted, by=NATIVE)


def test_common_blocks() -> None:
    assert [common_block(*pair) for pair in ((32, 32), (32, 16), (16, 128), (0, 64), (64, 0))] == [
        32,
        16,
        16,
        64,
        64,
    ]
    assert common_block(0, 0) > 0
    assert common_block(48, 32) == 0


def test_what_is_refused() -> None:
    a, b = operands((4, 6, 64), Blocks(1, 32), Blocks(32, 1))
    for bad, error, words in (
        ((replace(a, codes=a.codes.to(torch.uint8)), b), TypeError, "int8"),
        ((replace(a, step=a.step.double()), b), TypeError, "float32"),
        ((replace(a, step=a.step[:, :1]), b), ValueError, r"ask for \(4, 2\)"),
        ((a, replace(b, codes=b.codes[:40])), ValueError, "cannot multiply"),
        ((a, replace(b, blocks=Blocks(48, 1))), ValueError, "common length"),
        ((a, b, torch.zeros(5)), ValueError, "bias"),
        ((a, b, torch.zeros(6).double()), ValueError, "bias"),
        ((a, b, None, torch.float64), TypeError, "float64"),
    ):
        with pytest.raises(error, match=words):
            blocked.matmul(*bad)
    long = torch.zeros(1, 1 << 17, dtype=torch.int8)
    with pytest.raises(ValueError, match="fits int32"):
        blocked.matmul(Stepped(long, torch.ones(1, 1), Blocks(1, 1 << 17)), Stepped.plain(long.T))


def shifted(m: int, n: int, k: int, kinds: int) -> tuple[Stepped, Stepped]:
    """An operand whose columns' steps are one step shifted, the first 0, and another with a step per column."""
    draw = torch.Generator().manual_seed(m + k)
    shift = torch.randint(0, kinds, (1, k), generator=draw)
    a, b = matrix((m, k), COLUMN, 1), matrix((k, n), Blocks(0, 1), 2)
    step = 0.3 * torch.exp2(-shift.float())
    step[:, :1] = 0.0
    return replace(a, step=step), b


@pytest.mark.parametrize("kinds", [1, 3, 16])
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
def test_terms_gathered_by_their_steps(shape: tuple[int, int, int], kinds: int) -> None:
    """The same product, on every backend with the same bits, in whole blocks; and no more blocks than it takes."""
    a, b = shifted(*shape, kinds)
    left, right = blocked.gathered(a, b)
    compare(blocked.matmul, left, right, by=NATIVE)
    values = [x.codes.double() * x.blocks.spread(x.step, tuple(x.codes.shape)).double() for x in (a, b)]
    wanted, size = values[0] @ values[1], values[0].abs() @ values[1].abs()
    assert bool(((blocked.matmul(left, right) - wanted).abs() <= 120 * 2.0**-24 * size).all())
    assert left.codes.shape[1] == right.codes.shape[0] <= -(-shape[2] // 32) * 32 + 32 * kinds
    assert left.codes.shape[1] % blocked.GATHERED == 0


def test_gathering_that_may_not_ask_for_the_steps_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = shifted(20, 30, 300, 16)
    known = blocked.matmul(*blocked.gathered(a, b))
    monkeypatch.setattr(blocked, "at_hand", lambda x: False)
    left, right = blocked.gathered(a, b)
    assert left.codes.shape[1] == 320 + 16 * blocked.GATHERED
    assert torch.equal(blocked.matmul(left, right), known)
    bad = replace(a, step=torch.full_like(a.step, torch.nan))
    assert bool(blocked.matmul(*blocked.gathered(bad, b)).isnan().all())
