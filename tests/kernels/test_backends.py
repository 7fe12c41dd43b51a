"""Every implementation of an operation against its plain-torch reference: the same bits, at every CPU level."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
import torch

from fqt.kernels import choice, ops, philox, reference
from fqt.kernels.codes import COLUMN, ROW, TENSOR, Blocks, Dither, Entries, Findings, Levels, Quantized, Scales
from fqt.kernels.cpu import library
from fqt.kernels.rounding import DITHERED, NEAREST, STOCHASTIC, Coding, Rounding, dither_noise
from tests.backends import compare, same

pytestmark = pytest.mark.skipif(library.status().level == "reference", reason=str(library.status()))

SHAPES = [(0, 5), (5, 0), (0, 0), (1, 1), (2, 2), (3, 70), (17, 33), (5, 1000), (130, 31), (33, 129), (300, 701)]
TAILS = [(3, d) for d in range(1, 71)]  # every remainder of every vector length
LEVELS = {
    NEAREST: [Levels(0, 255), Levels(0, 3), Levels(-127, 127), Levels(-1, 1)],
    STOCHASTIC: [Levels(0, 255), Levels(0, 15), Levels(-127, 127)],
    DITHERED: [Levels(0, 254), Levels(0, 2)],
}
BLOCKS = {"tensor": TENSOR, "row": ROW, "column": COLUMN}
by_blocks = pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
by_rounding = pytest.mark.parametrize("rounding", LEVELS, ids=str)


def matrix(shape: tuple[int, int], kind: str = "plain") -> torch.Tensor:
    """Values that reach the edge cases of the arithmetic."""
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    x = torch.randn(shape, generator=generator)
    pick = torch.rand(shape, generator=generator)
    if kind == "wide":
        x = x * 3e38 / x.abs().amax().clamp(min=1) if x.numel() else x
    elif kind == "tiny":
        x = x * 1e-40
    elif kind == "zeros":
        x = torch.where(pick < 0.5, 0.0, x)
        x = torch.where(pick < 0.25, -0.0, x)
    elif kind == "nan":
        x = torch.where(pick < 0.02, torch.nan, x)
        x = torch.where(pick > 0.99, torch.inf, x)
    elif kind == "ties":
        x = (x * 4).round() / 2
    elif kind == "constant":
        x = torch.full(shape, 0.1)
    return x


KINDS = ("plain", "wide", "tiny", "zeros", "nan", "ties", "constant")


def shapes(kind: str) -> list[tuple[int, int]]:
    """What to try with values of that kind."""
    return SHAPES + TAILS if kind == "plain" else SHAPES


def spread_over(x: Entries, blocks: Blocks, levels: Levels) -> Scales:
    """Steps and offsets that spread a block over the levels; 0 where it is constant, NaN where it is not finite."""
    lo, hi = reference.value_range(x, blocks)
    step = (hi * 0.5 - lo * 0.5) / (levels.high - levels.low) * 2
    bad = ~(torch.isfinite(lo) & torch.isfinite(hi))
    return Scales(step.masked_fill(bad, torch.nan), (lo - levels.low * step).nan_to_num(0, 0, 0), blocks)


SEED = torch.tensor(-0x123456789ABCDEF)
random_words = philox.random_words


@cache
def words(seed: int, stream: int, n: int) -> torch.Tensor:
    return random_words(torch.tensor(seed), stream, n)


@pytest.fixture(autouse=True)
def words_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's random words, a pure function that would take most of the time of these tests."""
    monkeypatch.setattr(philox, "random_words", lambda seed, stream, n: words(int(seed), stream, n))


@by_blocks
@pytest.mark.parametrize("kind", KINDS)
def test_value_range(kind: str, blocks: Blocks) -> None:
    for shape in shapes(kind):
        compare(ops.value_range, Entries(matrix(shape, kind)), blocks, by="cpu" if 0 not in shape else None)


@by_rounding
@by_blocks
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(kind: str, blocks: Blocks, rounding: Rounding) -> None:
    for shape in shapes(kind):
        x = Entries(matrix(shape, kind))
        for levels in LEVELS[rounding]:
            scales = spread_over(x, blocks, levels)
            compare(ops.encode, x, scales, levels, rounding, SEED)
            codes = reference.encode(x, scales, levels, rounding, SEED)
            noise = [n.float() / 2**24 for n in dither_noise(SEED, *shape)]
            for dither in (None, noise[0], noise[1]):
                compare(ops.decode, codes, scales, dither)


@by_blocks
@pytest.mark.parametrize("kind", KINDS)
def test_code_variance(kind: str, blocks: Blocks) -> None:
    for shape in shapes(kind):
        x = Entries(matrix(shape, kind))
        compare(ops.code_variance, x, spread_over(x, blocks, Levels(0, 15)), Levels(0, 15))


@pytest.mark.parametrize("scale", [1e-3, 1e-7, 1e-9, 1e-12])
@pytest.mark.parametrize("codes", [1, 7, 127])
def test_variances_beside_code_zero(codes: int, scale: float) -> None:
    """Positions just below a whole number, whose fraction rounds to 1."""
    x = scale * torch.linspace(-1, 1, 333).repeat(3, 1)
    x[:, 0] = 1.0
    scales = Scales(torch.full((3, 1), 1 / codes), torch.zeros(3, 1), ROW)
    for op in (ops.code_variance, ops.variance_sums):
        compare(op, Entries(x), scales, Levels(-codes, codes))


MIXED = [(), (1,), (2,), (4, 1), (8, 2, 1), (128, 64, 2), (16, 16, 16), (512,), (64, 32, 16, 8, 4, 2, 1)]


def around(shape: tuple[int, int], keep: torch.Tensor) -> list[dict]:
    """What a transform may do to rows before and after: nothing, and every combination."""
    generator = torch.Generator().manual_seed(4)
    scale, offset = torch.randn(2, shape[0], 1, generator=generator)
    right = torch.randn(shape[1], generator=generator)
    before = reference.Scaling(torch.where(keep, 0.5, 1.0), offset, scale)
    return [
        {},
        {"before": before},
        {"after": reference.Unscaling(scale, offset)},
        {"after": reference.Unscaling(scale, offset, right)},
        {"before": before, "after": reference.Unscaling(scale, offset, right, torch.bfloat16)},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_hadamard(kind: str) -> None:
    for blocks in MIXED:
        for columns in (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200):
            x = matrix((sum(blocks), columns), kind)
            generator = torch.Generator().manual_seed(1)
            order = torch.randperm(sum(blocks), generator=generator)
            keep = torch.rand(sum(blocks), 1, generator=generator) < 0.5
            for more in around(tuple(x.shape), keep):  # type: ignore[arg-type]
                for kept in (None, keep):
                    for y in (x, x.bfloat16()):
                        before, after = more.get("before"), more.get("after")
                        compare(ops.hadamard, y, order, blocks, before, kept, after)


@pytest.mark.parametrize("kind", KINDS)
def test_rotate(kind: str) -> None:
    """Runs of every mixture of blocks, one or several to a row; none at all."""
    for blocks in MIXED:
        period = sum(blocks)
        before, after = torch.randn(2, period, generator=torch.Generator().manual_seed(3))
        for rows, runs in ((0, 2), (1, 1), (3, 2), (17, 1), (16, 5)):
            x = matrix((rows, runs * period), kind)
            for y in (x, x.bfloat16()):
                for last in (None, after):
                    compare(ops.rotate, y, before, last, blocks, by="cpu" if x.numel() else None)


@pytest.mark.parametrize("kind", KINDS)
def test_reflect(kind: str) -> None:
    for shape in shapes(kind):
        x = matrix(shape, kind)
        generator = torch.Generator().manual_seed(2)
        group = torch.randint(0, max(shape[0] // 3, 1), (shape[0],), generator=generator)
        normal, beta = torch.randn(2, shape[0], 1, generator=generator)
        for more in around(shape, normal > 0):
            for y in (x, x.bfloat16()):
                compare(ops.reflect, y, group, normal, beta, more.get("before"), more.get("after"))


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_rows(kind: str) -> None:
    for shape in [*shapes(kind), (3, 20000)]:
        x = matrix(shape, kind)
        keep = torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(4)) < 0.5
        for y in (x, x.bfloat16()):
            got, wanted = x.neg(), x.neg()
            assert ops.replace_rows_.backend(got, keep, y) == "cpu"
            assert ops.replace_rows_(got, keep, y) is got
            assert same(got, reference.replace_rows_(wanted, keep, y)), shape


def test_group_parameters() -> None:
    extremes = [0.0, -0.0, 1.0, -1.5, 1e-45, 1e-38, 3e38, -3.4e38, float("inf"), -float("inf"), float("nan"), 0.1]
    pairs = [(a, b) for a in extremes for b in extremes if not a > b]
    lo, hi = torch.tensor(pairs).T[:, :, None].contiguous()
    for mode in ("affine", "symmetric", "zero"):
        for steps in (1, 3, 7, 127, 254, 255):
            compare(ops.parameters, lo, hi, mode, steps)


def test_sums_of_values() -> None:
    for shape in [*SHAPES, *TAILS[::7], (5000, 3), (700, 2100)]:
        x = matrix(shape)
        for y in (x, x.bfloat16()):
            bound = 1e-6 * float(y.double().abs().sum() + 1)
            compare(ops.value_sums, y, equal=partial(torch.allclose, rtol=0, atol=bound))


def sources(x: torch.Tensor) -> list[Entries]:
    """The same in both dtypes, with and without factors of every period that fits."""
    found: list[Entries] = []
    periods = [p for p in (1, 3, x.shape[1] // 2, x.shape[1]) if p > 0 and x.shape[1] % p == 0]
    for y in (x, x.bfloat16()):
        found.append(Entries(y))
        for p in periods:
            found.append(Entries(y, torch.randn(p, generator=torch.Generator().manual_seed(p))))
    return found


@by_blocks
@pytest.mark.parametrize("kind", ["plain", "nan", "zeros"])
def test_bfloat16_and_factors_plain_and_on_its_side(kind: str, blocks: Blocks) -> None:
    levels = Levels(0, 254)
    for shape in [s for s in (*SHAPES, *TAILS[::9], (2, 9000)) if s[1]]:
        for x in sources(matrix(shape, kind)):
            compare(ops.value_range, x, blocks, by="cpu" if shape[0] else None)
            scales = spread_over(x, blocks, levels)
            for rounding in LEVELS:
                for transposed in (False, True):
                    compare(ops.encode, replace(x, transposed=transposed), scales, levels, rounding, SEED)
            compare(ops.variance_sums, x, scales, levels)


MODES = [("affine", Levels(0, 255)), ("affine", Levels(0, 254)), ("symmetric", Levels(-127, 127))]
MODES += [("zero", Levels(0, 255))]


def in_three_steps(x: Entries, blocks: Blocks, coding: Coding) -> Quantized:
    """Range, parameters and codes by the functions of the reference, and the dither by its noise."""
    lo, hi = reference.value_range(x, blocks)
    scales = Scales(*reference.parameters(lo, hi, coding.mode, coding.levels.high), blocks)
    codes = reference.encode(x, scales, coding.levels, coding.rounding, SEED)
    if coding.rounding != DITHERED:
        return Quantized(codes, scales)
    noise = [n.float() / 2**24 for n in dither_noise(SEED, *x.shape, x.transposed)]
    return Quantized(codes, scales, Dither(*noise))


@by_blocks
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_is_its_three_steps(kind: str, blocks: Blocks) -> None:
    """Codes, steps and offsets; every start of a row against the blocks of noise."""
    for shape in [s for s in (*SHAPES, *TAILS[::3], (9, 4099), (3, 9001)) if s[0] and s[1]]:
        for source in sources(matrix(shape, kind))[:: 1 if kind == "plain" else 3]:
            x = replace(source, transposed=kind == "zeros")
            for mode, levels in MODES:
                for rounding in LEVELS:
                    if rounding == DITHERED and levels.high != 254:
                        continue
                    coding = Coding(mode, levels, rounding)
                    arguments = (x, blocks, coding, SEED)
                    compare(ops.quantize, *arguments, wanted=in_three_steps(x, blocks, coding))


@pytest.mark.parametrize("rounding", ["stochastic", "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_findings_save_a_pass_and_change_nothing(dtype: torch.dtype, rounding: str) -> None:
    """Range and sums that a pass over rows comes by: those of passes of their own, on any number of threads."""
    stochastic = Coding("affine", Levels(0, 255), STOCHASTIC)
    both = (stochastic, Coding("affine", Levels(0, 254), DITHERED))

    def by_rows(x: torch.Tensor, known: Findings | None) -> Quantized:
        if rounding == "best":
            return choice.quantize_best(Entries(x), ROW, both, SEED, None, known)
        return ops.quantize(Entries(x), ROW, stochastic, SEED, known)

    for shape, channels in (
        ((9, 30), 10),
        ((9, 30), 7),
        ((1, 4099), 4099),
        ((700, 64), 64),
        ((70, 257), 257),
        ((3, 20000), 16),
    ):
        for special in (None, "nan", "-inf"):
            x = matrix(shape, "plain").to(dtype)
            if special:
                x[shape[0] // 2, 3] = float(special)
            wanted = Findings(channels=channels)
            before, alone = by_rows(x, wanted), by_rows(x, None)
            assert wanted == Findings(channels=channels)
            assert same(before[:3], alone[:3])
            assert alone.findings is None
            findings = before.findings
            assert findings is not None
            assert findings.range is not None
            for end, truth in zip(findings.range, reference.value_range(Entries(x), TENSOR), strict=True):
                assert same(torch.tensor([[end]]), truth)
            whole = ops.quantize(Entries(x), TENSOR, stochastic, SEED, findings)
            assert same(whole[:3], ops.quantize(Entries(x), TENSOR, stochastic, SEED)[:3])
            if rounding == "best" or shape[1] % channels:
                assert findings.sums is None
            elif special is None:
                sums = reference.value_sums(x.view(-1, channels))
                assert findings.sums is not None
                bound = 1e-6 * float(x.double().abs().sum() + 1)
                assert torch.allclose(findings.sums, sums, rtol=0, atol=bound)
                threads = torch.get_num_threads()
                try:
                    torch.set_num_threads(1)
                    again = by_rows(x, wanted).findings
                finally:
                    torch.set_num_threads(threads)
                assert again is not None
                assert same(again.sums, findings.sums)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_exact_sums_of_codes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    for shape in [*SHAPES, *TAILS[::5], (5000, 3), (2100, 700)]:
        low = 0 if dtype == torch.uint8 else -128
        codes = torch.randint(low, low + 256, shape, generator=generator, dtype=torch.int32).to(dtype)
        codes[: shape[0] // 2] = low + 255  # the largest sums
        weights = torch.randint(0, 2**24, (shape[0],), generator=generator, dtype=torch.int32)
        weights[: shape[0] // 2] = 2**24 - 1
        compare(ops.row_sums, codes)
        assert same(ops.row_sums(codes), codes.long().sum(1)), shape
        for y in (codes, codes.t().contiguous().t()):
            compare(ops.column_sums, y, weights)
            compare(ops.column_sums, y)
            plain, weighted = ops.column_sums(y, weights)
            assert same(plain, codes.long().sum(0)), shape
            assert weighted is not None
            assert same(weighted, (codes.long() * weights[:, None].long()).sum(0)), shape
            assert ops.column_sums(y)[1] is None


def test_noise() -> None:
    for n in (0, 1, 3, 4, 5, 31, 32, 33, 4095, 4096, 4097, 10000):
        compare(ops.random_u24, SEED, 3, n)
    dither = ops.dither(SEED, Entries(torch.zeros(37, 1001)), torch.float32)
    assert same((dither.row, dither.column), tuple(n.float() / 2**24 for n in dither_noise(SEED, 37, 1001)))


@pytest.mark.parametrize(
    "shape", [(1, 3), (3, 259), (37, 100), (5, 5000), (40, 19), (40, 51), (40, 115), (300, 16)]
)
@pytest.mark.parametrize("low", [0, -127])
def test_low_bits_of_the_noise(shape: tuple[int, int], low: int) -> None:
    """Where the fraction is the noise itself or one unit more, every bit of the noise decides."""
    noise = philox.rounding_noise(SEED, shape[0] * shape[1]).view(shape)
    one = torch.ones(1, 1)
    for more in (0, 1):
        x = (noise + more).float() * 2.0**-24
        for blocks in BLOCKS.values():
            step = one.expand(blocks.count(shape)).contiguous()
            scales = Scales(step, torch.zeros_like(step), blocks)
            codes = ops.encode(Entries(x), scales, Levels(low, 127), STOCHASTIC, SEED)
            assert bool((codes == more).all()), (blocks, more)


def test_large_matrices_on_one_and_two_threads() -> None:
    x = Entries(torch.randn(513, 1027, generator=torch.Generator().manual_seed(3)))
    before, levels = torch.get_num_threads(), Levels(0, 254)
    wanted = {}
    for blocks, rounding in product(BLOCKS.values(), LEVELS):
        scales = spread_over(x, blocks, levels)
        wanted[blocks, rounding] = scales, reference.encode(x, scales, levels, rounding, SEED)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for (blocks, rounding), (scales, codes) in wanted.items():
                compare(ops.encode, x, scales, levels, rounding, SEED, wanted=codes)
                if rounding == NEAREST:
                    compare(ops.value_range, x, blocks)
                    compare(ops.decode, codes, scales, None)
    finally:
        torch.set_num_threads(before)


def test_inputs_that_are_not_contiguous() -> None:
    x, levels = torch.randn(40, 60)[::2, ::3], Levels(0, 255)
    scales = spread_over(Entries(x), ROW, levels)
    scales = replace(scales, step=scales.step.expand(20, 2)[:, 1:])
    seed = torch.tensor([1, 5, 9])[1]
    compare(ops.encode, Entries(x), scales, levels, STOCHASTIC, seed)
    on_its_side = Scales(scales.step.T, scales.offset.T, COLUMN)
    compare(ops.encode, Entries(x.T), on_its_side, levels, NEAREST, None)
    wanted = reference.encode(Entries(x), scales, levels, NEAREST, None)
    assert same(ops.encode(Entries(x.T), on_its_side, levels, NEAREST, None), wanted.T)
