"""The callback for Lightning's `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fqt.callbacks.readings import (
    RECIPE,
    Readings,
    check_converted,
    check_every,
    refuse_parts,
    restore_recipe,
    saved_recipe,
)
from fqt.errors import FqtError


class LightningCallback(Callback):
    """ρ by layer in the logs of a `lightning.Trainer`, misuse refused, the recipe kept with the checkpoint.

        class Model(LightningModule):
            def __init__(self):
                super().__init__()
                self.net = fqt.quantize_(net, "shq8")

        Trainer(callbacks=[LightningCallback(every=100)]).fit(Model(), data)

    The loggers and `trainer.callback_metrics` get "rho" and "rho/LAYER" at the first step and every `every` steps
    (`fqt.Monitor`, which has the variances of both and what a reading costs).

    A checkpoint holds the recipe and the averages. `fit(…, ckpt_path=…)` converts a float model as the checkpoint's
    was, and warns if the model is quantized otherwise; a recipe that remembers ranges has to be there before.

    `training_step` is made again for a reading, without what it logs; a metric that it updates counts that batch
    again. Its loss must be a mean over samples. With several processes that have a model each (`strategy="ddp"`)
    the gradient that is read is the averaged one, and all log the same.

    Args:
        every: optimizer steps between readings; None for none.
        layers: whether ρ is logged by layer, too.

    Raises:
        FqtError: when fitting begins, or at its first step: the model has no converted layer, or none that
            quantizes its gradient; readings with a model that is spread over processes (FSDP, DeepSpeed) or with
            manual optimization; a `training_step` without a loss; gradients that are not those of the batches.
    """

    def __init__(self, every: int | None = 100, layers: bool = True) -> None:
        check_every(every)
        self.every, self.layers = every, layers
        self._step: TrainingStep | None = None
        self._readings: Readings | None = None
        self._saved: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the recipe beside the weights."""
        checkpoint[RECIPE] = saved_recipe(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes the model what the checkpoint's was."""
        if RECIPE in checkpoint:
            restore_recipe(pl_module, checkpoint[RECIPE])

    def state_dict(self) -> dict[str, Any]:
        """The readings' averages."""
        return {} if self._readings is None else {"readings": self._readings.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those that fitting goes on from."""
        self._saved = state_dict.get("readings")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what would go wrong, and begins to watch."""
        self._close()
        check_converted(pl_module)
        if self.every is None:
            return
        if not pl_module.automatic_optimization:
            raise FqtError(
                "with manual optimization no callback knows which batches .grad belongs to: pass every=None, and "
                "call fqt.Monitor.step in training_step"
            )
        self._step = TrainingStep(pl_module)
        wrapped, group = trainer.strategy.model, None
        if isinstance(wrapped, DistributedDataParallel):
            group = wrapped.process_group
        else:
            refuse_parts(type(trainer.strategy).__name__)
        self._readings = Readings(self._step, _loss(trainer), self.every, layers=self.layers, process_group=group)
        if self._saved is not None:
            self._readings.load_state_dict(self._saved)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watches the batch if its step will be read."""
        if self._step is not None and self._readings is not None:
            self._step.watch(self._readings.is_due)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes a reading if one is due; Lightning has unscaled gradients by now, and not clipped them."""
        if self._step is None or self._readings is None:
            return
        batches, self._step.batches = self._step.batches, []
        self._step.watch(False)
        # Each loss was divided by this, also where an epoch ended before so many batches were there.
        scale = len(batches) / trainer.accumulate_grad_batches if batches else 1.0
        number = trainer.global_step + 1
        with _unlogged(pl_module):
            found = self._readings.step(number, batches, scale=scale)
        if found is not None:
            for logger in trainer.loggers:
                logger.log_metrics(found, step=number)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in found.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the model as it was."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the model as it was."""
        self._close()

    def _close(self) -> None:
        if self._step is not None:
            self._step.watch(False)
        if self._readings is not None:
            self._readings.close()
        self._step = self._readings = None


class TrainingStep(nn.Module):
    """A Lightning module whose forward is its `training_step`: what a `Monitor` watches, and makes again."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        self.batches: list[tuple[Any, ...]] = []

    def forward(self, *batch: Any) -> Any:
        """As `training_step`."""
        return type(self.module).training_step(self.module, *batch)

    def watch(self, on: bool) -> None:
        """From now on the module's own `training_step` comes by here, or no longer does."""
        if on:
            self.module.__dict__["training_step"] = self._recorded
        else:
            self.module.__dict__.pop("training_step", None)

    def _recorded(self, *batch: Any, **more: Any) -> Any:
        batch = (*batch, *more.values())
        self.batches.append(batch)
        return self(*batch)


def _loss(trainer: Trainer) -> Any:
    def loss(step: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        with trainer.precision_plugin.train_step_context():
            output = step(*batch)
        found = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(found, Tensor):
            raise FqtError("training_step returned no loss for a batch that is measured")
        return found

    return loss


@contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """While it lasts, what a module logs goes nowhere."""
    names = ("log", "log_dict")
    before = {name: module.__dict__[name] for name in names if name in module.__dict__}
    module.__dict__.update(dict.fromkeys(names, lambda *_, **__: None))
    try:
        yield
    finally:
        for name in names:
            module.__dict__.pop(name)
        module.__dict__.update(before)
