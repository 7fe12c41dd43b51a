"""What training asks of a task: data, a model, a loss, and the metrics it is judged by.

The loop, the records and the reports know a task by this interface only. A new task is a subclass of `Task` and a
row of `fqt.train.tasks.TASKS`, or an import path on the command line.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACCURACY", "IGNORED", "Metric", "Task", "cross_entropy_sum"]

IGNORED = -100  # a target that counts for nothing, as in torch's cross entropy


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that a model is judged by.

    Attributes:
        name: as records have it.
        unit: as people read it; empty for a plain number.
        times: what a record's value is multiplied by to be in that unit.
        higher: whether more is better.
        digits: after the point, in that unit.
        note: what one must know to get the same number elsewhere, such as a scorer's signature.
    """

    name: str
    unit: str = ""
    times: float = 1.0
    higher: bool = True
    digits: int = 2
    note: str = ""

    @property
    def heading(self) -> str:
        """Name and unit, as the head of a column."""
        return f"{self.name} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """Name and unit, as the label of an axis."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def show(self, value: float | None, form: str = "") -> str:
        """A record's value in the metric's unit, without it; ``form`` goes before the digits (such as "+")."""
        if value is None or not math.isfinite(value):
            return "–"
        return format(self.times * value, f"{form}.{self.digits}f")

    def say(self, value: float | None) -> str:
        """A record's value with name and unit, for a line of text."""
        return f"{self.name} {self.show(value)} {self.unit}".rstrip()

    def best(self, values: Sequence[float]) -> float:
        """The best of some values; NaN counts last."""
        finite = [value for value in values if not math.isnan(value)]
        return (max if self.higher else min)(finite, default=math.nan)

    def to_dict(self) -> dict[str, Any]:
        """As records hold it."""
        return asdict(self)


ACCURACY = Metric(name="accuracy", unit="%", times=100.0)


class Task(ABC):
    """Data that was opened, and what is asked of a model on it: cross entropy over classes, unless overridden.

    A batch is a tensor or nested tuples of tensors with samples along the first axis, so that it can be halved.

    Attributes:
        metrics: what models are judged by; comparisons go by the first.
        steps_per_epoch: batches in an epoch.
        samples: what a sum counts: "images", "tokens" …
        equal_batches: whether full batches have equally many samples, rather than, say, about equally many tokens.
    """

    metrics: Sequence[Metric] = (ACCURACY,)
    steps_per_epoch: int
    samples: str = "samples"
    equal_batches: bool = True

    @abstractmethod
    def build(self, name: str) -> nn.Module:
        """A model by its name, or import path, with fresh weights from torch's global generator.

        Raises:
            FqtError: an unknown name, or an import path that leads to no module.
        """

    @abstractmethod
    def train(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The training batches of an epoch, from batch ``start`` on: a function of (seed, epoch, position)."""

    @abstractmethod
    def eval(self) -> Iterator[Any]:
        """The evaluation batches, always the same."""

    def predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The model's logits (n, classes) on a batch (inputs, targets), and the targets (n,) int64."""
        inputs, targets = batch
        return model(inputs), targets

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean cross entropy over targets, in nats; what training minimizes, with label smoothing."""
        return F.cross_entropy(logits, targets, label_smoothing=smoothing, ignore_index=IGNORED)

    def sums(self, logits: Tensor, targets: Tensor, loss: Tensor | None = None) -> Tensor:
        """What `values` needs, summed over targets, float64 (k,): the loss first, the number of targets last.

        Here (loss in nats, targets predicted right, targets).

        Args:
            logits, targets: of a batch.
            loss: its mean, where that is known: in training, with smoothing. Else it is computed, without.
        """
        right, count = (logits.argmax(1) == targets).sum(), (targets != IGNORED).sum()
        total = cross_entropy_sum(logits, targets) if loss is None else loss.double() * count
        return torch.stack([total, right, count])

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The metrics by name, from the sums over any number of batches."""
        return {"accuracy": sums[1] / sums[-1]}

    def score(self, model: nn.Module, amp: bool) -> Mapping[str, float]:
        """Metrics that are no sums, such as BLEU of what the model decodes; the model is in eval mode.

        Called after evaluation at the end of training.

        Args:
            model: to be judged.
            amp: whether bfloat16 autocast is on in training.
        """
        return {}

    def count(self, batch: Any) -> int:
        """The number of targets in a batch."""
        return int((batch[-1] != IGNORED).sum())

    def split(self, batch: Any, parts: int) -> list[Any]:
        """A batch cut along its samples into at most this many batches."""
        return [batch] if parts == 1 else _chunks(batch, parts)

    def is_whole(self, batch: Any) -> bool:
        """Whether noise is to be measured on a batch: it has the full size, and at least two samples.

        An epoch's last batch may be smaller.
        """
        return True


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Over targets that count, in nats, without smoothing; float64 scalar."""
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED).double()


def _chunks(batch: Any, parts: int) -> list[Any]:
    if isinstance(batch, Tensor):
        return list(batch.chunk(parts))
    return list(zip(*(_chunks(part, parts) for part in batch), strict=True))
