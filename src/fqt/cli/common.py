"""What all commands share: how they speak, the paths they take, and what the user typed.

Nothing that is printed, or cannot be printed, may change what a command does. Standard output and error are
replaced, while a command runs, by outlets that never raise. What the terminal's or the pipe's encoding lacks is
written in letters that it has (ρ as rho); when the reader has gone or the disk is full, the rest is dropped, and
the work goes on. That standard output could not take all (other than for want of a reader) is told at the end, with
status 1.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.measure import Measurement

from fqt.errors import FqtWarning
from fqt.files import check_path
from fqt.report.section import Table
from fqt.report.tables import rich_table
from fqt.train.ranks import claims

__all__ = ["PLACE", "complain", "keep_clear", "print_whole", "say", "steady_output", "typed"]

_IN_ASCII = {
    "–": "-", "—": "-", "−": "-", "…": "...", "±": "+-", "×": "x", "·": ".", "√": "sqrt", "‖": "||", "•": "*",
    "ρ": "rho", "σ": "sigma", "Σ": "Sum", "λ": "lambda", "⟨": "<", "⟩": ">", "≤": "<=", "≥": ">=", "≠": "!=",
    "∞": "inf", "²": "^2", "ᵀ": "^T", "→": "->", "“": '"', "”": '"', "‘": "'", "’": "'", "ĝ": "g^",
    "\u0302": "^", "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip
_BOX = {**dict.fromkeys("─━═╌╍┄┅┈┉╴╶╸╺", "-"), **dict.fromkeys("│┃║╎╏┆┇┊┋╵╷╹╻", "|")}  # corners and crossings: +
_GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN)  # the reader of a pipe; the terminal


def _in_letters(error: UnicodeError) -> tuple[str, int]:
    """For what an encoding lacks; what has no letters is written as its number."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_letters, error.object[error.start : error.end])), error.end


def _letters(character: str) -> str:
    if "\u2500" <= character <= "\u257f":
        return _BOX.get(character, "+")
    return _IN_ASCII.get(character) or character.encode("ascii", "backslashreplace").decode()


codecs.register_error("fqt", _in_letters)


class _Outlet(io.TextIOBase):
    """A text stream that drops what cannot be written, and remembers why."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream, self.error = stream, None if stream else OSError(errno.EBADF, os.strerror(errno.EBADF))
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="fqt")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream; rich draws boxes by it."""
        return getattr(self.stream, "encoding", None) or "ascii"

    def write(self, text: str) -> int:
        """Writes, or not."""
        if self.error is None and self.stream is not None:
            try:
                self.stream.write(text)
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flushes, or not."""
        if self.error is None and self.stream is not None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))

    def isatty(self) -> bool:
        """Whether a terminal that is still there reads it."""
        with contextlib.suppress(OSError, ValueError):
            return self.error is None and self.stream is not None and self.stream.isatty()
        return False

    def writable(self) -> bool:
        """As far as the writer can tell."""
        return True

    def fileno(self) -> int:
        """The stream's."""
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    @property
    def failure(self) -> str:
        """Why something is missing of what was written; empty if nothing is, or nobody reads it."""
        nobody = self.stream is None or self.error is None or self.error.errno in _GONE
        return "" if nobody or self.error is None else self.error.strerror or str(self.error)


@contextlib.contextmanager
def steady_output() -> Iterator[_Outlet]:
    """Standard output and error for the time of a command; gives the outlet of standard output."""
    before, show = (sys.stdout, sys.stderr), warnings.showwarning
    out, err = _Outlet(sys.stdout), _Outlet(sys.stderr)

    def in_one_line(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, FqtWarning):
            if claims(str(message)):
                complain(str(message))
        else:
            show(message, category, *rest, **more)

    sys.stdout, sys.stderr = out, err
    warnings.showwarning = in_one_line
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        warnings.showwarning = show


def say(text: str, end: str = "\n") -> None:
    """A line on standard output."""
    print(text, end=end)


def print_whole(table: Table) -> None:
    """A table at the width it needs: cut columns say nothing, and a pipe has no width."""
    console, shown = Console(), rich_table(table)
    needed = Measurement.get(console, console.options.update(max_width=1000), shown).maximum
    Console(width=max(console.width, needed)).print(shown)


def complain(text: str) -> None:
    """One line on standard error, whatever is in the text."""
    print("fqt: " + " ".join(text.split()), file=sys.stderr)


def keep_clear(path: Path | None) -> None:
    """If a command writes a file to where its standard output goes, what it says goes to standard error instead."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if path is not None and os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno())):
            sys.stdout.flush()
            sys.stdout = sys.stderr


class _Place(click.Path):
    """A path that may be there or not, but can be."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The path."""
        path = Path(os.fsdecode(super().convert(value, parameter, context)))
        check_path(path)
        return path


PLACE = _Place(path_type=Path)


def typed() -> list[str]:
    """What the user typed, for a record; the same for every way to start `fqt`."""
    return ["fqt", *sys.argv[1:]]
