"""The figures of what quantizers do to training: accuracy and convergence, and time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes

from fqt.errors import FqtError
from fqt.paper.quantizers import METHODS
from fqt.report.chart import Point, colour, plain, style
from fqt.report.panel import Built, Panel
from fqt.report.plot import log_axis
from fqt.report.runs import Curve
from fqt.report.section import Table
from fqt.report.summary import number

__all__ = ["accuracy", "overhead"]


def accuracy(record: Mapping[str, Any]) -> Built:
    """Accuracy against the bits of grad_input, and the loss on the way."""
    quantized: dict[str, Curve] = {}
    flat: list[tuple[str, float]] = []
    for row in record["rows"]:
        mean = 100 * math.fsum(row["accuracy"]) / len(row["accuracy"])
        match = re.fullmatch(r"([a-z]+)([2-8])([dx]?)", row["recipe"])
        if match:
            label = match[1] + {"d": ", dithered", "x": ", best"}.get(match[3], "")
            quantized.setdefault(label, []).append((int(match[2]), mean))
        else:
            flat.append((row["recipe"], mean))

    def against_bits(axes: Axes) -> list[Point]:
        points = []
        for label, curve in quantized.items():
            method, _, rounding = label.partition(", ")
            shade = colour(METHODS.index(method) if method in METHODS else len(METHODS))
            curve = sorted(curve)
            line = "--s" if rounding else "-o"
            axes.plot(*zip(*curve, strict=True), line, color=shade, label=plain(label), markersize=5, lw=1.2)
            points += [Point(b, v, (label, format(b, "g"), f"{v:.2f}")) for b, v in curve]
        bits = sorted({b for curve in quantized.values() for b, _ in curve}) or [0.0]
        for i, (label, value) in enumerate(flat):
            axes.axhline(value, color=colour(7), linestyle=style(8 * i), linewidth=1, label=plain(label))
            points.append(Point(bits[0], value, (label, "–", f"{value:.2f}")))
        axes.set_xticks(bits)
        axes.set_xlabel("bits of grad_input")
        axes.set_ylabel("accuracy, %")
        axes.legend(fontsize=7, ncols=2)
        return points

    def convergence(axes: Axes) -> list[Point]:
        points = []
        for i, row in enumerate(record["rows"]):
            curve = [(float(step), number(loss)) for step, loss in row["loss_curve"]]
            xs, ys = [step for step, _ in curve], [loss for _, loss in curve]
            axes.plot(xs, ys, style(i), color=colour(i), label=plain(row["recipe"]), linewidth=1.1)
            points += [Point(x, y, (row["recipe"], format(x, "g"), f"{y:.4g}")) for x, y in curve]
        log_axis(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.legend(fontsize=7, ncols=2)
        return points

    panels = [
        Panel(title="Accuracy at the end", columns=("recipe", "bits", "accuracy %"), draw=against_bits),
        Panel(title="Training loss, first seed", columns=("recipe", "step", "loss"), draw=convergence),
    ]
    seeds = "accuracy %, mean"
    table = [
        (
            row["recipe"],
            f"{100 * math.fsum(row['accuracy']) / len(row['accuracy']):.2f}",
            str(len(row["accuracy"])),
            f"{number(row['loss_curve'][-1][1]):.4f}" if row["loss_curve"] else "–",
        )
        for row in record["rows"]
    ]
    return panels, [Table("Accuracy", ("recipe", seeds, "seeds", "last loss"), table)]


def overhead(record: Mapping[str, Any]) -> Built:
    """Time of each quantizer over that of the convolution of its codes, which was timed in turn with it."""
    samples = record["settings"]["convolution"]["samples"]
    full = [row for row in record["rows"] if row["samples"] == samples]
    convolution = next((row["seconds"] for row in full if row["method"] is None), None)
    quantizers = [row for row in full if row["method"] is not None]
    if convolution is None or not quantizers:
        raise FqtError("the record of the overhead holds no timing of the whole shape yet")
    integer, floats = convolution["integer"]["q50"], convolution["float32"]["q50"]
    names = [row["method"] + ("d" if row["rounding"] == "dithered" else "") for row in quantizers]

    def draw(axes: Axes) -> list[Point]:
        points = []
        for i, row in enumerate(quantizers):
            total, beside = row["seconds"]["total"], row["seconds"]["integer"]["q50"]
            value = _share(row)
            low, high = value - total["q20"] / beside, total["q80"] / beside - value
            axes.bar(i, value, color=colour(METHODS.index(row["method"])), alpha=0.8)
            axes.errorbar(i, value, [[max(0.0, low)], [max(0.0, high)]], color=colour(0), capsize=3, linewidth=1)
            points.append(Point(i, value, (names[i], f"{value:.2f}", f"{value * integer / floats:.2f}")))
        axes.set_xticks(range(len(names)), [plain(name) for name in names])
        axes.set_ylabel("time / time of the integer convolution")
        return points

    columns = ("quantizer", "over integer", "over float32")
    panel = Panel(
        title="Quantizer over the convolution of its codes (median; 20 to 80 %)", columns=columns, draw=draw
    )
    parts = ("range", "transform", "quantize", "undo", "total", "integer")
    table = [
        (
            names[i],
            *(f"{1e3 * row['seconds'][part]['q50']:.3g}" if part in row["seconds"] else "–" for part in parts),
            f"{_share(row):.2f}",
            f"{_share(row) * integer / floats:.2f}",
        )
        for i, row in enumerate(quantizers)
    ]
    nothing = ["–"] * 4
    table.append(("convolution, integer", *nothing, f"{1e3 * integer:.3g}", "–", "1", f"{integer / floats:.2f}"))
    table.append(("convolution, float32", *nothing, f"{1e3 * floats:.3g}", "–", f"{floats / integer:.2f}", "1"))
    header = ("milliseconds", *parts[:-1], "convolution beside", "over integer", "over float32")
    tables = [Table("Time of grad_input's parts", header, table)]
    scaling = _scaling(record["rows"])
    return [panel], tables + ([scaling] if scaling.rows else [])


def _share(row: Mapping[str, Any]) -> float:
    return float(row["seconds"]["total"]["q50"] / row["seconds"]["integer"]["q50"])


def _scaling(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Time of quantize and undo by the number of rows: O(N·D) doubles when N does."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["method"] is not None and row["rounding"] == "stochastic":
            times.setdefault(row["method"], {})[row["samples"]] = row["seconds"]["total"]["q50"]
    counts = sorted({n for by_rows in times.values() for n in by_rows})
    pairs = list(pairwise(counts))
    body = [
        (method, *(f"{by_rows[b] / by_rows[a]:.2f}" for a, b in pairs))
        for method, by_rows in times.items()
        if all(n in by_rows for n in counts)
    ]
    return Table("Growth of the time with the rows", ("quantizer", *(f"{a} → {b}" for a, b in pairs)), body)
