"""The pictures of a diagnosis: ρ by layer, variance by bits and by layer, codes, and Theorem 2's table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from fqt.report.chart import Point, colour, labelled, plain
from fqt.report.matrix import LABELS, is_matrix, matrix_panel
from fqt.report.panel import Panel
from fqt.report.plot import log_axis, name_layers
from fqt.report.summary import number

__all__ = ["diagnosis_panels"]

ROLES = ("grad_input", "grad_weight")
BINS = 16  # that a histogram's codes are drawn in
DECADES = 4
Operands = Sequence[Mapping[str, Any]]


def diagnosis_panels(record: Mapping[str, Any]) -> list[Panel]:
    """Those for which the record has values."""
    operands = [o for o in record["operands"] if number(o["energy"]["value"]) > 0]
    by_role = {role: [o for o in operands if o["role"] == role] for role in ROLES}
    panels = [
        Panel(
            title="ρ by layer: quantization variance over mini-batch variance",
            columns=("layer", "ρ"),
            draw=lambda axes: _rho(axes, record),
            note="Bars are standard errors, cut short of 0; a cross is a layer with ‖g‖ < √3 · noise.",
            size=(6.0, 3.8),
        )
    ]
    if operands:
        panels.append(
            Panel(
                title="Exact variance over energy at the recipe's bits, by layer",
                columns=("layer", "for", "bits", "variance / ‖g‖²"),
                draw=lambda axes: _profile(axes, by_role),
                size=(6.0, 3.8),
            )
        )
    panels += [_bits_panel(role, chosen) for role, chosen in by_role.items() if chosen]
    if operands:
        panels.append(
            Panel(
                title="Share of the entries by code, from the lowest code to the highest",
                columns=("layer", "for", "codes", "share"),
                draw=lambda axes: _codes(axes, operands),
                note=f"Logarithmic, {DECADES} decades; empty where no code occurs.",
                size=(5.5, min(9.0, 1.6 + 0.13 * len(operands))),
            )
        )
    return panels + ([matrix_panel(record)] if is_matrix(record) else [])


def _bits_panel(role: str, operands: Operands) -> Panel:
    return Panel(
        title=f"Variance over energy by bits, {role}: median over layers",
        columns=("what", "bits", "variance / ‖g‖²"),
        draw=lambda axes: _by_bits(axes, operands),
        note=(
            "Shaded: from the least layer to the largest. Bound: the closed form; limit: what no left transform's "
            "bound falls below (where it is known)."
        ),
    )


def _rho(axes: Axes, record: Mapping[str, Any]) -> list[Point]:
    names = list(record["layers"])
    points = []
    for k, name in enumerate(names):
        rho = record["layers"][name]["rho"]
        value, error = number(rho["value"]), number(rho["error"])
        if not value > 0:
            continue
        drowned = name in record["drowned"]
        # On a logarithmic axis nothing can be drawn at or below zero.
        below = min(error, 0.9 * value)
        axes.errorbar(
            k, value, None if math.isnan(error) else [[below], [error]], fmt="x" if drowned else "o", markersize=4,
            color=colour(2 if drowned else 1), linewidth=1,
        )  # fmt: skip
        text = f"{value:.2g}" + ("" if math.isnan(error) else f" ± {error:.2g}")
        points.append(Point(k, value, (name or "(model)", text)))
    total = number(record["total"]["rho"]["value"])
    if total > 0:
        axes.axhline(total, color=colour(0), linewidth=1, linestyle="--", label=f"whole gradient: {total:.2g}")
        axes.legend(fontsize=8)
    if points:
        log_axis(axes)
    name_layers(axes, names)
    axes.set_ylabel("ρ")
    return points


def _profile(axes: Axes, by_role: Mapping[str, Operands]) -> list[Point]:
    backward = dict.fromkeys(o["layer"] for role in reversed(ROLES) for o in by_role[role])
    names = list(backward)[::-1]  # from input to loss, as in the other charts
    points = []
    for i, (role, chosen) in enumerate(by_role.items()):
        at = [names.index(o["layer"]) for o in chosen]
        values = [_share(o, o["variance"][str(o["bits"])]["value"]) for o in chosen]
        axes.plot(at, values, "o", color=colour(i + 1), label=role, markersize=4)
        for k, o, value in zip(at, chosen, values, strict=True):
            if value > 0:
                points.append(Point(k, value, (o["layer"] or "(model)", role, str(o["bits"]), f"{value:.2g}")))
    if points:
        log_axis(axes)
    name_layers(axes, names)
    axes.set_ylabel("variance / squared norm")
    axes.legend(fontsize=8)
    return points


def _by_bits(axes: Axes, operands: Operands) -> list[Point]:
    widths = sorted({int(b) for o in operands for b in o["variance"]})
    limited = [o for o in operands if o["limit"]]
    curves: dict[str, tuple[Operands, Callable[[Any, str], Any], str]] = {
        "exact": (operands, lambda o, b: o["variance"][b]["value"], "-o"),
        "bound": (operands, lambda o, b: o["bound"][b], "--"),
        "limit": (limited, lambda o, b: o["limit"][b], ":"),
    }
    points = []
    for i, (name, (chosen, value, line)) in enumerate(curves.items()):
        if not chosen:
            continue
        shares = [[_share(o, value(o, str(b))) for o in chosen if str(b) in o["variance"]] for b in widths]
        shares = [at or [math.nan] for at in shares]
        middle = [statistics.median(at) for at in shares]
        of = "" if len(chosen) == len(operands) else f" ({len(chosen)} of {len(operands)} layers)"
        axes.plot(widths, middle, line, color=colour(i + 1), label=name + of, markersize=3.5, linewidth=1.2)
        if name == "exact" and len(chosen) > 1:
            low, high = [min(at) for at in shares], [max(at) for at in shares]
            axes.fill_between(widths, low, high, color=colour(i + 1), alpha=0.12, linewidth=0)
        points += [Point(b, v, (name, str(b), f"{v:.2g}")) for b, v in zip(widths, middle, strict=True) if v > 0]
    if points:
        log_axis(axes)
    axes.set_xticks(widths)
    axes.set_xlabel("bits")
    axes.set_ylabel("variance / squared norm")
    axes.legend(fontsize=8)
    return points


def _codes(axes: Axes, operands: Operands) -> list[Point]:
    shares, points = [], []
    for k, o in enumerate(operands):
        counts = o["histogram"]
        total, bins = sum(counts), min(BINS, len(counts))
        edges = [round(j * len(counts) / bins) for j in range(bins + 1)]
        row = [sum(counts[a:b]) / total if total else 0.0 for a, b in pairwise(edges)]
        wide = [row[j * bins // BINS] for j in range(BINS)]  # few codes are drawn as wide as many
        shares.append([max(v, 10.0**-DECADES) if v > 0 else math.nan for v in wide])
        for j, share in enumerate(row):
            codes = f"{edges[j]}" if edges[j + 1] - edges[j] == 1 else f"{edges[j]}–{edges[j + 1] - 1}"
            middle = (j + 0.5) * BINS / bins - 0.5
            points.append(Point(middle, k, (o["layer"] or "(model)", o["role"], codes, f"{share:.2g}")))
    image = axes.imshow(
        shares, norm=LogNorm(10.0**-DECADES, 1), cmap="viridis", aspect="auto", interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_xticks([-0.5, BINS - 0.5], ["lowest", "highest"])
    axes.set_xlabel("codes")
    names = [f"{plain(o['layer'] or '(model)', 16)} {o['role'].removeprefix('grad_')}" for o in operands]
    places = labelled(len(names), LABELS)
    axes.set_yticks(places, [names[k] for k in places], fontsize=6)
    return points


def _share(operand: Mapping[str, Any], value: Any) -> float:
    return number(value) / number(operand["energy"]["value"])
