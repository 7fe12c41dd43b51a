"""What figures are drawn with: panels side by side, lines, axes; and how a figure becomes a file.

Uses matplotlib's objects without pyplot, so that no global figure or backend is touched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fqt.files import write_bytes
from fqt.report.chart import Point, colour, labelled, plain, quietly, style
from fqt.report.runs import Curve

__all__ = ["NAMED", "Draw", "figure_of", "lines", "log_axis", "name_layers", "save_figure"]

Draw = Callable[[Axes], list[Point]]
"""Fills a panel and returns the values it drew."""
NAMED = 16


def figure_of(
    panels: Sequence[tuple[str, Draw]], *, title: str, note: str, size: tuple[float, float] | None = None
) -> Figure:
    """Titled panels side by side in one figure, for a file; ``size`` in inches."""
    figure = Figure(figsize=size or (5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(name, fontsize=9)
    figure.suptitle(plain(title, 80))
    figure.supxlabel(plain(note, 500), fontsize=7, wrap=True)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure in the format of the path's ending, with no date in it.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    buffer = io.BytesIO()
    kind = path.suffix[1:]
    with matplotlib.rc_context({"svg.hashsalt": "fqt"}), quietly():
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_bytes(path, buffer.getvalue())


def lines(
    axes: Axes,
    series: Mapping[str, Curve],
    xlabel: str,
    ylabel: str,
    *,
    log: bool = False,
    form: str = ".4g",
) -> list[Point]:
    """One line per series; values that are not finite leave a gap. Returns the points drawn.

    More than `NAMED` series get no legend, which would cover them: their values say whose they are.
    """
    points = []
    for i, (name, curve) in enumerate(series.items()):
        if not curve:
            continue
        mark = "o" if len(curve) <= 12 else ""
        xs, ys = [x for x, _ in curve], [y for _, y in curve]
        axes.plot(xs, ys, style(i) + mark, color=colour(i), label=plain(name), linewidth=1.2, markersize=3.5)
        points += [Point(x, y, (name, format(x, "g"), format(y, form))) for x, y in curve if math.isfinite(y)]
    if log and any(point.y > 0 for point in points):
        log_axis(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if points and len(series) <= NAMED:
        axes.legend(fontsize=8, ncols=1 + (len(series) > 8))
    return points


def name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Layers' names along the x axis, as many as there is room for."""
    places = labelled(len(names), 39)
    axes.set_xticks(places, [plain(names[k] or "(model)", 20) for k in places], rotation=90, fontsize=7)


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis; over less than three decades with 1, 2 and 5 labelled in plain figures."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 1000 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
