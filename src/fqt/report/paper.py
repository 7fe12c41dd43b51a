"""The paper's figures, from the records that `fqt reproduce` leaves ("fqt paper 1").

Each figure is a list of panels and a list of tables; a file gets the panels side by side, a page gets them one by
one with their values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fqt.errors import FqtError
from fqt.report.chart import Point, colour, make_chart, plain, style
from fqt.report.figures import figure_of, log_axis
from fqt.report.matrix import matrix_panel
from fqt.report.runs import Curve
from fqt.report.section import Section, Table, facts
from fqt.report.summary import NUMBER, TEXT, check_shape, number, runs_of
from fqt.stats.bits import extra_bits, variance_law

__all__ = ["accuracy_record", "check_paper", "layers_record", "paper_figure", "paper_section", "paper_tables"]

FORMAT = "fqt paper 1"
METHODS = ("ptq", "psq", "bhq", "shq")
MAYBE = (int, float, type(None))
SHAPES: dict[str, dict[str, Any]] = {
    "variance": {
        "sampling": {"value": NUMBER, "error": NUMBER},
        "rows": [{"method": (str, type(None)), "bits": MAYBE, "grad_weight": TEXT, "value": NUMBER}],
    },
    "profile": {
        "settings": {"bits": [(int,)]},
        "rows": [{"layer": TEXT, "rows": (int,), "columns": (int,), "energy": NUMBER, "variance": {}}],
    },
    "histogram": {
        "layer": TEXT,
        "shape": [(int,)],
        "settings": {"bits": (int,)},
        "rows": [{"method": TEXT, "counts": [(int,)], "bins": [NUMBER], "variance": NUMBER}],
    },
    "accuracy": {"baseline": TEXT, "rows": [{"recipe": TEXT, "accuracy": [NUMBER], "loss_curve": [(list,)]}]},
    "overhead": {"settings": {"convolution": {"samples": (int,)}}, "rows": [{"samples": (int,), "seconds": {}}]},
    "layers": {"layers": [TEXT], "parts": [[MAYBE]]},
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: its title, the names of its values, what draws it, and what to know besides."""

    title: str
    columns: tuple[str, ...]
    draw: Callable[[Axes], list[Point]]
    note: str = ""
    size: tuple[float, float] = (5.0, 3.4)


def check_paper(record: Any, where: str) -> None:
    """Checks a record's form.

    Raises:
        FqtError: it is no record of `fqt reproduce`, or is damaged.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("figure") not in SHAPES:
        raise FqtError(f"{where} is no record of `fqt reproduce`")
    check_shape(record, {"environment": {}, **SHAPES[record["figure"]]}, where)


def paper_figure(record: Mapping[str, Any]) -> Figure:
    """The figure for a file."""
    panels = _BUILDERS[record["figure"]](record)[0]
    return figure_of([(panel.title, panel.draw) for panel in panels], title=_title(record), note=_note(record))


def paper_tables(record: Mapping[str, Any]) -> list[Table]:
    """The numbers to read off the figure."""
    return [table for table in _BUILDERS[record["figure"]](record)[1] if table.rows]


def paper_section(name: str, record: Mapping[str, Any]) -> Section:
    """The figure for a page.

    Raises:
        FqtError: the record is damaged.
    """
    check_paper(record, name)
    panels, tables = _BUILDERS[record["figure"]](record)
    charts = [make_chart(p.title, p.columns, p.draw, note=p.note, size=p.size) for p in panels]
    details = [facts("Settings", record.get("settings", {})), facts("Environment", record["environment"])]
    return Section(
        title=f"Paper: {_title(record)}",
        note=_note(record),
        tables=[table for table in tables if table.rows],
        charts=charts,
        details=[detail for detail in details if detail.rows],
        footer=name,
    )


def accuracy_record(comparison: Mapping[str, Any], source: str, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the accuracy figure, from a comparison's."""
    rows = []
    for recipe in comparison["recipes"]:
        runs = runs_of(comparison, recipe)
        if runs:
            rows.append(
                {
                    "recipe": recipe,
                    "accuracy": [run["accuracy"] for run in runs],
                    "loss_curve": runs[0]["loss_curve"],
                    "diverged": sum(run["diverged"] for run in runs),
                }
            )
    return {
        "format": FORMAT,
        "figure": "accuracy",
        "environment": dict(stamp),
        "source": {"record": source, "commit": comparison["environment"]["commit"], **comparison["config"]},
        "baseline": comparison["baseline"],
        "rows": rows,
    }


def layers_record(table: Any, source: str, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the layer × layer figure, from a table of the form that `fqt.report.matrix` describes.

    Raises:
        FqtError: it has another form.
    """
    check_shape(table, SHAPES["layers"], source)
    kept = {name: table[name] for name in ("layers", "parts", "errors", "settings", "network") if name in table}
    return {"format": FORMAT, "figure": "layers", "environment": dict(stamp), "source": source, **kept}


def _title(record: Mapping[str, Any]) -> str:
    return {
        "variance": "gradient variance against bits",
        "profile": "variance of each layer's gradient quantizer",
        "histogram": "codes and bin sizes of one layer's gradient",
        "accuracy": "accuracy and convergence against bits",
        "overhead": "quantizer overhead against the convolution",
        "layers": "layer × layer variance",
    }[record["figure"]]


def _note(record: Mapping[str, Any]) -> str:
    network = record.get("network")
    if isinstance(network, dict):
        return ", ".join(
            str(part)
            for part in (
                network.get("task"),
                network.get("model"),
                f"step {network.get('step')} of a {network.get('recipe')} run",
                f"batch {network.get('batch_size')}",
            )
        )
    if record["figure"] == "accuracy":
        source = record.get("source", {})
        seeds = max((len(row["accuracy"]) for row in record["rows"]), default=0)
        return f"{source.get('task')}, {source.get('model')}, {source.get('epochs')} epochs, {seeds} seed(s)"
    if record["figure"] == "overhead":
        c = record["settings"]["convolution"]
        return (
            f"Convolution {c.get('kernel')}×{c.get('kernel')} on ({c.get('samples')}, {c.get('channels')}, "
            f"{c.get('size')}, {c.get('size')}), one thread; medians"
        )
    return ""


Built = tuple[list[Panel], list[Table]]


# --- variance against bits ---------------------------------------------------------------------------------------


def _variance(record: Mapping[str, Any]) -> Built:
    curves = _variance_curves(record["rows"])
    unit = record["sampling"]["value"]
    panels = [
        _bits_panel("grad_input quantized, grad_weight exact", _with_weight(curves, "exact"), unit),
        _bits_panel("grad_weight quantized to 8 bits per tensor", _with_weight(curves, "ptq8"), unit),
    ]
    return [panel for panel in panels if panel is not None], [
        _variance_table(curves, unit),
        _law_table(curves),
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
        first = next(iter(curves.values()))
        top, start = max(max(curve.values()) for curve in curves.values()) / unit, min(first)
        axes.plot(
            [start, max(first)], [top, top / 4 ** (max(first) - start)], ":", color=colour(7), label="÷4 per bit"
        )
        log_axis(axes)
        axes.set_xticks(sorted(first))
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


def _law_table(curves: Mapping[Key, dict[int, float]]) -> Table:
    """Measured growth per bit over the law's."""
    exact = {key: curve for key, curve in curves.items() if key[2] == "exact"}
    pairs = sorted({b for curve in exact.values() for b in curve if b - 1 in curve}, reverse=True)
    if not pairs:
        return Table("", (), [])
    rows = [
        (method, rounding, *(f"{curve[b - 1] / curve[b]:.2f}" for b in pairs))
        for (method, rounding, _), curve in exact.items()
        if all(b in curve and b - 1 in curve for b in pairs)
    ]
    for dithered in (False, True) if rows else ():
        rounding = "dithered" if dithered else "stochastic"
        rows.append(("law", rounding, *(f"{variance_law(b, dithered=dithered):.2f}" for b in pairs)))
    header = ("method", "rounding", *(f"{b} → {b - 1}" for b in pairs))
    return Table("Growth of the variance with one bit fewer (grad_weight exact)", header, rows, text_columns=2)


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


# --- by layer ----------------------------------------------------------------------------------------------------


def _profile(record: Mapping[str, Any]) -> Built:
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
        every = max(1, len(rows) // 20)
        places = range(0, len(rows), every)
        axes.set_xticks(places, [plain(rows[k]["layer"], 20) for k in places], rotation=90, fontsize=7)
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
    return [panel], [Table(title, header, table)]


# --- one layer's codes -------------------------------------------------------------------------------------------


def _histogram(record: Mapping[str, Any]) -> Built:
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


# --- accuracy ----------------------------------------------------------------------------------------------------


def _accuracy(record: Mapping[str, Any]) -> Built:
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
        for i, (label, curve) in enumerate(quantized.items()):
            curve = sorted(curve)
            axes.plot(
                *zip(*curve, strict=True), "-o", color=colour(i + 1), label=plain(label), markersize=5, lw=1.2
            )
            points += [Point(b, v, (label, format(b, "g"), f"{v:.2f}")) for b, v in curve]
        bits = sorted({b for curve in quantized.values() for b, _ in curve}) or [0.0]
        for i, (label, value) in enumerate(flat):
            axes.axhline(value, color=colour(0), linestyle=style(8 * i), linewidth=1, label=plain(label))
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


# --- overhead ----------------------------------------------------------------------------------------------------


def _overhead(record: Mapping[str, Any]) -> Built:
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
            total = row["seconds"]["total"]
            value = total["q50"] / integer
            low, high = value - total["q20"] / integer, total["q80"] / integer - value
            axes.bar(i, value, color=colour(1 + METHODS.index(row["method"])), alpha=0.8)
            axes.errorbar(i, value, [[max(0.0, low)], [max(0.0, high)]], color=colour(0), capsize=3, linewidth=1)
            points.append(Point(i, value, (names[i], f"{value:.2f}", f"{total['q50'] / floats:.2f}")))
        axes.set_xticks(range(len(names)), [plain(name) for name in names])
        axes.set_ylabel("time / time of the integer convolution")
        return points

    columns = ("quantizer", "over integer", "over float32")
    panel = Panel(
        title="Quantizer over the convolution of its codes (median; 20 to 80 %)", columns=columns, draw=draw
    )
    parts = ("range", "transform", "quantize", "undo", "total")
    table = [
        (
            names[i],
            *(f"{1e3 * row['seconds'][part]['q50']:.1f}" if part in row["seconds"] else "–" for part in parts),
            f"{row['seconds']['total']['q50'] / integer:.2f}",
            f"{row['seconds']['total']['q50'] / floats:.2f}",
        )
        for i, row in enumerate(quantizers)
    ]
    table.append(
        ("convolution, integer", "–", "–", "–", "–", f"{1e3 * integer:.1f}", "1", f"{integer / floats:.2f}")
    )
    table.append(
        ("convolution, float32", "–", "–", "–", "–", f"{1e3 * floats:.1f}", f"{floats / integer:.2f}", "1")
    )
    header = ("milliseconds", *parts, "over integer", "over float32")
    tables = [Table("Time of grad_input's parts", header, table)]
    scaling = _scaling(record["rows"])
    return [panel], tables + ([scaling] if scaling.rows else [])


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


def _layers(record: Mapping[str, Any]) -> Built:
    title, columns, draw, note, size = matrix_panel(record)
    return [Panel(title=title, columns=columns, draw=draw, note=note, size=size)], []


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Built]] = {
    "variance": _variance,
    "profile": _profile,
    "histogram": _histogram,
    "accuracy": _accuracy,
    "overhead": _overhead,
    "layers": _layers,
}
