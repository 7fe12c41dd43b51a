"""The figures of a comparison and of single runs: metrics by recipe, curves, gradient noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fqt.errors import FqtError
from fqt.report.chart import Chart, Point, colour, make_chart, plain
from fqt.report.plot import NAMED, Draw, figure_of, lines, log_axis
from fqt.report.runs import Curve, RunRecord
from fqt.report.summary import Row, number, ratios_of, runs_of, value_of
from fqt.report.tables import caption
from fqt.train.results import kinds_of
from fqt.train.task import Metric

__all__ = [
    "comparison_charts",
    "comparison_figure",
    "distinct",
    "has_costs",
    "noise_figure",
    "run_charts",
]

_WORTH_COMPARING = 4
"""Recipes, below which a cost over noise says nothing."""
CurveOf = Callable[[Mapping[str, Any]], Curve]


def comparison_figure(record: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Three panels, one colour per recipe; panels without data are left out."""
    first = kinds_of(record["metrics"])[0]
    panels = [
        (f"{_title(first)} at the end: each seed, mean ± std", lambda axes: _ends(axes, record, rows, first)),
        ("Training loss: mean and range over seeds", lambda axes: _losses(axes, record, rows)),
    ]
    if _has_noise(rows):
        title = "Noise of the gradient (exact gradients have no bar)"
        panels.append((title, lambda axes: _noise(axes, record, rows)))
    config = record["config"]
    return figure_of(panels, title=f"{config['task']}, {config['model']}", note=caption(record))


def comparison_charts(record: Mapping[str, Any], rows: Sequence[Row]) -> list[Chart]:
    """The panels one by one, and the metrics while training."""
    kinds = kinds_of(record["metrics"])
    charts = [
        *(
            make_chart(
                f"{_title(kind)} at the end: each seed, mean ± standard deviation",
                ("recipe", "seed", kind.heading),
                partial(_ends, record=record, rows=rows, kind=kind),
            )
            for kind in kinds
        ),
        make_chart(
            "Training loss: mean and range over seeds",
            ("recipe", "step", "loss"),
            lambda axes: _losses(axes, record, rows),
        ),
    ]
    for kind in kinds:
        curves = {row.recipe: _mean_curve(record, row.recipe, _shown_curve(kind))[0] for row in rows}
        if any(len(curve) > 1 for curve in curves.values()):
            charts.append(
                make_chart(
                    f"{_title(kind)} on the evaluation data: mean over seeds",
                    ("recipe", "step", kind.heading),
                    partial(lines, series=curves, xlabel="step", ylabel=kind.label, form=f".{kind.digits}f"),
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
    if has_costs(rows):
        charts.append(
            make_chart(
                f"What the noise costs: {kinds[0].name} against the baseline's of the same seed",
                ("recipe", "ρ", kinds[0].label),
                partial(_costs, rows=rows, kind=kinds[0], baseline=record["baseline"]),
                note="Bars: standard error over paired seeds. Above 0 is worse than the baseline.",
            )
        )
    return charts


def noise_figure(record: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """One panel: what each recipe's metric loses against the baseline's, over its measured ρ.

    Raises:
        FqtError: fewer than four recipes have both.
    """
    kind, config = kinds_of(record["metrics"])[0], record["config"]
    if not has_costs(rows):
        raise FqtError(
            f"fewer than {_WORTH_COMPARING} recipes with noise and the baseline's seeds: compare more of them"
        )
    draw = partial(_costs, rows=rows, kind=kind, baseline=record["baseline"])
    panels = [("Does the noise predict the cost?", draw)]
    return figure_of(panels, title=f"{config['task']}, {config['model']}", note=caption(record))


def has_costs(rows: Sequence[Row]) -> bool:
    """Whether there are recipes enough for `noise_figure`."""
    return len(_with_cost(rows)) >= _WORTH_COMPARING


def _with_cost(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """The rows with noise and a difference, and the places of their colours."""
    return [(i, row) for i, row in enumerate(rows) if row.difference is not None and row.ratio.mean > 0]


def _costs(axes: Axes, rows: Sequence[Row], kind: Metric, baseline: str) -> list[Point]:
    points, sign = [], -kind.times if kind.higher else kind.times
    for rank, (i, row) in enumerate(sorted(_with_cost(rows), key=lambda pair: pair[1].ratio.mean)):
        assert row.difference is not None
        cost, error = sign * row.difference.mean, abs(kind.times) * row.difference.error
        error = 0.0 if math.isnan(error) else error
        place, ink = (row.ratio.mean, cost), colour(i)
        axes.errorbar(*place, error, fmt="o", color=ink, markersize=4, capsize=2)
        # Names on either side of the line that the points follow, so that neighbours' do not meet.
        offset, side = ((5, -7), "left") if rank % 2 else ((-5, 4), "right")
        axes.annotate(plain(row.recipe), place, offset, textcoords="offset points", fontsize=6, ha=side, color=ink)
        cells = (row.recipe, f"{row.ratio.mean:.2g}", format(cost, f".{kind.digits}f"))
        points.append(Point(*place, cells))
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xscale("log")
    # Linear about nothing, and logarithmic where recipes differ by orders of magnitude.
    axes.set_yscale("symlog", linthresh=10.0**-kind.digits * 100)
    axes.set_xlabel("ρ: quantization / mini-batch variance")
    axes.set_ylabel(f"{kind.label}, worse than {baseline} by")
    return points


def run_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Loss, metrics, ρ and width of single runs over their steps; a chart without any value is left out."""
    names = distinct(runs)
    loss = {name: run.loss for name, run in names.items()}
    kinds = {kind.name: kind for run in runs for kind in run.kinds}
    rho = {
        f"{name}{', ' * bool(layer)}{layer}": curve
        for name, run in names.items()
        for layer, curve in run.rho.items()
    }
    width = {name: run.width for name, run in names.items()}
    wanted = [
        ("Training loss, mean of each window", "loss", loss, True, ".4g"),
        *(
            (f"{_title(kind)} on {where}", kind.label, _shown(names, kind, curves), False, f".{kind.digits}f")
            for kind in kinds.values()
            for where, curves in (
                ("the evaluation data", "metrics"),
                ("the training batches, mean of each window", "train_metrics"),
            )
        ),
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


def _shown(runs: Mapping[str, RunRecord], kind: Metric, which: str) -> dict[str, Curve]:
    """A metric's curves in its unit, by run."""
    curves = {name: getattr(run, which).get(kind.name, []) for name, run in runs.items()}
    return {name: [(step, kind.times * value) for step, value in curve] for name, curve in curves.items()}


def _title(kind: Metric) -> str:
    """The metric's name at the head of a title."""
    return kind.name[:1].upper() + kind.name[1:]


def distinct(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Runs by label, or by folder where two would share one."""
    labels = [run.label for run in runs]
    return {run.label if labels.count(run.label) == 1 else run.name: run for run in runs}


def _has_noise(rows: Sequence[Row]) -> bool:
    return any(row.ratio.mean > 0 for row in rows)


def _ends(axes: Axes, record: Mapping[str, Any], rows: Sequence[Row], kind: Metric) -> list[Point]:
    points = []
    for i, row in enumerate(rows):
        runs = runs_of(record, row.recipe)
        values = [kind.times * value_of(run, kind.name) for run in runs]
        axes.plot([i] * len(values), values, "o", color=colour(i), alpha=0.4, markersize=5)
        mean, std = row.metrics[kind.name].mean, row.metrics[kind.name].std
        spread = 0.0 if math.isnan(std) else kind.times * std
        axes.errorbar(i, kind.times * mean, spread, fmt="_", color=colour(i), markersize=18, capsize=4)
        for run, value in zip(runs, values, strict=True):
            points.append(Point(i, value, (row.recipe, str(run["seed"]), format(value, f".{kind.digits}f"))))
    _name_recipes(axes, rows)
    axes.set_ylabel(kind.label)
    return points


def _shown_curve(kind: Metric) -> CurveOf:
    """A run's curve of a metric, in its unit."""
    return lambda run: [(s, kind.times * number(v)) for s, v in run["metric_curves"].get(kind.name, [])]


def _loss_curve(run: Mapping[str, Any]) -> Curve:
    return [(step, number(value)) for step, value in run["loss_curve"]]


def _mean_curve(record: Mapping[str, Any], recipe: str, curve_of: CurveOf) -> tuple[Curve, Curve, Curve]:
    """Mean, lowest and highest over a recipe's seeds, as far as all of them go."""
    curves = [curve_of(run) for run in runs_of(record, recipe)]
    shared = min(len(curve) for curve in curves)
    steps = [step for step, _ in curves[0][:shared]]
    columns = [[curve[k][1] for curve in curves] for k in range(shared)]
    mean = [math.fsum(column) / len(column) for column in columns]
    return (
        list(zip(steps, mean, strict=True)),
        list(zip(steps, map(min, columns), strict=True)),
        list(zip(steps, map(max, columns), strict=True)),
    )


def _losses(axes: Axes, record: Mapping[str, Any], rows: Sequence[Row]) -> list[Point]:
    series = {}
    for i, row in enumerate(rows):
        series[row.recipe], low, high = _mean_curve(record, row.recipe, _loss_curve)
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
