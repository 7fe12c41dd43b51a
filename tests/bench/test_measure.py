"""A whole run on small cases: the record, its tables, an interruption, and the command line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import fqt
import fqt.cli
from fqt.bench import Request, failures, markdown, read_bench, results, run, terminal_tables
from fqt.bench import cases as registry
from fqt.bench.contestants import Unavailable
from fqt.bench.device import device_named as bench_device
from fqt.bench.integers import best_product
from fqt.bench.products import OPERANDS
from fqt.bench.summary import Quantiles, _floor, _ratio
from fqt.bench.timing import rounds
from fqt.errors import FqtError
from fqt.kernels.cpu import library
from fqt.kernels.integer import machine_obstacle

from .conftest import BLOCKS, IMAGES, LINEAR, MATRIX, TINY, Silent

SHAPES = ((32, 48, 64),)


def request(*cases, **more):
    return Request(cases=cases, **{"repeats": 3, "seeds": 2, "compile": False, "shapes": SHAPES, **more})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record of a run over all small cases, as returned and as read again."""
    path = tmp_path_factory.mktemp("bench") / "deep" / "bench.json"
    before = torch.get_rng_state(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fqt.bench.measure.EMULATED", math.inf)  # how fast bfloat16 is here does not matter
        made = run(request(*TINY, threads=1), path, Silent())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    return made, read_bench(path)


def test_devices():
    assert bench_device("cpu") == torch.device("cpu")
    for name, words in (("tpu", "known: cpu, cuda"), ("cpu:1", "known: cpu, cuda"), ("cuda:x", "known: cpu, cuda")):
        with pytest.raises(FqtError, match=words):
            bench_device(name)
    named = [case.name for case in registry.select([], device="cuda")]
    assert named == ["linear-4096", "linear-14336", "gpt-2048", "gpt-4096", "resnet50"]
    assert not set(named) & {case.name for case in registry.select([])}
    assert registry.select(["linear-1024"], device="cuda")[0].name == "linear-1024"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu(request):
    status, out, err = request.getfixturevalue("run")("bench", "--device", "cuda")
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "no CUDA device is there" in err


def test_what_a_gpu_s_record_says():
    """A ratio against torchao with its floor, the peak of memory, and the GPU in the line of origin."""
    row = {"status": "timed", "reason": "", "seconds": [2.0, 2.0], "autocast": True, "recipe": None}
    case = {
        "name": "linear-4096", "title": "Linear", "kind": "layer", "device": "cuda", "macs": 1,
        "floors": [{"measure": "torchao", "value": 1.1, "recipes": ["psq8d"]}],
        "contestants": [
            row | {"name": "torchao int8", "group": "torchao", "autocast": False},
            row | {"name": "psq8d bf16", "group": "ours", "recipe": "psq8d", "seconds": [1.0, 1.0],
                   "peak_bytes": 3 << 30},
        ],
    }  # fmt: skip
    stamp = dict.fromkeys(("time", "fqt", "commit", "dirty", "torch", "processor", "threads"), "x")
    gpu = {"name": "H100", "driver": None, "cuda": "12.8", "triton": "3.9.0"}
    record = {
        "cases": [case], "environment": stamp, "kernels": {"level": "avx2"}, "device": gpu, "torchao": None,
        "repeats": 2, "compile": True, "interrupted": False,
    }  # fmt: skip
    found = [r for r in results(record) if r.measure == "torchao"]
    assert [(r.ratio.median, r.floor, r.met) for r in found] == [(2.0, 1.1, True)]
    text = markdown(record)
    assert "3.00 GiB at the peak" in text
    assert "H100, driver unknown, CUDA 12.8, Triton 3.9.0" in text
    assert "avx2" not in text
    case["device"] = ""
    assert not [r for r in results(record) if r.measure == "torchao"]


def test_round_trip(whole):
    made, read = whole
    assert made == read
    assert not failures(read)
    assert read["interrupted"] is False
    assert read["environment"]["threads"] == 1
    assert read["kernels"]["level"] in ("reference", *library.LEVELS)
    assert [case["name"] for case in read["cases"]] == [case.name for case in TINY]
    for case in read["cases"]:
        timed = [row for row in case["contestants"] if row["status"] == "timed"]
        assert all(len(row["seconds"]) == 3 and min(row["seconds"]) > 0 for row in timed)
        left_out = {row["name"]: row["reason"] for row in case["contestants"] if row["status"] == "skipped"}
        assert set(left_out.values()) <= {"compilation was left out"}
    linear = read["cases"][0]
    assert linear["macs"] == 3 * 128 * 64 * 48
    assert {"fp32", "bf16", "psq8", "psq8 bf16", "shq8", "integer products"} <= {
        row["name"] for row in linear["contestants"] if row["status"] == "timed"
    }
    ours = next(row for row in linear["contestants"] if row["name"] == "psq8")
    assert sum(ours["arithmetic"].values()) == 3
    assert ours["bias"] > 0


def test_results_and_floors(whole):
    found = {(r.case, r.recipe, r.measure): r for r in results(whole[1])}
    assert found["linear", "psq8", "bf16"].met is True
    assert found["linear", "psq8", "fp32"].met is False
    assert found["linear", "psq8", "limit"].met is True
    assert found["linear", "shq8", "psq8"].met is True
    assert found["linear", "shq8", "bf16"].met is None
    assert found["linear", "psq8", "kept/fp32"].ratio == Quantiles(0.25, 0.25, 0.25)
    assert found["linear", "psq8", "kept/bf16"].ratio.median == 0.5
    assert found["matrix", "psq8", "copy"].met is True
    assert found["matrix", "psq8d", "copy"].met is False
    assert ("linear", "psq8", "psq8") not in found
    of_product = [(recipe, measure) for case, recipe, measure in found if case == "product"]
    assert of_product == [(recipe, "plain") for recipe in OPERANDS]
    assert all(found["product", recipe, "plain"].met for recipe in OPERANDS)
    assert not any(case == "blocks" and measure == "psq8" for case, _, measure in found)


def row(name, group, seconds, **more):
    return {"name": name, "group": group, "seconds": seconds, "autocast": "bf16" in name, **more}


def test_ratios_by_hand():
    case = {
        "kind": "layer",
        "macs": 300,
        "floors": [{"measure": "bf16", "value": 1.6, "recipes": ["a"]}],
        "kept": {"fp32": {"layers": 100}, "a": {"layers": 30}},
        "contestants": [
            row("fp32", "fp32", [10.0, 20.0, 30.0]),
            row("bf16", "bf16", [4.0, 8.0, 12.0]),
            row("bf16 compiled", "bf16", [3.0, 6.0, 90.0]),  # the better median
            row("a", "ours", [2.0, 5.0, 6.0], recipe="a"),
            row("a bf16", "ours", [1.0, 3.0, 5.0], recipe="a"),
            row("a bf16 compiled", "ours", [], recipe="a"),  # not timed
            row("psq8", "ours", [2.0, 4.0, 5.0], recipe="psq8"),
            row("integer products", "limit", [1.0, 1.0, 2.0], macs=200),
        ],
    }
    assert _ratio(case, "a", "bf16").median == 3.0  # of 3, 2, 18
    assert _ratio(case, "a", "fp32").median == 5.0  # of 5, 4, 5
    assert _ratio(case, "a", "limit").median == pytest.approx(0.4 * 300 / 200)  # of 1, 1/3, 2/5
    assert _ratio(case, "a", "psq8").median == 0.75  # of 1/2, 3/4, 1: the fastest form of each
    assert _ratio(case, "a", "kept/fp32").median == 0.3
    assert _ratio(case, "a", "kept/bf16") is None
    assert _floor(case, "a", "bf16") == 1.6
    assert _floor(case, "psq8", "bf16") is None
    assert Quantiles.of([0.0, 10.0]) == Quantiles(5.0, 1.0, 9.0)


def test_rounds_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = list(rounds(calls, {"a": 1, "b": 2, "c": 1}, 4))
    assert "".join(order) == "abbc" + "bbca" + "cabb" + "abbc"
    assert all(set(r) == set("abc") for r in found)


def test_tables(whole):
    record = whole[1]
    text = markdown(record)
    ratios = next(line for line in text.splitlines() if line.startswith("| Linear 64→48 | psq8 |"))
    assert "met ≥ 1e-06" in ratios
    assert "missed ≥ 1e+06" in ratios
    assert "0.25 met ≤ 0.27" in ratios
    assert "| quantizer 64×256 | psq8d |" in text
    assert "skipped |  | compilation was left out" in text
    assert "simulated products" in text or "integer products" in text
    assert "1 threads" in text
    assert text.count("| Linear 64→48 | integer products |") == 1
    tables = terminal_tables(record)
    assert [table.row_count for table in tables] == [
        len(results(record)),
        sum(len(c["contestants"]) for c in record["cases"]),
    ]


def test_a_wrong_contestant_is_reported_and_not_timed(monkeypatch, tmp_path):
    from fqt.bench import contestants

    right = contestants.quantize_

    def wrong(model, recipe):
        model = right(model, recipe)
        if recipe == fqt.Recipe("psq8"):
            model.register_forward_hook(lambda module, args, out: out + 1)
        return model

    monkeypatch.setattr(contestants, "quantize_", wrong)
    record = run(request(LINEAR), tmp_path / "b.json", Silent())
    found = {row["name"]: row for row in record["cases"][0]["contestants"]}
    assert [line.split(":")[0] for line in failures(record)] == ["linear, psq8", "linear, psq8 bf16"]
    assert found["psq8"]["seconds"] == []
    assert len(found["shq8"]["seconds"]) == 3
    assert "output is" in found["psq8"]["reason"]
    assert "| failed |" in markdown(record)
    assert not any(r.recipe == "psq8" and not r.measure.startswith(("kept", "all")) for r in results(record))


@pytest.mark.skipif(bool(machine_obstacle("cpu")), reason="no integer kernels")
def test_layers_that_lose_are_spared():
    """With `spare` each recipe takes part once more, some of its layers float."""
    record = run(request(replace(IMAGES, spare=True)), None, Silent())
    found = {row["name"]: row for row in record["cases"][0]["contestants"]}
    assert [row.get("recipe") for row in found.values()].count("psq8 spared") == 2
    assert found["psq8 spared bf16"]["autocast"]
    assert found["psq8"]["arithmetic"] == {"integer": 12}
    assert found["psq8 spared"]["arithmetic"] == {"float": 3, "integer": 3}
    assert {"psq8", "psq8 spared"} <= {r.recipe for r in results(record) if r.measure == "fp32"}


def test_what_does_not_run_is_recorded(monkeypatch):
    from fqt.bench import contestants

    def no_compiler(model, **options):
        raise RuntimeError("no C++ compiler\nwith a long explanation")

    def no_torchao(model):
        raise Unavailable("torchao is not installed")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(contestants, "_torchao", no_torchao)
    record = run(request(replace(LINEAR, recipes=("psq8",)), compile=True), None, Silent())
    found = {row["name"]: (row["status"], row["reason"]) for row in record["cases"][0]["contestants"]}
    assert found["bf16 compiled"] == ("skipped", "RuntimeError: no C++ compiler")
    assert found["psq8 bf16 compiled"][0] == "skipped"
    assert found["torchao int8"] == ("skipped", "torchao is not installed")
    assert found["psq8"][0] == "timed"
    assert not failures(record)


def test_emulated_bfloat16_is_left_out(monkeypatch):
    """Nothing in bfloat16 is verified or timed, and the record says why; the bytes kept are still counted."""
    monkeypatch.setattr("fqt.bench.measure.EMULATED", 0.0)
    record = run(request(replace(LINEAR, recipes=("psq8",)), compile=True, repeats=1), None, Silent())
    case = record["cases"][0]
    status = {row["name"]: row["status"] for row in case["contestants"]}
    left_out = {row["name"]: row["reason"] for row in case["contestants"] if row["status"] == "skipped"}
    assert set(left_out) == {"bf16", "bf16 compiled", "torchao int8", "psq8 bf16", "psq8 bf16 compiled"}
    assert all(reason.startswith("bfloat16 is emulated here: a pass in it takes ") for reason in left_out.values())
    assert {name for name, found in status.items() if found == "timed"} == {"fp32", "psq8", "integer products"}
    assert {r.measure for r in results(record)} == {"fp32", "limit", "kept/fp32", "kept/bf16", "all/bf16"}
    assert not failures(record)
    assert "bfloat16 is emulated here" in markdown(record)


def test_a_compiled_contestant(monkeypatch):
    """With the eager backend, which needs no compiler and calls what dynamo found."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager", **options))
    record = run(request(replace(LINEAR, recipes=()), compile=True, repeats=1), None, Silent())
    found = {row["name"]: row for row in record["cases"][0]["contestants"]}
    assert found["bf16 compiled"]["status"] == "timed"
    assert found["bf16 compiled"]["graph_breaks"] == 0


@pytest.mark.parametrize("stop_at", [0, 3, 12, 13])
def test_an_interrupted_run_keeps_what_it_has(stop_at, tmp_path):
    path = tmp_path / "b.json"
    record = run(request(replace(LINEAR, recipes=("psq8",)), MATRIX, repeats=6), path, Silent(stop_at))
    assert read_bench(path) == record
    assert record["interrupted"] is True
    assert "interrupted" in markdown(record)
    lengths = {len(row["seconds"]) for row in record["cases"][0]["contestants"] if row["status"] == "timed"}
    assert len(lengths) <= 1  # whole rounds only
    assert terminal_tables(record)


def test_bad_plans(tmp_path):
    with pytest.raises(FqtError, match="unknown recipe"):
        request(LINEAR, recipes=("psq8", "nope"))
    for wrong in ({"repeats": 0}, {"seeds": 1}, {"threads": 0}):
        with pytest.raises(FqtError, match="at least one round, two seeds and one thread"):
            request(LINEAR, **wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(FqtError, match="cannot write"):
        run(request(LINEAR), tmp_path / "file" / "b.json", Silent())
    path = tmp_path / "other.json"
    path.write_text("[1]")
    with pytest.raises(FqtError, match="is not the record of a bench"):
        read_bench(path)
    path.write_text(json.dumps({"kind": "bench", "format": 99}))
    with pytest.raises(FqtError, match="format 99"):
        read_bench(path)


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs `fqt bench` on the small cases in an empty folder; gives status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "CASES", TINY)
    monkeypatch.setattr("fqt.bench.CASES", TINY)
    monkeypatch.setattr(registry.select, "__defaults__", (TINY,))
    monkeypatch.setattr("fqt.bench.measure.best_product", lambda shapes, device: best_product(SHAPES))

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            fqt.cli.main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def test_the_command(command, tmp_path):
    status, out, err = command("linear", "matrix", "--quick", "--repeats", 2, "--out", "b.json", "--recipe", "psq8")
    assert status == 0  # though floors were missed
    assert "record in b.json" in out
    assert "Linear 64→48" in err
    record = read_bench(tmp_path / "b.json")
    assert [case["name"] for case in record["cases"]] == ["linear", "matrix"]
    assert {row.get("recipe") for case in record["cases"] for row in case["contestants"]} == {None, "psq8"}
    assert record["repeats"] == 2
    status, out, err = command("--table", "b.json")
    assert (status, out, err) == (0, markdown(record), "")


def test_a_wrong_result_is_status_1(command, monkeypatch):
    from fqt.bench import quantizing

    monkeypatch.setattr(
        quantizing.Quantization, "quantize", lambda self, seed: self.quantizer.quantize(self.source, 0)
    )
    status, _, err = command("matrix", "--quick", "--repeats", 1)
    assert status == 1
    assert "wrong result: matrix, psq8: biased" in err


def test_list(command):
    status, out, _ = command("--list")
    assert status == 0
    assert all(case.name in out for case in TINY)
    assert "0.27" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv-7"], "unknown case 'conv-7'; known: "),
        (["--recipe", "xyz4"], "unknown recipe 'xyz4'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
        (["--table", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, tmp_path, arguments, message):
    status, out, err = command(*arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_ctrl_c(tmp_path):
    """A real signal, in the middle of a real case."""
    path = tmp_path / "b.json"
    arguments = ["bench", "quantize", "--quick", "--repeats", "100000", "--threads", "1", "--out", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fqt", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what runs in the background
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and not path.exists():
            time.sleep(0.05)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "as far as it came" in out
    assert read_bench(path)["interrupted"] is True


def test_the_models_of_the_registry_are_what_they_say():
    model = registry.select(["transformer"])[0].workload.model()
    assert len([m for m in model.modules() if isinstance(m, nn.Linear)]) == 16
    assert BLOCKS.workload.model()(torch.zeros(2, 3, 32)).shape == (2, 3, 32)
