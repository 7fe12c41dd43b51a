"""variance() is the variance: against many draws, against a dense oracle, and never above variance_bound().

z-tests at 6σ, 2e-9 each for normal means (below 2e-8 with 150 draws); seeds fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqt import Quantizer

from . import oracles
from .cases import FAMILIES, METHODS, PLAIN, SUFFIXES, build, gaussian, plain_id
from .estimators import energies, energy_errors, inverse_of, z_score

TRANSFORMED = [f"{m}{b}{s}" for m in ("bhq", "shq") for b in (3,) for s in ("d", "x")]
STEPS = {"": 1, "d": 2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["ptq3", "psq4", "psq8", "bhq4", "shq2", "shq8", "ptq4d", "psq4x"])
def test_equals_the_empirical_variance(name: str, family: str) -> None:
    """Copies side by side are independent draws here: stochastic, or dithered with rows left alone (then only
    the mean is tested; shared row dither moves the estimate of its error, which is why 4096 copies)."""
    q, x = build(name), FAMILIES[family](8, 6, 4)
    expected = float(q.variance(x, seed=2))
    bound = float(q.variance_bound(x, seed=2))
    if expected <= 1e-4 * bound:  # all on codes but for a last bit
        assert float(energies(q, x, 64, seed=2).mean()) <= 1e-3 * bound
    elif q.rounding_name == "stochastic":
        assert abs(z_score(energies(q, x, 4096, seed=2), expected)) < 6
    else:
        assert abs(z_score(energy_errors(q, x, 150))) < 6


@pytest.mark.parametrize("family", ["heavy_rows", "constant_rows", "sparse"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_equals_the_empirical_variance_over_seeds(name: str, family: str) -> None:
    """Each seed draws its own signs and dither, and names its own variance."""
    assert abs(z_score(energy_errors(build(name), FAMILIES[family](8, 6, 4), 150))) < 6


@pytest.mark.parametrize("q", [q for q in PLAIN if q.rounding_name in ("stochastic", "best")], ids=plain_id)
def test_every_scale_equals_the_empirical_variance(q: Quantizer) -> None:
    x = FAMILIES["heavy_rows"](6, 7, 9)
    if q.rounding_name == "stochastic":
        assert abs(z_score(energies(q, x, 4096), float(q.variance(x)))) < 6
    else:
        assert abs(z_score(energy_errors(q, x, 150))) < 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_dense_oracle(method: str, n: int, family: str) -> None:
    """float32 against float64 and dense matrices: positions differ by 1e-5 of a step, p(1 − p) by as much."""
    x = FAMILIES[family](n, 48, 3)
    for bits in (2, 4, 8):
        for rounding, head in STEPS.items():
            truth = oracles.dense(method, x.double().numpy(), 2**bits - head, seed=5)
            q = build(f"{method}{bits}{rounding}")
            bound = truth.bound(1 / 4 if rounding == "" else 1 / 12)
            assert float(q.variance_bound(x, seed=5)) == pytest.approx(bound, rel=1e-4)
            exact = truth.variance() if rounding == "" else bound
            assert float(q.variance(x, seed=5)) == pytest.approx(exact, rel=2e-3, abs=1e-4 * bound)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 37, 100, 130, 300])
@pytest.mark.parametrize("method", ["bhq", "shq"])
def test_any_number_of_rows_against_the_matrix_read_off(method: str, n: int) -> None:
    """For every N: undoing is linear with some S⁻¹, and variance() is Σ ‖S⁻¹e_i‖² step_i² Σ p(1 − p) with that
    S⁻¹ and y = S (x − z), both dense."""
    x = FAMILIES["heavy_rows"](n, 16, 6).double()
    q = build(f"{method}4", guard=False)
    qx = q.quantize(x, seed=8)
    inverse = inverse_of(qx).numpy()
    y = np.linalg.solve(inverse, (x - x.amin(1, keepdim=True)).numpy())
    truth = oracles.Dense(inverse, inverse, y, y.min(1), (y.max(1) - y.min(1)) / 15)
    assert np.allclose(truth.step, qx.matrix_step.numpy()[:, 0], rtol=1e-6)
    assert float(q.variance(x, seed=8)) == pytest.approx(truth.variance(), rel=1e-6)
    scaled = inverse / np.linalg.norm(inverse, axis=1, keepdims=True)
    assert np.allclose(scaled @ scaled.T, np.eye(n), atol=1e-9), "S⁻¹ is a scale times an orthogonal matrix"


shapes = st.tuples(st.integers(1, 19), st.integers(1, 9))


@given(
    shape=shapes,
    family=st.sampled_from(sorted(FAMILIES)),
    name=st.sampled_from([f"{m}{b}{s}" for m in METHODS for b in (2, 3, 4, 8) for s in (*SUFFIXES, "n")]),
    guard=st.sampled_from([True, False, "exact"]),
    exponent=st.integers(-60, 60),
    seed=st.integers(-(2**63), 2**64),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_bound_is_never_below(
    shape: tuple[int, int], family: str, name: str, guard: bool | str, exponent: int, seed: int
) -> None:
    x = FAMILIES[family](*shape, 1) * 2.0**exponent
    q = build(name, guard=True if name.endswith("x") and guard == "exact" else guard)
    exact, bound = float(q.variance(x, seed)), float(q.variance_bound(x, seed))
    assert 0 <= exact <= bound * (1 + 1e-12)


@given(
    shape=shapes,
    family=st.sampled_from(sorted(FAMILIES)),
    method=st.sampled_from(["bhq", "shq"]),
    rounding=st.sampled_from(["", "d"]),
    bits=st.integers(2, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_guards_never_lose_to_plain_rows(
    shape: tuple[int, int], family: str, method: str, rounding: str, bits: int, seed: int
) -> None:
    x = FAMILIES[family](*shape, seed)
    psq = build(f"psq{bits}{rounding}")
    guarded = build(f"{method}{bits}{rounding}")
    assert guarded.variance_bound(x, seed) <= psq.variance_bound(x, seed) * (1 + 1e-9)
    exact = build(f"{method}{bits}{rounding}", guard="exact")
    assert exact.variance(x, seed) <= psq.variance(x, seed) * (1 + 1e-9)


@pytest.mark.parametrize("mode", ["zero", "symmetric"])
@pytest.mark.parametrize("method", ["bhq", "shq"])
def test_guards_compare_the_scale_in_use(method: str, mode: str) -> None:
    """The step bounds that the guard compares are those of the scale mode that then quantizes."""
    for family in FAMILIES.values():
        for seed in range(6):
            x = family(9, 12, seed)
            guarded, psq = build(f"{method}4", mode=mode), build("psq4", mode=mode)
            assert guarded.variance_bound(x, seed) <= psq.variance_bound(x, seed) * (1 + 1e-9)


def test_nearest_has_no_variance() -> None:
    x = gaussian(8, 9)
    for name in ("ptq4n", "psq4n", "bhq4n"):
        q = build(name)
        assert float(q.variance(x, None)) == 0
        assert torch.equal(q.quantize(x).dequantize(), q.quantize(x, 7).dequantize())


def test_is_a_float64_scalar() -> None:
    for q in (build("shq4"), build("psq4x"), build("ptq4d")):
        for value in (q.variance(gaussian(4, 4)), q.variance_bound(gaussian(4, 4))):
            assert value.dtype == torch.float64
            assert value.ndim == 0
