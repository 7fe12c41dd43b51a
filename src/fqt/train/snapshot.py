"""A network at one step of its training: what measurements of its gradient need, and no more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.nn import Recipe
from fqt.train.checkpoint import load_checkpoint
from fqt.train.config import TrainConfig
from fqt.train.named import named_recipe
from fqt.train.results import is_finished, read_result
from fqt.train.run import continue_config
from fqt.train.task import Task
from fqt.train.tasks import load_task
from fqt.train.trainer import load_weights, make_model, pick_device, training_loss

__all__ = ["Snapshot", "check_run"]


def check_run(folder: Path) -> None:
    """Refuses a folder that holds no run; the message names the runs in the folders just below it.

    Raises:
        FqtError: it holds none.
    """
    if not (folder / "config.toml").is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/config.toml"))
        below = f"; name one below it: {', '.join(inside)}" if inside else ""
        raise FqtError(f"{folder} holds no run of `fqt train` (no config.toml){below}")


@dataclass(frozen=True)
class Snapshot:
    """Weights, data and loss at one step of a run.

    Attributes:
        config: of the run.
        task: its data and loss.
        weights: its state dict at that step.
        step: optimizer steps made until then.
        recipe: the run's, or what `--adapt` had made of it where the checkpoint says so; a name or a mapping.
    """

    config: TrainConfig
    task: Task
    weights: dict[str, Tensor]
    step: int
    recipe: Any

    @staticmethod
    def of_config(config: TrainConfig, checkpoint: Path) -> Snapshot:
        """The weights in ``checkpoint`` (a run's ``halfway.pt`` or ``checkpoint.pt``) with a configuration.

        Raises:
            FqtError: the data or the checkpoint is missing or damaged.
        """
        saved = load_checkpoint(checkpoint, ("model", "step"))
        adapted = (saved.get("adapter") or {}).get("recipe")
        task = load_task(config, pick_device(config.device))
        return Snapshot(config, task, saved["model"], saved["step"], adapted or config.recipe)

    @staticmethod
    def of_run(folder: Path, *, at: str = "halfway", **machine: Any) -> Snapshot:
        """A run as its folder holds it.

        Args:
            folder: of the run.
            at: "halfway" for the state after half of the steps, "checkpoint" for the latest.
            machine: its data, device or workers here, if they moved; None is as the run had it.

        Raises:
            FqtError: there is no such run, it has not come that far, or its data is missing.
        """
        check_run(folder)
        config = continue_config(folder, machine)
        path = folder / f"{at}.pt"
        if not path.is_file():
            if is_finished(folder):
                result = read_result(folder)
                raise FqtError(
                    f"{folder} has no {path.name}: it "
                    + (f"diverged at step {result.steps} before" if result.diverged else "ended without")
                    + " keeping it; name another run"
                )
            raise FqtError(f"{folder} has no {path.name} yet: let the run come further, or name another one")
        return Snapshot.of_config(config, path)

    def model(self, recipe: str | Path | Recipe | None = None) -> nn.Module:
        """The network under a recipe [default: its own], in training mode but for dropout, whose noise is not
        quantization's."""
        model = make_model(self.config, self.task, named_recipe(self.recipe if recipe is None else recipe))
        load_weights(model, self.weights)
        model = model.to(pick_device(self.config.device)).train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        return model

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss that training minimizes; a scalar."""
        return training_loss(self.config, self.task)(model, batch)

    def batches(self, number: int, start: int = 0) -> list[Any]:
        """Training batches in an order that training did not use, from the epochs after its last.

        Args:
            number: of batches.
            start: how many to leave out first.
        """
        return list(islice(self._fresh(), start, start + number))

    def _fresh(self) -> Iterator[Any]:
        for epoch in count(self.config.epochs):
            yield from self.task.train(epoch)

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
