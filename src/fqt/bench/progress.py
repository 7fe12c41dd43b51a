"""A bench on a console: one bar on a terminal, a line per case elsewhere. Nothing here is written to a file."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ConsoleObserver:
    """Shows a run; an `fqt.bench.measure.Observer` and a context manager that clears the bar.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}"),
            console=console,
            transient=True,
        )
        self._task = TaskID(0)

    def __enter__(self) -> ConsoleObserver:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._bars.stop()

    def case(self, title: str, total: int) -> None:
        """A case with that many readings begins."""
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._task = self._bars.add_task(title, total=total, doing="")
        if not self._console.is_terminal:
            self._console.print(title, highlight=False)

    def say(self, text: str) -> None:
        """What is being done."""
        self._bars.update(self._task, doing=text)

    def advance(self) -> None:
        """A reading more."""
        self._bars.advance(self._task)
