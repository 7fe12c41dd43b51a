"""A network in the middle of its training: what measurements of its gradient need, and no more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fqt.nn import Recipe
from fqt.train.checkpoint import load_checkpoint
from fqt.train.config import TrainConfig
from fqt.train.loaders import Batch, Loader
from fqt.train.run import continue_config
from fqt.train.tasks import load_task
from fqt.train.trainer import forward, load_weights, make_model, pick_device

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """Weights, data and loss at one step of a run.

    Attributes:
        config: of the run.
        data: its loader.
        weights: its state dict at that step.
        step: optimizer steps made until then.
        device: where models and batches go.
    """

    config: TrainConfig
    data: Loader
    weights: dict[str, Tensor]
    step: int
    device: torch.device

    @staticmethod
    def of_config(config: TrainConfig, checkpoint: Path) -> Snapshot:
        """The weights in ``checkpoint`` (a run's ``halfway.pt`` or ``checkpoint.pt``) with a configuration.

        Raises:
            FqtError: the data or the checkpoint is missing or damaged.
        """
        device = pick_device(config.device)
        saved = load_checkpoint(checkpoint, ("model", "step"))
        return Snapshot(config, load_task(config, device), saved["model"], saved["step"], device)

    @staticmethod
    def of_run(folder: Path, **machine: Any) -> Snapshot:
        """Half-way through the run in ``folder``; ``machine`` is its data, device or workers here, if they moved.

        Raises:
            FqtError: there is no such run, it has not come half-way, or its data is missing.
        """
        return Snapshot.of_config(continue_config(folder, machine), folder / "halfway.pt")

    def model(self, recipe: str | Recipe) -> nn.Module:
        """The network converted to a recipe, in training mode but for dropout: its noise is not quantization's."""
        model = make_model(self.config, self.data, recipe)
        load_weights(model, self.weights)
        model = model.to(self.device).train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss that training minimizes; a scalar."""
        logits = forward(model, batch[0], amp=self.config.amp)
        return F.cross_entropy(logits, batch[1], label_smoothing=self.config.label_smoothing)

    def batches(self, number: int) -> list[Batch]:
        """Training batches in an order that training did not use: from the epochs after its last."""
        return list(islice(self._fresh(), number))

    def _fresh(self) -> Iterator[Batch]:
        for epoch in count(self.config.epochs):
            yield from self.data.train(epoch)

    def identity(self) -> dict[str, Any]:
        """What tells this network from another in a record."""
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(self.weights[name].detach().cpu().contiguous().numpy().tobytes())
        config = self.config
        return {
            "task": config.task,
            "model": config.model,
            "recipe": config.recipe,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "step": self.step,
            "weights": digest.hexdigest(),
        }
