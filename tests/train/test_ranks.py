"""Runs of two processes beside runs of one, and continued by another number of them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

import fqt.cli
from fqt.errors import FqtError
from fqt.train import resolve, train
from fqt.train.checkpoint import load_checkpoint
from fqt.train.ranks import Ranks, peers
from fqt.train.run import STATE
from fqt.train.trainer import Trainer

from .conftest import Interruption
from .worker import CUT, REFUSED, config, main


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Their folder, and what each of two processes saw; one start of them for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.raises(fqt.train.Interrupted):
        train(config("floats"), folder / "from one", observer=Interruption(3))
    multiprocessing.spawn(main, args=(str(folder),), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _state(folder):
    return load_checkpoint(folder / "checkpoint.pt", STATE)


def _close(left, right, tolerance=1e-5):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=tolerance, atol=tolerance)


def _same_lines(left, right):
    """Records whose counts are equal and whose losses are so up to the order of sums."""
    assert [line["kind"] for line in left] == [line["kind"] for line in right]
    for a, b in zip(left, right, strict=True):
        assert {k: v for k, v in a.items() if k != "loss"} == {k: v for k, v in b.items() if k != "loss"}
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)


ALONE = [
    ("floats", ["floats", "shards", "from one"]),
    ("parts", ["parts", "shards in parts"]),
    ("a sample left", ["a sample left"]),
]


@pytest.mark.parametrize(("name", "together"), ALONE)
def test_floats_do_not_see_how_many_processes_there_are(two, tmp_path, metrics, name, together):
    """Losses, counts, weights and averages; also sharded, in parts, and where a batch is too small to be shared."""
    folder, _ = two
    train(config(name), tmp_path)
    for other in together:
        _same_lines(metrics(tmp_path), metrics(folder / other))
        for part in ("model", "average"):
            if _state(tmp_path)[part] is not None:
                _close(_state(tmp_path)[part], _state(folder / other)[part])


def test_every_target_counts_once(two, metrics):
    lines = metrics(two[0] / "quantized")
    assert [line["samples"] for line in lines if line["kind"] == "train"] == [500, 500]
    assert {line["samples"] for line in lines if line["kind"] == "eval"} == {500}


def test_a_score_of_shards(two, tmp_path, metrics):
    train(config("views", fsdp=False), tmp_path)
    scores = [metrics(folder)[-2]["metrics"]["accuracy of views"] for folder in (tmp_path, two[0] / "views")]
    assert scores[0] == scores[1]


def test_processes_draw_noise_of_their_own(two):
    """The first draws what a process alone does."""
    first, second = (rank["noise"] for rank in two[1])
    Trainer(config("quantized"))
    assert torch.equal(torch.rand(3), first)
    assert not torch.equal(first, second)


def test_processes_keep_the_same_weights(two):
    for name in ("quantized", "messages", "adapted"):
        first, second = (rank["weights"][name] for rank in two[1])
        _close(first["model"], second["model"], 0)
        assert first["recipe"] == second["recipe"]
    assert first["recipe"] is not None
    assert two[1][0]["results"] == two[1][1]["results"]


def test_shards_train_as_replicas_do(two):
    """With the same draws: quantization is of whole parameters. Convolutions add up in another memory layout."""
    for name, tolerance in (("quantized", 1e-5), ("batch norm", 1e-3)):
        replica, shards = (_state(two[0] / run) for run in (name, f"{name} shards"))
        _close(replica["model"], shards["model"], tolerance)


@pytest.mark.parametrize("name", CUT)
def test_an_interrupted_run_continues_to_the_same_numbers(two, metrics, name):
    folder, _ = two
    assert metrics(folder / name) == metrics(folder / f"{name}, cut")
    _close(_state(folder / name)["model"], _state(folder / f"{name}, cut")["model"], 0)


def test_one_process_continues_the_run_of_two(two, metrics):
    """The sums of both are in its next window; the record says how many there were."""
    folder = two[0] / "from two"
    assert len(_state(folder)["others"]) == 1
    train(config("quantized"), folder, resume=True)
    here, there = metrics(folder), metrics(two[0] / "quantized")
    assert [line.get("samples") for line in here] == [line.get("samples") for line in there]
    assert here[:2] == there[:2]
    stamps = fqt.records.read_json(folder / "environment.json")
    assert (stamps["started"]["processes"], stamps["continued"][0]["processes"]) == (2, 1)
    assert _state(folder)["others"] == []


def test_messages_and_widths_are_in_the_record(two, metrics):
    assert _state(two[0] / "messages")["messages"]["count"] >= 4
    assert {"monitor", "adapt"} <= {line["kind"] for line in metrics(two[0] / "adapted")}


def test_items_are_dealt_out(two):
    """As many to each; what is there for the exchange only does not count."""
    assert two[1][0]["dealt"] == [[(0, True), (2, True)], [(0, True), (2, True)], []]
    assert two[1][1]["dealt"] == [[(1, True), (3, True)], [(1, True), (2, False)], []]


def test_what_processes_cannot_do_is_refused_on_all_of_them(two):
    words = (
        "already holds a run",
        "multiple of the 2 processes",
        "leave accumulate at 1",
        "--device cuda",
        "biased",
    )
    for rank in two[1]:
        assert all(word in said for word, said in zip(words, rank["refused"], strict=True))
        assert len(rank["refused"]) == len(REFUSED)
        assert "these have [124, 125] images to predict" in rank["unequal"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"fsdp": True}, "--no-fsdp"), ({"messages": "psq8"}, "this is one")],
)
def test_one_process_cannot_do_it(tmp_path, changes, words):
    with pytest.raises(FqtError, match=words):
        train(config("floats", **changes), tmp_path / "run")


@pytest.mark.parametrize("changes", [{"adapt": True}, {"messages": "psq8"}])
def test_shards_are_not_measured_and_send_floats(changes):
    with pytest.raises(FqtError, match="whole models"):
        resolve("digits", None, {"fsdp": True, **changes})


def test_other_commands_are_one_processs(run, monkeypatch):
    """Said by the first process to say it."""
    said = []
    monkeypatch.setattr("fqt.cli.started", lambda: 2)
    monkeypatch.setattr("fqt.cli.claims", lambda line: not said and not said.append(line))
    assert run("compare", "digits") == (
        2,
        "",
        "fqt: only `fqt train` runs on several processes: start `fqt compare` without torchrun\n",
    )
    assert run("compare", "digits") == (2, "", "")


def test_torchrun_ends_once(tmp_path):
    """Both processes stop after one step, one saves and says so, though the signal comes twice."""
    words = f"--nproc-per-node 2 --standalone -m fqt train digits --epochs 9999 --recipe none --out {tmp_path}/run"
    environment = {**os.environ, "PYTHONPATH": str(Path(fqt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *words.split()]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as torchrun:
        try:
            metrics = tmp_path / "run" / "metrics.jsonl"
            while torchrun.poll() is None and not (metrics.exists() and '"train"' in metrics.read_text()):
                time.sleep(0.1)
        finally:
            torchrun.send_signal(signal.SIGTERM)
        _, said = torchrun.communicate()
    (step,) = re.findall(r"^fqt: interrupted after step (\d+);", said, re.MULTILINE)
    state = _state(tmp_path / "run")
    assert state["step"] == int(step)
    assert len(state["others"]) == 1
    assert "fqt: another" not in said


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer"), FqtError),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), FqtError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_a_broken_connection_is_told_from_a_fault(error, kind):
    with pytest.raises(kind) as caught, peers():
        raise error
    assert ("another process" in str(caught.value)) == (kind is FqtError)


def test_alone_there_is_nobody_to_wait_for():
    with Ranks.start() as ranks:
        assert ranks == Ranks()
        assert ranks.lead(lambda: 3) == 3
        assert ranks.everyone(3) == [3]
        assert ranks.total(torch.tensor([2.0, 3.0])) == [2, 3]
        assert (ranks.any(True), ranks.any(False)) == (True, False)
