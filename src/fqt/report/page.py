"""One web page of any number of records: self-contained, so that it can be mailed, printed and kept.

Everything is in the file: style, script, drawings. Nothing is fetched. What comes from a record is text to the
template, which escapes it; the only markup that is taken as it is are matplotlib's drawings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fqt.errors import FqtError
from fqt.files import write_bytes
from fqt.report.chart import Chart, Drawing, drawing
from fqt.report.collect import Collection, ComparisonRecord
from fqt.report.figures import comparison_charts, distinct, run_charts
from fqt.report.other import other_section
from fqt.report.runs import RunRecord
from fqt.report.section import Builder, Facts, Section, Table, facts, show
from fqt.report.tables import caption, cells, header, provenance, title
from fqt.train.results import kinds_of
from fqt.train.task import Metric

__all__ = ["render", "write_page"]


@dataclass(frozen=True)
class _Shown:
    """A section with its charts drawn."""

    section: Section
    key: str
    drawings: list[tuple[Chart, Drawing]] = field(default_factory=list)


def write_page(found: Collection, path: Path, sections: Mapping[str, Builder] | None = None) -> list[str]:
    """Writes the page of a collection, as `render` makes it; returns what it could not show, one line each.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    page, problems = render(found, sections)
    write_bytes(path, page.encode(errors="backslashreplace"))  # a name that is no text
    return problems


def render(found: Collection, sections: Mapping[str, Builder] | None = None) -> tuple[str, list[str]]:
    """The page: an overview of what ran, then curves, comparisons, other records, and each run in full.

    A record that turns out not to have the form it claims becomes a problem, on the page and in the list returned.

    Args:
        found: the records.
        sections: by format, what makes the sections of records that this room does not know
            (`fqt.paper.figures.SECTIONS`).
    """
    problems = list(found.problems)
    keys = (f"s{i}" for i in count(1))
    shown = []
    for name, build in _builders(found, sections or {}):
        try:
            section = build()
            key = next(keys)
            drawings = [(chart, drawing(chart, f"{key}c{i}")) for i, chart in enumerate(section.charts)]
        except (FqtError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            # Records come from anywhere: whatever a wrong shape raises, it is this record that is wrong.
            problems.append(f"{name} cannot be shown: it is no complete record ({type(error).__name__}: {error})")
            continue
        shown.append(_Shown(section, key, drawings))
    environment = Environment(
        loader=PackageLoader("fqt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        title=_page_title(found), overview=_overview(found), problems=problems, sections=shown
    )
    return text, problems


def _builders(found: Collection, more: Mapping[str, Builder]) -> list[tuple[str, Any]]:
    """(name, function that makes the section), in the order of the page."""
    builders: list[tuple[str, Any]] = []
    for (task, model), runs in _groups(found.runs).items():
        builders.append((f"{task}, {model}", lambda t=task, m=model, r=runs: _curves(t, m, r)))
    builders += [(c.name, lambda c=c: _comparison(c)) for c in found.comparisons]
    builders += [(name, lambda n=name, r=record: other_section(n, r, more)) for name, record in found.others]
    builders += [(run.name, lambda r=run, n=name: _run(r, n)) for name, run in distinct(found.runs).items()]
    return builders


def _page_title(found: Collection) -> str:
    tasks = [str(run.config.get("task", "")) for run in found.runs]
    tasks += [str(c.record.get("config", {}).get("task", "")) for c in found.comparisons]
    names = ", ".join(dict.fromkeys(task for task in tasks if task))
    return f"fqt report: {names}" if names else "fqt report"


def _groups(runs: Sequence[RunRecord]) -> dict[tuple[str, str], list[RunRecord]]:
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        key = (str(run.config.get("task", "unknown task")), str(run.config.get("model", "unknown model")))
        groups.setdefault(key, []).append(run)
    return groups


def _overview(found: Collection) -> Table | None:
    """Every run in one line, those inside comparisons too."""
    rows = [
        (
            run.name,
            show(run.config.get("task")),
            show(run.config.get("model")),
            show(run.config.get("recipe")),
            show(run.config.get("seed")),
            _progress(run),
            _judged(run.kinds, {name: curve[-1][1] for name, curve in run.metrics.items() if curve}),
            _number(run.loss[-1][1] if run.loss else None),
            run.state,
        )
        for run in found.runs
    ]
    for comparison in found.comparisons:
        config = comparison.record.get("config", {})
        for entry in comparison.record["runs"]:
            rows.append(
                (
                    f"{comparison.name}/{entry['recipe']}-seed{entry['seed']}",
                    show(config.get("task")),
                    show(config.get("model")),
                    show(entry["recipe"]),
                    show(entry["seed"]),
                    show(entry.get("steps")),
                    _judged(kinds_of(comparison.record["metrics"]), entry["metrics"]),
                    _number(entry["train_loss"]),
                    "diverged" if entry["diverged"] else "finished",
                )
            )
    columns = ("run", "task", "model", "recipe", "seed", "steps", "result", "training loss", "state")
    return Table("What ran", columns, rows, text_columns=4) if rows else None


def _progress(run: RunRecord) -> str:
    planned = run.planned
    return f"{run.steps}/{planned}" if run.state == "incomplete" and planned else str(run.steps)


def _judged(kinds: Sequence[Metric], values: Mapping[str, Any]) -> str:
    """What a run is judged by, with its unit; tasks differ in it."""
    return kinds[0].say(values.get(kinds[0].name)) if kinds else "–"


def _number(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, ".4f")


def _curves(task: str, model: str, runs: Sequence[RunRecord]) -> Section:
    charts = run_charts(runs)
    note = "" if charts else "None of these runs has written a line of metrics yet."
    return Section(title=f"{task}, {model}: curves", note=note, charts=charts)


def _comparison(comparison: ComparisonRecord) -> Section:
    record, rows = comparison.record, comparison.rows
    return Section(
        title=f"Comparison: {title(record)}",
        note=caption(record),
        tables=[Table("", header(record), [tuple(cells(record, row)) for row in rows])],
        charts=comparison_charts(record, rows) if rows else [],
        details=[
            facts("Configuration", record["config"]),
            facts("Measurement", record["measurement"]),
            *_notes(kinds_of(record["metrics"])),
            _environment(record["environment"]),
        ],
        footer=f"{comparison.name}. {provenance(record)}",
    )


def _run(run: RunRecord, name: str) -> Section:
    end = {"incomplete": f"incomplete, {_progress(run)} steps", "finished": "finished", "diverged": "diverged"}
    evaluations = _evaluations(run)
    columns = ("step", *(kind.heading for kind in run.kinds))
    tables = [Table("Evaluations", columns, evaluations)] if evaluations else []
    details = [facts("Configuration", run.config), facts("Recipe in full", run.recipe), *_notes(run.kinds)]
    details += [_environment(stamp) for stamp in run.stamps]
    return Section(
        title=f"Run: {name}",
        note=f"{run.name}: {end[run.state]}.",
        warnings=list(run.problems),
        tables=tables,
        details=[detail for detail in details if detail.rows],
    )


def _notes(kinds: Sequence[Metric]) -> list[Facts]:
    """How metrics that say so are computed."""
    noted = {kind.name: kind.note for kind in kinds if kind.note}
    return [facts("Metrics", noted)] if noted else []


def _evaluations(run: RunRecord) -> list[tuple[str, ...]]:
    curves = {kind.name: dict(run.metrics[kind.name]) for kind in run.kinds}
    steps = sorted({step for curve in curves.values() for step in curve})
    return [(format(step, "g"), *(kind.show(curves[kind.name].get(step)) for kind in run.kinds)) for step in steps]


def _environment(stamp: Mapping[str, Any]) -> Facts:
    step = f", continued after step {stamp['step']}" if "step" in stamp else ""
    return facts(f"Environment{step}", stamp)
