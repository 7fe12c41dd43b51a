"""The record of one training run, as far as it goes.

A run that was cut short, or whose files are partly unreadable, still says something: what is there is kept, and
what is not is named in `RunRecord.problems`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.records import read_json, read_records, read_toml
from fqt.train.results import check_line, metric_kinds
from fqt.train.task import Metric

__all__ = ["RunRecord", "is_run", "read_run"]

Curve = list[tuple[float, float]]
FILES = ("config.toml", "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder says.

    Attributes:
        name: of the run: its folder as it was given.
        config: the configuration; empty if it could not be read.
        recipe: the recipe in full, as the configuration holds it.
        stamps: where and with what it was started, then each time it was continued.
        loss: (step, mean training loss of the window that ends there); NaN where it was not finite.
        kinds: what the metrics are.
        train_metrics: (step, metric over the window's samples), by name.
        metrics: (step, metric on the evaluation data), by name.
        rho: (step, quantization variance over sampling variance of the gradient) by layer, "" for the whole.
        width: (step, mean width of grad_input by multiplications), where `--adapt` changes it.
        state: "finished", "diverged" or "incomplete".
        problems: what could not be read, one line each.
    """

    name: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    stamps: list[dict[str, Any]]
    loss: Curve
    kinds: tuple[Metric, ...]
    train_metrics: dict[str, Curve]
    metrics: dict[str, Curve]
    rho: dict[str, Curve]
    width: Curve
    state: str
    problems: tuple[str, ...]

    @property
    def steps(self) -> int:
        """The last step that the metrics tell of."""
        curves = (self.loss, self.width, *self.metrics.values(), *self.rho.values())
        return int(max((curve[-1][0] for curve in curves if curve), default=0))

    @property
    def planned(self) -> int | None:
        """Steps the configuration asks for, where it says."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def label(self) -> str:
        """Recipe and seed, as the comparison's folders are named."""
        recipe, seed = self.config.get("recipe"), self.config.get("seed")
        return self.name if recipe is None else f"{recipe}, seed {seed}"


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, whole or not."""
    return any((folder / name).is_file() for name in FILES)


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder.

    Raises:
        FqtError: neither its configuration nor its metrics can be read.
    """
    problems: list[str] = []

    def attempt(read: Any, name: str, otherwise: Any) -> Any:
        try:
            return read(folder / name)
        except FqtError as error:
            problems.append(str(error))
            return otherwise

    config = attempt(read_toml, "config.toml", {})
    lines = attempt(read_records, "metrics.jsonl", [])
    if not config and not lines:
        raise FqtError(f"{folder} holds no readable run ({'; '.join(problems) or 'its files are empty'})")
    stamp = attempt(read_json, "environment.json", {})
    records = _sound(lines, folder / "metrics.jsonl", problems)
    end = next((record for record in records if record.get("kind") == "end"), None)
    state = "incomplete" if end is None else "diverged" if end.get("diverged") else "finished"
    kinds = metric_kinds(records)
    recipe = config.pop("resolved_recipe", {})
    return RunRecord(
        name=str(folder),
        config=config,
        recipe=recipe if isinstance(recipe, dict) else {},
        stamps=_stamps(stamp),
        loss=_curve(records, "train", "loss"),
        kinds=kinds,
        train_metrics={kind.name: _metric(records, "train", kind.name) for kind in kinds},
        metrics={kind.name: _metric(records, "eval", kind.name) for kind in kinds},
        rho=_ratios(records),
        width=_widths(records),
        state=state,
        problems=tuple(problems),
    )


def _sound(lines: list[dict[str, Any]], path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines that are what they should be; the first that is not becomes a problem."""
    sound, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            check_line(line, f"line {number} of {path}")
            sound.append(line)
        except FqtError as error:
            damaged.append(str(error))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        problems.append(f"{damaged[0]}{more}; it is left out")
    return [line for line in sound if isinstance(_step(line), float)]


def _stamps(stamp: Any) -> list[dict[str, Any]]:
    if not isinstance(stamp, dict):
        return []
    continued = stamp.get("continued")
    stamps = [stamp.get("started"), *(continued if isinstance(continued, list) else [])]
    return [entry for entry in stamps if isinstance(entry, dict)]


def _step(record: Mapping[str, Any]) -> float | None:
    step = record.get("step")
    return float(step) if isinstance(step, (int, float)) and not isinstance(step, bool) else None


def _value(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _curve(records: list[dict[str, Any]], kind: str, name: str) -> Curve:
    return [(_step(r) or 0.0, _value(r.get(name))) for r in records if r.get("kind") == kind and name in r]


def _metric(records: list[dict[str, Any]], kind: str, name: str) -> Curve:
    lines = [record for record in records if record["kind"] == kind and name in record["metrics"]]
    return [(_step(record) or 0.0, _value(record["metrics"][name])) for record in lines]


def _ratios(records: list[dict[str, Any]]) -> dict[str, Curve]:
    """From lines of kind "monitor": ``rho`` of the whole gradient, ``layers`` by layer."""
    readings = [record for record in records if record.get("kind") == "monitor"]
    curves = {"": _curve(readings, "monitor", "rho")}
    for record in readings:
        by_layer = record.get("layers")
        for layer, value in by_layer.items() if isinstance(by_layer, dict) else ():
            curves.setdefault(str(layer) or "(model)", []).append((_step(record) or 0.0, _value(value)))
    return {name: curve for name, curve in curves.items() if curve}


def _widths(records: list[dict[str, Any]]) -> Curve:
    """From lines of kind "monitor" and "adapt", both of which say the mean width in force from their step on.

    A change follows the reading of its step, so that the curve has a corner there.
    """
    return [
        (_step(r) or 0.0, _value(r.get("mean_width")))
        for r in records
        if r.get("kind") in ("monitor", "adapt") and "mean_width" in r
    ]
