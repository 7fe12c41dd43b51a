"""The state of a training run and what one step does to it. No files, no clock, no signals: see `fqt.train.run`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fqt.errors import FqtError
from fqt.nn import Recipe, dump_recipe, load_recipe, quantize_
from fqt.nn.stored import without_recipe
from fqt.seeds import derive_seed
from fqt.stats.passes import LossFn
from fqt.train.adapt import Adapter
from fqt.train.checkpoint import restore_rng, rng_state, seed_all
from fqt.train.config import TrainConfig
from fqt.train.loaders import Batch, Loader
from fqt.train.models import build_model
from fqt.train.optim import learning_rate, make_optimizer
from fqt.train.tasks import load_task

__all__ = ["Trainer", "forward", "load_weights", "make_model", "pick_device", "training_loss"]


class Trainer:
    """A model, its optimizer, its data, and how far training has come.

    Everything random derives from ``config.seed``: equal seeds give equal initial weights and equal data for every
    recipe. Constructing one seeds the global generators of torch, NumPy and Python; two trainers that take turns
    in one process would therefore share one stream of noise, which is sound but not reproducible.

    Args:
        config: the run.

    Raises:
        FqtError: an unknown task, model, recipe or device, or missing data.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.recipe: dict[str, Any] = dump_recipe(load_recipe(config.recipe))
        self.data: Loader = load_task(config, self.device)
        self.model = make_model(config, self.data, config.recipe).to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.steps_per_epoch = self.data.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.steps is not None:
            self.total_steps = min(self.total_steps, config.steps)
        self.step = 0
        self._window = self._empty_window()
        self.adapter = self._adapter() if config.adapt else None
        self._events: list[dict[str, Any]] = []
        seed_all(derive_seed(config.seed, "noise"))

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step closed an epoch or the run."""
        return self.step % self.steps_per_epoch == 0 or self.step == self.total_steps

    @property
    def at_window_end(self) -> bool:
        """Whether the last step closed a window of metrics; windows do not straddle epochs."""
        return self.at_epoch_end or (self.step % self.steps_per_epoch) % self.config.window == 0

    def batches(self) -> Iterator[Batch]:
        """The batches from here to the end of the epoch or of the run."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        left = self.total_steps - self.step
        for count, batch in enumerate(self.data.train(epoch, position), start=1):
            yield batch
            if count == left:
                return

    def train_step(self, batch: Batch) -> None:
        """One step of SGD on one batch; loss and hits are added to the window without waiting for the device."""
        images, labels = batch
        rate = learning_rate(self.config, self.step, self.steps_per_epoch, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        logits = forward(self.model, images, amp=self.config.amp)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.adapter is not None and torch.isfinite(loss):
            whole = len(labels) == self.config.batch_size or self.steps_per_epoch == 1
            self._events += self.adapter.step(batch, self.step + 1, whole)
        self.optimizer.step()
        self.step += 1
        hits = (logits.detach().argmax(1) == labels).sum()
        count = torch.full_like(hits, len(labels))
        self._window += torch.stack([loss.detach().double() * len(labels), hits, count])

    def take_events(self) -> list[dict[str, Any]]:
        """Records of what was measured and changed since the last call."""
        events, self._events = self._events, []
        return events

    def take_window(self) -> dict[str, Any]:
        """The metrics since the last call: mean loss, accuracy, samples; starts a new window."""
        loss, hits, count = self._window.tolist()
        self._window = self._empty_window()
        return {
            "kind": "train",
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "step": self.step,
            "samples": int(count),
            "loss": loss / count,
            "accuracy": hits / count,
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Mean cross entropy (without smoothing) and accuracy on the evaluation data, in eval mode."""
        self.model.eval()
        totals = self._empty_window()
        for images, labels in self.data.eval():
            logits = forward(self.model, images, amp=self.config.amp)
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            hits = (logits.argmax(1) == labels).sum()
            totals += torch.stack([loss, hits, torch.full_like(hits, len(labels))])
        loss, hits, count = totals.tolist()
        return {
            "kind": "eval",
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "step": self.step,
            "samples": int(count),
            "loss": loss / count,
            "accuracy": hits / count,
        }

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue to the same numbers."""
        return {
            "config": self.config.to_dict(),
            "recipe": self.recipe,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "window": self._window.cpu(),
            "rng": rng_state(),
            "adapter": None if self.adapter is None else self.adapter.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a state where `state` was called.

        Raises:
            FqtError: the state belongs to another model, optimizer or recipe.
        """
        if state["recipe"] != self.recipe:
            raise FqtError(
                f"the recipe {self.config.recipe} is no longer what the run was started with; "
                "put the old recipe back, or start a new run"
            )
        load_weights(self.model, state["model"])
        built = self.optimizer.param_groups
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise FqtError(f"the checkpoint's optimizer does not fit this model ({error})") from error
        shapes = [(b.shape, p.shape) for p, s in self.optimizer.state.items() for b in s.values() if b is not None]
        if _differ(built, self.optimizer.param_groups) or any(buffer != parameter for buffer, parameter in shapes):
            raise FqtError("the checkpoint's optimizer is another than this run's")
        self.step = state["step"]
        self._window = state["window"].to(self.device)
        if self.adapter is not None:
            self.adapter.restore(state["adapter"])
        restore_rng(state["rng"])

    def _adapter(self) -> Adapter:
        """What changes the recipe; its loss is the training loss."""
        loss_fn = training_loss(self.config)
        every = self.config.adapt_every
        return Adapter(self.model, loss_fn, target=self.config.rho, every=every, seed=self.config.seed)

    def _empty_window(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.device)  # loss · samples, hits, samples


def _differ(built: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> bool:
    """Whether an optimizer's groups have other settings, but for the rate, which every step sets.

    Settings that only one of them has are another version's of torch.
    """
    pairs = zip(built, loaded, strict=True)
    return any(a[name] != b[name] for a, b in pairs for name in {*a} & {*b} - {"params", "lr"})


def make_model(config: TrainConfig, data: Loader, recipe: str | Recipe) -> nn.Module:
    """The configuration's model for this data with its initial weights, converted to ``recipe``; on the CPU.

    Channels-last, the layout in which convolutions are fastest, on integers and in float. Seeds the global
    generators: the weights depend on ``config.seed`` only.

    Raises:
        FqtError: an unknown model or recipe, or a recipe that does not fit the model.
    """
    seed_all(derive_seed(config.seed, "weights"))
    model = build_model(config.model, in_channels=data.in_channels, num_classes=data.num_classes)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return quantize_(model, load_recipe(recipe))


def forward(model: nn.Module, images: Tensor, *, amp: bool) -> Tensor:
    """The logits in float32, computed under bfloat16 autocast if ``amp``."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp):
        return model(images).float()


def training_loss(config: TrainConfig) -> LossFn:
    """``loss_fn(model, batch)``: the cross entropy that a run minimises."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        logits = forward(model, batch[0], amp=config.amp)
        return F.cross_entropy(logits, batch[1], label_smoothing=config.label_smoothing)

    return loss_fn


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict, strictly, whatever recipe it was saved under: a run's own record says which.

    Raises:
        FqtError: names or shapes differ from the model's.
    """
    try:
        model.load_state_dict(without_recipe(state))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise FqtError(f"the checkpoint does not fit this model ({' '.join(lines[1:3])[:200]})") from error


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU if there is one.

    Raises:
        FqtError: the name is not a device's, or there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FqtError(f"cannot use the device {name!r} ({reason})") from error
    return device
