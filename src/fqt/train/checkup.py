"""Statistics of a run: its model at a checkpoint, on batches that training did not use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.nn import Recipe, load_recipe, quantize_
from fqt.stats.passes import LossFn
from fqt.train.checkpoint import load_checkpoint
from fqt.train.config import TrainConfig
from fqt.train.loaders import Batch, Loader
from fqt.train.run import continue_config
from fqt.train.tasks import load_task
from fqt.train.trainer import load_weights, make_model, pick_device, training_loss

__all__ = ["Checkup", "fresh_batches"]


@dataclass(frozen=True)
class Checkup:
    """A run's weights and data, to measure gradients on.

    Attributes:
        config: of the run.
        data: its task's data.
        weights: a state dict.
        step: after which they were saved.
        recipe: in force then, with what `--adapt` had changed; a mapping or a name.
    """

    config: TrainConfig
    data: Loader
    weights: dict[str, Tensor]
    step: int
    recipe: Any

    @staticmethod
    def of(folder: Path, *, at: str = "checkpoint", given: dict[str, Any] | None = None) -> Checkup:
        """Reads a run.

        Args:
            folder: of the run.
            at: "checkpoint" for the latest state, "halfway" for the one after half of the steps.
            given: where the data lies now, and the device.

        Raises:
            FqtError: no run, no such checkpoint, or no data.
        """
        config = continue_config(folder, given or {})
        path = folder / f"{at}.pt"
        if not path.is_file():
            raise FqtError(f"{folder} has no {path.name} yet: let the run come further, or name another checkpoint")
        saved = load_checkpoint(path, ("model", "step"))
        adapted = (saved.get("adapter") or {}).get("recipe")
        data = load_task(config, pick_device(config.device))
        return Checkup(config, data, saved["model"], saved["step"], adapted or config.recipe)

    def model(self, recipe: Recipe | str | Path | None = None) -> nn.Module:
        """The model in training mode but for dropout, whose noise is not quantization's."""
        model = make_model(self.config, self.data, "none")
        load_weights(model, self.weights)
        quantize_(model, load_recipe(self.recipe if recipe is None else recipe))
        model = model.to(pick_device(self.config.device)).train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        return model

    def batches(self, number: int, start: int = 0) -> list[Batch]:
        """Training batches in an order that training did not use, the first `start` of them left out."""
        return list(islice(fresh_batches(self.data, self.config), start, start + number))

    @property
    def loss_fn(self) -> LossFn:
        """The training loss."""
        return training_loss(self.config)


def fresh_batches(data: Loader, config: TrainConfig) -> Iterator[Batch]:
    """Training batches in an order that training did not use: from the epochs after its last."""
    for epoch in count(config.epochs):
        yield from data.train(epoch)
