"""The figure of the gradient variance against the bits, and what can be read off it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from fqt.paper.bits import extra_bits, variance_law
from fqt.paper.quantizers import METHODS
from fqt.report.chart import Point, colour
from fqt.report.panel import Built, Panel
from fqt.report.plot import log_axis
from fqt.report.section import Table
from fqt.report.summary import number

__all__ = ["variance"]


def variance(record: Mapping[str, Any]) -> Built:
    """ρ against the bits with grad_weight exact and quantized; the law, the gap in bits, grad_weight's share."""
    curves = _variance_curves(record["rows"])
    unit = record["sampling"]["value"]
    panels = [
        _bits_panel("grad_input quantized, grad_weight exact", _with_weight(curves, "exact"), unit),
        _bits_panel("grad_weight quantized to 8 bits per tensor", _with_weight(curves, "ptq8"), unit),
    ]
    return [panel for panel in panels if panel is not None], [
        _variance_table(curves, unit),
        _law_table(record["rows"]),
        _gap_table(curves),
        _weight_table(record["rows"], unit),
    ]


Key = tuple[str, str, str]  # method, rounding, quantizer of grad_weight


def _variance_curves(rows: Sequence[Mapping[str, Any]]) -> dict[Key, dict[int, float]]:
    curves: dict[Key, dict[int, float]] = {}
    for row in rows:
        if row["method"] is not None:
            key = (row["method"], str(row.get("rounding")), row["grad_weight"])
            curves.setdefault(key, {})[int(row["bits"])] = float(row["value"])
    return curves


def _with_weight(curves: Mapping[Key, dict[int, float]], weight: str) -> dict[tuple[str, str], dict[int, float]]:
    return {(method, rounding): curve for (method, rounding, w), curve in curves.items() if w == weight}


def _bits_panel(title: str, curves: Mapping[tuple[str, str], dict[int, float]], unit: float) -> Panel | None:
    if not curves:
        return None

    def draw(axes: Axes) -> list[Point]:
        points = []
        for (method, rounding), curve in curves.items():
            i = METHODS.index(method) if method in METHODS else len(METHODS)
            bits = sorted(curve)
            label = method + (", dithered" if rounding == "dithered" else "")
            line = "--" if rounding == "dithered" else "-"
            values = [curve[b] / unit for b in bits]
            axes.plot(bits, values, line + "o", color=colour(i), markersize=3, linewidth=1.2, label=label)
            points += [Point(b, v, (label, str(b), f"{v:.3g}")) for b, v in zip(bits, values, strict=True)]
        worst = max(curves.values(), key=lambda curve: curve[max(curve)])
        few, many = min(worst), max(worst)
        least = worst[many] / unit
        axes.plot([few, many], [least * 4 ** (many - few), least], ":", color=colour(7), label="×4 per bit less")
        log_axis(axes)
        axes.set_xticks(sorted(worst))
        axes.set_xlabel("bits of grad_input")
        axes.set_ylabel("variance / mini-batch variance")
        axes.legend(fontsize=7, ncols=2)
        return points

    return Panel(title=title, columns=("quantizer", "bits", "ρ"), draw=draw)


def _variance_table(curves: Mapping[Key, dict[int, float]], unit: float) -> Table:
    bits = sorted({b for curve in curves.values() for b in curve})
    rows = [
        (method, rounding, weight, *(f"{curve[b] / unit:.3g}" if b in curve else "–" for b in bits))
        for (method, rounding, weight), curve in curves.items()
    ]
    header = ("method", "rounding", "grad_weight", *(f"{b} bits" for b in bits))
    return Table("ρ: variance over mini-batch variance", header, rows, text_columns=3)


def _law_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Measured growth with one bit fewer, over the law's; errors as if independent, which is too careful.

    The cells share their batches, so that what differs between batches cancels in a ratio in part.
    """
    found = {
        (row["method"], str(row.get("rounding")), int(row["bits"])): (float(row["value"]), number(row.get("error")))
        for row in rows
        if row["method"] is not None and row["grad_weight"] == "exact"
    }
    bits = sorted({b for _, _, b in found if any(b2 == b - 1 for _, _, b2 in found)}, reverse=True)
    body: list[tuple[str, ...]] = []
    for method, rounding in dict.fromkeys((m, r) for m, r, _ in found):
        cells = [_ratio(found.get((method, rounding, b - 1)), found.get((method, rounding, b))) for b in bits]
        body.append((method, rounding, *cells))
    for dithered in (False, True):
        rounding = "dithered" if dithered else "stochastic"
        body.append(("law", rounding, *(f"{variance_law(b, dithered=dithered):.2f}" for b in bits)))
    header = ("method", "rounding", *(f"{b} → {b - 1}" for b in bits))
    title = "Growth of the variance with one bit fewer (grad_weight exact), ± standard error"
    return Table(title, header, body if bits else [], text_columns=2)


def _ratio(above: tuple[float, float] | None, below: tuple[float, float] | None) -> str:
    if above is None or below is None or above[0] <= 0 or below[0] <= 0:
        return "–"
    value = above[0] / below[0]
    error = value * math.hypot(above[1] / above[0], below[1] / below[0])
    return f"{value:.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")


def _gap_table(curves: Mapping[Key, dict[int, float]]) -> Table:
    rows = []
    for (method, rounding, weight), curve in curves.items():
        worse = curves.get(("ptq", "stochastic", weight))
        if worse is None or (method, rounding) == ("ptq", "stochastic") or weight == "column8":
            continue
        gap = extra_bits(worse, curve)
        bits = sorted({b for c in curves.values() for b in c})
        rows.append((method, rounding, weight, *(f"{gap[b]:+.2f}" if b in gap else "–" for b in bits)))
    bits = sorted({b for c in curves.values() for b in c})
    header = ("method", "rounding", "grad_weight", *(f"at {b}" for b in bits))
    return Table("Bits that stochastic PTQ must add to reach the same variance", header, rows, text_columns=3)


def _weight_table(rows: Sequence[Mapping[str, Any]], unit: float) -> Table:
    names = {"ptq8": "8 bits per tensor (paper)", "column8": "8 bits per feature (released code)"}
    found = [
        (
            names.get(row["grad_weight"], row["grad_weight"]),
            "exact" if row["method"] is None else f"{row['method']}{row['bits']}",
            f"{row['value'] / unit:.3g}",
        )
        for row in rows
        if row["grad_weight"] == "column8"
        or (row["grad_weight"] == "ptq8" and (row["method"] is None or row["bits"] in (4, 8)))
    ]
    return Table("Quantizer of grad_weight", ("grad_weight", "grad_input", "ρ"), sorted(found), text_columns=2)
