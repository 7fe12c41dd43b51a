"""The comparison with other libraries: its page says what its record says; its parts tell right from wrong."""

from __future__ import annotations

import dataclasses
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from fqt.records import read_json

RESULTS = Path(__file__).parents[1] / "results"
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(RESULTS), *sys.path])
    import comparison
    import comparison_page
    import rivals
    import trials

OURS = next(rival for rival in rivals.RIVALS if rival.key == "fqt")
FLOAT = next(rival for rival in rivals.RIVALS if rival.key == "fp32")


def test_the_page_is_the_record():
    record = read_json(comparison_page.RECORD)
    assert comparison_page.PAGE.read_text(encoding="utf-8") == comparison_page.page(record)
    assert comparison_page.RECORD.stat().st_size < 200_000


def test_the_record_has_everyone_or_says_who_was_absent():
    for name, part in read_json(comparison_page.RECORD)["parts"].items():
        assert part["environment"]["torch"]
        assert part["kernels"]["level"]
        for rival in rivals.taking_part(name):
            measured_beside_all = name == "speed" and rival is FLOAT  # the first of every pair of times
            assert measured_beside_all or rival.key in str(part["results"]) or rival.key in part["absent"]


def test_a_page_of_nothing_says_so():
    text = comparison_page.page({"parts": {}})
    assert text.count("Not measured: `python results/comparison.py --only") == len(comparison.PARTS)
    assert "On a GPU: not measured." in text


@pytest.mark.parametrize("found", ["", "0.0.1"])
def test_an_absent_rival_is_one_line_and_in_the_record(found, monkeypatch, capsys):
    def version(package):
        if not found:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(comparison.PARTS, "kept", lambda present: {"present": [rival.key for rival in present]})
    monkeypatch.delenv("SDNQ_USE_TORCH_COMPILE", raising=False)
    threads = torch.get_num_threads()
    part = comparison.measure("kept")
    torch.set_num_threads(threads)
    assert all("torchao" not in key and "sdnq" not in key for key in part["results"]["present"])
    assert {"torchao", "sdnq"} <= set(part["absent"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: sdnq")]
    assert len(printed) == 1
    assert printed[0].endswith("(pip install sdnq==0.2.8)")
    page = comparison_page.page({"parts": {"kept": {**part, "results": {"Linear": {"fp32": 4, "fqt": 1}}}}})
    assert "Left out: sdnq" in page
    assert "| fqt, `default` | 0.25 |" in page


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda x: x.clone(), "float"),
        (lambda x: x * (1 + 1e-2), "runs"),
        (lambda x: x * 2, "wrong"),
        (lambda x: x * float("nan"), "wrong"),
        (lambda x: x[:1], "wrong"),
    ],
)
def test_what_became_of_a_trial(change, status):
    want = {"output": torch.ones(3, 2), "grad_input": torch.ones(4)}
    assert trials.judge({**want, "output": change(want["output"])}, want, torch.float32)["status"] == status


def test_a_missing_gradient_is_wrong():
    assert trials.judge({}, {"grad_input": torch.ones(1)}, torch.float32)["status"] == "wrong"


def test_trials_of_ours_and_of_float(one_thread):
    torch.manual_seed(0)
    found = {
        trial.title: (trials.attempt(trial, OURS), trials.attempt(trial, FLOAT)) for trial in trials.TRIALS[:6]
    }
    assert [ours["status"] for ours, _ in found.values()] == ["runs"] * 5 + [
        "float"
    ]  # of no row nothing is rounded
    assert {plain["status"] for _, plain in found.values()} == {"float"}
    second = next(trial for trial in trials.TRIALS if trial.title == "a second derivative")
    assert trials.attempt(second, OURS)["message"].startswith("FqtError: double backward")


def test_a_message_is_one_line_without_paths():
    error = RuntimeError("\x1b[1mnot here\x1b[0m:\n  /home/somebody/lib/x.py")
    assert trials.message(error) == "RuntimeError: not here: …/x.py"


class Planted(nn.Module):
    """A Linear whose gradients get `noise` added, a bias if it is the same every time."""

    def __init__(self, linear: nn.Linear, seed: int | None) -> None:
        super().__init__()
        self.weight, self.bias, self.seed = linear.weight, linear.bias, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        y = nn.functional.linear(x, self.weight, self.bias)
        y.register_hook(
            lambda g: g + 0.01 * g.norm() / g.numel() ** 0.5 * torch.randn(g.shape, generator=generator)
        )
        return y


@pytest.mark.parametrize(("seed", "left"), [(None, 1 / 8), (1, 1.0)])
def test_noise_is_averaged_away_and_a_bias_is_not(seed, left):
    """‖mean of 64‖/‖one‖ is 1/8 up to its relative spread, 2 % for the 10⁴ entries of a gradient."""

    def convert(model):
        return nn.Sequential(Planted(model[0], seed))

    planted = dataclasses.replace(FLOAT, convert=convert)
    found = comparison.layer_errors(planted, torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), 64)
    for error in found.values():
        assert error["mean"] / error["one"] == pytest.approx(left, rel=0.15)


@pytest.mark.parametrize("role", ["grad_input", "grad_weight"])
def test_the_rounding_of_a_layer_is_seen_from_outside(role, one_thread):
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(comparison.rounding_of(FLOAT, role)(x, 0), x)
    ours = comparison.rounding_of(OURS, role)
    assert torch.equal(ours(x, 1), ours(x, 1))
    assert 1e-3 < float((ours(x, 1) - x).norm() / x.norm()) < 1e-2
    assert not torch.equal(ours(x, 1), ours(x, 2))


def test_verdicts_in_short():
    nearest = comparison.verdict(lambda x, seed: x.round(), 64, None)
    assert nearest["verdict"] == "biased"
    assert "gaussian" in nearest["convicted"]
    assert comparison.verdict(lambda x, seed: None, 64, None)["why"].startswith("FqtError")


def test_speed_is_measured_in_pairs_and_refused_to_a_wrong_result(one_thread):
    step = comparison.transformer(blocks=1, width=16, heads=2, samples=2, tokens=4)
    runner = comparison.Runner(FLOAT.contestant, step)
    found = comparison.against(runner, runner.outcome(), runner)
    assert all(len(pair) == 2 and min(pair) > 0 for pair in found["seconds"])
    assert comparison.ROUNDS[0] <= len(found["seconds"]) <= comparison.ROUNDS[1]
    wrong = {"output": runner.outcome()["output"] * 2}
    assert "off fp32's" in comparison.against(runner, wrong, runner)["why"]
