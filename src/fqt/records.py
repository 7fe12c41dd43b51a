"""Records of what was run: JSON files, JSON lines, and the stamp of where and with what they were made.

A leaf: any room may use it. Two rules hold for every file written here.

* A file that replaces another is written beside it, flushed to the disk and renamed over it, so that a full
  disk, a crash or a power cut leaves either the old file or the new one, never half of one.
* What is written is standard JSON: a float that is not finite becomes ``null`` (JSON has no NaN).
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

from fqt.errors import FqtError

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its earlier name
    import tomli as tomllib

__all__ = [
    "append_record",
    "environment",
    "read_document",
    "read_json",
    "read_records",
    "read_toml",
    "write_bytes",
    "write_json",
]


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` whole or not at all; what stood there before survives a failure.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise _cannot_write(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON document, atomically; floats that are not finite become ``null``.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    write_bytes(path, (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads one JSON document.

    Raises:
        FqtError: the file is missing or is not JSON.
    """
    return read_document(path, json.loads, "JSON")


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        FqtError: the file is missing or is not TOML.
    """
    return read_document(path, tomllib.loads, "TOML")


def read_document(path: Path, parse: Callable[[str], Any], kind: str) -> Any:
    """Reads a whole text file with `parse`, whose errors are `ValueError`; `kind` names the format.

    Raises:
        FqtError: the file is missing or is not of that format.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FqtError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise FqtError(f"{path} is not a {kind} file ({error})") from error


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one line of JSON.

    Raises:
        FqtError: the disk is full, or the file cannot be written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
    except OSError as error:
        raise _cannot_write(path, error) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines; a last line that was cut off in writing is left out.

    Raises:
        FqtError: the file is missing, or a line before the last is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FqtError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise FqtError(f"line {number} of {path} is not JSON ({error})") from error
    return records


def environment(command: Sequence[str] = ()) -> dict[str, Any]:
    """The stamp that goes with every result: software, hardware, commit, time, command.

    ``commit`` is that of the source tree `fqt` was imported from, ``None`` when it is no git checkout;
    ``dirty`` says that tracked files differed from it.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(word).name if i == 0 else word for i, word in enumerate(command)],
        "fqt": _version(),
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _finite(value: Any) -> Any:
    """``value`` with every float that JSON cannot hold replaced by ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _cannot_write(path: Path, error: OSError) -> FqtError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FqtError(
            f"the disk is full: {path} was not written, and what was saved before is intact; "
            "free some space, then continue the run"
        )
    return FqtError(f"cannot write {path}: {error.strerror or error}")


def _version() -> str | None:
    try:
        return metadata.version("fqt")
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of a git command in the source tree of `fqt`, or ``None`` where there is none."""
    here = Path(__file__).resolve().parent
    root = here.parents[1]
    if not (root / ".git").exists():  # an installed copy inside somebody else's repository is not ours
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
