"""The numbers of a comparison, one row per recipe, from the record that `fqt compare` leaves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.records import check_shape, read_json
from fqt.train.compare import FORMAT, SHAPE

__all__ = ["MeanStd", "Row", "read_comparison", "summarize"]


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
        accuracy: final accuracy on the evaluation data, a share.
        difference: accuracy minus the baseline's of the same seed; ``None`` without the baseline's runs, and for
            the baseline itself.
        loss: mean training loss over the last epoch.
        ratio: variance of the gradient due to quantization over that due to the mini-batch.
        diverged: runs whose loss ceased to be finite.
    """

    recipe: str
    accuracy: MeanStd
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
    record = read_json(file)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FqtError(f"{file} is no record of a comparison")
    check_shape(record, SHAPE, str(file))
    return record


def summarize(record: Mapping[str, Any]) -> list[Row]:
    """One row per recipe that has runs, in the order they were asked for."""
    baseline = {run["seed"]: run["accuracy"] for run in runs_of(record, record["baseline"])}
    rows = []
    for recipe in record["recipes"]:
        runs = runs_of(record, recipe)
        if not runs:
            continue
        pairs = [run["accuracy"] - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
        rows.append(
            Row(
                recipe=recipe,
                accuracy=MeanStd.of([run["accuracy"] for run in runs]),
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
