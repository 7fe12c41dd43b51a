"""The command line as a user meets it: output, exit status, one line for an error."""

import errno
import io
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import fqt.cli
from fqt.records import write_json
from fqt.train import read_result
from fqt.train.checkpoint import load_checkpoint
from fqt.train.run import STATE, continue_config
from fqt.train.trainer import Trainer

FAST = ["--batch-size", "256", "--epochs", "1", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_train_then_resume(run, tmp_path):
    status, out, err = run("train", "digits", "--recipe", "qat", "--out", "r", *FAST)
    assert status == 0
    assert "accuracy" in out
    assert "record in r" in out
    assert "qat seed 0: 5 steps" in err
    status, again, err = run("train", "--out", "r", "--resume")
    assert (status, again, err) == (0, out, "")
    status, _, err = run("train", "digits", "--recipe", "bhq4", "--out", "r", "--resume")
    assert (status, "started with recipe = qat" in err) == (2, True)
    assert run("train", "digits", "--out", "r", *FAST)[0] == 2


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "cifar10"], True),
        (["compare", "cifar10", "--recipes", "qat"], True),
        (["train", "cifar10", "--preset", "cifar10-speedrun"], False),
        (["train", "cifar10", "--resume"], False),
        (["explain", "cifar10"], False),
    ],
)
def test_the_preset_of_a_model_is_said_where_it_would_be_trained(command, said, run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = run(*command, "--model", "speedrun", "--data", "nowhere")
    assert status == 2
    assert ("by --preset cifar10-speedrun" in err) is said


def test_default_folder(run, tmp_path):
    assert run("train", "--recipe", "none", "--seed", "3", *FAST)[0] == 0
    assert (tmp_path / "runs" / "digits-none-seed3" / "checkpoint.pt").exists()


def test_compare_and_report(run, tmp_path):
    command = ["compare", "digits", "--recipes", "qat, psq4", "--seeds", 2, "--draws", 2, "--out", "c", *FAST]
    status, out, _ = run(*command)
    assert status == 0
    assert "psq4" in out
    assert "noise" in out
    for name in (
        "compare.json", "compare.md", "compare.png", "compare.svg", "report.html", "psq4-seed1/metrics.jsonl"
    ):  # fmt: skip
        assert (tmp_path / "c" / name).exists()
    (tmp_path / "c" / "compare.md").unlink()
    assert run("report", "c")[1] == out
    assert (tmp_path / "c" / "compare.md").exists()
    status, again, err = run(*command)
    assert (status, again, err) == (0, out, "")  # nothing was trained again


def test_report_of_runs(run, tmp_path):
    for recipe in ("qat", "psq4"):
        assert run("train", "digits", "--recipe", recipe, "--out", f"r/{recipe}", *FAST)[0] == 0
    assert run("report", "r/qat")[:2] == (0, "page: r/qat/report.html\n")
    assert run("report", "r/qat", "r/psq4")[:2] == (0, "page: report.html\n")
    assert run("report", "r", "--html", "pages/p.html")[:2] == (0, "page: pages/p.html\n")
    pages = {path: (tmp_path / path).read_text() for path in ("r/qat/report.html", "report.html", "pages/p.html")}
    assert "Run: psq4" in pages["pages/p.html"]
    assert "psq4" in pages["report.html"]
    assert "psq4" not in pages["r/qat/report.html"]
    (tmp_path / "r" / "psq4" / "metrics.jsonl").write_text("")
    (tmp_path / "r" / "psq4" / "config.toml").write_text("=")
    status, out, err = run("report", "r")
    assert (status, out) == (0, "page: r/report.html\n")
    assert err.startswith("fqt: r/psq4 holds no readable run")
    assert err.count("\n") == 1
    assert run("report", "r/psq4")[:2] == (2, "")


def test_explain(run):
    status, out, _ = run("explain", "digits", "--recipe", "ptq8")
    assert out.splitlines()[0].split() == ["layer", "product", "arithmetic", "operands", "why"]
    assert not any("Product(" in line for line in out.splitlines())
    assert status == 0
    assert "grad_weight" in out


def test_explain_what_ran(run):
    status, out, _ = run("explain", "digits", "--recipe", "psq4", "--batch")
    assert status == 0
    assert out.splitlines()[0].split() == ["layer", "product", "arithmetic", "operands", "calls", "share", "why"]
    assert any(line.endswith("(share of multiplications)") for line in out.splitlines())


def test_a_model_beside_the_user(run, tmp_path):
    (tmp_path / "beside_me.py").write_text(
        "from torch import nn\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    assert run("train", "--model", "beside_me:net", "--recipe", "psq4", "--out", "r", *FAST)[0] == 0


ERRORS = [
    (["train", "sudoku"], "unknown task 'sudoku'; known: digits, fashion-mnist, cifar10, imagefolder"),
    (["train", "--recipe", "xyz4"], "unknown recipe 'xyz4'; known:"),
    (["train", "--model", "lenet"], "unknown model 'lenet'; known: convnet"),
    (["train", "--preset", "best"], "unknown preset 'best'; known:"),
    (["train", "--schedule", "weekly"], "unknown schedule 'weekly'; known: cosine"),
    (["train", "--epochs", "many"], "Invalid value for '--epochs'"),
    (["train", "--epochs", "0"], "epochs must be at least 1"),
    (["train", "--frobnicate"], "No such option"),
    (["train", "cifar10"], "--data"),
    (["train", "cifar10", "--data", "nowhere"], "there is no folder nowhere; --data must name"),
    (["train", "imagefolder", "--data", "."], "train/CLASS"),
    (["train", "--resume", "--out", "nowhere"], "holds no run to continue"),
    (["train", "--resume", "--force", "--out", "x"], "give one of them"),
    (["train", "--device", "cuda:77"], "cannot use the device"),
    (["compare", "--recipes", "qat,nope"], "unknown recipe 'nope'"),
    (["compare", "--recipes", ","], "at least one recipe"),
    (["compare", "--seeds", "0"], "0 is not in the range"),
    (["train", "torch:relu"], "task torch:relu: cannot be called"),
    (["compare", "sudoku"], "unknown task 'sudoku'"),
    (["explain", "sudoku"], "unknown task 'sudoku'"),
    (["report", "nowhere"], "cannot read nowhere"),
    (["report", "."], "holds no record of fqt"),
    (["report"], "Missing argument 'RUN...'"),
    (["train", "--out", "n" * 300], "File name too long; name another place"),
    (["train", "--out", "d/" * 2500], "File name too long"),
    (["train", "--recipe", "n" * 300 + ".toml"], "File name too long"),
    (["train", "--preset", "n/" * 2500 + ".toml"], "File name too long"),
    (["train", "cifar10", "--data", "n" * 300], "File name too long"),
    (["train", "--seed", "9" * 400], "seed must have less than 64 bits"),
    (["report", "n" * 300], "File name too long"),
    (["dance"], "No such command"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, arguments, message):
    status, out, err = run(*arguments)
    assert status == 2
    assert message in err
    assert err.startswith("fqt: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.rglob("*"))  # nothing was left behind


def test_a_file_where_a_folder_should_be(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for command in ("train", "compare", "reproduce"):
        status, out, err = run(command, "--out", "file/x")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "Not a directory" in err
    assert (tmp_path / "file").read_text() == "mine"


class Stream(io.TextIOWrapper):
    """A standard stream of another encoding, or one that fails."""

    def __init__(self, encoding="utf-8", fails=0):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
        self.fails = fails

    def write(self, text):
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        return super().write(text)

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def _streams(monkeypatch, out, err):
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def _main(*arguments):
    with pytest.raises(SystemExit) as stop:
        fqt.cli.main(list(arguments))
    return stop.value.code


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_encoding_changes_a_status(tmp_path, monkeypatch, encoding):
    monkeypatch.chdir(tmp_path)
    out, err = _streams(monkeypatch, Stream(encoding), Stream(encoding))
    small = [
        "--recipes",
        "qat,psq4",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--draws",
        "2",
        "--batches",
        "2",
        "--out",
        "ρ",
    ]
    assert _main("compare", "digits", *small, *FAST) == 0
    assert ("noise ρ" if encoding == "utf-8" else "noise rho") in out.text()
    assert "report.html" in out.text()
    assert _main("report", "ρ/nowhere") == 2
    assert ("ρ/nowhere" if encoding == "utf-8" else "rho/nowhere") in err.text()
    assert (sys.stdout, sys.stderr) == (out, err)


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 1), (errno.EPIPE, 0), (errno.EIO, 0)])
def test_output_that_cannot_be_written(tmp_path, monkeypatch, number, status):
    """A full disk is told in one line; a reader that has gone changes nothing. The record is whole."""
    monkeypatch.chdir(tmp_path)
    _, err = _streams(monkeypatch, Stream(fails=number), Stream())
    assert _main("train", "--recipe", "none", "--out", "r", *FAST) == status
    said = [line for line in err.text().splitlines() if line.startswith("fqt: ")]
    assert said == (["fqt: cannot write to standard output: No space left on device"] if status else [])
    _streams(monkeypatch, Stream(), Stream(fails=number))
    assert _main("train", "--recipe", "none", "--out", "s", *FAST) == 0
    assert read_result(tmp_path / "r").metrics == read_result(tmp_path / "s").metrics


def test_a_page_on_standard_output_is_the_page_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "a.json", {"format": "fqt other", "rows": [{"a": 1}]})
    with open(tmp_path / "page.html", "w") as out:
        _, err = _streams(monkeypatch, out, Stream())
        assert _main("report", "a.json", "--html", f"/dev/fd/{out.fileno()}") == 0
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")
    assert "page: /dev/fd/" in err.text()


def test_python_m_fqt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fqt", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fqt, version {fqt.__version__}\n"


def test_divergence_is_status_1(run):
    status, _, err = run("train", "--recipe", "none", "--lr", "1e30", "--momentum", "0", "--out", "r", *FAST)
    assert status == 1
    assert "diverged at step" in err


def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path):
    folder = tmp_path / "r"
    command = [sys.executable, "-m", "fqt", "train", "digits", "--epochs", "4000", "--out", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what runs in the background
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and not (folder / "checkpoint.pt").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
    trainer = Trainer(continue_config(folder, {}))
    trainer.restore(load_checkpoint(folder / "checkpoint.pt", STATE))
    assert 20 <= trainer.step < 80_000
    before = trainer.step
    trainer.train_step(next(trainer.batches()))
    assert trainer.step == before + 1


@pytest.mark.parametrize(
    ("command", "how"), [("train", "command with --resume (not --force)"), ("compare", "command (not --force)")]
)
def test_a_stopped_training_says_how_its_command_continues(run, monkeypatch, command, how):
    def stopped(*_, **__):
        raise fqt.train.Interrupted(Path("r"), 3)

    monkeypatch.setattr(fqt.cli.training, command, stopped)
    status, _, err = run(command, "digits", "--out", "r", *FAST)
    assert (status, err.strip()) == (
        130,
        f"fqt: interrupted after step 3; the state is saved in r; the same {how} continues",
    )


def test_help_and_version(run):
    assert "compare" in run("--help")[1]
    assert {"--recipes", "--resume"} <= set(run("compare", "-h")[1].split())
    assert fqt.__version__ in run("--version")[1]


def test_importing_fqt_loads_no_compiler() -> None:
    """Dynamo takes as long as all the rest."""
    code = "import sys, fqt; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
