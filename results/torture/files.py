"""Files: checkpoints, configurations, records and recipes are damaged in every way, and read.

A damaged file is refused in one line, or restored to the same numbers, or taken with a warning; it never ends in a
traceback, never hangs, never runs code, and is never taken in silence for what it was. What has no digest because
it is written by hand (recipes, presets) may turn into another valid one. One case in thirty goes through the
command line, in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fqt
import fqt.cli
from fqt.bench.summary import read_bench, results
from fqt.errors import FqtError
from fqt.nn import dump_recipe, load_recipe
from fqt.paper.figures import SECTIONS
from fqt.records import JSON_SEAL, TOML_SEAL, read_json, write_json
from fqt.report import collect
from fqt.report.page import render
from fqt.stats import diagnosis_from, diagnosis_record
from fqt.train import Comparison, TrainConfig, compare, resolve, train
from fqt.train.checkpoint import SEAL
from fqt.train.run import Interrupted, Silent

SECONDS = 60  # for one file; a hang takes longer
MISSING = object()


@dataclass(frozen=True)
class Target:
    """A file and who reads it.

    Attributes:
        folder: copied for every case.
        file: in it, the one that is damaged.
        read: reads the copy; what it returns must not change unnoticed.
        command: arguments of `fqt` that read it, given the copy.
        sealed: whether a change must be noticed; otherwise only tracebacks and hangs count.
    """

    folder: Path
    file: str
    read: Callable[[Path], Any]
    command: Callable[[Path], list[str]] | None = None
    sealed: bool = True


class _Hang(BaseException):
    """A file took too long."""


def main(
    cases: int, seed: int = 0, progress: Callable[[int], None] | None = None, *, short: bool = False
) -> dict[str, Any]:
    """Reads `cases` damaged files; what was found.

    Args:
        cases: files.
        seed: of the damage.
        progress: told how many were read.
        short: only the files of a run, all in this process.
    """
    torch.set_num_threads(1)
    counts = {"refused": 0, "warned": 0, "unchanged": 0, "another": 0}
    failures: list[str] = []
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        canary = root / "canary"
        targets = _targets(root, short)
        whole = [_intact(target, root / "copy") for target in targets]
        for case in range(cases):
            random_ = random.Random(f"{seed} {case}")
            which = case % len(targets)
            target, copy = targets[which], root / "copy"
            shutil.copytree(target.folder, copy)
            how, noticeable = _damage(copy / target.file, random_, canary)
            label = f"case {case} of seed {seed} ({target.folder.name}/{target.file}, {how})"
            if case % 30 == 29 and not short and target.command is not None:
                outcome, problem = _by_command(target.command(copy), root / "log")
            else:
                outcome, problem = _in_process(target, copy, whole[which], target.sealed and noticeable)
            counts[outcome] += 1
            failures += [f"{label}: {problem}"] if problem else []
            if canary.exists():
                failures.append(f"{label}: code in the file was run")
                canary.unlink()
            shutil.rmtree(copy)
            if progress is not None:
                progress(case + 1)
    return {"cases": cases, "seed": seed, **counts, "failures": failures}


def _intact(target: Target, copy: Path) -> Any:
    """What reading gives before any damage; in a copy, since a run is continued by it."""
    shutil.copytree(target.folder, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = target.read(copy)
    shutil.rmtree(copy)
    return found


def _in_process(target: Target, copy: Path, whole: Any, noticeable: bool) -> tuple[str, str]:
    """(outcome, what is wrong)"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        signal.alarm(SECONDS)
        try:
            found = target.read(copy)
        except FqtError as error:
            return "refused", "" if "\n" not in str(error).strip() and str(error) else f"says {str(error)!r}"
        except _Hang:
            return "another", f"no end after {SECONDS} s"
        except Exception as error:
            return "another", f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
    if found == whole:
        return "unchanged", ""
    if caught:
        return "warned", ""
    return "another", "taken in silence, with other content" if noticeable else ""


def _by_command(arguments: list[str], log: Path) -> tuple[str, str]:
    """The same by `fqt` in a process of its own; whether the numbers are the same is not asked there."""
    process = os.fork()
    if process == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        signal.alarm(2 * SECONDS)  # without a handler of ours it ends the process
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            fqt.cli.main(arguments)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr, flush=True)
        os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text = log.read_text(errors="replace")
    if status == 2:
        complaints = [line for line in text.splitlines() if line.startswith("fqt: ")]
        return "refused", "" if complaints and "Traceback" not in text else f"says {text[-300:]!r}"
    return "unchanged", "" if status in (0, 1) and "Traceback" not in text else f"status {status}: {text[-300:]!r}"


def _alarm(*_: Any) -> None:
    raise _Hang


# What there is to damage


def _targets(root: Path, short: bool) -> list[Target]:
    targets = _of_a_run(root)
    if not short:
        targets.append(Target(root / "whole", "metrics.jsonl", _page(""), _report("")))
        targets += _of_a_comparison(root) + _of_records(root) + _by_hand(root)
    return targets + [_unsealed(target, root) for target in targets if target.sealed]


def _config() -> TrainConfig:
    small = {"epochs": 2, "steps": 6, "batch_size": 256, "window": 2, "recipe": "psq4", "device": "cpu", "seed": 1}
    return resolve("digits", None, {**small, "model": f"{Path(__file__).stem}:net"})


def net(num_classes: int) -> torch.nn.Module:
    """A network that takes no time."""
    nn = torch.nn
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes))


def _of_a_run(root: Path) -> list[Target]:
    """A run that was interrupted, and one that came to its end."""
    config, cut, whole = _config(), root / "cut", root / "whole"
    with contextlib.suppress(Interrupted):
        train(config, cut, observer=_Stop(5))
    train(config, whole)

    def resumed(folder: Path) -> Any:
        return _still(train(config, folder, resume=True))

    def resume(folder: Path) -> list[str]:
        return ["train", "--resume", "--out", str(folder)]

    targets = [Target(cut, name, resumed, resume) for name in ("checkpoint.pt", "metrics.jsonl", "metrics.sums")]
    targets += [Target(cut, "checkpoint.pt", resumed, resume), Target(cut, "metrics.jsonl", resumed, resume)]
    targets += [Target(cut, name, resumed, resume) for name in ("config.toml", "environment.json")]
    targets += [Target(whole, name, resumed, resume) for name in ("metrics.jsonl", "config.toml")]
    return targets


def _of_a_comparison(root: Path) -> list[Target]:
    config, compared = _config(), root / "compared"
    comparison = Comparison(
        base=config, recipes=("qat", "psq4"), seeds=(1,), batches=2, draws=2, sampling_batches=2
    )
    compare(comparison, compared)

    def again(folder: Path) -> Any:
        return json.dumps(_still(compare(comparison, folder)), sort_keys=True)

    return [
        Target(compared, "compare.json", again),
        Target(compared, "compare.json", _page("compare.json"), _report("compare.json")),
        Target(compared, "psq4-seed1/metrics.jsonl", again),
        Target(compared, "qat-seed1/halfway.pt", again),
    ]


def _of_records(root: Path) -> list[Target]:
    records = root / "records"
    records.mkdir()
    torch.manual_seed(0)
    model = fqt.quantize_(
        torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)), "psq4"
    )
    loss = lambda model, batch: model(batch).square().mean()
    found = fqt.diagnose(model, loss, [torch.randn(16, 8) for _ in range(3)], table=2)
    write_json(records / "diagnosis.json", {"run": str(root / "whole"), "at": "halfway", **diagnosis_record(found)})
    results_ = Path(__file__).resolve().parents[1]
    for source in ("paper/histogram.json", "paper/variance.json", "bench/amx-layers.json"):
        write_json(records / Path(source).name, read_json(results_ / source))
    write_json(records / "certificate.json", fqt.certify("psq4", draws=64).to_dict())

    def plan(folder: Path) -> Any:
        return fqt.plan(diagnosis_from(read_json(folder / "diagnosis.json")), mean_width=5)

    def planned(folder: Path) -> list[str]:
        return ["plan", str(folder / "diagnosis.json"), "--out", "/dev/null"]

    names = ("histogram.json", "variance.json", "certificate.json", "diagnosis.json", "amx-layers.json")
    return [
        Target(records, "diagnosis.json", plan, planned),
        Target(records, "amx-layers.json", lambda f: results(read_bench(f / "amx-layers.json"))),
        *(Target(records, name, _page(name), _report(name)) for name in names),
    ]


def _by_hand(root: Path) -> list[Target]:
    by_hand = root / "hand"
    by_hand.mkdir()
    (by_hand / "recipe.toml").write_text(
        'base = "qat"\ngrad_input = "shq4d"\n[grad_weight]\ntransform = "hadamard"\ngroup = "row"\nbits = 8\n'
        '[[rules]]\npattern = "fc"\nrecipe = "none"\n'
    )
    (by_hand / "preset.toml").write_text(
        'task = "digits"\nlr = 0.2\nsteps = 100\nmodel = "convnet"\naugment = false\n'
    )

    return [
        Target(by_hand, "recipe.toml", lambda f: dump_recipe(load_recipe(f / "recipe.toml")), sealed=False),
        Target(by_hand, "preset.toml", lambda f: resolve(None, str(f / "preset.toml"), {}), sealed=False),
    ]


def _page(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = collect([folder / name if name else folder])
        text, problems = render(found, SECTIONS)
        for problem in [*problems, *(line for run in found.runs for line in run.problems)]:  # on the page, too
            warnings.warn(problem, stacklevel=1)
        return text.replace(str(folder), "")

    return read


def _report(name: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["report", str(folder / name), "--html", "/dev/null"]


def _unsealed(target: Target, root: Path) -> Target:
    """The same as an earlier version left it, and so without a digest: only refusals and tracebacks count."""
    folder = root / f"{target.folder.name}-old"
    if not folder.exists():
        shutil.copytree(target.folder, folder)
        for path in folder.rglob("*"):
            data = path.read_bytes() if path.is_file() else b""
            if path.suffix == ".sums":
                path.unlink()
            elif path.suffix == ".json":
                path.write_text(json.dumps(read_json(path), indent=1))
            elif path.suffix == ".toml" and data.startswith(TOML_SEAL.head):
                path.write_bytes(data[len(TOML_SEAL.head) :].rpartition(TOML_SEAL.lead)[0])
            elif path.suffix == ".pt":
                torch.save({**torch.load(path), "format": "fqt checkpoint 1"}, path)
    return Target(folder, target.file, target.read, target.command, sealed=False)


class _Stop(Silent):
    """Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step(self) -> None:
        """Counts."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def _still(value: Any) -> Any:
    """Without clocks."""
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _still(item) for key, item in value.items() if key not in ("seconds", "environment")}
    return [_still(item) for item in value] if isinstance(value, list | tuple) else value


# How it is damaged


def _damage(path: Path, random_: random.Random, canary: Path) -> tuple[str, bool]:
    """Damages a file; says how, and whether its digest shows it."""
    if not path.exists():
        return "not there", False
    data = path.read_bytes()
    how = [_bit, _bit, _bit, _byte, _cut, _cut, _hole, _twice, _rubbish, _empty, _other, _swap]
    if path.suffix == ".json":
        how += [_leaf, _leaf, _leaf, _deep]
    elif path.suffix == ".toml":
        how += [_line, _line, _deep]
    elif path.suffix == ".jsonl":
        how += [_metrics, _metrics, _line, _deep]
    elif path.suffix == ".pt":
        how += [_code, _state, _state]
    chosen = random_.choice(how)
    if chosen is _code:
        path.write_bytes(_with_code(data, canary))
    else:
        path.write_bytes(chosen(data, random_))
    return chosen.__name__.strip("_"), chosen not in (_leaf, _line, _state)  # these have the right digest


def _bit(data: bytes, random_: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def _byte(data: bytes, random_: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    changed[random_.randrange(len(changed))] = random_.randrange(256)
    return bytes(changed)


def _cut(data: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(len(data) + 1)
    return data[: data.rfind(b"\n", 0, at) + 1] if random_.random() < 0.5 else data[:at]


def _hole(data: bytes, random_: random.Random) -> bytes:
    a, b = sorted(random_.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + (data[b:] if random_.random() < 0.5 else bytes(b - a) + data[b:])


def _twice(data: bytes, random_: random.Random) -> bytes:
    a, b = sorted(random_.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:]


def _rubbish(data: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(len(data) + 1)
    return (
        data[:at]
        + random_.choice([random_.randbytes(9), b"\xff\xfe", b"\0", b'"', b"\n", b"}", b"\xc3"])
        + data[at:]
    )


def _empty(data: bytes, random_: random.Random) -> bytes:
    return random_.choice([b"", b"\n", b"{}", b"[]", b"null", b"0"])


def _other(data: bytes, random_: random.Random) -> bytes:
    return random_.choice(
        [random_.randbytes(200), b"hello\n", b"\x89PNG\r\n", "ρ = \u2028".encode("utf-16"), data[::-1]]
    )


def _swap(data: bytes, random_: random.Random) -> bytes:
    lines = data.split(b"\n")
    a, b = random_.randrange(len(lines)), random_.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _deep(data: bytes, random_: random.Random) -> bytes:
    depth = random_.choice([100, 3000, 100_000])
    inside = b"[" * depth + b"]" * depth
    return random_.choice([inside, b'{"a": ' * depth, b'{"kind": ' + inside + b"}\n", b"task = " + inside])


_STRANGE = [
    None, True, -1, 0, 10**400, -(2**63), 1e308, "", "x" * 1000, "\ud800", [], [[]], {}, {"": None}, "../../x",
    [None], -0.5, "psq4", 2.5, ["qat"], {"value": "x"},
]  # fmt: skip


def _leaf(data: bytes, random_: random.Random) -> bytes:
    """Something of the wrong type, sealed as if it had been written so, or not."""
    try:
        value = json.loads(data)
    except ValueError:
        return b""
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        inside = []
        for item in level:
            keys = item.keys() if isinstance(item, dict) else range(len(item))
            places += [(item, key) for key in keys]
            inside += [item[key] for key in keys if isinstance(item[key], dict | list)]
        level = inside
    if not places:
        return b"3"
    item, key = random_.choice(places)
    strange = random_.choice([*_STRANGE, MISSING])
    if strange is MISSING:
        del item[key]
    else:
        item[key] = strange
    if isinstance(value, dict) and value.pop("seal", None) is not None:
        value.pop("sealed", None)
        return JSON_SEAL.put(json.dumps(value, indent=1)[2:-2].encode())
    return json.dumps(value, indent=1).encode()


def _metrics(data: bytes, random_: random.Random) -> bytes:
    lines = [line for line in data.split(b"\n") if line]
    if not lines:
        return b"3\n"
    at = random_.randrange(len(lines))
    lines[at] = _leaf(lines[at], random_).replace(b"\n", b"")
    return b"\n".join(lines) + b"\n"


def _line(data: bytes, random_: random.Random) -> bytes:
    """A line with another value, sealed as if it had been written so where the file was sealed."""
    sealed = data.startswith(TOML_SEAL.head)
    body = data[len(TOML_SEAL.head) :].rpartition(TOML_SEAL.lead)[0] if sealed else data
    lines = body.split(b"\n")
    at = random_.randrange(len(lines))
    name = lines[at].partition(b"=")[0] or b"x "
    values = [
        "nan",
        "inf",
        "9" * 400,
        "-1",
        "1e999",
        '""',
        '"\\u0000"',
        "[]",
        "{}",
        "true",
        "1979-05-27",
        '"' + "x" * 300 + '"',
    ]
    lines[at] = name + b"= " + random_.choice(values).encode()
    body = b"\n".join(lines)
    return TOML_SEAL.put(body) if sealed else body


class _Evil:
    """What a pickle of it does when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (open, (str(self.canary), "w"))


def _code(data: bytes, random_: random.Random) -> bytes:
    raise NotImplementedError  # stands for `_with_code`


def _with_code(data: bytes, canary: Path) -> bytes:
    """A checkpoint whose pickle would write a file, with the right digest."""
    buffer = io.BytesIO()
    torch.save({"format": "fqt checkpoint 2", "model": _Evil(canary)}, buffer)
    return _seal_archive(buffer.getvalue())


def _state(data: bytes, random_: random.Random) -> bytes:
    """A checkpoint with something of the wrong type in it, with the right digest or as of an earlier version."""
    try:
        content = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:
        return b""
    item = content
    while True:
        key = random_.choice(list(item))
        if not isinstance(item[key], dict) or not item[key] or random_.random() < 0.4:
            break
        item = item[key]
    item[key] = random_.choice([*_STRANGE[:4], "", [], {}, torch.zeros(2), torch.tensor(float("nan")), (1, 2)])
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return _seal_archive(buffer.getvalue()) if content.get("format") == "fqt checkpoint 2" else buffer.getvalue()


def _seal_archive(data: bytes) -> bytes:
    assert zipfile.is_zipfile(io.BytesIO(data))
    return SEAL.put(data[:-2] + (len(SEAL.lead) + 16).to_bytes(2, "little"))
