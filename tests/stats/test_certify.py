"""Certificates: sound estimates pass, each defect gets the verdict that fits it, and the arithmetic is right.

Seeds are fixed. A certificate convicts a sound estimate with probability at most 1e-3, whatever its draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import fqt
from fqt.errors import FqtError
from fqt.kernels import ops, rounding
from fqt.stats.certification import seeding
from fqt.stats.certification.bias import row_mean
from fqt.stats.certification.inputs import Input, adversarial_inputs
from fqt.stats.certification.run import _alphas, row_noise, smallest_bias
from fqt.stats.certification.sample import Sample
from fqt.stats.certification.statistic import ColumnMoments, Significance
from tests.quant import mutants

from .defects import DEFECTS, SOUND, Case, row_stochastic, stochastic, uniform

CASES = {**DEFECTS, **SOUND}


@pytest.mark.parametrize("name", CASES)
def test_each_defect_gets_its_verdict_and_sound_estimates_pass(name: str) -> None:
    case: Case = CASES[name]
    certificate = fqt.certify(case.function, draws=case.draws, mixes=case.mixes)
    assert certificate.verdict == case.verdict, str(certificate)
    assert bool(certificate.convicted) == (case.verdict != "exact")


# Every method at three widths and with every rounding.
QUANTIZERS = "ptq2 psq2d bhq2x shq2 ptq4d psq4x bhq4 shq4d ptq8x psq8 bhq8d shq8x"


@pytest.mark.parametrize("name", QUANTIZERS.split())
def test_quantizers_are_exact(name: str) -> None:
    certificate = fqt.certify(name, draws=64)
    assert certificate.verdict == "exact", str(certificate)
    said = any("independent in threes, not jointly" in note for note in certificate.notes)
    assert said == (name[-1] in "dx")


@pytest.mark.parametrize("name", ["ptq8n", "psq4n"])
def test_nearest_is_biased(name: str) -> None:
    certificate = fqt.certify(name, draws=64)
    assert certificate.verdict == "biased"
    assert {"gaussian", "heavy tail"} <= set(certificate.convicted)
    assert any(note.startswith("deterministic") for note in certificate.notes)


def _dither_shared_by_rows(patch: pytest.MonkeyPatch) -> None:
    """In encoding as well as in decoding: every entry right, a column's errors all equal."""
    right = rounding.dither_noise

    def dither_noise(seed: Tensor, rows: int, columns: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
        row, column = right(seed, rows, columns, transposed)
        return row[:1].expand(rows, 1), column

    mutants.dither_shared_by_rows(patch)
    patch.setattr(rounding, "dither_noise", dither_noise)
    patch.setattr(ops.encode, "implementations", [])


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str, str]] = {
    "biased up": (mutants.biased_up, "psq4", "biased", "mean, each row"),
    "clips": (mutants.step_too_small, "ptq4", "biased", "no clipping"),
    "decodes off": (mutants.decode_scale_off, "psq4", "biased", "mean, each row"),
    "transform not undone": (mutants.transform_not_undone, "bhq4", "biased", "mean, each entry"),
    "dither not subtracted": (mutants.dither_not_subtracted, "psq4d", "biased", "mean, each row"),
    "dither shared by rows": (_dither_shared_by_rows, "psq4d", "dependent", "sums of errors"),
    "another row's dither subtracted": (mutants.dither_shared_by_rows, "psq4d", "dependent", "variance law"),
    "noise shared in a row": (mutants.noise_per_row, "psq4", "dependent", "sums of errors"),
    "noise too narrow": (mutants.noise_too_narrow, "psq4", "biased", "variance law"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_quantizer_with_a_planted_defect_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, quantizer, verdict, test = PLANTED[name]
    mutant(monkeypatch)
    certificate = fqt.certify(quantizer, draws=64)
    assert certificate.verdict == verdict, str(certificate)
    assert test in {f.test for found in certificate.convicted.values() for f in found}


def test_the_declared_variance_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unbiased and independent, but with two points twice as far apart as p(1 − p) says."""

    def wide(patch: pytest.MonkeyPatch) -> None:
        def rule(t: Tensor, u: Tensor) -> Tensor:
            inner = (t >= 1) & (t <= 14)  # stays in the codes' range
            far = t.floor() - 1 + 3 * (u < (t - t.floor() + 1) / 3)
            return torch.where(inner, far, stochastic(t, u))

        mutants._rounding(rule)(patch)

    wide(monkeypatch)
    found = fqt.certify("psq4", draws=64).convicted
    assert "variance law" in {f.test for f in found["gaussian"]}


@dataclass(frozen=True, kw_only=True)
class Misdeclared(fqt.Quantizer):
    """Rounds rightly, and says another variance, or bound."""

    variance_factor: float = 1.0
    bound_factor: float = 1.0

    def variance(self, *arguments: Any, **more: Any) -> Tensor:
        return self.variance_factor * super().variance(*arguments, **more)

    def variance_bound(self, *arguments: Any, **more: Any) -> Tensor:
        return self.bound_factor * super().variance_bound(*arguments, **more)


@pytest.mark.parametrize(
    ("name", "variance", "bound", "verdict"),
    [
        ("psq4", 0.5, 1.0, "dependent"),
        ("psq4", 1.1, 2.0, "dependent"),
        ("shq4d", 0.9, 1.0, "dependent"),  # one that depends on the seed, by its signs
        ("psq4", 1.0, 0.5, "dependent"),
        ("psq4", 1.0, 2.0, "exact"),
    ],
)
def test_what_variance_says_is_held_against_the_draws(
    name: str, variance: float, bound: float, verdict: str
) -> None:
    q = fqt.quantizer(name)
    choices = {field: getattr(q, field) for field in ("transform", "scale", "grid", "rounding")}
    wrong = Misdeclared(**choices, variance_factor=variance, bound_factor=bound)
    certificate = fqt.certify(wrong, draws=64)
    assert certificate.verdict == verdict, str(certificate)
    failed = {f.test for found in certificate.convicted.values() for f in found}
    assert failed == ({"declared variance"} if verdict != "exact" else set())
    if variance != 1.0:
        effect = next(f.effect for f in certificate.convicted["gaussian"])
        assert effect == pytest.approx(1 / variance - 1, abs=0.05)


@pytest.mark.parametrize("draws", [64, 256, 1024, 4096])
@pytest.mark.parametrize("alpha", [1e-2, 1e-5, 1e-8, 1e-11])
def test_the_rate_is_kept_for_every_two_valued_error(draws: int, alpha: float) -> None:
    """Exact: the probability that k ~ Binomial(M, p) is rejected is at most alpha, for p from 1e-6 to ½."""
    k = torch.arange(draws + 1, dtype=torch.float64)
    q = k / draws
    one = Significance(alpha, 1)
    for p in torch.logspace(-6, math.log10(0.5), 60, dtype=torch.float64).tolist():
        of = ColumnMoments(q - p, q * (1 - q) * draws / (draws - 1), (1 - 2 * q).abs() * (q * (1 - q) > 0), q)
        rejected = (one.score(of, 1.0, draws) > 1).numpy()
        assert binom.pmf(k.numpy(), draws, p)[rejected].sum() <= 1.01 * alpha, p


def test_without_the_extra_terms_it_would_not_be() -> None:
    """The plain z-test at 1e-8 rejects rare events far too often: what the terms are for."""
    k = torch.arange(1025, dtype=torch.float64)
    q, p = k / 1024, 0.003
    z = (q - p).abs() / (q * (1 - q) / 1023).sqrt()
    assert binom.pmf(k.numpy(), 1024, p)[(z > Significance(1e-8, 1).z).numpy()].sum() > 1e-3


def test_power_of_one_entry_is_as_stated() -> None:
    """Exact: a bias of `power.entry` at p = ½ is rejected with probability 0.99, to 0.5 %."""
    alpha, m = _alphas(adversarial_inputs(0), 1e-3, True)["entry"], 1024
    bias = smallest_bias(alpha, m, 1 / 4, 1.0)
    k = torch.arange(m + 1, dtype=torch.float64)
    q = k / m
    of = ColumnMoments(q - 0.5, q * (1 - q) * m / (m - 1), (1 - 2 * q).abs(), q)
    rejected = (alpha.score(of, 1.0, m) > 1).numpy()
    found = binom.pmf(k.numpy(), m, 0.5 + bias)[rejected].sum()
    assert 0.985 < found < 0.997
    assert bias < 0.14


def test_power_of_a_row_is_as_stated() -> None:
    """Stochastic rounding, biased by `power.row` steps in each of 128 entries: found in 291 of 300 or more.

    At a power of 0.99 that fails with probability 0.03 %, at 0.95 it would fail with 96 %.
    """
    alpha, m = _alphas(adversarial_inputs(0), 1e-3, False)["row"], 1024
    bias = smallest_bias(alpha, m, *row_noise(128))
    fraction = (torch.arange(128, dtype=torch.float64) + 0.5) / 128
    given = Input("row", (torch.arange(128) % 13 + fraction).float()[None])
    found = 0
    for trial in range(300):
        error = (uniform((m, 128), trial) < fraction).double() - fraction + bias
        found += (
            row_mean(
                Sample(given, error, torch.ones(128), torch.zeros(128).bool(), error, None, None, None, m), alpha
            ).score
            > 1
        )
    assert found >= 291, found


def test_same_arguments_same_certificate_and_the_global_generator_is_untouched() -> None:
    def with_global_noise(x: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return row_stochastic(x, 0, lambda t: torch.rand_like(t))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (fqt.certify(with_global_noise, draws=64) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert first.verdict == "exact"


def test_noise_that_ignores_the_seed_is_said_so() -> None:
    certificate = fqt.certify(DEFECTS["seed ignored"].function, draws=64)
    assert [f.test for f in certificate.convicted["gaussian"]] == ["same seed, same draw"]
    assert any(note.startswith("not repeatable") for note in certificate.notes)


def test_last_bits_that_differ_each_time_are_no_conviction() -> None:
    """As sums in no fixed order, on a device, leave them."""

    def jittered(x: Tensor, seed: int) -> Tensor:
        return row_stochastic(x, seed) * (1 + 1e-7 * torch.randn(()))

    certificate = fqt.certify(jittered, draws=64)
    assert certificate.verdict == "exact", str(certificate)


def test_inputs_share_no_generator_with_the_noise() -> None:
    """A function that makes float64 noise from its seed would be correlated with an input made from that seed."""
    for seed in (0, 1, 5):
        x = adversarial_inputs(seed)[0].x
        for dtype in (torch.float32, torch.float64):
            same = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            correlation = torch.corrcoef(torch.stack([x.flatten(), same.float().flatten()]))[0, 1]
            assert abs(correlation) < 0.15  # five standard deviations


@pytest.mark.parametrize(("relation", "where"), [(1 << 30, "bit 30"), (1 << 3, "bit 3"), (2**31 - 1, "all bits")])
def test_opposite_noise_of_related_seeds_is_found(relation: int, where: str) -> None:
    def opposite(x: Tensor, seed: int) -> Tensor:
        first = min(seed, seed ^ relation)
        u = uniform(x.shape, first)
        return row_stochastic(x, 0, lambda t: u if seed == first else 1 - u)

    found = fqt.certify(opposite, draws=64).convicted["gaussian"]
    assert any(f.test == "related seeds" and f.where.endswith(where) and f.effect < -0.3 for f in found)


@pytest.mark.parametrize("p", [0.003, 0.05, 0.5])
def test_an_odd_draw_is_no_more_surprising_than_it_is(p: float) -> None:
    """Exact: of 200 terms of 0 or 1 the bound on a tail is not below its binomial probability."""
    terms = (uniform((1000, 200), 3) < p).double()
    alpha = Significance(1e-4, 1000)
    for k in {0, round(100 * p), round(200 * p), round(400 * p), 40, 199}:
        above = -binom.logsf(k - 1, 200, p)
        below = -binom.logcdf(k, 200, p)
        # 5 %: p is estimated from 1,000 draws
        assert seeding._surprise(terms, k, 1, 1.0, alpha) <= 1.05 * above + 0.05
        assert seeding._surprise(terms, k, -1, 1.0, alpha) <= 1.05 * below + 0.05
    assert seeding._surprise(terms, 199, 1, 1.0, alpha) > alpha.log  # and yet it convicts


def test_what_mixes_is_reported_and_not_judged() -> None:
    """A left transform rightly correlates rows: judged if none is admitted, reported otherwise."""
    q = fqt.quantizer("bhq4")

    def mixed(x: Tensor, seed: int) -> Tensor:
        return q.quantize(x, seed).dequantize()

    assert fqt.certify(mixed, draws=64, mixes=0).verdict == "exact"
    assert fqt.certify(mixed, draws=64, mixes="rows").verdict == "exact"
    certificate = fqt.certify(mixed, draws=64)
    assert certificate.verdict == "dependent"
    assert {"sums of errors"} <= {f.test for found in certificate.convicted.values() for f in found}


def test_a_function_that_refuses_an_input_is_not_convicted_for_it() -> None:
    def whole_groups(x: Tensor, seed: int) -> Tensor:
        if x.shape[1] % 16:
            raise ValueError("the last axis must be divisible by 16")
        return row_stochastic(x, seed)

    certificate = fqt.certify(whole_groups, draws=64)
    assert certificate.verdict == "exact"
    assert any("not tested" in n and "odd size 7×19" in n and "divisible by 16" in n for n in certificate.notes)


def test_nan_on_an_odd_input_convicts() -> None:
    def nan_at_zero(x: Tensor, seed: int) -> Tensor:
        return row_stochastic(x, seed) * (x.abs().max() / x.abs().max())

    certificate = fqt.certify(nan_at_zero, draws=64)
    assert certificate.verdict == "biased"
    assert set(certificate.convicted) == {"all zero"}


def test_table_and_json() -> None:
    certificate = fqt.certify(DEFECTS["one random number per row"].function, draws=64, mixes=None)
    text = str(certificate)
    assert "verdict: dependent" in text
    assert "convicted on “gaussian”: " in text
    assert max(len(line) for line in text.splitlines() if "FAIL" in line or "pass" in line) < 160
    record = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
    assert record["verdict"] == "dependent"
    assert "gaussian" in record["convicted"]
    assert len(record["findings"]) == len(certificate.findings)


def test_inputs_are_what_their_names_say() -> None:
    inputs = {i.name: i for i in adversarial_inputs(0)}
    assert 0 < float(inputs["denormal"].x.abs().max()) < 2.0**-126
    assert inputs["one-hot rows"].carriers == 1
    assert inputs["gaussian"].carriers > 32
    assert inputs["sparse rows"].carriers <= 3
    assert float(inputs["non-negative"].x.min()) > 0
    assert all(torch.equal(i.x, inputs[i.name].x) for i in adversarial_inputs(0))
    assert not torch.equal(adversarial_inputs(1)[0].x, inputs["gaussian"].x)


BAD: dict[str, tuple[object, str]] = {
    "unknown name": ("bhq", "needs its bits"),
    "no such module": ("no_such_module:f", "cannot be imported"),
    "no such function": ("math:no_such", "cannot be imported"),
    "no function": ("math:pi", "is not a function"),
    "not callable": (3.0, "cannot certify 3.0"),
    "a class": (dict, "cannot certify"),
    "wrong shape": (lambda x, seed: x.flatten(), "must keep the shape"),
    "codes": (lambda x, seed: x.round().to(torch.int8), "float estimate, not torch.int8"),
    "no tensor": (lambda x, seed: x.numpy(), "must return a tensor, not ndarray"),
    "NaN": (lambda x, seed: x * math.nan, "returned NaN or Inf"),
    "raises": (lambda x, seed: x @ x, "failed on a plain"),
    "no seed": (lambda x: x, "failed on a plain"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_subjects_get_one_clear_line(name: str) -> None:
    subject, message = BAD[name]
    with pytest.raises(FqtError, match=message) as error:
        fqt.certify(subject, draws=64)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option", [{"draws": 10}, {"draws": 99.5}, {"rate": 0.0}, {"rate": 1}, {"seed": -1}, {"mixes": 2}], ids=str
)
def test_bad_options(option: dict[str, object]) -> None:
    with pytest.raises(FqtError):
        fqt.certify("psq4", **option)  # type: ignore[arg-type]


def test_command_line(capsys, tmp_path) -> None:
    import fqt.cli

    def run(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stop:
            fqt.cli.main(["certify", *arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    file = tmp_path / "c.json"
    status, out, err = run("psq4", "--draws", "64", "--json", str(file))
    assert (status, err) == (0, "")
    assert "verdict: exact" in out
    assert json.loads(file.read_text())["verdict"] == "exact"
    path = "tests.stats.defects:noise_per_row"
    assert run(path, "--draws", "64", "--mixes", "none")[0] == 1
    for arguments, message in ((("bhq",), "needs its bits"), (("psq4", "--mixes", "2"), "mixes must be")):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
