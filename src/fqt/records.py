"""Records of what was run: JSON files, JSON lines, and the stamp of where and with what they were made.

A leaf: any room may use it. How files are written, and what a seal is, says `fqt.files`. Three more rules hold.

* What is written is standard JSON: a float that is not finite becomes ``null`` (JSON has no NaN).
* What is written is sealed: a JSON document at its end, TOML in a comment at its end, lines in a file of their own
  beside them. A file without a seal was made by hand or by an earlier version and is taken as it is; one whose seal
  does not fit is refused.
* What is read is tame: no number that is not finite or has more than 64 bits, no nesting without end. What a record
  must hold besides is said by an example of its shape (`check_shape`).
"""

from __future__ import annotations

import datetime
import hashlib
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
import tomli_w
import torch

from fqt.errors import FqtError
from fqt.files import DIGITS, Seal, cannot_write, digest, read_bytes, shown, write_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its earlier name
    import tomli as tomllib

__all__ = [
    "MAYBE",
    "NUMBER",
    "TEXT",
    "RecordLog",
    "check_shape",
    "environment",
    "plain",
    "read_document",
    "read_json",
    "read_records",
    "read_toml",
    "write_json",
    "write_toml",
]

JSON_SEAL = Seal(
    b'{\n "sealed": "by the BLAKE2b digest of all before it, at the end",\n', b',\n "seal": "', b'"\n}\n'
)
TOML_SEAL = Seal(b"# Sealed: the last line holds the BLAKE2b digest of all before it.\n", b"# Digest: ", b"\n")
DEPTH = 64  # of nested tables and lists
NUMBER, TEXT = (int, float), (str,)
MAYBE = (*NUMBER, type(None))  # null stands for a number that was not finite


def is_width(value: Any) -> bool:
    """A leaf of a shape: bits of a code."""
    return type(value) is int and 1 <= value <= 64


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON document, atomically; floats that are not finite become ``null``. A mapping is sealed.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    if isinstance(value, Mapping) and value:
        write_bytes(path, JSON_SEAL.put(text[2:-2].encode()))  # without the brackets, which the seal brings
    else:
        write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads one JSON document, without its seal.

    Raises:
        FqtError: the file is missing, is not JSON, or is not what was written.
    """
    data = read_bytes(path)
    value = read_document(path, _parse_json, "JSON", data)
    seal = JSON_SEAL.holds(data)
    if not isinstance(value, dict):
        return value
    marks = [value.pop(name, None) for name in ("sealed", "seal")]
    if seal is False or (seal is None and marks != [None, None]):
        raise _broken(path, "its lines `sealed` and `seal`")
    return value


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a TOML file, atomically and sealed.

    Raises:
        FqtError: the disk is full, the folder cannot be written, or a value is no text.
    """
    try:
        text = tomli_w.dumps(values).encode()
    except UnicodeEncodeError as error:  # of a path that is no text, in a value
        raise FqtError(
            f"cannot write {shown(path)}: a name in it is not UTF-8; rename that file or folder"
        ) from error
    write_bytes(path, TOML_SEAL.put(text))


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        FqtError: the file is missing, is not TOML, or was sealed and is not what was written.
    """
    data = read_bytes(path)
    if TOML_SEAL.holds(data) is False:
        raise _broken(path, "its first and last line")
    return read_document(path, tomllib.loads, "TOML", data)


def read_document(path: Path, parse: Callable[[str], Any], kind: str, data: bytes | None = None) -> Any:
    """Reads a whole text file with `parse`, whose errors are `ValueError`; `kind` names the format.

    Args:
        path: of the file.
        parse: from the text to plain values.
        kind: of file.
        data: its bytes, where they have been read.

    Raises:
        FqtError: the file is missing, is not of that format, or holds what is not tame (see the module).
    """
    data = read_bytes(path) if data is None else data
    try:
        value = parse(data.decode())
        _check_tame(value)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise FqtError(f"{shown(path)} is not a {kind} file ({reason[:200]})") from error
    return value


class RecordLog:
    """A file of JSON lines that grows, and beside it (ending ``.sums``) its length and digest after every line.

    A line counts from when its sum is written: what a killed process left without one is not read.

    Args:
        path: of the lines.
        size: how many bytes of them to keep; what follows is cut off.

    Raises:
        FqtError: the first ``size`` bytes are not what was written.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path, self.sums = path, path.with_suffix(".sums")
        kept = read_bytes(path)[:size] if size else b""
        if len(kept) < size or (size and kept[-1:] != b"\n"):
            raise _cut_short(path)
        sums = _read_sums(self.sums)
        if sums is not None and size and (size, digest(kept)) not in sums:
            raise _damaged(path)
        self._digest = hashlib.blake2b(kept, digest_size=DIGITS // 2)
        self.size = size
        known = [entry for entry in sums or [(size, digest(kept))] if 0 < entry[0] <= size]
        write_bytes(self.sums, b"".join(b"%d %s\n" % entry for entry in known))
        if path.exists():
            os.truncate(path, size)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises:
            FqtError: the disk is full, or a file cannot be written.
        """
        line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        _append(self.path, line)
        self._digest.update(line)
        self.size += len(line)
        _append(self.sums, b"%d %s\n" % (self.size, self._digest.hexdigest().encode()))

    def sync(self) -> int:
        """Brings everything to the disk; returns the size in bytes."""
        for path in (self.path, self.sums):
            if path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        return self.size


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines; a last line that was cut off in writing is left out.

    Raises:
        FqtError: the file is missing, a line is no JSON object, or the file is not what its sums say.
    """
    data = read_bytes(path)
    sums = _read_sums(path.with_suffix(".sums"))
    if sums is not None:
        size, written = sums[-1] if sums else (0, digest(b""))
        if len(data) < size:
            raise _cut_short(path)
        if digest(data[:size]) != written or data[size:].count(b"\n") > 1:
            raise _damaged(path)
        data = data[:size]
    *lines, rest = data.split(b"\n")
    records = [_line(path, number, line) for number, line in enumerate(lines, start=1)]
    try:
        return [*records, _line(path, len(lines) + 1, rest)] if rest else records
    except FqtError:
        return records


def _line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = _parse_json(line.decode())
        _check_tame(value)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise FqtError(f"line {number} of {shown(path)} is not JSON ({str(error)[:200]})") from error
    return value


def _append(path: Path, data: bytes) -> None:
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        raise cannot_write(path, error) from error


def _read_sums(path: Path) -> list[tuple[int, bytes]] | None:
    """(bytes, their digest) after each line; None where there is no such file."""
    if not path.exists():
        return None
    *lines, _ = read_bytes(path).split(b"\n")  # the last line may be cut off in writing
    entries = [line.split(b" ") for line in lines]
    for number, entry in enumerate(entries, start=1):
        if len(entry) != 2 or len(entry[1]) != DIGITS or not entry[0].isdigit() or len(entry[0]) > DIGITS:
            raise FqtError(f"line {number} of {shown(path)} is damaged; put back an intact copy")
    return [(int(size), written) for size, written in entries]


def _damaged(path: Path) -> FqtError:
    return FqtError(
        f"{shown(path)} is damaged: it is not what was written (its digest is another); put back an intact copy, "
        "or start the run again with --force"
    )


def _cut_short(path: Path) -> FqtError:
    return FqtError(
        f"{shown(path)} is cut short: lines that were written are missing; put back an intact copy, or start the "
        "run again with --force"
    )


def _broken(path: Path, seal: str) -> FqtError:
    return FqtError(
        f"{shown(path)} is damaged: it is not what was written (its digest is another); put back an intact copy, "
        f"or, if you changed it on purpose, remove {seal}"
    )


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check_tame(value: Any) -> None:
    """Refuses numbers that are not finite or do not fit 64 bits, and deep nesting, by ValueError."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise RecursionError
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inside += item.values()
            elif isinstance(item, list):
                inside += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number is not finite")
            elif isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise ValueError("a number has more than 64 bits")
        level = inside


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Checks a JSON value against an example of its shape.

    Args:
        value: to check.
        shape: a dict with the names that must be there, or with ``...`` for every name that is; a list with an
            example of every item; for a leaf a tuple of types, or a function that says whether it is right.
        where: for the message.

    Raises:
        FqtError: something is missing or of another type; the message says what.
    """
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            raise FqtError(f"{where} is damaged: it is no table of names and values")
        for name, inner in shape.items() if ... not in shape else ((name, shape[...]) for name in value):
            if name not in value:
                raise FqtError(f"{where} is incomplete: it has no {name!r}")
            leaf = not isinstance(inner, (dict, list))
            check_shape(value[name], inner, f"{where}, {name}" if leaf else f"{where}: {name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise FqtError(f"{where} is damaged: it is no list")
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{i}]")
    elif callable(shape):
        if not shape(value):
            raise FqtError(f"{where} is damaged: {str(value)[:40]!r} cannot be there")
    elif not isinstance(value, shape) or (isinstance(value, bool) and bool not in shape):
        raise FqtError(f"{where} is damaged: {str(value)[:40]!r} is of the wrong type")


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


def plain(value: Any) -> Any:
    """``value`` as JSON holds it: every float that is not finite replaced by ``None``, tuples by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


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
