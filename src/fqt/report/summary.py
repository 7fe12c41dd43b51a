"""The numbers of a comparison, one row per recipe, from the record that `fqt compare` leaves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqt.records import read_json
from fqt.train.compare import check_comparison
from fqt.train.results import kinds_of

__all__ = ["MeanStd", "Row", "read_comparison", "runs_of", "summarize", "value_of"]


@dataclass(frozen=True, kw_only=True)
class MeanStd:
    """Mean and sample standard deviation of ``count`` values; the deviation is NaN for fewer than 2."""

    mean: float
    std: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> MeanStd:
        """The spread of some values; all NaN without any."""
        if not values:
            return MeanStd(mean=math.nan, std=math.nan, count=0)
        std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
        return MeanStd(mean=math.fsum(values) / len(values), std=std, count=len(values))

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.std / math.sqrt(self.count) if self.count else math.nan


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe over its seeds.

    Attributes:
        recipe: its name.
        metrics: by name, on the evaluation data at the end; as records have them.
        difference: the first metric minus the baseline's of the same seed; ``None`` without the baseline's runs,
            and for the baseline itself.
        loss: mean training loss over the last epoch.
        ratio: variance of the gradient due to quantization over that due to the mini-batch.
        diverged: runs whose loss ceased to be finite.
    """

    recipe: str
    metrics: dict[str, MeanStd]
    difference: MeanStd | None
    loss: MeanStd
    ratio: MeanStd
    diverged: int


def read_comparison(path: Path) -> dict[str, Any]:
    """Reads ``compare.json``, or that file in the folder given.

    Raises:
        FqtError: the file is missing or is no record of a comparison.
    """
    file = path / "compare.json" if path.is_dir() else path
    return check_comparison(read_json(file), str(file))


def summarize(record: Mapping[str, Any]) -> list[Row]:
    """One row per recipe that has runs, in the order they were asked for."""
    kinds = kinds_of(record["metrics"])
    first = kinds[0].name
    baseline = {run["seed"]: value_of(run, first) for run in runs_of(record, record["baseline"])}
    rows = []
    for recipe in record["recipes"]:
        runs = runs_of(record, recipe)
        if not runs:
            continue
        pairs = [value_of(run, first) - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
        rows.append(
            Row(
                recipe=recipe,
                metrics={k.name: MeanStd.of([value_of(run, k.name) for run in runs]) for k in kinds},
                difference=MeanStd.of(pairs) if pairs and recipe != record["baseline"] else None,
                loss=MeanStd.of([number(run["train_loss"]) for run in runs]),
                ratio=MeanStd.of(ratios_of(record, recipe)),
                diverged=sum(run["diverged"] for run in runs),
            )
        )
    return rows


def runs_of(record: Mapping[str, Any], recipe: str) -> list[dict[str, Any]]:
    """The runs of one recipe."""
    return [run for run in record["runs"] if run["recipe"] == recipe]


def value_of(run: Mapping[str, Any], metric: str) -> float:
    """A run's metric at the end; NaN where it has none."""
    return number(run["metrics"].get(metric))


def ratios_of(record: Mapping[str, Any], recipe: str) -> list[float]:
    """The variance ratios of one recipe, one per seed that was asked for and measured."""
    return [
        number(entry["ratio"]["value"])
        for entry in record["gradient"]
        if entry["recipe"] == recipe and entry["seed"] in record["seeds"]
    ]


def number(value: Any) -> float:
    """A float from JSON, where ``null`` stands for one that was not finite."""
    return math.nan if value is None else float(value)
