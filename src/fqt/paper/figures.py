"""The paper's figures, from the records that `fqt reproduce` leaves.

Each figure is a list of panels and a list of tables; a file gets the panels side by side, a page gets them one by
one with their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from fqt.paper.layers import histogram, profile
from fqt.paper.record import FORMAT, check_paper
from fqt.paper.training import accuracy, overhead
from fqt.paper.variance import variance
from fqt.report.matrix import matrix_panel, matrix_table
from fqt.report.panel import Built
from fqt.report.plot import figure_of
from fqt.report.section import Builder, Section, Table, facts

__all__ = ["SECTIONS", "paper_figure", "paper_section", "paper_tables"]


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

SECTIONS: dict[str, Builder] = {FORMAT: paper_section}
"""For `fqt.report.render`: how records of the figures become sections of a page."""
