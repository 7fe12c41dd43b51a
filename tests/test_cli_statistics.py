"""`fqt diagnose`, `fqt plan` and `fqt train --adapt` as a user meets them."""

import shutil

import pytest

from fqt.nn import load_recipe
from fqt.records import read_json, read_records
from fqt.report.runs import read_run
from fqt.train import resolve, train

FAST = ["--batch-size", "256", "--epochs", "1", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(run, monkeypatch):
    """On a screen that is wide enough for the tables."""
    monkeypatch.setenv("COLUMNS", "160")
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics") / "r"
    train(resolve("digits", None, {"batch_size": 256, "epochs": 1, "device": "cpu", "recipe": "shq4"}), folder)
    return folder


def test_diagnose_plan_train(run, trained, tmp_path):
    record = tmp_path / "d.json"
    status, out, err = run(
        "diagnose", trained, "--batches", 3, "--recipe", "shq3", "--at", "halfway", "--out", record
    )
    assert status == 0, err
    for text in ("Gradient noise by layer", "Theorem 2", "classifier", "whole gradient", "range"):
        assert text in out
    assert read_json(record)["step"] == 2
    status, out, err = run("plan", record, "--mean-width", 4, "--check", 2, "--out", "p.toml")
    assert status == 0, err
    assert "predicted" in out
    assert "measured" in out
    recipe = load_recipe(tmp_path / "p.toml")
    assert {rule.pattern for rule in recipe.rules} == {"features.0", "features.3", "features.6", "classifier"}
    assert run("train", "digits", "--recipe", "p.toml", "--out", "q", *FAST)[0] == 0


def test_by_default_the_record_lies_with_the_run(run, trained):
    assert run("diagnose", trained, "--batches", 2, "--table", 0)[0] == 0
    status, _, err = run("plan", trained)
    assert (status, "no table" in err) == (2, True)
    assert run("diagnose", trained, "--batches", 2)[0] == 0
    assert run("plan", trained, "--rho", 0.5)[0] == 0
    assert (trained / "plan.toml").exists()


def test_a_run_that_adapted_is_diagnosed_with_the_recipe_in_force(run, tmp_path):
    adapt = ["--adapt", "--adapt-every", 2, "--rho", "0.2"]
    assert run("train", "digits", "--recipe", "psq8", *adapt, "--out", "a", *FAST)[0] == 0
    changes = [r for r in read_records(tmp_path / "a" / "metrics.jsonl") if r["kind"] == "adapt"]
    assert run("diagnose", "a", "--batches", 2, "--table", 0)[0] == 0
    found = {
        o["layer"]: o["bits"]
        for o in read_json(tmp_path / "a" / "diagnosis.json")["operands"]
        if o["role"] == "grad_input"
    }
    assert found == changes[-1]["widths"]
    shown = read_run(tmp_path / "a")  # what the page of the run draws
    readings = [r for r in read_records(tmp_path / "a" / "metrics.jsonl") if r["kind"] == "monitor"]
    assert shown.rho[""] == [(r["step"], r["rho"]) for r in readings]
    assert shown.rho["classifier"] == [(r["step"], r["layers"]["classifier"]) for r in readings]
    assert shown.width[0] == (2, 8)
    assert (changes[-1]["step"], changes[-1]["mean_width"]) in shown.width


ERRORS = [
    (["diagnose", "nowhere"], "holds no run"),
    (["plan", "nowhere"], "cannot read nowhere"),
    (["train", "--recipe", "qat", "--adapt"], "give a recipe that quantizes it, such as shq8"),
    (["train", "--recipe", "psq8", "--adapt", "--rho", "-1"], "rho must be positive"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*"))


def test_a_recipe_without_gradient_quantizers_is_refused(run, trained):
    status, _, err = run("diagnose", trained, "--recipe", "qat", "--out", "d.json")
    assert (status, "no layer quantizes its gradient" in err) == (2, True)


def test_a_plan_wants_a_diagnosis(run, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "undiagnosed", ignore=shutil.ignore_patterns("diagnosis.json"))
    status, _, err = run("plan", tmp_path / "undiagnosed")
    assert (status, "run `fqt diagnose" in err) == (2, True)
    status, _, err = run("diagnose", trained.parent)
    assert (status, f"name one below it: {trained}" in err) == (2, True)
    status, _, err = run("plan", trained.parent)
    assert (status, f"name one below it: {trained}" in err) == (2, True)
    status, _, err = run("diagnose", "nosuch")
    assert (status, "holds no run of `fqt train`" in err, "--resume" in err) == (2, True, False)
    status, _, err = run("plan", trained, "--check", -1)
    assert status == 2
    status, _, err = run("train", "digits", "--rho", 0.1, *FAST)
    assert (status, "add --adapt" in err) == (2, True)


def test_a_run_that_diverged_says_so(run, trained, tmp_path):
    ended = tmp_path / "e"
    shutil.copytree(trained, ended)
    (ended / "halfway.pt").unlink()
    (ended / "metrics.sums").unlink()  # which would show that the lines are changed
    for line, message in (("", "ended without"), ('"diverged": true', "diverged at step 5 before keeping it")):
        if line:
            metrics = (ended / "metrics.jsonl").read_text()
            (ended / "metrics.jsonl").write_text(metrics.replace('"diverged": false', line))
        status, _, err = run("diagnose", ended, "--at", "halfway")
        assert (status, message in err) == (2, True), err


def test_the_page_shows_what_was_measured(run, trained, tmp_path):
    assert run("diagnose", trained, "--batches", 2, "--out", tmp_path / "s" / "diagnosis.json")[0] == 0
    assert run("certify", "psq4", "--draws", 64, "--json", tmp_path / "s" / "psq4.json")[0] == 0
    status, _, err = run("report", "s")
    assert (status, err) == (0, "")
    page = (tmp_path / "s" / "report.html").read_text()
    assert "Theorem 2: whose quantizer adds what" in page
    assert "Certificate of psq4: exact" in page
    assert f"Diagnosis: {trained} with shq4" in page


def test_tables_are_whole_on_a_narrow_screen(run, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    status, out, err = run("diagnose", trained, "--batches", 2, "--table", 0, "--out", tmp_path / "n.json")
    assert status == 0, err
    assert "…" not in out
