"""A layer × layer table as a picture. It is any record with

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
from fqt.report.chart import Point, plain
from fqt.report.panel import Panel
from fqt.report.summary import check_shape, number

__all__ = ["is_matrix", "matrix_panel"]

DECADES = 6  # below the largest part; what is smaller is drawn as the smallest


def is_matrix(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a layer × layer table."""
    return isinstance(record.get("layers"), list) and isinstance(record.get("parts"), list)


def matrix_panel(record: Mapping[str, Any]) -> Panel:
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
    return Panel(
        title="Gradient variance of each layer (down) by the layer whose quantizer causes it (across)",
        columns=("gradient of", "quantizer of", "variance"),
        draw=lambda axes: _matrix(axes, layers, parts, errors),
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
