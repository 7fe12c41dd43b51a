"""All of `make torture`: every part, one display of progress, one record.

    python results/torture/run.py [--fraction 0.01 | --cases 1] [--seed 0] [--only kills,files] [--out RECORD]

A part is a script beside this one, or a fuzzer of tests/torture, with ``main(cases, seed) -> dict``, which says
what was run, how many cases there were, and under "failures" what was wrong, with the seed that shows it again. The
status is 1 if anything was.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fqt.records import environment, write_json

HERE = Path(__file__).resolve().parent
# They are in tests/torture, imported as `tests.torture.…` from the root of the repository.
FUZZERS = ("quantizers", "layers")
CASES = {"kills": 200, "files": 1000, "growth": 10_000, "quantizers": 100_000, "layers": 10_000}
# In this order: kills and damaged files are read by forks of this process, which must not have computed anything.


def main() -> int:
    """The command; its status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, default=1.0, help="of the cases, at least one of each part")
    size.add_argument("--cases", type=int, help="of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(CASES), help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=HERE / "record.json")
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    record: dict[str, Any] = {
        "format": "fqt torture 1",
        "environment": environment([Path(__file__).name, *sys.argv[1:]]),
        "seed": options.seed,
        "parts": {},
    }
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        for name in options.only.split(","):
            record["parts"][name] = _part(name, options, bars, console)
            write_json(options.out, record)
    bad = sum(len(part["failures"]) for part in record["parts"].values())
    print(f"{bad} failures; record in {options.out}")
    return 1 if bad else 0


def _part(name: str, options: argparse.Namespace, bars: Progress, console: Console) -> dict[str, Any]:
    cases = max(1, round(options.fraction * CASES[name])) if options.cases is None else options.cases
    task = bars.add_task(name, total=cases)
    if not console.is_terminal:
        console.print(f"{name}: {cases} cases", highlight=False)
    part = importlib.import_module(f"tests.torture.{name}" if name in FUZZERS else name).main
    more: dict[str, Any] = {}
    if "progress" in inspect.signature(part).parameters:  # a part that says how far it is
        more["progress"] = lambda done: bars.update(task, completed=done)
    start = time.monotonic()
    found = part(cases, options.seed, **more)
    bars.update(task, completed=cases)
    for failure in found["failures"]:
        console.print(f"{name}: {failure}", highlight=False)
    return {**found, "seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    sys.exit(main())
