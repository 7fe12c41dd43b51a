"""The plot of a comparison: accuracy by recipe, loss curves, gradient noise.

Uses matplotlib's objects without pyplot, so that no global figure or backend is touched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fqt.records import write_bytes
from fqt.report.summary import Row, number, ratios_of, runs_of
from fqt.report.tables import caption

__all__ = ["comparison_figure", "save_figure"]

# Okabe and Ito's palette, told apart by readers with any colour vision; further recipes repeat it dashed
COLOURS = ("#000000", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999")


def comparison_figure(record: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Three panels, one colour per recipe; panels without data are left out."""
    panels = [_accuracy, _losses] + ([_noise] if any(row.ratio.mean > 0 for row in rows) else [])
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, record, rows)
        axes.spines[["top", "right"]].set_visible(False)
    config = record["config"]
    figure.suptitle(f"{config['task']}, {config['model']}")
    figure.supxlabel(caption(record), fontsize=7, wrap=True)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure in the format of the path's ending, with no date in it.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    buffer = io.BytesIO()
    kind = path.suffix[1:]
    with matplotlib.rc_context({"svg.hashsalt": "fqt"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_bytes(path, buffer.getvalue())


def _accuracy(axes: Axes, record: Mapping[str, Any], rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows):
        values = [100 * run["accuracy"] for run in runs_of(record, row.recipe)]
        axes.plot([i] * len(values), values, "o", color=_colour(i), alpha=0.4, markersize=5)
        spread = 0.0 if math.isnan(row.accuracy.std) else 100 * row.accuracy.std
        axes.errorbar(i, 100 * row.accuracy.mean, spread, fmt="_", color=_colour(i), markersize=18, capsize=4)
    _name_recipes(axes, rows)
    axes.set_ylabel("accuracy, %")
    axes.set_title("Accuracy at the end: each seed, mean ± std", fontsize=9)


def _losses(axes: Axes, record: Mapping[str, Any], rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows):
        curves = [run["loss_curve"] for run in runs_of(record, row.recipe)]
        shared = min(len(curve) for curve in curves)
        steps = [step for step, _ in curves[0][:shared]]
        columns = [[number(curve[k][1]) for curve in curves] for k in range(shared)]
        mean = [math.fsum(column) / len(column) for column in columns]
        style = "-" if i < len(COLOURS) else "--"
        axes.plot(steps, mean, style, color=_colour(i), label=row.recipe, linewidth=1.2)
        if len(curves) > 1:
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(steps, low, high, color=_colour(i), alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title("Training loss: mean and range over seeds", fontsize=9)
    axes.legend(fontsize=7)


def _noise(axes: Axes, record: Mapping[str, Any], rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows):
        values = [value for value in ratios_of(record, row.recipe) if value > 0]
        if values:
            axes.bar(i, row.ratio.mean, color=_colour(i), alpha=0.7)
            axes.plot([i] * len(values), values, "o", color="black", markersize=3)
    _name_recipes(axes, rows)
    axes.set_yscale("log")
    axes.set_ylabel("quantization variance / mini-batch variance")
    axes.set_title("Noise of the gradient (exact gradients have no bar)", fontsize=9)


def _name_recipes(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_xticks(range(len(rows)), [row.recipe for row in rows], rotation=30, ha="right")


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
