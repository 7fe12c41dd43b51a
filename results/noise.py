"""Noise against bits stored, of the field's quantizers on real gradients: the picture on the front page.

    python results/noise.py

Writes results/noise.json and docs/noise.svg. Noise is the exact variance of a quantizer, of one with random
signs the mean of four seeds, over the squared norm of the matrix; geometric mean over the gradient matrices
that ship with the package. Bits are those of a 1024 × 1024 tensor with all that turns codes back.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fqt.quant import quantizer
from fqt.quant.catalog import method_of
from fqt.quant.examples import FAMILIES, gradients
from fqt.records import environment, write_json
from fqt.report import save_figure
from fqt.stats.catalog import STORED_SHAPE

ROOT = Path(__file__).parent.parent
WIDTHS = range(2, 9)
SIGNS = 4
CURVES = {  # of integers, by width
    "ptq{}": "a step per tensor",
    "psq{}": "a step per row",
    "bhq{}": "block Householder (StatQuant)",
    "thq{}d": "fqt: two Hadamards, dither",
}
POINTS = {  # the field's others: where the label goes, in points
    "luq4": (6, 2),
    "mxfp4": (7, 1),
    "mxint4": (7, 3),
    "nvfp4": (7, -4),
    "eden4": (7, -9),
    "mxint8": (6, 4),
    "tile8": (6, 2),
    "e4m3": (6, -2),
    "e5m2": (6, -2),
}
LABELS = {
    "luq4": "LUQ",
    "mxfp4": "MXFP4",
    "mxint4": "MXINT4",
    "nvfp4": "NVFP4",
    "eden4": "MS-EDEN",
    "mxint8": "MXINT8",
    "tile8": "Jetfire",
    "e4m3": "FP8 E4M3",
    "e5m2": "FP8 E5M2",
}
COLOURS = ("#9a9a9a", "#5b8db8", "#3a6ea5", "#d1495b")
INK = "#767676"  # readable on white and on a dark page


def row(name: str) -> dict[str, Any]:
    """Bits and noise of a quantizer."""
    q, rows = quantizer(name), []
    for x in (x for family in FAMILIES for x in gradients(family).values()):
        seeds = range(SIGNS)
        noise = sum(float(q.variance(x, seed)) for seed in seeds) / len(seeds)
        rows.append(noise / float(x.double().square().sum()))
    size = STORED_SHAPE[0] * STORED_SHAPE[1]
    return {
        "name": name,
        "bits": q.bits_stored(STORED_SHAPE) / size,
        "noise": statistics.geometric_mean(rows),
        "bias": method_of(name).bias,
    }


def figure(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Curves of integers, points of the others; on no background."""
    drawn = Figure(figsize=(8.4, 4.6), layout="constrained", facecolor="none")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    axes.set_facecolor("none")
    for (name, label), colour in zip(CURVES.items(), COLOURS, strict=True):
        curve = [rows[name.format(bits)] for bits in WIDTHS]
        wide = 2.6 if label.startswith("fqt") else 1.6
        axes.plot(*_columns(curve), "o-", color=colour, label=label, linewidth=wide, markersize=1.8 * wide)
    for name, offset in POINTS.items():
        face = "none" if rows[name]["bias"] != "exact" else "#e09f3e"
        axes.plot(*_columns([rows[name]]), "D", color="#e09f3e", markerfacecolor=face, markersize=6)
        place = (rows[name]["bits"], rows[name]["noise"])
        axes.annotate(LABELS[name], place, xytext=offset, textcoords="offset points", fontsize=8.5, color=INK)
    axes.plot([], [], "D", color="#e09f3e", label="formats of the field; hollow: biased")
    _finish(axes)
    return drawn


def _columns(rows: list[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["bits"] for row in rows], [row["noise"] for row in rows]


def _finish(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("bits stored per entry, scales included", color=INK)
    axes.set_ylabel("gradient noise: variance over energy", color=INK)
    axes.set_title("Noise that quantizing a gradient adds; lower left is better", color=INK, fontsize=11)
    axes.tick_params(which="both", colors=INK)
    axes.grid(True, color=INK, alpha=0.2, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.legend(fontsize=9, labelcolor=INK, frameon=False)


def main() -> None:
    """Measures, and writes the record and the picture."""
    names = [name.format(bits) for name in CURVES for bits in WIDTHS] + list(POINTS)
    rows = {name: row(name) for name in names}
    stamp = environment(["python", "results/noise.py"])
    write_json(ROOT / "results" / "noise.json", {"environment": stamp, "rows": rows})
    save_figure(figure(rows), ROOT / "docs" / "noise.svg")


if __name__ == "__main__":
    main()
