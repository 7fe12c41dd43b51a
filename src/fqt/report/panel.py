"""A panel: what one chart shows, before it is drawn for a page or into a figure's file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes

from fqt.report.chart import Chart, Point, make_chart
from fqt.report.section import Table

__all__ = ["Built", "Panel"]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: its title, the names of its values, what draws it, and what to know besides."""

    title: str
    columns: tuple[str, ...]
    draw: Callable[[Axes], list[Point]]
    note: str = ""
    size: tuple[float, float] = (5.0, 3.4)

    def chart(self) -> Chart:
        """The panel for a page."""
        return make_chart(self.title, self.columns, self.draw, note=self.note, size=self.size)


Built = tuple[list[Panel], list[Table]]
"""A figure: its panels, and the tables to read off it."""
