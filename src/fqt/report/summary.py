"""The numbers of a comparison, one row per recipe, from the record that `fqt compare` leaves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.records import read_json

__all__ = ["Row", "Spread", "check_shape", "read_comparison", "summarize"]

NUMBER, TEXT = (int, float), (str,)
ESTIMATE = {"value": (int, float, type(None))}
SHAPE = {
    "environment": {"time": TEXT, "commit": (str, type(None)), "dirty": (bool, type(None)), "accelerators": [TEXT]},
    "config": {"task": TEXT, "model": TEXT},
    "baseline": TEXT,
    "recipes": [TEXT],
    "seeds": [(int,)],
    "measurement": {"reference": TEXT, "batches": (int,), "draws": (int,)},
    "runs": [
        {
            "recipe": TEXT, "seed": (int,), "accuracy": NUMBER, "train_loss": (int, float, type(None)),
            "diverged": (bool,), "loss_curve": [(list,)], "accuracy_curve": [(list,)],
        }
    ],
    "gradient": [{"recipe": TEXT, "seed": (int,), "ratio": ESTIMATE}],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation of ``count`` values; the deviation is NaN for fewer than 2."""

    mean: float
    std: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of some values; all NaN without any."""
        if not values:
            return Spread(mean=math.nan, std=math.nan, count=0)
        std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
        return Spread(mean=math.fsum(values) / len(values), std=std, count=len(values))

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
    accuracy: Spread
    difference: Spread | None
    loss: Spread
    ratio: Spread
    diverged: int


def read_comparison(path: Path) -> dict[str, Any]:
    """Reads ``compare.json``, or that file in the folder given.

    Raises:
        FqtError: the file is missing or is no record of a comparison.
    """
    file = path / "compare.json" if path.is_dir() else path
    record = read_json(file)
    if not isinstance(record, dict) or record.get("format") != "fqt compare 1":
        raise FqtError(f"{file} is no record of a comparison")
    check_shape(record, SHAPE, str(file))
    return record


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Checks a JSON value against an example of its shape, in which a tuple of types stands for a leaf.

    Raises:
        FqtError: something is missing or of another type; the message says what.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise FqtError(f"{where} is damaged: it is no table of names and values")
        for name, inner in shape.items():
            if name not in value:
                raise FqtError(f"{where} is incomplete: it has no {name!r}")
            check_shape(value[name], inner, f"{where}, {name}" if isinstance(inner, tuple) else f"{where}: {name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise FqtError(f"{where} is damaged: it is no list")
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{i}]")
    elif not isinstance(value, shape) or (isinstance(value, bool) and bool not in shape):
        raise FqtError(f"{where} is damaged: {str(value)[:40]!r} is of the wrong type")


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
                accuracy=Spread.of([run["accuracy"] for run in runs]),
                difference=Spread.of(pairs) if pairs and recipe != record["baseline"] else None,
                loss=Spread.of([number(run["train_loss"]) for run in runs]),
                ratio=Spread.of(ratios_of(record, recipe)),
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
