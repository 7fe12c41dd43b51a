"""The native kernels against the plain-torch reference: the same bits, at every instruction-set level."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fqt.kernels import native, ops, philox, reference

needs_native = pytest.mark.skipif(
    native.status().level == "reference" and "FQT_KERNELS" not in os.environ, reason=str(native.status())
)
pytestmark = needs_native

SHAPES = [(0, 5), (5, 0), (0, 0), (1, 1), (2, 2), (3, 70), (17, 33), (5, 1000), (130, 31), (33, 129), (300, 701)]
TAILS = [(3, d) for d in range(1, 71)]  # every remainder of every vector length
RANGES = {"nearest": [(0, 255), (0, 3), (-127, 127), (-1, 1)], "stochastic": [(0, 255), (0, 15), (-127, 127)]}
RANGES["dithered"] = [(0, 254), (0, 2)]
GROUPS = {"tensor": (0, 1), "row": (1,), "column": (0,)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and values, NaN equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=7e37), b.nan_to_num(nan=7e37))


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


def parameters(x: torch.Tensor, group: str, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and offset that spread a group over the codes; 0 where it is constant, NaN where it is not finite."""
    lo, hi = reference.value_range(x, group)
    step = (hi * 0.5 - lo * 0.5) / (high - low) * 2
    bad = ~(torch.isfinite(lo) & torch.isfinite(hi))
    return step.masked_fill(bad, torch.nan), (lo - low * step).nan_to_num(0, 0, 0)


SEED = torch.tensor(-0x123456789ABCDEF)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_range(kind: str, group: str) -> None:
    for shape in shapes(kind):
        x = matrix(shape, kind)
        for a, b in zip(ops.value_range(x, group), reference.value_range(x, group), strict=True):
            assert same(a, b), (shape, group)


@pytest.mark.parametrize("rounding", RANGES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(kind: str, group: str, rounding: str) -> None:
    for shape in shapes(kind):
        x = matrix(shape, kind)
        for low, high in RANGES[rounding]:
            step, offset = parameters(x, group, low, high)
            wanted = reference.encode(x, step, offset, low, high, rounding, SEED)
            assert same(native.encode(x, step, offset, low, high, rounding, SEED), wanted), (shape, low, high)
            noise = [n.float() / 2**24 for n in reference.dither_noise(SEED, *shape)]
            for dither in (None, noise[0], noise[1]):
                value = reference.decode(wanted, step, offset, dither)
                assert same(native.decode(wanted, step, offset, dither), value), (shape, low, high)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_code_variance(kind: str, group: str) -> None:
    for shape in shapes(kind):
        x = matrix(shape, kind)
        step, offset = parameters(x, group, 0, 15)
        wanted = reference.code_variance(x, step, offset, 0, 15)
        assert same(native.code_variance(x, step, offset, 0, 15), wanted), shape


@pytest.mark.parametrize("scale", [1e-3, 1e-7, 1e-9, 1e-12])
@pytest.mark.parametrize("codes", [1, 7, 127])
def test_variances_beside_code_zero(codes: int, scale: float) -> None:
    """Positions just below a whole number, whose fraction rounds to 1."""
    x = scale * torch.linspace(-1, 1, 333).repeat(3, 1)
    x[:, 0] = 1.0
    step, offset = torch.full((3, 1), 1 / codes), torch.zeros(3, 1)
    arguments = (x, step, offset, -codes, codes)
    assert same(native.code_variance(*arguments), reference.code_variance(*arguments))
    assert torch.equal(native.variance_sums(*arguments), reference.variance_sums(*arguments))


BLOCKS = [(), (1,), (2,), (4, 1), (8, 2, 1), (128, 64, 2), (16, 16, 16), (512,), (64, 32, 16, 8, 4, 2, 1)]


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
    for blocks in BLOCKS:
        for columns in (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200):
            x = matrix((sum(blocks), columns), kind)
            generator = torch.Generator().manual_seed(1)
            order = torch.randperm(sum(blocks), generator=generator)
            keep = torch.rand(sum(blocks), 1, generator=generator) < 0.5
            for more in around(tuple(x.shape), keep):  # type: ignore[arg-type]
                for kept in (None, keep):
                    for y in (x, x.bfloat16()):
                        wanted = reference.hadamard(y, order, blocks, keep=kept, **more)
                        assert same(native.hadamard(y, order, blocks, keep=kept, **more), wanted), (blocks, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_reflect(kind: str) -> None:
    for shape in shapes(kind):
        x = matrix(shape, kind)
        generator = torch.Generator().manual_seed(2)
        group = torch.randint(0, max(shape[0] // 3, 1), (shape[0],), generator=generator)
        normal, factor = torch.randn(2, shape[0], 1, generator=generator)
        for more in around(shape, normal > 0):
            for y in (x, x.bfloat16()):
                wanted = reference.reflect(y, group, normal, factor, **more)
                assert same(native.reflect(y, group, normal, factor, **more), wanted), shape


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_rows(kind: str) -> None:
    for shape in [*shapes(kind), (3, 20000)]:
        x = matrix(shape, kind)
        keep = torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(4)) < 0.5
        for y in (x, x.bfloat16()):
            got, wanted = x.neg(), x.neg()
            assert ops.replace_rows_(got, keep, y) is got
            assert same(got, reference.replace_rows_(wanted, keep, y)), shape


def test_group_parameters() -> None:
    extremes = [0.0, -0.0, 1.0, -1.5, 1e-45, 1e-38, 3e38, -3.4e38, float("inf"), -float("inf"), float("nan"), 0.1]
    pairs = [(a, b) for a in extremes for b in extremes if not a > b]
    lo, hi = torch.tensor(pairs).T[:, :, None].contiguous()
    for mode in ("affine", "symmetric", "zero"):
        for steps in (1, 3, 7, 127, 254, 255):
            wanted = reference.parameters(lo, hi, mode, steps)
            assert all(map(same, ops.parameters(lo, hi, mode, steps), wanted)), (mode, steps)


def test_sums_of_values() -> None:
    for shape in [*SHAPES, *TAILS[::7], (5000, 3), (700, 2100)]:
        x = matrix(shape)
        for y in (x, x.bfloat16()):
            wanted = reference.value_sums(y)
            assert torch.allclose(ops.value_sums(y), wanted, rtol=0, atol=1e-6 * float(y.double().abs().sum() + 1))


def sources(x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The same in both dtypes, with and without factors of every period that fits."""
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    periods = [p for p in (1, 3, x.shape[1] // 2, x.shape[1]) if p > 0 and x.shape[1] % p == 0]
    for y in (x, x.bfloat16()):
        found.append((y, None))
        for p in periods:
            found.append((y, torch.randn(p, generator=torch.Generator().manual_seed(p))))
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["plain", "nan", "zeros"])
def test_bfloat16_and_factors_plain_and_on_its_side(kind: str, group: str) -> None:
    for shape in [s for s in (*SHAPES, *TAILS[::9], (2, 9000)) if s[1]]:
        for x, factor in sources(matrix(shape, kind)):
            for a, b in zip(
                ops.value_range(x, group, factor), reference.value_range(x, group, factor), strict=True
            ):
                assert same(a, b), (shape, x.dtype)
            step, offset = parameters(reference.values(x, factor), group, 0, 254)
            for rounding in RANGES:
                for transposed in (False, True):
                    rest = (step, offset, 0, 254, rounding, SEED, factor, transposed)
                    assert same(native.encode(x, *rest), reference.encode(x, *rest)), (shape, x.dtype, rounding)
            rest = (step, offset, 0, 254, factor)
            assert same(native.variance_sums(x, *rest), reference.variance_sums(x, *rest)), (shape, x.dtype)


MODES = [("affine", 0, 255), ("affine", 0, 254), ("symmetric", -127, 127), ("zero", 0, 255)]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_is_its_three_steps(kind: str, group: str) -> None:
    """Codes, steps and offsets; every start of a row against the blocks of noise."""
    for shape in [s for s in (*SHAPES, *TAILS[::3], (9, 4099), (3, 9001)) if s[0] and s[1]]:
        for x, factor in sources(matrix(shape, kind))[:: 1 if kind == "plain" else 3]:
            for mode, low, high in MODES:
                for rounding in RANGES:
                    if rounding == "dithered" and high != 254:
                        continue
                    how = (x, group, mode, low, high, rounding, SEED, factor, kind == "zeros")
                    lo, hi = reference.value_range(x, group, factor)
                    step, offset = reference.parameters(lo, hi, mode, high)
                    codes = reference.encode(x, step, offset, *how[3:])
                    *found, noise = ops.quantize(*how)
                    for a, b in zip(found, (codes, step, offset), strict=True):
                        assert same(a, b), (shape, mode, rounding, x.dtype)
                    assert (noise is None) == (rounding != "dithered")
                    for a, b in zip(noise or (), reference.dither_noise(SEED, *x.shape, how[-1]), strict=False):
                        assert same(a, b / 2**24)


@pytest.mark.parametrize("rounding", ["stochastic", "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_findings_save_a_pass_and_change_nothing(dtype: torch.dtype, rounding: str) -> None:
    """Range and sums that a pass over rows comes by: those of passes of their own, on any number of threads."""
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
            findings = native.Findings(channels)
            before = native.quantize(x, "row", "affine", 0, 255, rounding, SEED, findings=findings)
            alone = native.quantize(x, "row", "affine", 0, 255, rounding, SEED)
            assert all(same(a, b) for a, b in zip(before[:3], alone[:3], strict=True))
            assert findings.known
            lo, hi = reference.value_range(x, "tensor")
            assert same(torch.tensor([[findings.lo]]), lo)
            assert same(torch.tensor([[findings.hi]]), hi)
            whole = native.quantize(x, "tensor", "affine", 0, 255, "stochastic", SEED, findings=findings)
            plain = native.quantize(x, "tensor", "affine", 0, 255, "stochastic", SEED)
            assert all(same(a, b) for a, b in zip(whole[:3], plain[:3], strict=True))
            if rounding == "best" or shape[1] % channels:
                assert findings.sums is None
            elif special is None:
                wanted = reference.value_sums(x.view(-1, channels))
                assert findings.sums is not None
                bound = 1e-6 * float(x.double().abs().sum() + 1)
                assert torch.allclose(findings.sums, wanted, rtol=0, atol=bound)
                threads = torch.get_num_threads()
                torch.set_num_threads(1)
                again = native.Findings(channels)
                native.quantize(x, "row", "affine", 0, 255, rounding, SEED, findings=again)
                torch.set_num_threads(threads)
                assert same(again.sums, findings.sums)


def test_transposed_swaps_the_streams_of_dither() -> None:
    (row, column), (other_row, other_column) = (ops.dither_noise(SEED, 5, 7, t) for t in (False, True))
    assert torch.equal(other_row.flatten(), ops.dither_noise(SEED, 7, 5)[1].flatten())
    assert torch.equal(other_column.flatten(), ops.dither_noise(SEED, 7, 5)[0].flatten())
    assert not torch.equal(row, other_row)
    assert not torch.equal(column, other_column)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_exact_sums_of_codes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    for shape in [*SHAPES, *TAILS[::5], (5000, 3), (2100, 700)]:
        low = 0 if dtype == torch.uint8 else -128
        codes = torch.randint(low, low + 256, shape, generator=generator, dtype=torch.int32).to(dtype)
        codes[: shape[0] // 2] = low + 255  # the largest sums
        weights = torch.randint(0, 2**24, (shape[0],), generator=generator, dtype=torch.int32)
        weights[: shape[0] // 2] = 2**24 - 1
        assert same(native.row_sums(codes), codes.long().sum(1)), shape
        for y in (codes, codes.t().contiguous().t()):
            plain, weighted = ops.column_sums(y, weights)
            assert same(plain, codes.long().sum(0)), shape
            assert weighted is not None
            assert same(weighted, (codes.long() * weights[:, None].long()).sum(0)), shape
            assert ops.column_sums(y)[1] is None


def test_noise() -> None:
    for n in (0, 1, 3, 4, 5, 31, 32, 33, 4095, 4096, 4097, 10000):
        assert same(ops.random_u24(SEED, 3, n), philox.random_u24(SEED, 3, n)), n
    for a, b in zip(ops.dither_noise(SEED, 37, 1001), reference.dither_noise(SEED, 37, 1001), strict=True):
        assert same(a, b)


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
        for group in ("tensor", "row", "column"):
            step = one.expand_as(reference.value_range(x, group)[0]).contiguous()
            codes = ops.encode(x, step, torch.zeros_like(step), low, 127, "stochastic", SEED)
            assert bool((codes == more).all()), (group, more)


def test_large_matrices_on_one_and_two_threads() -> None:
    x = torch.randn(513, 1027, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for group in GROUPS:
                step, offset = parameters(x, group, 0, 254)
                for rounding in RANGES:
                    wanted = reference.encode(x, step, offset, 0, 254, rounding, SEED)
                    assert same(ops.encode(x, step, offset, 0, 254, rounding, SEED), wanted)
                assert same(ops.value_range(x, group)[0], reference.value_range(x, group)[0])
                assert same(ops.decode(wanted, step, offset, None), reference.decode(wanted, step, offset, None))
    finally:
        torch.set_num_threads(before)


def test_inputs_that_are_not_contiguous() -> None:
    x = torch.randn(40, 60)[::2, ::3]
    step, offset = parameters(x, "row", 0, 255)
    step = step.expand(20, 2)[:, 1:]
    seed = torch.tensor([1, 5, 9])[1]
    wanted = reference.encode(x, step, offset, 0, 255, "stochastic", seed)
    assert same(ops.encode(x, step, offset, 0, 255, "stochastic", seed), wanted)
    assert same(ops.encode(x.T, step.T, offset.T, 0, 255, "nearest", None), wanted_nearest(x, step, offset).T)


def wanted_nearest(x: torch.Tensor, step: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The reference's codes."""
    return reference.encode(x, step, offset, 0, 255, "nearest", None)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x, s: ops.encode(x, s[:2], s[:2], 0, 255, "nearest", None), "parameters of shape"),
        (lambda x, s: ops.encode(x, s, s, 0, 256, "nearest", None), "codes 0 … 256"),
        (lambda x, s: ops.encode(x, s, s, 0, 255, "dithered", torch.tensor(1)), "codes 0 … 256"),
        (lambda x, s: ops.encode(x, s, s, -129, 3, "nearest", None), "codes -129"),
        (lambda x, s: ops.encode(x, s, s, 0, 255, "stochastic", None), "seed"),
        (lambda x, s: ops.encode(x, s, s, 0, 255, "up", None), "rounding 'up'"),
        (lambda x, s: ops.value_range(x, "rows"), "group 'rows'"),
        (lambda x, s: ops.value_range(x, "row", torch.ones(3)), "factors of shape"),
        (
            lambda x, s: ops.hadamard(x, torch.arange(4), (4,), after=reference.Unscaling(s, s, torch.ones(3))),
            "right factor of shape",
        ),
    ],
)
def test_bad_arguments_are_named(call, names: str) -> None:
    x, step = torch.randn(4, 5), torch.ones(4, 1)
    with pytest.raises((ValueError, KeyError), match=names):
        call(x, step)


def test_bad_indices_raise() -> None:
    x, ones = torch.randn(4, 5), torch.ones(4, 1)
    with pytest.raises(IndexError, match="outside"):
        ops.hadamard(x, torch.tensor([0, 1, 2, 4]), (4,))
    with pytest.raises(IndexError, match="powers of two"):
        ops.hadamard(x, torch.arange(4), (3, 1))
    with pytest.raises(IndexError, match="outside"):
        ops.reflect(x, torch.tensor([0, 1, 2, -1]), ones, ones)


def test_two_python_threads_at_once() -> None:
    x = torch.randn(200, 300)
    step, offset = parameters(x, "row", 0, 254)
    wanted = {r: reference.encode(x, step, offset, 0, 254, r, SEED) for r in RANGES}
    failures: list[str] = []

    def work(rounding: str) -> None:
        for _ in range(50):
            if not same(ops.encode(x, step, offset, 0, 254, rounding, SEED), wanted[rounding]):
                failures.append(rounding)

    threads = [threading.Thread(target=work, args=(r,)) for r in ("stochastic", "dithered")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


_FORK = """
import os, torch
from fqt.kernels import native, ops, products, reference
torch.set_num_threads(2)
x, one = torch.randn(512, 512), torch.ones(1, 1)
wanted = ops.encode(x, one, one, -127, 127, "nearest", None)
product = products.matmul(wanted, wanted)
child = os.fork()
if child == 0:
    codes = ops.encode(x, one, one, -127, 127, "nearest", None)
    again = products.matmul(codes, codes)
    same = (codes.numpy() == wanted.numpy()).all() and (again.numpy() == product.numpy()).all()
    os._exit(0 if same else 1)  # torch's own parallel loops would hang here
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run(code: str, level: str = "", timeout: float = 120) -> str:
    """Standard output of a fresh interpreter."""
    environment = {**os.environ, "FQT_KERNELS": level} if level else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=timeout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fork_after_use() -> None:
    run(_FORK, timeout=60)


@pytest.mark.parametrize("level", native.LEVELS)
def test_every_level_gives_the_same_bits(level: str) -> None:
    """The tests of this file, of the products and of those with corrections again, at a lower level."""
    if "FQT_KERNELS" in os.environ:
        pytest.skip("a level is chosen already")
    have = native.status().level
    if native.LEVELS.index(level) >= native.LEVELS.index(have):
        pytest.skip(f"this machine runs {have} anyway")
    here = Path(__file__)
    files = [__file__, str(here.with_name("test_products.py")), str(here.parents[1] / "nn" / "test_fused.py")]
    chosen = (
        "plain or sums or steps or parameters or nan or noise or large or matmul or exact or epilogues or longest"
    )
    chosen += " or long_weight or findings or (formulas and dithered)"
    arguments = [*files, "-q", "-p", "no:cacheprovider", "-k", f"({chosen}) and not opcheck"]
    code = f"""
import sys, pytest
from fqt.kernels import status
print(status().level)
sys.exit(pytest.main({arguments!r}))
"""
    out = run(code, level, timeout=400)
    assert out.splitlines()[0] == level


def test_the_reference_can_be_asked_for() -> None:
    code = "from fqt.kernels import status; s = status(); print(s.level, s.reason)"
    assert run(code, "reference").split() == ["reference", "FQT_KERNELS=reference"]


def test_an_unknown_level_is_an_error() -> None:
    code = """
from fqt.errors import FqtError
from fqt.kernels import status
try:
    status()
except FqtError as error:
    print(error)
"""
    assert "known: reference, portable" in run(code, "sse")
