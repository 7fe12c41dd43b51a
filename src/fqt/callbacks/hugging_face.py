"""The callback for Hugging Face's `Trainer`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

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
from fqt.stats.monitor import first_half
from fqt.stats.passes import energy, trainable

_IGNORED = -100
"""The label of tokens that do not count, throughout transformers."""


_ADVICE = (
    "pass every=None for no readings, as where Trainer's loss is not the model's own (an overridden compute_loss), "
    "and measure with fqt.diagnose"
)


class HuggingFaceCallback(TrainerCallback, ExportableState):
    """ρ by layer in the logs of a `transformers.Trainer`, misuse refused, the recipe kept with the checkpoint.

        model = fqt.quantize_(model, "shq8")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[HuggingFaceCallback(every=100)])

    Logs get "rho" and "rho/LAYER" at the first step and every `every` steps (`fqt.Monitor`, which has the variances
    of both and what a reading costs). `Trainer` calls its writers (`report_to`) before callbacks that are passed to
    it: `callback.put_first(trainer)` lets them see ρ, too.

    A checkpoint holds the recipe and the averages. `trainer.train(resume_from_checkpoint=…)` converts a float model
    as the checkpoint's was, and warns if the model is quantized otherwise.

    The loss is taken to be the model's own (`outputs.loss`), of which a mean over samples is measured: the step is
    made again from what the model was given. Clipping and a `GradScaler` are divided out. Started by torchrun or
    accelerate launch, processes with a model each (`DistributedDataParallel`) read the averaged gradient, all the
    same.

    Args:
        every: optimizer steps between readings; None for none.
        layers: whether ρ is logged by layer, too.

    Raises:
        FqtError: when training begins, or at its first step: the model has no converted layer, or none that
            quantizes its gradient; several GPUs in one process; readings with a model that is spread over processes
            (FSDP, DeepSpeed) or with label smoothing; a loss that is computed outside the model; gradients that are
            not those of the batches.
    """

    def __init__(self, every: int | None = 100, layers: bool = True) -> None:
        check_every(every)
        self.every, self.layers = every, layers
        self.saved: dict[str, Any] | None = None
        """Of the checkpoint that training goes on from: its recipe, and the readings' averages."""
        self._model: nn.Module | None = None
        self._step: _Step | None = None
        self._unlogged: dict[str, float] = {}

    def put_first(self, trainer: Any) -> HuggingFaceCallback:
        """Moves the callback before all others of a trainer, or adds it there. Returns itself."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(c for c in callbacks if c is not self)]
        return self

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into `trainer_state.json`."""
        saved = self.saved
        if self._model is not None:
            saved = {RECIPE: saved_recipe(self._model)}
            if self._step is not None:
                saved["readings"] = self._step.readings.state_dict()
        return {"args": {"every": self.every, "layers": self.layers}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Refuses what would go wrong, goes on from a checkpoint, and begins to watch."""
        model: nn.Module = more["model"]
        self._close()
        if args.n_gpu > 1:
            raise FqtError(
                f"Trainer would spread the model over {args.n_gpu} GPUs by DataParallel, whose copies draw noise "
                "in no order: start it by torchrun, or show it one GPU (CUDA_VISIBLE_DEVICES)"
            )
        self.saved = _of_checkpoint(state, type(self).__name__)
        if self.saved is not None:
            restore_recipe(model, self.saved[RECIPE])
        check_converted(model)
        self._model = model
        if self.every is None:
            return
        if args.label_smoothing_factor:
            raise FqtError(
                "Trainer computes label smoothing outside the model, where no callback sees it: pass every=None "
                "for no readings, or smooth in the model"
            )
        kind, group = AcceleratorState().distributed_type.name, None
        if kind.startswith("MULTI_"):  # accelerate's words for DistributedDataParallel: MULTI_GPU, MULTI_CPU …
            group = torch.distributed.group.WORLD
        else:
            refuse_parts(kind)
        self._step = _Step(model, self.every, self.layers, group, args.average_tokens_across_devices)
        if self.saved is not None and "readings" in self.saved:
            self._step.readings.load_state_dict(self.saved["readings"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Takes a reading if one is due."""
        if self._step is not None:
            found = self._step.end(state.global_step + 1, getattr(more.get("optimizer"), "scaler", None))
            self._unlogged = found or self._unlogged

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Adds the last reading to what is logged next, and to the history that the state keeps."""
        if logs is None or "loss" not in logs:
            return  # of an evaluation, or the end's summary
        for target in (logs, state.log_history[-1] if state.log_history else {}):
            target.update(self._unlogged)
        self._unlogged = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Leaves the model as it was."""
        self._close()
        self.saved = None

    def _close(self) -> None:
        if self._step is not None:
            self._step.close()
        self._step = self._model = None
        self._unlogged = {}


def _of_checkpoint(state: TrainerState, name: str) -> dict[str, Any] | None:
    """What this callback wrote into the state that training goes on from; None if it is a new one."""
    entries: Any = state.stateful_callbacks or {}  # declared as a list, kept as a dictionary
    entry = entries.get(name)
    entry = entry[0] if isinstance(entry, list) else entry
    return None if entry is None else entry["attributes"]["saved"]


class _Step:
    """One optimizer step after the other: what the model is given, and how large gradients are before clipping."""

    def __init__(self, model: nn.Module, every: int, layers: bool, group: Any, tokens_of_all: bool) -> None:
        how: dict[str, Any] = {"layers": layers, "process_group": group, "advice": _ADVICE}
        self.readings = Readings(model, self._loss, every, self._half, **how)
        self._processes = self.readings.monitor.processes
        self._items_of = self._processes.count if tokens_of_all else 1
        """How many processes' labels `Trainer` counts as one batch's; it multiplies the loss by it."""
        self._batches: list[dict[str, Any]] = []
        self._square: float | None = None
        self._reading = False  # while passes are made again
        self._noting = False  # once a backward pass will end with `_note`
        self._parameters = trainable(model)
        self._hooks = [model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        self._hooks += [p.register_post_accumulate_grad_hook(self._in_backward) for p in self._parameters.values()]

    def end(self, number: int, scaler: Any) -> dict[str, float] | None:
        """After the last backward pass of a step and clipping; a reading if one was due."""
        batches, square = self._batches, self._square
        self._batches, self._square = [], None
        if self.readings.is_due and self._processes.total(len(batches) == 1 and not _has_halves(batches[0])):
            self.readings.wait(number, "fewer than two of its samples have labels that count")
            return None
        scale = 1.0 if scaler is None or not scaler.is_enabled() else scaler.get_scale()
        summed = any(batch.get("num_items_in_batch") is not None for batch in batches)
        self._reading = True
        try:
            with self._unclipped(square):
                return self.readings.step(number, batches, reduction="sum" if summed else "mean", scale=scale)
        finally:
            self._reading = False

    @contextmanager
    def _unclipped(self, square: float | None) -> Iterator[None]:
        """While it lasts, gradients are as large as backward passes left them; then the very tensors they were.

        A loss multiplied by what clipping multiplied gradients by would do as well but for rounding: under a recipe
        with `x`, another last bit can be another choice of quantizer.

        Args:
            square: their squared norm then; None if no backward pass was watched.
        """
        if square is None:
            yield
            return
        clipped = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        now = self._size()
        grown = math.sqrt(square / now) if now else 1.0
        grown = grown if math.isfinite(grown) else 1.0  # of what a scaler divided out, too
        for name, gradient in clipped.items():
            self._parameters[name].grad = gradient if grown == 1.0 else gradient * grown
        try:
            yield
        finally:
            for name, gradient in clipped.items():
                self._parameters[name].grad = gradient

    def close(self) -> None:
        """Takes all hooks off the model."""
        self.readings.close()
        for hook in self._hooks:
            hook.remove()

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._reading and model.training and torch.is_grad_enabled() and self.readings.is_due:
            if args:
                raise FqtError("Trainer gives a model its batch by keyword; this one got some by position")
            self._batches.append(kwargs)
            self._noting = False  # of a backward pass that did not come to its end

    def _in_backward(self, parameter: Tensor) -> None:
        if self._reading or self._noting or not self.readings.is_due:
            return
        self._noting = True
        queue = torch.autograd.Variable._execution_engine.queue_callback
        # DistributedDataParallel averages at the end of a pass, too, in a callback queued later than this one.
        queue(lambda: queue(self._note))

    def _note(self) -> None:
        self._noting, self._square = False, self._size()

    def _size(self) -> float:
        return sum(float(energy(p.grad)) for p in self._parameters.values() if p.grad is not None)

    def _loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        if not isinstance(loss, Tensor):
            raise FqtError(
                "the model returns no loss: where Trainer computes it (compute_loss, compute_loss_func), no "
                "callback sees it"
            )
        return loss if batch.get("num_items_in_batch") is None else loss * self._items_of

    def _half(self, batch: Any) -> tuple[Any, float]:
        """A first part with about half of the labels that count, and its share of them."""
        part, first, whole = self._processes.together(lambda: _parted(batch))
        items = batch.get("num_items_in_batch")
        if items is not None:
            if self._items_of > 1:
                first, whole = self._processes.means(first, whole)
            part["num_items_in_batch"] = items * (first / whole)
        return part, first / whole


def _parted(batch: Mapping[str, Any]) -> tuple[Any, float, float]:
    """A first part of a batch, how many labels count in it, and in all of the batch.

    By labels, not samples: a mean over labels weighs a sample by how many it has, and padding has none.
    """
    labels = batch.get("labels")
    counted = _counted(labels).cumsum(0).double() if labels is not None and labels.ndim else torch.zeros(0)
    within = counted[(counted > 0) & (counted < counted[-1:])]
    if not len(within):  # no labels, or one sample, which is refused; of several, `_has_halves` knows
        part, share = first_half(batch)
        return part, share, 1.0
    half = within[(within - counted[-1] / 2).abs().argmin()]
    return first_half(batch, rows=int((counted <= half).sum()))[0], float(half), float(counted[-1])


def _counted(labels: Tensor) -> Tensor:
    """How many of each sample's labels count."""
    return (labels != _IGNORED).reshape(len(labels), -1).sum(1)


def _has_halves(batch: Mapping[str, Any]) -> bool:
    """Whether a batch's samples, if it has several, can be parted such that labels count in both parts."""
    labels = batch.get("labels")
    if labels is None or not labels.ndim or len(labels) < 2:
        return True
    return int((_counted(labels) > 0).sum()) > 1
