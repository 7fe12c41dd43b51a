"""Noise against bits stored, of the field's quantizers on real gradients: the picture on the front page.

    python results/noise.py

Writes results/noise.json and docs/noise.svg. Noise is what a Linear in training mode adds to `grad_input`: the
mean square of its error, against evaluation mode's, over its energy; 16 draws, geometric mean over the gradient
matrices that ship with the package, as grad_output. So it holds all that a quantizer costs in a layer, also the
second rounding of a weight whose features are rotated. These matrices have no weights: the layer's are Gaussian,
in 8 bits per tensor as in `qat`. Bits are those of a 1024 × 1024 grad_output with all that turns codes back.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import fqt
from fqt.quant import quantizer
from fqt.quant.examples import FAMILIES, gradients
from fqt.quant.names import method_of
from fqt.records import environment, write_json
from fqt.report import save_figure
from fqt.stats.catalog import STORED_SHAPE

ROOT = Path(__file__).parent.parent
WIDTHS = range(2, 9)
DRAWS = 16
CURVES = {  # of integers, a name for each width
    "a step per tensor": [f"ptq{bits}" for bits in WIDTHS],
    "a step per row": [f"psq{bits}" for bits in WIDTHS],
    "block Householder (StatQuant)": [f"bhq{bits}" for bits in WIDTHS],
    # Features are mixed to 5 bits only: above, rounding their weight again costs more.
    "fqt: Hadamard matrices, dither": [f"{'thq' if bits <= 5 else 'shq'}{bits}d" for bits in WIDTHS],
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
    matrices = [x for family in FAMILIES for x in gradients(family).values()]
    size = STORED_SHAPE[0] * STORED_SHAPE[1]
    return {
        "name": name,
        "bits": quantizer(name).bits_stored(STORED_SHAPE) / size,
        "noise": statistics.geometric_mean(in_a_layer(name, x) for x in matrices),
        "bias": method_of(name).bias,
    }


def in_a_layer(name: str, grad_output: Tensor) -> float:
    """Mean square of the error of grad_input (N, D) over its energy; grad_output (N, D)."""
    torch.manual_seed(0)
    layer = nn.Linear(grad_output.shape[1], grad_output.shape[1], bias=False)
    nn.init.normal_(layer.weight)
    fqt.quantize_(layer, {"base": "qat", "grad_input": name})
    input = torch.zeros_like(grad_output, requires_grad=True)

    def grad_input() -> Tensor:
        return torch.autograd.grad(layer(input), input, grad_output)[0].double()

    layer.eval()
    exact = grad_input()
    layer.train()
    errors = [float((grad_input() - exact).square().sum()) for _ in range(DRAWS)]
    return statistics.fmean(errors) / float(exact.square().sum())


def figure(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Curves of integers, points of the others; on no background."""
    drawn = Figure(figsize=(8.4, 4.6), layout="constrained", facecolor="none")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    axes.set_facecolor("none")
    for (label, names), colour in zip(CURVES.items(), COLOURS, strict=True):
        curve = [rows[name] for name in names]
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
    axes.set_ylabel("mean square error over energy", color=INK)
    axes.set_title("Noise of a layer's grad_input; lower left is better", color=INK, fontsize=11)
    axes.tick_params(which="both", colors=INK)
    axes.grid(True, color=INK, alpha=0.2, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.legend(loc="lower left", fontsize=9, labelcolor=INK, frameon=False)


def main() -> None:
    """Measures, and writes the record and the picture."""
    names = [name for names in CURVES.values() for name in names] + list(POINTS)
    rows = {name: row(name) for name in names}
    stamp = environment(["python", "results/noise.py"])
    write_json(ROOT / "results" / "noise.json", {"environment": stamp, "rows": rows})
    save_figure(figure(rows), ROOT / "docs" / "noise.svg")


if __name__ == "__main__":
    main()
