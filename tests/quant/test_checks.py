"""Checks A to I and R of the paper on the library. `test_mutants` shows that each can fail."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels.rounding import STOCHASTIC

from . import checks
from .cases import BITS, FAMILIES, METHODS, PAPER, build

UNBIASED = [
    *((f"{m}{b}", "heavy_rows") for m in METHODS for b in BITS),
    *((f"{m}3", f) for m in METHODS for f in FAMILIES if f != "heavy_rows"),
]
HARD = ("gaussian", "one_large", "constant_rows", "one_hot", "sparse")
DITHERED = [(f"{m}{r}", f) for m in METHODS for r in ("2d", "8d", "4x") for f in HARD]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_stochastic_rounding(bits: int) -> None:
    checks.check_a_rounding(bits)


@pytest.mark.parametrize(("name", "family"), UNBIASED)
def test_b_unbiased(name: str, family: str) -> None:
    checks.check_b_unbiased(build(name), FAMILIES[family](8, 5, 1), copies=2048)


@pytest.mark.parametrize(("name", "family"), DITHERED)
def test_b_unbiased_dithered_and_best(name: str, family: str) -> None:
    checks.check_b_unbiased(build(name), FAMILIES[family](8, 4, 2), seed=3, copies=2048)


@pytest.mark.parametrize("method", ["bhq", "shq"])
@pytest.mark.parametrize("family", ["heavy_rows", "one_hot", "constant_rows"])
def test_b_unbiased_without_guard(method: str, family: str) -> None:
    checks.check_b_unbiased(build(f"{method}3", guard=False), FAMILIES[family](8, 5, 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rounding", ["", "d"])
@pytest.mark.parametrize("bits", BITS)
def test_c_nothing_is_clipped(method: str, bits: int, rounding: str) -> None:
    for family in ("heavy_rows", "one_sided", "zero_rows"):
        checks.check_c_no_clipping(method, bits, FAMILIES[family](16, 12, 5), rounding)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_d_variance_below_the_papers_bound(method: str, bits: int) -> None:
    for family in FAMILIES.values():
        checks.check_d_bound(method, bits, family(16, 8, 2), seed=7)


@pytest.mark.parametrize("method", METHODS)
def test_d_two_thirds_of_the_bound_on_gaussian_rows(method: str) -> None:
    checks.check_d_ratio(method, 6)


@pytest.mark.parametrize("n", [3, 8, 64])
def test_d_rigorous_rule_keeps_its_closed_form(n: int) -> None:
    """One block: D/(4B²) (λ1^⅔ N^−⅓ + λ2^⅔ N^⅔)³, for small rows that add up coherently too."""
    for r, coherent in ((1e-3, False), (1e-3, True), (1e-6, True)):
        x = checks.large_row(r, n, 40)
        if coherent:
            x[1:] = x[1]
        size = (x.amax(1) - x.amin(1)).double()
        big, small = float(size[0]), float(size[1:].max())
        form = 40 / (4 * 225) * (big ** (2 / 3) * n ** (-1 / 3) + small ** (2 / 3) * n ** (2 / 3)) ** 3
        q = build("bhq4", guard=False, small_rows="rigorous")
        assert float(q.variance_bound(x)) <= form * (1 + 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rounding", ["", "d"])
def test_e_bit_law(method: str, rounding: str) -> None:
    checks.check_e_bit_law(method, rounding)


@pytest.mark.parametrize("r", checks.LARGE_ROW_TABLE)
def test_f_one_large_row(r: float) -> None:
    checks.check_f_large_row(r)


@pytest.mark.parametrize("n", [3, 4, 5, 50, 128])
@pytest.mark.parametrize("ratio", [1e-3, 1e-8])
def test_g_reflection(n: int, ratio: float) -> None:
    checks.check_g_reflection(n, ratio)


def _sizes() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    eight = torch.full((128,), 1e-3)
    eight[5::16] = 1.0
    return {
        "one of eight": torch.tensor([1.0] + [1e-8] * 7),
        "eight of 128": eight,
        "all equal": torch.ones(8),
        "all zero": torch.zeros(6),
        "one": torch.ones(1),
        "two": torch.tensor([3.0, 1.0]),
        "three": torch.tensor([3.0, 1.0, 1.0]),
        "uniform": torch.rand(37, generator=gen),
        "lognormal": torch.exp(3 * torch.randn(64, generator=gen)),
        "with zeros": torch.rand(20, generator=gen) * (torch.arange(20) % 3 > 0),
        "ties": torch.arange(30).div(7, rounding_mode="floor").float(),
    }


@pytest.mark.parametrize("case", _sizes())
def test_h_grouping(case: str) -> None:
    checks.check_h_grouping(_sizes()[case])


def test_h_known_groupings() -> None:
    q = build("bhq4", guard=False)
    assert [(g, len(s)) for g, s in checks.blocks_of(q, _sizes()["one of eight"])] == [(0, 7)]
    blocks = checks.blocks_of(q, _sizes()["eight of 128"])
    assert len(blocks) == 8
    assert all(14 <= 1 + len(small) <= 17 for _, small in blocks)
    assert sorted(large for large, _ in blocks) == list(range(5, 128, 16))


@pytest.mark.parametrize("method", ["bhq", "shq"])
def test_i_never_worse_than_plain_rows(method: str) -> None:
    checks.check_i_never_worse(method)


def test_i_one_hot_rows_without_guard() -> None:
    """The paper's counterexample: 1.25 times PSQ's step bound, and a variance where PSQ has none."""
    x = FAMILIES["one_hot"](128, 2048, 0)
    free, psq = build("bhq4", guard=False), build("psq4")
    assert 1.2 < float(free.variance_bound(x) / psq.variance_bound(x)) < 1.3
    assert abs(float(free.variance(x)) / 284 - 1) < 0.05
    assert float(build("bhq4").variance_bound(x) / psq.variance_bound(x)) <= 1.0


def test_r_same_weight_quantizer() -> None:
    checks.check_r_same_weight_quantizer()


def test_all_methods_of_the_paper_are_there() -> None:
    assert {build(f"{m}5").rounding for m in PAPER} == {STOCHASTIC}
