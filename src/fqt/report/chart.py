"""A chart: one panel drawn by matplotlib, with the values behind it, and its form on a web page.

The page's charts are matplotlib's own SVG, inlined, with three changes: its colours become the page's (so that one
drawing serves light, dark and paper), its ids are made unique to the page, and its prologue is dropped. The values
go into a table under the chart, with the place of each in the drawing; a few lines of script show the nearest one
under the pointer, and without script the table is still there. A charting library in JavaScript was rejected:
the well-kept ones weigh from 0.2 to 4.5 MB in every page, cannot be drawn on a server without a browser, and draw
a second version of figures that matplotlib draws for the README anyway.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "Chart",
    "Drawing",
    "Point",
    "colour",
    "drawing",
    "labelled",
    "make_chart",
    "plain",
    "quietly",
    "style",
]

# Okabe and Ito's palette, told apart by readers with any colour vision; further series repeat it dashed
COLOURS = ("#000000", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999")
POINTS = 2000  # more would weigh more than the chart


@dataclass(frozen=True)
class Point:
    """A value of a chart.

    Attributes:
        x, y: where it is drawn, in the axes' own units.
        cells: what it says, under the chart's columns.
    """

    x: float
    y: float
    cells: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One panel with its values.

    Attributes:
        title: what is shown, in one line.
        figure: the drawing, without its title.
        columns: names of the points' cells.
        points: the values drawn.
        note: what a reader must know besides; may be empty.
    """

    title: str
    figure: Figure
    columns: tuple[str, ...]
    points: tuple[Point, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart for a page.

    Attributes:
        svg: safe markup, starting with <svg.
        points: (x, y, cells): the place in the SVG's own coordinates.
    """

    svg: str
    points: list[tuple[float, float, tuple[str, ...]]]


def make_chart(
    title: str,
    columns: Sequence[str],
    draw: Callable[[Axes], list[Point]],
    *,
    note: str = "",
    size: tuple[float, float] = (5.0, 3.4),
) -> Chart:
    """A chart of one panel; `draw` fills it and returns the values it drew."""
    with _style():
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        points = draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    return Chart(title=title, figure=figure, columns=tuple(columns), points=tuple(points), note=note)


def drawing(chart: Chart, key: str) -> Drawing:
    """The chart for a page on which no other one has this key (letters and digits)."""
    buffer = io.StringIO()
    with _style(), matplotlib.rc_context({"svg.hashsalt": "fqt", "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        chart.figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"| xmlns(?::xlink)?="[^"]*"| version="[^"]*"', "", text, count=5)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, count=2, flags=re.DOTALL)
    for i, value in enumerate(COLOURS):
        text = re.sub(value, "currentColor" if i == 0 else f"var(--series{i})", text, flags=re.IGNORECASE)
    return Drawing(svg=text.replace("<svg ", '<svg role="img" ', 1), points=list(_places(chart)))


def _places(chart: Chart) -> Iterator[tuple[float, float, tuple[str, ...]]]:
    axes = chart.figure.axes[0]
    height = chart.figure.bbox.height
    for point in thin(chart.points):
        if math.isfinite(point.x) and math.isfinite(point.y):
            x, y = axes.transData.transform((point.x, point.y))
            if math.isfinite(x) and math.isfinite(y):
                yield round(float(x), 1), round(float(height - y), 1), point.cells


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """At most some 2,000 of the points, evenly chosen, first and last included."""
    if len(points) <= POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (POINTS - 1))] for i in range(POINTS)]


def labelled(count: int, room: int) -> range:
    """Which of so many rows or columns get a label, where there is room for that many."""
    return range(0, count, max(1, -(-count // room)))


def colour(i: int) -> str:
    """The colour of series i."""
    return COLOURS[i % len(COLOURS)]


def style(i: int) -> str:
    """The line of series i: dashed, then dotted, where colours repeat."""
    return ("-", "--", ":")[i // len(COLOURS) % 3]


def plain(text: object, limit: int = 32) -> str:
    """Text as matplotlib draws it literally: no mathematics, nothing hidden from a legend, not too long."""
    shown = "".join(c if c.isprintable() else "�" for c in str(text))
    if len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    return (" " if not shown or shown.startswith("_") else "") + shown.replace("$", r"\$")


@contextmanager
def _style() -> Iterator[None]:
    """Fonts of the page."""
    look: Any = {"font.size": 10, "axes.titlesize": 10, "legend.frameon": False}
    with matplotlib.rc_context(look), quietly():
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """While figures are drawn and saved: without what matplotlib says of them that no user can mend.

    Names in scripts the drawing font lacks are the reader's browser's matter; a legend's place is searched for
    slowly on a busy machine.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Creating legend")
        yield
