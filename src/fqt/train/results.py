"""The numbers of a run, read from its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.records import MAYBE, NUMBER, TEXT, check_shape, read_records
from fqt.train.task import ACCURACY, Metric

__all__ = [
    "METRICS",
    "RunResult",
    "check_line",
    "is_finished",
    "is_share",
    "kinds_of",
    "metric_kinds",
    "read_metrics",
    "read_result",
]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came out of a run.

    Attributes:
        metrics: by name, on the evaluation data at the end.
        best: the best of all evaluations, by name.
        eval_loss: mean loss on the evaluation data, at the end; NaN after divergence.
        train_loss: mean training loss over the last epoch; NaN after divergence.
        steps: optimizer steps made.
        seconds: wall time in training steps and evaluations.
        diverged: whether the run was ended because its loss was no longer finite.
        loss_curve: (step, mean training loss of the window that ends there).
        metric_curves: (step, metric on the evaluation data), by name.
        kinds: what the metrics are; the first is what a run is judged by.
    """

    metrics: dict[str, float]
    best: dict[str, float]
    eval_loss: float
    train_loss: float
    steps: int
    seconds: float
    diverged: bool
    loss_curve: list[tuple[int, float]]
    metric_curves: dict[str, list[tuple[int, float]]]
    kinds: tuple[Metric, ...]

    def __str__(self) -> str:
        """The metrics with their units, and the best where the last is not."""
        said = []
        for kind in self.kinds:
            if kind.name not in self.metrics:
                continue
            last, best = self.metrics[kind.name], self.best[kind.name]
            said.append(
                kind.say(last) + (f" (best {kind.show(best)})" if kind.show(best) != kind.show(last) else "")
            )
        return ", ".join(said)


def is_share(value: Any) -> bool:
    """Whether a JSON value is a number from 0 to 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


METRICS = [
    {
        "name": TEXT, "unit": TEXT, "times": NUMBER, "higher": (bool,),
        "digits": lambda digits: type(digits) is int and 0 <= digits <= 15,
    }
]  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "task": {"metrics": METRICS, "samples": TEXT},
    "train": {
        "epoch": (int,), "step": (int,), "samples": (int,), "loss": MAYBE, "metrics": {...: MAYBE},
        "seconds": NUMBER,
    },
    "eval": {"step": (int,), "loss": MAYBE, "metrics": {...: MAYBE}, "seconds": NUMBER},
    "monitor": {"step": (int,), "layers": {...: MAYBE}},
    "adapt": {"step": (int,), "mean_width": NUMBER},
    "end": {"step": (int,), "diverged": (bool,)},
}  # fmt: skip


def metric_kinds(records: Sequence[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """What the metrics of a run are; accuracy in records of versions that knew no other."""
    for record in records:
        if record.get("kind") == "task":
            return kinds_of(record["metrics"])
    return (ACCURACY,)


def kinds_of(described: Sequence[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """Metrics as records describe them."""
    names = [field.name for field in fields(Metric)]
    return tuple(Metric(**{name: kind[name] for name in names if name in kind}) for kind in described)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, checked; lines of kinds that are not known are left to whoever knows.

    Raises:
        FqtError: they cannot be read, or are damaged.
    """
    path = folder / "metrics.jsonl"
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        check_line(record, f"line {number} of {path}")
    return records


def check_line(record: dict[str, Any], where: str) -> None:
    """Checks the form of one line, and gives one of an earlier version today's.

    Raises:
        FqtError: it is damaged.
    """
    check_shape(record, {"kind": TEXT}, where)
    if record["kind"] in ("train", "eval") and "metrics" not in record and is_share(record.get("accuracy")):
        record["metrics"] = {"accuracy": record.pop("accuracy")}  # of versions that knew no other metric
    check_shape(record, SHAPES.get(record["kind"], {}), where)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a run that came to its end.

    Raises:
        FqtError: its metrics are damaged.
    """
    path = folder / "metrics.jsonl"
    return path.exists() and any(record["kind"] == "end" for record in read_metrics(folder)[-1:])


def read_result(folder: Path) -> RunResult:
    """Reads the numbers of a finished run.

    Raises:
        FqtError: there is no run, it is not finished, or its metrics are damaged.
    """
    records = read_metrics(folder)
    if not records or records[-1]["kind"] != "end":
        raise FqtError(f"the run in {folder} is not finished: `fqt train --out {folder} --resume` continues it")
    windows = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    last = [record for record in windows if record["epoch"] == windows[-1]["epoch"]]
    samples = sum(record["samples"] for record in last)
    if not evals or samples < 1:
        raise FqtError(f"{folder / 'metrics.jsonl'} is damaged: it has an end, but no training or no evaluation")
    kinds = metric_kinds(records)
    curves = {kind.name: _metric_curve(evals, kind.name) for kind in kinds}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        raise FqtError(f"{folder / 'metrics.jsonl'} is damaged: no evaluation has one of the task's metrics")
    return RunResult(
        metrics={name: curve[-1][1] for name, curve in curves.items()},
        best={k.name: k.best([value for _, value in curves[k.name]]) for k in kinds if k.name in curves},
        eval_loss=_number(evals[-1]["loss"]),
        train_loss=sum(_number(record["loss"]) * record["samples"] for record in last) / samples,
        steps=records[-1]["step"],
        seconds=sum(record["seconds"] for record in windows + evals),
        diverged=records[-1]["diverged"],
        loss_curve=[(record["step"], _number(record["loss"])) for record in windows],
        metric_curves=curves,
        kinds=kinds,
    )


def _metric_curve(evals: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(r["step"], _number(r["metrics"][name])) for r in evals if name in r["metrics"]]


def _number(value: Any) -> float:
    """A float from JSON, where ``null`` stands for one that was not finite."""
    return float("nan") if value is None else float(value)
