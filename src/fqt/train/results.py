"""The numbers of a run, read from its ``metrics.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.records import MAYBE, NUMBER, TEXT, check_shape, read_records

__all__ = ["RunResult", "check_line", "is_finished", "is_share", "read_metrics", "read_result"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came out of a run.

    Attributes:
        accuracy: share of the evaluation images classified right, at the end.
        best_accuracy: the best of all evaluations.
        eval_loss: mean cross entropy on the evaluation images, at the end; NaN after divergence.
        train_loss: mean training loss over the last epoch; NaN after divergence.
        steps: optimizer steps made.
        seconds: wall time in training steps and evaluations.
        diverged: whether the run was ended because its loss was no longer finite.
        loss_curve: (step, mean training loss of the window that ends there).
        accuracy_curve: (step, accuracy on the evaluation images).
    """

    accuracy: float
    best_accuracy: float
    eval_loss: float
    train_loss: float
    steps: int
    seconds: float
    diverged: bool
    loss_curve: list[tuple[int, float]]
    accuracy_curve: list[tuple[int, float]]


def is_share(value: Any) -> bool:
    """Whether a JSON value is a number from 0 to 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


SHAPES: dict[str, dict[str, Any]] = {
    "train": {"epoch": (int,), "step": (int,), "samples": (int,), "loss": MAYBE, "seconds": NUMBER},
    "eval": {"step": (int,), "loss": MAYBE, "accuracy": is_share, "seconds": NUMBER},
    "monitor": {"step": (int,), "layers": {...: MAYBE}},
    "adapt": {"step": (int,), "mean_width": NUMBER},
    "end": {"step": (int,), "diverged": (bool,)},
}


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
    """Checks the form of one line.

    Raises:
        FqtError: it is damaged.
    """
    check_shape(record, {"kind": TEXT}, where)
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
        raise FqtError(f"the run in {folder} is not finished; continue it with --resume")
    windows = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    last = [record for record in windows if record["epoch"] == windows[-1]["epoch"]]
    samples = sum(record["samples"] for record in last)
    if not evals or samples < 1:
        raise FqtError(f"{folder / 'metrics.jsonl'} is damaged: it has an end, but no training or no evaluation")
    return RunResult(
        accuracy=evals[-1]["accuracy"],
        best_accuracy=max(record["accuracy"] for record in evals),
        eval_loss=_number(evals[-1]["loss"]),
        train_loss=sum(_number(record["loss"]) * record["samples"] for record in last) / samples,
        steps=records[-1]["step"],
        seconds=sum(record["seconds"] for record in windows + evals),
        diverged=records[-1]["diverged"],
        loss_curve=[(record["step"], _number(record["loss"])) for record in windows],
        accuracy_curve=[(record["step"], record["accuracy"]) for record in evals],
    )


def _number(value: Any) -> float:
    """A float from JSON, where ``null`` stands for one that was not finite."""
    return float("nan") if value is None else float(value)
