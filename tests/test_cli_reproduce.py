"""`fqt reproduce` as a user meets it: records, figures, a page; what was measured is kept."""

import json

import pytest

import fqt.cli
import fqt.cli.reproduce
from fqt.paper.measure import Reproduction
from fqt.records import read_json

ACCURACY = {
    "format": "fqt compare 1",
    "environment": {"time": "then", "commit": None, "dirty": None, "accelerators": []},
    "config": {"task": "digits", "model": "convnet", "epochs": 1},
    "baseline": "qat",
    "recipes": ["qat", "bhq4"],
    "seeds": [0],
    "measurement": {"reference": "qat", "batches": 0, "draws": 0},
    "runs": [
        {"recipe": r, "seed": 0, "accuracy": a, "train_loss": 0.1, "diverged": False,
         "loss_curve": [[5, 1.0], [9, 0.5]], "accuracy_curve": [[9, a]]}
        for r, a in (("qat", 0.75), ("bhq4", 0.625))
    ],
    "gradient": [],
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def test_figures_from_nothing(run, tmp_path):
    status, out, err = run("reproduce", "profile", "histogram", "--quick", "--steps", 4, "--out", "p")
    assert status == 0
    assert "page: p/report.html" in out
    assert "Exact variance over squared norm, 4 bits" in out
    for name in ("profile", "histogram"):
        assert (tmp_path / "p" / f"{name}.png").exists()
    page = (tmp_path / "p" / "report.html").read_text()
    assert "Paper: codes and bin sizes" in page
    assert "Run: qat, seed 0" in page  # the network's own record
    record = read_json(tmp_path / "p" / "profile.json")
    assert record["environment"]["command"]
    assert record["network"]["step"] == 2
    status, _, err = run("reproduce", "profile", "--steps", 4, "--out", "p")
    assert (status, err.count("\n")) == (2, 1)
    assert "measured with other settings" in err
    layer = read_json(tmp_path / "p" / "profile.json")["rows"][0]["layer"]
    arguments = ["histogram", "--run", "p/network", "--layer", layer, "--out", "q"]
    assert run("reproduce", *arguments)[0] == 0
    assert read_json(tmp_path / "q" / "histogram.json")["layer"] == layer
    assert not (tmp_path / "q" / "network").exists()


def test_figures_from_other_records(run, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "compare.json").write_text(json.dumps(ACCURACY))
    parts = {"a": {"a": {"value": 2.0, "error": 0.1}}}
    (tmp_path / "t.json").write_text(json.dumps({"table": {"sources": ["a"], "targets": ["a"], "parts": parts}}))
    status, out, _ = run("reproduce", "layers", "accuracy", "--comparison", "c", "--table", "t.json", "--out", "p")
    assert status == 0
    assert "62.50" in out
    assert read_json(tmp_path / "p" / "layers.json")["table"]["parts"] == parts
    assert (tmp_path / "p" / "accuracy.png").exists()
    assert not (tmp_path / "p" / "network").exists()
    assert run("reproduce", "accuracy", "--out", "p")[0] == 0  # from the record that is there


def test_what_is_missing_is_left_out_unless_asked_for(run, monkeypatch):
    monkeypatch.setattr(Reproduction, "overhead", lambda self: None)
    monkeypatch.setattr(fqt.cli.reproduce, "_show", lambda path: None)
    monkeypatch.setattr(fqt.cli.reproduce, "_measure", lambda *arguments: None)
    status, _, err = run("reproduce", "--quick", "--steps", 4, "--out", "p")
    assert status == 0
    assert "accuracy is left out: it needs --comparison" in err


def test_an_interruption_says_what_is_kept(run, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Reproduction, "overhead", interrupted)
    status, _, err = run("reproduce", "overhead", "--out", "p")
    assert status == 130
    assert "what was measured is kept in p; the same command continues" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "unknown figure 'dance'; known: variance, layers, profile, histogram, accuracy, overhead"),
        (["accuracy"], "accuracy needs --comparison"),
        (["accuracy", "--comparison", "nowhere"], "cannot read nowhere"),
        (["layers", "--table", "nowhere.json"], "cannot read nowhere.json"),
        (["profile", "--run", "nowhere"], "holds no run of `fqt train`"),
        (["profile", "--run", "x", "--steps", "3"], "leave --model and --steps out"),
        (["profile", "--data", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, arguments, message):
    status, out, err = run("reproduce", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("fqt: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*"))
