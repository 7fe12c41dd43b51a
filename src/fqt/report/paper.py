"""The paper's figures, from the records that `fqt reproduce` leaves ("fqt paper 1").

Each figure is a list of panels and a list of tables; a file gets the panels side by side, a page gets them one by
one with their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from fqt.errors import FqtError
from fqt.records import NUMBER, TEXT, check_shape, is_width
from fqt.report.figures import figure_of
from fqt.report.matrix import check_matrix, matrix_panel, matrix_table
from fqt.report.panel import Built
from fqt.report.paper_layers import histogram, profile
from fqt.report.paper_training import accuracy, overhead
from fqt.report.paper_variance import variance
from fqt.report.section import Section, Table, facts
from fqt.report.summary import runs_of

__all__ = ["accuracy_record", "check_paper", "layers_record", "paper_figure", "paper_section", "paper_tables"]

FORMAT = "fqt paper 1"


def _width_or_none(value: Any) -> bool:
    return value is None or is_width(value)


SHAPES: dict[str, dict[str, Any]] = {
    "variance": {
        "sampling": {"value": NUMBER, "error": NUMBER},
        "rows": [{"method": (str, type(None)), "bits": _width_or_none, "grad_weight": TEXT, "value": NUMBER}],
    },
    "profile": {
        "settings": {"bits": [is_width]},
        "rows": [{"layer": TEXT, "rows": (int,), "columns": (int,), "energy": NUMBER, "variance": {}}],
    },
    "histogram": {
        "layer": TEXT,
        "shape": [(int,)],
        "settings": {"bits": is_width},
        "rows": [{"method": TEXT, "counts": [(int,)], "bins": [NUMBER], "variance": NUMBER}],
    },
    "accuracy": {"baseline": TEXT, "rows": [{"recipe": TEXT, "accuracy": [NUMBER], "loss_curve": [(list,)]}]},
    "overhead": {"settings": {"convolution": {"samples": (int,)}}, "rows": [{"samples": (int,), "seconds": {}}]},
    "layers": {"table": {}},
}


def check_paper(record: Any, where: str) -> None:
    """Checks a record's form.

    Raises:
        FqtError: it is no record of `fqt reproduce`, or is damaged.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("figure") not in SHAPES:
        raise FqtError(f"{where} is no record of `fqt reproduce`")
    check_shape(record, {"environment": {}, **SHAPES[record["figure"]]}, where)
    if record["figure"] == "layers":
        check_matrix(record, where)


def paper_figure(record: Mapping[str, Any]) -> Figure:
    """The figure for a file."""
    panels = _BUILDERS[record["figure"]](record)[0]
    size = panels[0].size if record["figure"] == "layers" else None  # as large as its names need
    shown = [(panel.title, panel.draw) for panel in panels]
    return figure_of(shown, title=_title(record), note=_note(record), size=size)


def paper_tables(record: Mapping[str, Any]) -> list[Table]:
    """The numbers to read off the figure."""
    return [table for table in _BUILDERS[record["figure"]](record)[1] if table.rows]


def paper_section(name: str, record: Mapping[str, Any]) -> Section:
    """The figure for a page.

    Raises:
        FqtError: the record is damaged.
    """
    check_paper(record, name)
    panels, tables = _BUILDERS[record["figure"]](record)
    details = [facts("Settings", record.get("settings", {})), facts("Environment", record["environment"])]
    return Section(
        title=f"Paper: {_title(record)}{_task(record)}",
        note=_note(record),
        tables=[table for table in tables if table.rows],
        charts=[panel.chart() for panel in panels],
        details=[detail for detail in details if detail.rows],
        footer=name,
    )


def accuracy_record(comparison: Mapping[str, Any], source: str, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the accuracy figure, from a comparison's."""
    rows = []
    for recipe in comparison["recipes"]:
        runs = runs_of(comparison, recipe)
        if runs:
            rows.append(
                {
                    "recipe": recipe,
                    "accuracy": [run["accuracy"] for run in runs],
                    "loss_curve": runs[0]["loss_curve"],
                    "diverged": sum(run["diverged"] for run in runs),
                }
            )
    return {
        "format": FORMAT,
        "figure": "accuracy",
        "environment": dict(stamp),
        "source": {"record": source, "commit": comparison["environment"]["commit"], **comparison["config"]},
        "baseline": comparison["baseline"],
        "rows": rows,
    }


def layers_record(record: Any, source: str, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the layer × layer figure, from another record that has the table, such as a diagnosis.

    Raises:
        FqtError: it has none.
    """
    check_matrix(record, source)
    kept = {name: record[name] for name in ("table", "settings", "network") if name in record}
    return {"format": FORMAT, "figure": "layers", "environment": dict(stamp), "source": source, **kept}


def _title(record: Mapping[str, Any]) -> str:
    return {
        "variance": "gradient variance against bits",
        "profile": "variance of each layer's gradient quantizer",
        "histogram": "codes and bin sizes of one layer's gradient",
        "accuracy": "accuracy and convergence against bits",
        "overhead": "quantizer overhead against the convolution",
        "layers": "layer × layer variance",
    }[record["figure"]]


def _task(record: Mapping[str, Any]) -> str:
    network = record.get("network")
    return f" ({network.get('task')}, {network.get('model')})" if isinstance(network, dict) else ""


def _note(record: Mapping[str, Any]) -> str:
    network = record.get("network")
    if isinstance(network, dict):
        return ", ".join(
            str(part)
            for part in (
                network.get("task"),
                network.get("model"),
                f"step {network.get('step')} of a {network.get('recipe')} run",
                f"batch {network.get('batch_size')}",
            )
        )
    if record["figure"] == "accuracy":
        source = record.get("source", {})
        seeds = max((len(row["accuracy"]) for row in record["rows"]), default=0)
        return f"{source.get('task')}, {source.get('model')}, {source.get('epochs')} epochs, {seeds} seed(s)"
    if record["figure"] == "overhead":
        c = record["settings"]["convolution"]
        return (
            f"Convolution {c.get('kernel')}×{c.get('kernel')} on ({c.get('samples')}, {c.get('channels')}, "
            f"{c.get('size')}, {c.get('size')}), one thread; medians"
        )
    return ""


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Built]] = {
    "variance": variance,
    "profile": profile,
    "histogram": histogram,
    "accuracy": accuracy,
    "overhead": overhead,
    "layers": lambda record: ([matrix_panel(record)], [matrix_table(record)]),
}
