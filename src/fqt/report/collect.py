"""What lies under the paths a reader names: runs, comparisons, and other records.

A path that is not there is an error; a record that is there and cannot be read becomes a line in
`Collection.problems`, so that one bad file does not hide the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.records import read_json
from fqt.report.runs import FILES, RunRecord, is_run, read_run
from fqt.report.summary import Row, read_comparison, summarize

__all__ = ["Collection", "ComparisonRecord", "collect"]

DEPTH = 6  # folders below a named one that are looked into
SKIPPED = ("environment.json", "compare.json")


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """A comparison: its folder, its record, and its summary."""

    name: str
    record: dict[str, Any]
    rows: list[Row]


@dataclass(kw_only=True)
class Collection:
    """The records found, in the order of the paths, folders sorted by name.

    Attributes:
        runs: single runs; those that a comparison's record already holds are not repeated.
        comparisons: records of `fqt compare`.
        others: (name, record) of every other JSON document with a "format" of fqt or an environment stamp.
        problems: what could not be read, one line each.
    """

    runs: list[RunRecord] = field(default_factory=list)
    comparisons: list[ComparisonRecord] = field(default_factory=list)
    others: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect(paths: Sequence[Path]) -> Collection:
    """Reads everything under some paths: folders of runs, of comparisons, of both, or JSON files.

    Raises:
        FqtError: a path does not exist or is no record, or there is nothing readable under any of them.
    """
    found = Collection()
    for path in dict.fromkeys(paths):
        if path.is_dir():
            _visit(path, found, DEPTH)
        elif path.name in FILES and path.is_file():
            _keep(found.runs, found, lambda path=path: read_run(path.parent))
        elif path.name == "compare.json" and path.is_file():
            _keep(found.comparisons, found, lambda path=path: _comparison(path))
        else:
            record = read_json(path)
            if not _is_record(record):
                raise FqtError(
                    f"{path} is no record of fqt: name a run's folder, a comparison's, or one above them"
                )
            found.others.append((str(path), record))
    if not (found.runs or found.comparisons or found.others):
        if found.problems:
            raise FqtError("; ".join(found.problems))
        names = ", ".join(map(str, paths))
        raise FqtError(f"{names} holds no record of fqt (config.toml, metrics.jsonl or compare.json)")
    return found


def _visit(folder: Path, found: Collection, depth: int, *, covered_run: bool = False) -> None:
    covered: set[str] = set()  # runs that a comparison's record holds, whose folders may hold other records
    if (folder / "compare.json").is_file():
        comparison = _keep(found.comparisons, found, lambda: _comparison(folder))
        if comparison is not None:
            covered = {f"{run['recipe']}-seed{run['seed']}" for run in comparison.record["runs"]}
    if is_run(folder) and not covered_run:
        _keep(found.runs, found, lambda: read_run(folder))
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        found.problems.append(f"cannot read {folder}: {error.strerror}")
        return
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir() and depth:
            _visit(path, found, depth - 1, covered_run=path.name in covered)
        elif path.suffix == ".json" and path.name not in SKIPPED and path.is_file():
            record = _keep([], found, lambda path=path: read_json(path))
            if _is_record(record):
                found.others.append((str(path), record))


def _keep(into: list[Any], found: Collection, read: Any) -> Any:
    """Reads one record into a list, or says why not."""
    try:
        record = read()
    except FqtError as error:
        found.problems.append(" ".join(str(error).split()))
        return None
    into.append(record)
    return record


def _comparison(path: Path) -> ComparisonRecord:
    record = read_comparison(path)
    return ComparisonRecord(name=str(path if path.is_dir() else path.parent), record=record, rows=summarize(record))


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and (
        str(value.get("format", "")).startswith("fqt ") or isinstance(value.get("environment"), dict)
    )
