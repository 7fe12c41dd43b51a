"""Records of any other kind: lists of rows become tables, layer × layer tables a chart, the rest a list of facts.

A layer × layer table is any record with

    {"layers": [name, …], "parts": [[number, …], …], "errors": [[number, …], …]}

where ``parts[k][l]`` is what the quantizers of layer l add to the variance of layer k's parameter gradient, and
``errors`` (which may be left out) its standard error; ``null`` stands for a value that was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from fqt.errors import FqtError
from fqt.report.chart import Chart, Point, make_chart, plain
from fqt.report.section import Facts, Section, Table, facts, flatten, show
from fqt.report.summary import check_shape, number

__all__ = ["is_matrix", "matrix_chart", "other_section"]

ROWS = 500  # of a table; the record has them all
DECADES = 6  # below the largest part; what is smaller is drawn as the smallest


def other_section(name: str, record: Mapping[str, Any]) -> Section:
    """A section for a record of which only the form is known."""
    rest = {key: value for key, value in record.items() if key not in ("format", "environment")}
    charts = []
    if is_matrix(record):
        charts.append(matrix_chart(record))
        rest = {key: value for key, value in rest.items() if key not in ("layers", "parts", "errors")}
    tables = []
    for key in [key for key, value in rest.items() if _is_rows(value)]:
        tables.append(_rows_table(key, rest.pop(key)))
    details = [facts("Content", rest), _environment(record)]
    kind = str(record.get("format", "record")).removeprefix("fqt ")
    return Section(
        title=f"{kind}: {name.rsplit('/', 1)[-1]}",
        note=name,
        tables=tables,
        charts=charts,
        details=[detail for detail in details if detail.rows],
    )


def is_matrix(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a layer × layer table."""
    return isinstance(record.get("layers"), list) and isinstance(record.get("parts"), list)


def matrix_chart(record: Mapping[str, Any]) -> Chart:
    """The layer × layer table: receiving layer down, quantized layer across, colour by size.

    Raises:
        FqtError: the table is not square.
    """
    check_shape(record, {"layers": [(str,)], "parts": [[(int, float, type(None))]]}, "the layer × layer table")
    layers, parts = record["layers"], record["parts"]
    if len(parts) != len(layers) or any(len(row) != len(layers) for row in parts):
        raise FqtError(f"the layer × layer table is not {len(layers)} × {len(layers)}")
    errors = record.get("errors") or [[None] * len(layers) for _ in layers]
    side = min(7.0, 3.2 + 0.12 * len(layers))
    return make_chart(
        "Gradient variance of each layer (down) by the layer whose quantizer causes it (across)",
        ("gradient of", "quantizer of", "variance"),
        lambda axes: _matrix(axes, layers, parts, errors),
        note=f"Logarithmic, {DECADES} decades; empty where there is none.",
        size=(side + 0.8, side),
    )


def _matrix(axes: Axes, layers: Sequence[str], parts: Sequence[Any], errors: Sequence[Any]) -> list[Point]:
    values = [[number(value) for value in row] for row in parts]
    top = max((v for row in values for v in row if v > 0 and math.isfinite(v)), default=1.0)
    norm = LogNorm(top * 10.0**-DECADES, top)
    floor = top * 10.0**-DECADES
    shown = [[max(v, floor) if v > 0 else math.nan for v in row] for row in values]
    image = axes.imshow(shown, norm=norm, cmap="viridis", aspect="equal", interpolation="nearest")
    figure = axes.figure
    figure.colorbar(image, ax=axes, shrink=0.8)
    every = max(1, len(layers) // 24)
    places = range(0, len(layers), every)
    names = [plain(layers[i], 16) for i in places]
    axes.set_xticks(places, names, rotation=90, fontsize=7)
    axes.set_yticks(places, names, fontsize=7)
    points = []
    for k, row in enumerate(values):
        for i, value in enumerate(row):
            if value != 0 and math.isfinite(value):
                error = number(errors[k][i])
                text = f"{value:.3g}" + (f" ± {error:.1g}" if math.isfinite(error) else "")
                points.append(Point(i, k, (layers[k], layers[i], text)))
    return points


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    flat = [dict(flatten(row)) for row in rows[:ROWS]]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    words = next(
        (i for i, name in enumerate(columns) if any(not isinstance(row.get(name, ""), str) for row in flat)),
        len(columns),
    )
    more = f" (the first {ROWS} of {len(rows)})" if len(rows) > ROWS else ""
    cells = [[show(row.get(name)) for name in columns] for row in flat]
    return Table(title + more, columns, cells, text_columns=max(1, words))


def _environment(record: Mapping[str, Any]) -> Facts:
    stamp = record.get("environment")
    return facts("Environment", stamp if isinstance(stamp, dict) else {})
