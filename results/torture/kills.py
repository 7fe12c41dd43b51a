"""Kills: every command that takes long is killed (SIGKILL) at random moments and started again, until it ends.

Half of the kills come at a random time, half at a random one of the writes: before a file is flushed, renamed,
removed or cut, or with half a line written. In the end the numbers must be those of a run that was left alone: no
line of metrics lost or doubled, the same weights, nothing half-written left behind.

A killed process is a fork of this one, which has imported everything and computed nothing: it starts in no time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by every optimizer
from torch import nn

import fqt.cli
import fqt.records
from fqt.train.checkpoint import load_checkpoint
from fqt.train.readers import read_digits

SMALL = ["--model", f"{Path(__file__).stem}:net", "--batch-size", "256", "--window", "2", "--device", "cpu"]
COMMANDS = {
    "train": ["train", "digits", "--recipe", "psq4", "--steps", "12", *SMALL],
    "adapt": ["train", "digits", "--recipe", "shq4", "--adapt", "--adapt-every", "2", "--steps", "12", *SMALL],
    "compare": [
        "compare", "digits", "--recipes", "qat,psq4", "--seeds", "1", "--steps", "6", "--batches", "2",
        "--draws", "2", *SMALL,
    ],
    "reproduce": ["reproduce", "variance", "histogram", "--quick", "--steps", "4", "--model", SMALL[1]],
}  # fmt: skip
LONGEST = 600.0  # seconds that a command may take
CLOCK = ("seconds", "time", "environment", "metrics_bytes", "source")


def net(num_classes: int) -> nn.Module:
    """A network that takes no time."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes))


def main(
    cases: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    *,
    commands: Sequence[str] = tuple(COMMANDS),
) -> dict[str, Any]:
    """Kills `cases` times, in turn each command; what was found.

    Args:
        cases: kills.
        seed: of the moments.
        progress: told how many were made.
        commands: the ones to kill.
    """
    torch.set_num_threads(1)
    read_digits("")  # with the imports below: what every fork would import anew
    random_ = random.Random(seed)
    kills, runs, failures = dict.fromkeys(commands, 0), 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = {command: _Whole(command, folder / f"{command}-whole") for command in commands}
        while sum(kills.values()) < cases:
            command = min(commands, key=lambda c: kills[c])
            found = _until_it_ends(whole[command], folder / "killed", random_)
            kills[command] += found["kills"]
            runs += 1
            failures += [f"{command}, run {runs} of seed {seed}: {line}" for line in found["failures"]]
            shutil.rmtree(folder / "killed", ignore_errors=True)
            if progress is not None:
                progress(min(cases, sum(kills.values())))
    return {"cases": sum(kills.values()), "seed": seed, "runs": runs, "kills": kills, "failures": failures}


class _Whole:
    """A run that is left alone: its numbers, how long it takes and how often it writes."""

    def __init__(self, command: str, folder: Path) -> None:
        self.command, self.folder = command, folder
        start = time.monotonic()
        status, _, self.writes = _run(command, folder)
        self.seconds = time.monotonic() - start
        if status != 0:
            raise RuntimeError(f"{command} does not work at all: status {status}")
        self.numbers = _numbers(folder)


def _until_it_ends(whole: _Whole, folder: Path, random_: random.Random) -> dict[str, Any]:
    kills = 0
    for _ in range(50):
        if random_.random() < 0.5:
            status, text, _ = _run(whole.command, folder, after=random_.uniform(0, 1.1 * whole.seconds))
        else:
            status, text, _ = _run(whole.command, folder, at=random_.randint(1, whole.writes))
        if status == 0:
            return {"kills": kills, "failures": _differences(whole, folder)}
        if status != -signal.SIGKILL:
            return {"kills": kills, "failures": [f"status {status} after {kills} kills: {text[-300:]}"]}
        kills += 1
        if kills % 6 == 0:  # a run that is killed again and again must get its turn
            status, text, _ = _run(whole.command, folder)
            bad = [] if status == 0 else [f"status {status} after {kills} kills: {text[-300:]}"]
            return {"kills": kills, "failures": bad or _differences(whole, folder)}
    return {"kills": kills, "failures": ["it does not come to an end"]}


def _run(command: str, folder: Path, *, after: float | None = None, at: int | None = None) -> tuple[int, str, int]:
    """Runs a command in a fork, perhaps killed; its status, what it said, how often it wrote."""
    arguments = [*COMMANDS[command], "--out", str(folder)]
    if command in ("train", "adapt") and (folder / "config.toml").exists():
        arguments.append("--resume")
    log = folder.with_name("log")
    counted = folder.with_name("writes")
    process = os.fork()
    if process == 0:
        _child(arguments, log, counted, at)
    deadline = time.monotonic() + (LONGEST if after is None else after)
    while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            ended = os.waitpid(process, 0)
            break
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    if after is None and at is None and status == -signal.SIGKILL:
        return 124, f"no end after {LONGEST:.0f} s", 0
    writes = int(counted.read_text()) if status == 0 else 0
    return status, log.read_text(errors="replace"), writes


def _child(arguments: list[str], log: Path, counted: Path, at: int | None) -> None:
    """The command; never returns."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    sys.argv = ["fqt", *arguments]
    writes = _watch_writes(at)
    status: Any = 1
    try:
        fqt.cli.main(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr, flush=True)
    counted.write_text(str(writes[0]))
    os._exit(int(status or 0))


def _watch_writes(at: int | None) -> list[int]:
    """Counts what changes a file, and dies at number `at`."""
    writes = [0]

    def due() -> bool:
        writes[0] += 1
        return writes[0] == at

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if due():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return call

    for name in ("fsync", "replace", "unlink", "truncate"):
        setattr(os, name, before(getattr(os, name)))
    append = fqt.records._append

    def half(path: Path, data: bytes) -> None:
        if due():
            append(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, data)

    fqt.records._append = half
    return writes


def _numbers(folder: Path) -> dict[str, Any]:
    """All that a command's record says, but for clocks, by file."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = [_still(json.loads(line)) for line in path.read_text().splitlines()]
            found[name + " read"] = [_still(line) for line in fqt.records.read_records(path)]
        elif path.suffix == ".json" and path.name != "environment.json":
            found[name] = _still(fqt.records.read_json(path))
        elif path.suffix == ".pt":
            found[name] = _still(load_checkpoint(path, ()))
        elif path.is_file():
            found[name] = path.read_bytes() if path.suffix == ".toml" else True
    return found


def _still(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _still(item) for key, item in value.items() if key not in CLOCK}
    if isinstance(value, list | tuple):
        return [_still(item) for item in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def _differences(whole: _Whole, folder: Path) -> list[str]:
    try:
        numbers = _numbers(folder)
    except Exception as error:
        return [f"cannot be read: {error!r}"]
    names = sorted({*numbers, *whole.numbers})
    return [f"{name} differs" for name in names if numbers.get(name) != whole.numbers.get(name)]
