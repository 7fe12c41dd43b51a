"""Theorem 2's layer × layer table as a picture, from any record with a "table" as `table_record` makes it:

    {"sources": [name, …], "targets": [name, …], "parts": {source: {target: {"value": number, "error": number}}}}

A part is what a source's quantizers add to the variance of a target's parameter gradient. Sources are in the order
of the backward pass; the picture turns them round, so that both axes go from input to loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from fqt.records import MAYBE, TEXT, check_shape
from fqt.report.chart import Point, labelled, plain
from fqt.report.panel import Panel
from fqt.report.section import Table
from fqt.report.summary import number

__all__ = ["LABELS", "check_matrix", "is_matrix", "matrix_panel", "matrix_table"]

DECADES = 6  # below the largest part; what is smaller is drawn as the smallest
LABELS = 48  # names on an axis
Part = tuple[float, float]


def is_matrix(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a layer × layer table."""
    table = record.get("table")
    return isinstance(table, Mapping) and "sources" in table and "parts" in table


def check_matrix(record: Any, where: str) -> None:
    """Checks the form of a record's table.

    Raises:
        FqtError: there is no table, or it is damaged.
    """
    check_shape(record, {"table": {"sources": [TEXT], "targets": [TEXT], "parts": {}}}, where)
    table = record["table"]
    estimate = {"value": MAYBE, "error": MAYBE}
    check_shape(table["parts"], {s: dict.fromkeys(table["targets"], estimate) for s in table["sources"]}, where)


def matrix_panel(record: Mapping[str, Any]) -> Panel:
    """The layer × layer table: receiving layer down, quantized layer across, colour by size.

    Raises:
        FqtError: the table is damaged.
    """
    check_matrix(record, "the layer × layer table")
    table = record["table"]
    sources, targets = table["sources"][::-1], table["targets"]
    parts = [[_part(table["parts"][source][target]) for source in sources] for target in targets]
    width, height = (min(8.0, 3.2 + 0.13 * len(names)) for names in (sources, targets))
    return Panel(
        title="Gradient variance of each layer (down) by the layer whose quantizer causes it (across)",
        columns=("gradient of", "quantizer of", "variance"),
        draw=lambda axes: _matrix(axes, sources, targets, parts),
        note=f"Logarithmic, {DECADES} decades; empty where there is none.",
        size=(width + 1.2, height),
    )


def matrix_table(record: Mapping[str, Any]) -> Table:
    """What each layer's quantizers add to the variance of the whole gradient, and its share of the sum of parts."""
    table = record["table"]
    sums = {s: math.fsum(_part(part)[0] for part in table["parts"][s].values()) for s in table["sources"]}
    whole = math.fsum(value for value in sums.values() if math.isfinite(value))
    rows = [
        (source or "(model)", f"{value:.3g}", f"{100 * value / whole:.1f}" if whole else "–")
        if math.isfinite(value)
        else (source or "(model)", "–", "–")
        for source, value in sums.items()
    ]
    title = "What each layer's quantizers add to the variance of the whole gradient"
    return Table(title, ("quantizer of", "variance", "share %"), rows)


def _part(estimate: Mapping[str, Any]) -> Part:
    return number(estimate["value"]), number(estimate["error"])


def _matrix(axes: Axes, sources: Sequence[str], targets: Sequence[str], parts: list[list[Part]]) -> list[Point]:
    top = max((v for row in parts for v, _ in row if v > 0 and math.isfinite(v)), default=1.0)
    floor = top * 10.0**-DECADES
    shown = [[max(v, floor) if v > 0 else math.nan for v, _ in row] for row in parts]
    image = axes.imshow(shown, norm=LogNorm(floor, top), cmap="viridis", aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    for names, ticks in ((sources, axes.set_xticks), (targets, axes.set_yticks)):
        places = labelled(len(names), LABELS)
        ticks(places, [plain(names[i] or "(model)", 16) for i in places], fontsize=6)
    axes.tick_params(axis="x", labelrotation=90)
    points = []
    for k, row in enumerate(parts):
        for i, (value, error) in enumerate(row):
            if value != 0 and math.isfinite(value):
                text = f"{value:.3g}" + (f" ± {error:.1g}" if math.isfinite(error) else "")
                points.append(Point(i, k, (targets[k] or "(model)", sources[i] or "(model)", text)))
    return points
