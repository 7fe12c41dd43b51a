"""Progress on the terminal: a bar where there is one, now and then a plain line where output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fqt.train.results import kinds_of
from fqt.train.task import Metric

__all__ = ["ConsoleObserver"]

QUIET_SECONDS = 20.0


class ConsoleObserver:
    """Shows a run on a console; an `fqt.train.run.Observer`.

    Args:
        console: where to write. On a terminal it gets one bar per run that stays on its line; elsewhere a line
            at the start, at the end, and every 20 seconds or so.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._task = TaskID(0)
        self._title = ""
        self._total = 0
        self._loss = "loss –"
        self._kinds: tuple[Metric, ...] = ()
        self._metrics = self._width = ""
        self._said, self._spoke = "", 0.0

    def begin(self, title: str, total: int, done: int) -> None:
        """A run of ``total`` steps starts with ``done`` of them behind it."""
        self._title, self._total = title, total
        self._loss, self._metrics, self._width = "loss –", "", ""
        if not self._console.is_terminal:
            self._say(f"{total} steps" + (f", continuing after {done}" if done else ""))
            return
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._bars.start()
        self._task = self._bars.add_task(title, total=total, completed=done, note="")

    def step(self) -> None:
        """A step was made."""
        if self._bars:
            self._bars.advance(self._task)

    def record(self, record: Mapping[str, Any]) -> None:
        """A line was added to the metrics."""
        if record["kind"] == "task":
            self._kinds = kinds_of(record["metrics"])
            return
        if record["kind"] == "train":
            self._loss = f"loss {record['loss']:.4f}"
        elif record["kind"] == "eval":
            known = [kind for kind in self._kinds if kind.name in record["metrics"]]
            self._metrics = "".join(f", {kind.say(record['metrics'][kind.name])}" for kind in known)
        elif record["kind"] == "adapt":
            self._width = f", {record['mean_width']:.2f} bits"
        elif record["kind"] == "end" and record["diverged"]:
            self._say(f"diverged at step {record['step']}, the loss is not finite")
        if self._bars:
            self._bars.update(self._task, note=self._loss + self._metrics + self._width)
        elif record["kind"] == "end" or time.monotonic() - self._spoke > QUIET_SECONDS:
            self._say(f"step {record['step']}/{self._total}, {self._loss}{self._metrics}{self._width}")

    def end(self) -> None:
        """The run is over, finished or not."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def _say(self, text: str) -> None:
        if text != self._said:
            self._console.print(f"{self._title}: {text}", highlight=False)
        self._said, self._spoke = text, time.monotonic()
