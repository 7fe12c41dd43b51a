"""The figures of what quantizers do to the layers of a network: variance by layer, codes and bin sizes of one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from fqt.paper.bits import extra_bits, variance_law
from fqt.paper.quantizers import METHODS
from fqt.report.chart import Point, colour, style
from fqt.report.panel import Built, Panel
from fqt.report.plot import log_axis, name_layers
from fqt.report.section import Table

__all__ = ["histogram", "profile"]


def profile(record: Mapping[str, Any]) -> Built:
    """Each layer's exact variance relative to its gradient's squared norm, at 4 bits."""
    bits, rows = record["settings"]["bits"], record["rows"]
    at = 4 if 4 in bits else bits[len(bits) // 2]
    column = bits.index(at)

    def relative(row: Mapping[str, Any], method: str, rounding: str = "stochastic") -> float:
        return float(row["variance"][method][rounding][column]) / row["energy"] if row["energy"] else math.nan

    def draw(axes: Axes) -> list[Point]:
        points = []
        for i, method in enumerate(METHODS):
            values = [relative(row, method) for row in rows]
            axes.plot(range(len(rows)), values, "-o", color=colour(i), label=method, markersize=3, linewidth=1.2)
            for k, value in enumerate(values):
                points.append(Point(k, value, (rows[k]["layer"], method, f"{value:.3g}")))
        log_axis(axes)
        name_layers(axes, [row["layer"] for row in rows])
        axes.set_ylabel("variance / squared norm")
        axes.legend(fontsize=8, ncols=2)
        return points

    header = ("layer", "N × D", *METHODS, "ptq/psq", "ptq/bhq", "ptq/shq", "shq dithered")
    table = []
    for row in rows:
        values = [relative(row, method) for method in METHODS]
        ratios = [f"{values[0] / value:.1f}" if value else "–" for value in values[1:]]
        cells = [f"{value:.2e}" for value in values]
        dithered = f"{relative(row, 'shq', 'dithered'):.2e}"
        table.append((row["layer"], f"{row['rows']} × {row['columns']}", *cells, *ratios, dithered))
    title = f"Exact variance over squared norm, {at} bits"
    panel = Panel(title=title, columns=("layer", "quantizer", "variance / ‖g‖²"), draw=draw, size=(6.0, 3.8))
    return [panel], [Table(title, header, table), _growth(bits, rows), _gaps(bits, rows)]


def _by_bits(bits: Sequence[int], row: Mapping[str, Any], method: str, rounding: str) -> dict[int, float]:
    return dict(zip(bits, row["variance"][method][rounding], strict=True))


def _growth(bits: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> Table:
    """How the exact variance grows with one bit fewer: median over layers, lowest and highest."""
    pairs = [b for b in sorted(bits, reverse=True) if b - 1 in bits]
    body = []
    for rounding in ("stochastic", "dithered"):
        for method in METHODS:
            curves = [_by_bits(bits, row, method, rounding) for row in rows]
            cells = [_spread([c[b - 1] / c[b] for c in curves if c[b] > 0]) for b in pairs]
            body.append((method, rounding, *cells))
        law = (f"{variance_law(b, dithered=rounding == 'dithered'):.2f}" for b in pairs)
        body.append(("law", rounding, *law))
    header = ("method", "rounding", *(f"{b} → {b - 1}" for b in pairs))
    title = "Growth of the exact variance with one bit fewer: median over layers (lowest, highest)"
    return Table(title, header, body if pairs else [], text_columns=2)


def _gaps(bits: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> Table:
    """The bits PTQ must add at each layer to reach the exact variance of the others."""
    body = []
    for rounding in ("stochastic", "dithered"):
        for method in METHODS:
            if (method, rounding) == ("ptq", "stochastic"):
                continue
            gaps = [
                extra_bits(_by_bits(bits, row, "ptq", "stochastic"), _by_bits(bits, row, method, rounding))
                for row in rows
            ]
            cells = [_spread([gap[b] for gap in gaps if b in gap], len(rows)) for b in sorted(bits)]
            body.append((method, rounding, *cells))
    header = ("method", "rounding", *(f"at {b}" for b in sorted(bits)))
    title = "Bits that stochastic PTQ must add at a layer: median over layers (lowest, highest)"
    return Table(title, header, body, text_columns=2)


def _spread(values: Sequence[float], wanted: int = 0) -> str:
    """Median, lowest and highest; nothing where some layers have no value, whose median would mislead."""
    if not values or len(values) < wanted:
        return "–"
    return f"{statistics.median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


def histogram(record: Mapping[str, Any]) -> Built:
    """How often each code is used, and how large the bins are, row by row."""
    rows = record["rows"]

    def codes(axes: Axes) -> list[Point]:
        points = []
        for i, row in enumerate(rows):
            total = sum(row["counts"])
            shares = [count / total for count in row["counts"]]
            axes.step(range(len(shares)), shares, style(i), where="mid", color=colour(i), label=row["method"], lw=1)
            points += [Point(c, v, (row["method"], str(c), f"{v:.2g}")) for c, v in enumerate(shares) if v]
        log_axis(axes)
        axes.set_xlabel("code")
        axes.set_ylabel("share of entries")
        axes.legend(fontsize=8, ncols=2)
        return points

    def bins(axes: Axes) -> list[Point]:
        points = []
        for i, row in enumerate(rows):
            sizes = sorted(row["bins"], reverse=True)
            axes.plot(
                range(1, len(sizes) + 1), sizes, style(i), color=colour(i), label=row["method"], linewidth=1.4
            )
            points += [Point(n, v, (row["method"], str(n), f"{v:.3g}")) for n, v in enumerate(sizes, 1) if v > 0]
        log_axis(axes)
        axes.set_xlabel("row, by bin size")
        axes.set_ylabel("bin size")
        axes.legend(fontsize=8, ncols=2)
        return points

    n, d = record["shape"]
    width = record["settings"]["bits"]
    of = f"{record['layer']}, {n} × {d}, {width} bits"
    panels = [
        Panel(title=f"Codes: {of}", columns=("quantizer", "code", "share"), draw=codes),
        Panel(title=f"Bin sizes: {of}", columns=("quantizer", "row", "bin size"), draw=bins),
    ]
    table = [
        (
            row["method"],
            f"{row['variance']:.3g}",
            f"{rows[0]['variance'] / row['variance']:.1f}" if row["variance"] else "–",
            f"{100 * sum(count == 0 for count in row['counts']) / len(row['counts']):.0f}",
            f"{min(row['bins']):.2g} … {max(row['bins']):.2g}",
        )
        for row in rows
    ]
    header = ("quantizer", "variance", f"{rows[0]['method']} over it" if rows else "", "empty codes %", "bin sizes")
    return panels, [Table(f"Layer {of}", header, table)]
