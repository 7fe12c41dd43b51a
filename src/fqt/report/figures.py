"""The figures of a comparison and of single runs: accuracy by recipe, curves, gradient noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fqt.report.chart import Chart, Point, colour, make_chart, plain
from fqt.report.plot import NAMED, Draw, figure_of, lines, log_axis
from fqt.report.runs import Curve, RunRecord
from fqt.report.summary import Row, number, ratios_of, runs_of
from fqt.report.tables import caption

__all__ = [
    "comparison_charts",
    "comparison_figure",
    "distinct",
    "run_charts",
]


def comparison_figure(record: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Three panels, one colour per recipe; panels without data are left out."""
    panels = [
        ("Accuracy at the end: each seed, mean ± std", lambda axes: _accuracy(axes, record, rows)),
        ("Training loss: mean and range over seeds", lambda axes: _losses(axes, record, rows)),
    ]
    if _has_noise(rows):
        title = "Noise of the gradient (exact gradients have no bar)"
        panels.append((title, lambda axes: _noise(axes, record, rows)))
    config = record["config"]
    return figure_of(panels, title=f"{config['task']}, {config['model']}", note=caption(record))


def comparison_charts(record: Mapping[str, Any], rows: Sequence[Row]) -> list[Chart]:
    """The panels one by one, and the accuracy while training."""
    charts = [
        make_chart(
            "Accuracy at the end: each seed, mean ± standard deviation",
            ("recipe", "seed", "accuracy %"),
            lambda axes: _accuracy(axes, record, rows),
        ),
        make_chart(
            "Training loss: mean and range over seeds",
            ("recipe", "step", "loss"),
            lambda axes: _losses(axes, record, rows),
        ),
    ]
    accuracies = {row.recipe: _mean_curve(record, row.recipe, "accuracy_curve", 100)[0] for row in rows}
    if any(len(curve) > 1 for curve in accuracies.values()):
        charts.append(
            make_chart(
                "Accuracy on the evaluation data: mean over seeds",
                ("recipe", "step", "accuracy %"),
                lambda axes: lines(axes, accuracies, "step", "accuracy, %", form=".2f"),
            )
        )
    if _has_noise(rows):
        charts.append(
            make_chart(
                "Noise of the gradient: quantization variance over mini-batch variance",
                ("recipe", "seed", "ρ"),
                lambda axes: _noise(axes, record, rows),
                note="Exact gradients have no bar.",
            )
        )
    return charts


def run_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Loss, accuracy, ρ and width of single runs over their steps; a chart without any value is left out."""
    names = distinct(runs)
    loss = {name: run.loss for name, run in names.items()}
    accuracy = {name: _percent(run.accuracy) for name, run in names.items()}
    training = {name: _percent(run.train_accuracy) for name, run in names.items()}
    rho = {
        f"{name}{', ' * bool(layer)}{layer}": curve
        for name, run in names.items()
        for layer, curve in run.rho.items()
    }
    width = {name: run.width for name, run in names.items()}
    wanted = [
        ("Training loss, mean of each window", "loss", loss, True, ".4g"),
        ("Accuracy on the evaluation data", "accuracy, %", accuracy, False, ".2f"),
        ("Accuracy on the training batches, mean of each window", "accuracy, %", training, False, ".2f"),
        ("ρ: quantization variance over mini-batch variance", "ρ", rho, True, ".2g"),
        ("Width of grad_input, mean by multiplications", "bits", width, False, ".3g"),
    ]
    return [
        make_chart(
            title,
            ("run", "step", unit),
            _panel(series, unit, log, form),
            note="" if len(series) <= NAMED else f"{len(series)} lines: point at one to read its name.",
        )
        for title, unit, series, log, form in wanted
        if any(math.isfinite(value) for curve in series.values() for _, value in curve)
    ]


def _panel(series: Mapping[str, Curve], unit: str, log: bool, form: str) -> Draw:
    return lambda axes: lines(axes, series, "step", unit, log=log, form=form)


def _percent(curve: Curve) -> Curve:
    return [(step, 100 * value) for step, value in curve]


def distinct(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Runs by label, or by folder where two would share one."""
    labels = [run.label for run in runs]
    return {run.label if labels.count(run.label) == 1 else run.name: run for run in runs}


def _has_noise(rows: Sequence[Row]) -> bool:
    return any(row.ratio.mean > 0 for row in rows)


def _accuracy(axes: Axes, record: Mapping[str, Any], rows: Sequence[Row]) -> list[Point]:
    points = []
    for i, row in enumerate(rows):
        runs = runs_of(record, row.recipe)
        values = [100 * run["accuracy"] for run in runs]
        axes.plot([i] * len(values), values, "o", color=colour(i), alpha=0.4, markersize=5)
        spread = 0.0 if math.isnan(row.accuracy.std) else 100 * row.accuracy.std
        axes.errorbar(i, 100 * row.accuracy.mean, spread, fmt="_", color=colour(i), markersize=18, capsize=4)
        for run, value in zip(runs, values, strict=True):
            points.append(Point(i, value, (row.recipe, str(run["seed"]), f"{value:.2f}")))
    _name_recipes(axes, rows)
    axes.set_ylabel("accuracy, %")
    return points


def _mean_curve(
    record: Mapping[str, Any], recipe: str, which: str, factor: float = 1.0
) -> tuple[Curve, Curve, Curve]:
    """Mean, lowest and highest over a recipe's seeds, as far as all of them go."""
    curves = [run[which] for run in runs_of(record, recipe)]
    shared = min(len(curve) for curve in curves)
    steps = [step for step, _ in curves[0][:shared]]
    columns = [[factor * number(curve[k][1]) for curve in curves] for k in range(shared)]
    mean = [math.fsum(column) / len(column) for column in columns]
    return (
        list(zip(steps, mean, strict=True)),
        list(zip(steps, map(min, columns), strict=True)),
        list(zip(steps, map(max, columns), strict=True)),
    )


def _losses(axes: Axes, record: Mapping[str, Any], rows: Sequence[Row]) -> list[Point]:
    series = {}
    for i, row in enumerate(rows):
        series[row.recipe], low, high = _mean_curve(record, row.recipe, "loss_curve")
        if len(runs_of(record, row.recipe)) > 1:
            steps, lows, highs = [x for x, _ in low], [y for _, y in low], [y for _, y in high]
            axes.fill_between(steps, lows, highs, color=colour(i), alpha=0.12, linewidth=0)
    return lines(axes, series, "step", "training loss", log=True)


def _noise(axes: Axes, record: Mapping[str, Any], rows: Sequence[Row]) -> list[Point]:
    points = []
    for i, row in enumerate(rows):
        values = [value for value in ratios_of(record, row.recipe) if value > 0]
        if values:
            axes.bar(i, row.ratio.mean, color=colour(i), alpha=0.7)
            axes.plot([i] * len(values), values, "o", color="black", markersize=3)
            points.append(Point(i, row.ratio.mean, (row.recipe, "mean", f"{row.ratio.mean:.2g}")))
        for entry in record["gradient"]:
            value = number(entry["ratio"]["value"])
            if entry["recipe"] == row.recipe and entry["seed"] in record["seeds"] and value > 0:
                points.append(Point(i, value, (row.recipe, str(entry["seed"]), f"{value:.2g}")))
    _name_recipes(axes, rows)
    log_axis(axes)
    axes.set_ylabel("ρ: quantization / mini-batch variance")
    return points


def _name_recipes(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_xticks(range(len(rows)), [plain(row.recipe) for row in rows], rotation=30, ha="right")
