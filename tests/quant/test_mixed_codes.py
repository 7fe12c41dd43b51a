"""Transform, guard, ranges and codes in one call: bit for bit what the plain-torch kernels give step by step."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import fqt
from fqt.kernels import mixing
from fqt.kernels.codes import Entries, Findings
from fqt.kernels.cpu import library
from fqt.kernels.op import Implementation
from fqt.kernels.roots import inverse_cube_root, square_root
from fqt.quant import QuantizedTensor, Quantizer
from fqt.quant.best import rounded
from fqt.quant.transform import BlockHouseholder
from tests.backends import reference_only

needs_native = pytest.mark.skipif(library.status().level == "reference", reason=str(library.status()))

# One row, odd sizes, every remainder of a block and of a vector, whole blocks, strips of long rows.
SHAPES = [(1, 1), (1, 70), (2, 3), (3, 1), (3, 70), (5, 16), (17, 33), (31, 1000), (64, 65), (100, 40), (128, 257)]
SHAPES += [(130, 31), (256, 1030), (300, 701), (513, 128), (1000, 16), (127, 5000), (4, 70000)]
NAMES = ("shq8", "shq4d", "shq2", "shq5n", "bhq8", "bhq8d", "bhq3", "bhq4n")


def matrix(shape: tuple[int, int], kind: str) -> Tensor:
    """Rows of equal sizes, of sizes e⁻⁶ to e⁶, with constant ones, near the ends of the floats, or two-valued."""
    generator = torch.Generator().manual_seed(hash((shape, len(kind))) % 1000)
    x = torch.randn(shape, generator=generator)
    if kind in ("scaled", "constant"):
        x = x * torch.exp(3 * torch.randn(shape[0], 1, generator=generator))
    if kind == "constant":
        x[::3] = 0.7
        x[1::5] = 0.0
    elif kind == "extreme":
        size = torch.tensor([3.3e38, 1e-44, 1.0, 1e30, 1e-30])[torch.arange(shape[0]) % 5]
        x = x / x.abs().amax().clamp(min=1e-3) * size[:, None]
    elif kind == "flat":  # the rows of a later half take two values: mixing them costs
        x[shape[0] // 2 :] = x[shape[0] // 2 :].sign() * (
            1 + torch.rand(shape[0] - shape[0] // 2, 1, generator=generator)
        )
    return x


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def differences(a: QuantizedTensor, b: QuantizedTensor) -> list[str]:
    """What differs between two quantizations of one matrix."""
    assert a.mixing is not None
    assert b.mixing is not None
    assert (a.noise is None) == (b.noise is None)
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in ("matrix_codes", "matrix_step", "group_offset")}
    pairs |= {
        name: (getattr(a.mixing, name), getattr(b.mixing, name)) for name in ("inverse_scale", "offset", "cost")
    }
    left, right = vars(a.mixing.matrix), vars(b.mixing.matrix)
    pairs |= {name: (left[name], right[name]) for name in left if isinstance(left[name], Tensor)}
    if a.noise is not None and b.noise is not None:
        pairs |= {"row": (a.noise.row, b.noise.row), "column": (a.noise.column, b.noise.column)}
    found = [name for name, (one, other) in pairs.items() if not same(one, other)]
    return found + ([] if left.get("blocks") == right.get("blocks") else ["blocks"])


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def members(name: str) -> list[Quantizer]:
    """With and without a guard, and the other model of small rows."""
    q = fqt.quantizer(name)
    found = [q, replace(q, transform=replace(q.transform, guard=False))]
    if isinstance(q.transform, BlockHouseholder):
        found.append(replace(q, transform=replace(q.transform, small_rows="rigorous")))
    else:
        found.append(replace(q, transform=replace(q.transform, block=512)))
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per call that was asked for: whether it gave codes; the reference takes over where not."""
    seen: list[bool] = []
    for op in (mixing.hadamard_codes, mixing.householder_codes):

        def at_once(*arguments: object, right: Callable) -> object:
            before = len(seen)
            found = right(*arguments)
            if len(seen) == before:
                seen.append(True)
            return found

        def in_steps(*arguments: object, right: Callable = op.reference) -> object:
            seen.append(False)
            return right(*arguments)

        watched = [Implementation(i.backend, partial(at_once, right=i.run), i.when) for i in op.implementations]
        monkeypatch.setattr(op, "implementations", watched)
        monkeypatch.setattr(op, "reference", in_steps)
    return seen


@needs_native
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["plain", "scaled", "constant", "extreme", "flat"])
def test_one_call_is_all_steps(kind: str, name: str, calls: list[bool]) -> None:
    for number, shape in enumerate(SHAPES if kind in ("plain", "scaled") else SHAPES[::2]):
        for q in members(name):
            for x in (matrix(shape, kind), matrix(shape, kind).bfloat16()):
                if not bool(torch.isfinite(x).all()):
                    continue
                with reference_only():
                    wanted = q.quantize(x, number)
                assert not calls.pop()
                for n in (1, 2):
                    with threads(n):
                        assert not differences(q.quantize(x, number), wanted), (shape, x.dtype, n)
                    assert calls.pop(), "this went step by step"


@needs_native
def test_both_answers_of_the_guard_are_among_the_cases() -> None:
    """Else the comparison would not see a guard that never keeps, or never mixes."""
    for name in ("shq8", "bhq8"):
        cases = [matrix(shape, kind) for shape in SHAPES for kind in ("scaled", "flat")]
        kept = [fqt.quantizer(name).quantize(x, 3).mixing for x in cases]
        mixed_rows = [float((m.offset != 0).double().mean()) for m in kept if m is not None]
        assert any(m == 0 for m in mixed_rows)
        assert any(m == 1 for m in mixed_rows)
        assert any(0 < m < 1 for m in mixed_rows)


@needs_native
def test_the_comparison_sees_what_is_wrong() -> None:
    """Another seed, no guard, other rows."""
    x = matrix((300, 701), "flat")
    for name, guarded in (("shq8", "keep"), ("bhq8", "normal")):
        q = fqt.quantizer(name)
        with reference_only():
            other_seed, unguarded = q.quantize(x, 1), members(name)[1].quantize(x, 0)
            shifted = q.quantize(x.roll(1, 0), 0)
        quantized = q.quantize(x, 0)
        assert "matrix_codes" in differences(quantized, other_seed)
        assert {guarded, "matrix_step", "inverse_scale", "offset", "cost"} <= set(differences(quantized, unguarded))
        assert {"matrix_codes", "group_offset"} <= set(differences(quantized, shifted))


@needs_native
@pytest.mark.parametrize("name", ["shq4", "bhq4d"])
def test_factors(name: str, calls: list[bool]) -> None:
    """What is multiplied on the way, with its entries' noise where it belongs."""
    for shape in [(64, 33), (300, 701), (6, 40000)]:
        x = matrix(shape, "scaled")
        factor = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
        for y in (x, x.bfloat16()):
            q = fqt.quantizer(name)
            with reference_only():
                wanted = q.quantize(Entries(y, factor).values(), 2)
            assert not differences(q.quantize(y, 2, factor=factor), wanted)
            assert calls == [False, True]
            calls.clear()


@needs_native
def test_what_goes_step_by_step(calls: list[bool]) -> None:
    """Values that are not finite, float64, no entries, and members whose choices need the steps."""
    x = matrix((16, 9), "scaled")
    bad = x.clone()
    bad[3, 2] = torch.nan
    for name in ("shq8", "bhq8"):
        q = fqt.quantizer(name)
        for y in (bad, x.double(), x[:0], x[:, :0]):
            value = q.quantize(y, 0, nonfinite="propagate").dequantize()
            assert bool(torch.isnan(value).all()) == (y is bad or not y.numel())
        assert calls == [False] * 4
        calls.clear()
        with pytest.raises(fqt.FqtError, match="NaN or Inf"):
            q.quantize(bad, 0)
        exact = replace(q, transform=replace(q.transform, guard="exact"))
        for other in (
            exact,
            rounded(q.transform, q.scale, q.grid, "best"),
            replace(q, scale=replace(q.scale, mode="zero")),
        ):
            other.quantize(x, 0)
        assert calls == [False] * 3  # not finite, exact and zero; "best" rounds in a step of its own
        calls.clear()
        q.quantize(x.T, 0, axis=1)
        assert calls == [True]
        calls.clear()


def test_rounded_gives_the_same_codes_and_the_matrix() -> None:
    x = matrix((130, 64), "scaled")
    for name in NAMES:
        q = fqt.quantizer(name)
        y, quantized = q.rounded(x, 4)
        assert y.shape == x.shape
        assert not differences(q.quantize(x, 4), quantized)


def test_roots_are_right_to_two_units() -> None:
    """Against exact integers: y is within 2⁻⁵¹ of x^(−1/3) if x·y³ lies between (1 − 2⁻⁵¹)³ and (1 + 2⁻⁵¹)³."""
    x = torch.exp(200 * torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 100)
    for a, y, root in zip(x.tolist(), inverse_cube_root(x).tolist(), square_root(x).tolist(), strict=True):
        p, q = y.as_integer_ratio()
        n, d = a.as_integer_ratio()
        error = (n * p**3 - d * q**3) / (d * q**3)  # of integers: rounded once
        assert abs(error) < 3 * 2**-51
        assert math.isclose(root, math.sqrt(a), rel_tol=2**-51)


@needs_native
@pytest.mark.parametrize("level", library.LEVELS)
def test_every_level_gives_the_same_codes(level: str) -> None:
    """The comparison again, on kernels of a lower level."""
    have = library.status().level
    above = library.LEVELS.index(level) >= library.LEVELS.index(have)
    if "FQT_KERNELS" in os.environ or above or level not in library.machine_levels():
        pytest.skip(f"this runs on {have} anyway, or has no {level}")
    chosen = "test_one_call and scaled and (shq4d or bhq3) or test_factors"
    arguments = [__file__, "-q", "-p", "no:cacheprovider", "-k", chosen]
    told = "from fqt.kernels.cpu.library import status; print(status().level, flush=True)"
    code = f"import sys, pytest; {told}; sys.exit(pytest.main({arguments!r}))"
    environment = {**os.environ, "FQT_KERNELS": level}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0] == level


@needs_native
@pytest.mark.parametrize("method", ["bhq8", "shq4d"])
def test_the_range_is_taken_down_for_others(method: str) -> None:
    """Quantizing whole tensors by a range that a transform's pass came by changes nothing."""
    x = torch.randn(70, 33, generator=torch.Generator().manual_seed(0)) + 0.3
    findings = fqt.quantizer(method).quantize_knowing(x, Findings(), 1)[1]
    assert findings.range == (float(x.min()), float(x.max()))
    whole = fqt.quantizer("ptq8")
    assert torch.equal(whole.quantize_knowing(x, findings, 2)[0].codes, whole.quantize(x, 2).codes)
    scaled = fqt.quantizer(method).quantize_knowing(x, Findings(), 1, factor=torch.rand(33))[1]
    assert scaled == Findings()
