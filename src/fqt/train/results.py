"""The numbers of a run, read from its ``metrics.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.records import read_records

__all__ = ["RunResult", "is_finished", "read_result"]


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


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a run that came to its end."""
    path = folder / "metrics.jsonl"
    return path.exists() and any(record.get("kind") == "end" for record in read_records(path)[-1:])


def read_result(folder: Path) -> RunResult:
    """Reads the numbers of a finished run.

    Raises:
        FqtError: there is no run, or it is not finished.
    """
    records = read_records(folder / "metrics.jsonl")
    if not records or records[-1].get("kind") != "end":
        raise FqtError(f"the run in {folder} is not finished; continue it with --resume")
    windows = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    last = [record for record in windows if record["epoch"] == windows[-1]["epoch"]]
    samples = sum(record["samples"] for record in last)
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
