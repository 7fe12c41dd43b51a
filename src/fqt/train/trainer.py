"""The state of a training run and what one step does to it. No files, no clock, no signals: see `fqt.train.run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fqt.errors import FqtError
from fqt.nn import Recipe, dump_recipe, quantize_
from fqt.nn.stored import without_recipe
from fqt.seeds import derive_seed
from fqt.stats.passes import LossFn
from fqt.train.adapt import Adapter
from fqt.train.average import Average
from fqt.train.checkpoint import restore_rng, rng_state, seed_all
from fqt.train.config import TrainConfig
from fqt.train.graphs import Capture, Graphs
from fqt.train.named import named_recipe
from fqt.train.optim import learning_rate, make_optimizer, set_rate
from fqt.train.ranks import Ranks
from fqt.train.shards import gathered, placed, placed_optimizer, shard, whole
from fqt.train.task import Task
from fqt.train.tasks import load_task

if TYPE_CHECKING:  # torch may have been built without what messages need
    from fqt.distributed import Messages

__all__ = ["Trainer", "forward", "load_weights", "make_model", "pick_device", "training_loss"]


class Trainer:
    """A model, its optimizer, its data, and how far training has come.

    Everything random derives from ``config.seed``: equal seeds give equal initial weights and equal data for every
    recipe. Constructing one seeds the global generators of torch, NumPy and Python; two trainers that take turns
    in one process would therefore share one stream of noise, which is sound but not reproducible.

    Of several processes each takes its part of every batch, and has noise of its own; gradients are averaged such
    that the loss is the mean over the batch's targets. All of them must call the same methods.

    Args:
        config: the run.
        ranks: the processes that make it.

    Raises:
        FqtError: an unknown task, model, recipe or device, missing data, or what several processes cannot do.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        _check_processes(config, self.ranks)
        self.device = pick_device(config.device, self.ranks)
        if config.graph and self.device.type != "cuda":
            raise FqtError(
                f"--graph records a step's launches on a GPU, and this run is on {self.device}: leave it out"
            )
        self.recipe: dict[str, Any] = dump_recipe(named_recipe(config.recipe))
        self.task: Task = load_task(config, self.device)
        self.model = make_model(config, self.task, config.recipe).to(self.device)
        self.steps_per_epoch = self.task.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.steps is not None:
            self.total_steps = min(self.total_steps, config.steps)
        self.averaged = Average(self.model, config, self.total_steps) if config.average else None
        if config.fsdp:
            for model in (self.model, self.averaged.model) if self.averaged else (self.model,):
                shard(model, self.ranks, self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        self.messages = _messages(config)
        self._forward = self._wrapped()
        self._graphs = Graphs(self._pass, Capture(self.device)) if config.graph else None
        self._window: Tensor | None = None
        self.adapter = self._adapter() if config.adapt else None
        self._events: list[dict[str, Any]] = []
        seed_all(self.ranks.noise_seed(config.seed))

    @property
    def epoch(self) -> int:
        """The epoch that the last step was in."""
        return (self.step - 1) // self.steps_per_epoch

    @property
    def at_evaluation(self) -> bool:
        """Whether the last step is followed by an evaluation."""
        every = self.config.eval_every or self.steps_per_epoch
        return self.step % every == 0 or self.step == self.total_steps

    @property
    def at_window_end(self) -> bool:
        """Whether the last step closed a window of metrics; windows straddle neither epochs nor evaluations."""
        position = self.step % self.steps_per_epoch
        return self.at_evaluation or position % self.config.window == 0

    def description(self) -> dict[str, Any]:
        """The record that says how to read the others."""
        metrics = [metric.to_dict() for metric in self.task.metrics]
        return {"kind": "task", "step": 0, "metrics": metrics, "samples": self.task.samples}

    def batches(self) -> Iterator[Any]:
        """The batches from here to the end of the epoch or of the run."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        left = self.total_steps - self.step
        for count, batch in enumerate(self.task.train(epoch, position), start=1):
            yield batch
            if count == left:
                return

    def train_step(self, batch: Any) -> None:
        """One step of the optimizer on one batch; what is counted is added up without waiting for the device."""
        rate = learning_rate(self.config, self.step, self.steps_per_epoch, self.total_steps)
        set_rate(self.optimizer, rate)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=self._graphs is None)
        if self.config.fsdp:
            self.ranks.share(self.model.buffers())  # as DDP does
        mine, finite = self._backward(batch)
        if self.adapter is not None and not self.ranks.any(not finite):
            self._events += self.adapter.step(mine, self.step + 1, self.task.is_whole(batch))
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        if self.averaged is not None:
            self.averaged.update(self.model, self.step)

    def _backward(self, batch: Any) -> tuple[Any, Tensor]:
        """The gradient of a batch, from its parts on all processes and, on each, one after the other.

        Returns:
            This process's part, or the whole batch where it goes through several; whether its loss was finite.
        """
        processes = self.ranks.count
        parts = self.task.split(batch, processes * self.config.accumulate)
        counts = [self.task.count(part) for part in parts] if len(parts) > 1 or processes > 1 else []
        if self.adapter is not None and processes > 1 and len(set(counts)) > 1 and self.task.is_whole(batch):
            raise FqtError(
                f"--adapt on several processes needs equal parts, and these have {counts} {self.task.samples} to "
                "predict: leave it out, or train on one process"
            )
        if self._graphs is not None:
            sums, finite = self._graphs(batch)
            self._add(sums)
            return batch, finite
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        mine = list(self.ranks.deal(enumerate(parts)))
        for done, ((i, part), counted) in enumerate(mine, start=1):
            with self._unsent() if done < len(mine) else nullcontext():
                # Gradients are averaged over processes, hence the factor.
                share = processes * counted * counts[i] / sum(counts) if counts else None
                sums, good = self._pass(part, share)
            self._add(sums if counted else torch.zeros_like(sums))
            finite = finite & good
        return mine[0][0][1] if len(mine) == 1 else batch, finite

    def _pass(self, batch: Any, share: float | None = None) -> tuple[Tensor, Tensor]:
        """The gradient of a batch, times its share; the task's sums, and whether the loss was finite."""
        logits, targets = forward(self.task, self._forward, batch, amp=self.config.amp)
        loss = self.task.loss(logits, targets, self.config.label_smoothing)
        (loss if share is None else loss * share).backward()
        with torch.no_grad():
            return self.task.sums(logits, targets, loss), torch.isfinite(loss.detach())

    def _add(self, sums: Tensor) -> None:
        self._window = sums if self._window is None else self._window + sums

    def _unsent(self) -> AbstractContextManager[None]:
        """Meanwhile each process adds up gradients of its own; those of shards are averaged part by part."""
        if isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return nullcontext()

    def _wrapped(self) -> Any:
        """The model as it is called in training: compiled, and with its gradients averaged over processes."""
        model: Any = torch.compile(self.model) if self.config.compile else self.model
        if self.ranks.count == 1 or self.config.fsdp:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        replica = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        if self.messages is not None:
            from fqt.distributed import quantized_messages

            replica.register_comm_hook(self.messages, quantized_messages)
        return replica

    def take_events(self) -> list[dict[str, Any]]:
        """Records of what was measured and changed since the last call."""
        events, self._events = self._events, []
        return events

    def take_window(self) -> dict[str, Any]:
        """The mean loss and the metrics over all targets since the last call; starts a new window."""
        assert self._window is not None
        sums = self.ranks.total(self._window)
        self._window = None
        return {
            "kind": "train",
            "epoch": self.epoch,
            "step": self.step,
            "samples": int(sums[-1]),
            "loss": sums[0] / sums[-1],
            "metrics": self.task.values(sums),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Mean loss (without smoothing) and metrics on the evaluation data, in eval mode, by averaged weights if
        there are; after the last step also what the task scores otherwise.
        """
        model = self.model if self.averaged is None else self.averaged.model
        model.eval()
        self.ranks.share(model.buffers())
        totals: Tensor | None = None
        for batch, counted in self.ranks.deal(self.task.eval()):
            sums = self.task.sums(*forward(self.task, model, batch, amp=self.config.amp))
            sums = sums if counted else torch.zeros_like(sums)
            totals = sums if totals is None else totals + sums
        assert totals is not None, "a task has evaluation data"
        values = self.ranks.total(totals)
        metrics = self.task.values(values)
        if self.step == self.total_steps:
            with gathered(model) if self.config.fsdp else nullcontext():
                metrics |= self.ranks.lead(lambda: dict(self.task.score(model, self.config.amp)))
        return {
            "kind": "eval",
            "epoch": self.epoch,
            "step": self.step,
            "samples": int(values[-1]),
            "loss": values[0] / values[-1],
            "metrics": metrics,
        }

    def weights(self) -> dict[str, Tensor]:
        """The model's state, whole."""
        return whole(self.model.state_dict())

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue to the same numbers on as many processes; the first one's is to be
        kept.
        """
        window = None if self._window is None else self._window.cpu()
        first, *others = self.ranks.everyone({"window": window, "rng": rng_state()})
        return {
            "config": self.config.to_dict(),
            "recipe": self.recipe,
            "step": self.step,
            "model": self.weights(),
            "optimizer": whole(self.optimizer.state_dict()),
            **first,
            "others": others,
            "adapter": None if self.adapter is None else self.adapter.state(),
            "average": None if self.averaged is None else whole(self.averaged.model.state_dict()),
            "messages": None if self.messages is None else self.messages.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a state where `state` was called, on any number of processes.

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
            self.optimizer.load_state_dict(placed_optimizer(state["optimizer"], self.optimizer))
        except ValueError as error:
            raise FqtError(f"the checkpoint's optimizer does not fit this model ({error})") from error
        if _differ(built, self.optimizer.param_groups) or not _fits(self.optimizer):
            raise FqtError("the checkpoint's optimizer is another than this run's")
        self.step = state["step"]
        if self.averaged is not None:
            if state.get("average") is None:
                raise FqtError("the checkpoint has no averaged weights, which this run evaluates")
            load_weights(self.averaged.model, state["average"])
        if self.adapter is not None:
            self.adapter.restore(state["adapter"])
        if self.messages is not None and state.get("messages"):
            self.messages.load_state_dict(state["messages"])
        self._take_up_own([{"window": state["window"], "rng": state["rng"]}, *state.get("others", [])])

    def _take_up_own(self, saved: list[dict[str, Any]]) -> None:
        """What each process had of its own: sums, which the first takes up if there were others, and generators."""
        ranks = self.ranks
        windows = [own["window"] for own in saved if own["window"] is not None]
        self._window = None
        if windows and sum(windows)[-1]:
            if len(saved) != ranks.count:
                windows = [sum(windows), *[torch.zeros_like(windows[0])] * (ranks.count - 1)]
            self._window = windows[ranks.rank].to(self.device)
        if ranks.rank < len(saved):
            restore_rng(saved[ranks.rank]["rng"])
        else:
            seed_all(ranks.noise_seed(self.config.seed, self.step))

    def _adapter(self) -> Adapter:
        """What changes the recipe; its loss is the training loss."""
        loss_fn = training_loss(self.config, self.task)
        every = self.config.adapt_every
        return Adapter(
            self._forward,
            loss_fn,
            target=self.config.rho,
            every=every,
            seed=self.config.seed,
            ranks=self.ranks,
            messages=self.messages if self.ranks.count > 1 else None,
        )


def _fits(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what the known optimizers keep per entry has the parameters' shapes."""
    per_entry = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    return all(
        state[name].shape == parameter.shape
        for parameter, state in optimizer.state.items()
        for name in per_entry
        if state.get(name) is not None
    )


def _differ(built: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> bool:
    """Whether an optimizer's groups have other settings, but for the rate, which every step sets.

    Settings that only one of them has are another version's of torch.
    """
    pairs = zip(built, loaded, strict=True)
    return any(a[name] != b[name] for a, b in pairs for name in {*a} & {*b} - {"params", "lr"})


def _messages(config: TrainConfig) -> Messages | None:
    """How processes send each other gradients, if not as floats."""
    if not config.messages:
        return None
    from fqt.distributed import Messages

    return Messages(config.messages, seed=derive_seed(config.seed, "messages"))


def _check_processes(config: TrainConfig, ranks: Ranks) -> None:
    """Refuses what cannot be done by this many processes."""
    if ranks.count == 1:
        if config.fsdp:
            raise FqtError(
                "--fsdp deals a model out over processes, and this is one: start it by torchrun "
                "--nproc-per-node 2 -m fqt train, or say --no-fsdp"
            )
        return
    if config.graph:
        raise FqtError("--graph records the steps of one process: leave it out under torchrun")
    if config.adapt and config.batch_size % ranks.count:
        raise FqtError(
            f"--adapt compares equal parts of a batch: make --batch-size {config.batch_size} a multiple of the "
            f"{ranks.count} processes"
        )


def make_model(config: TrainConfig, task: Task, recipe: str | Recipe) -> nn.Module:
    """The configuration's model for this task with its initial weights, converted to ``recipe``; on the CPU.

    Channels-last, the layout in which convolutions are fastest, on integers and in float. Seeds the global
    generators: the weights depend on ``config.seed`` only.

    Raises:
        FqtError: an unknown model or recipe, a recipe that does not fit the model, or checkpointing of a model
            that has none.
    """
    seed_all(derive_seed(config.seed, "weights"))
    model = task.build(config.model)
    if config.checkpointing:
        if not hasattr(model, "checkpointing"):
            raise FqtError(f"model {config.model}: has no attribute `checkpointing`; leave --checkpointing out")
        model.checkpointing = True  # type: ignore[assignment]
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return quantize_(model, named_recipe(recipe))


def forward(task: Task, model: nn.Module, batch: Any, *, amp: bool) -> tuple[Tensor, Tensor]:
    """The logits in float32, computed under bfloat16 autocast if ``amp``, and the targets."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=amp):
        logits, targets = task.predict(model, batch)
        return logits.float(), targets


def training_loss(config: TrainConfig, task: Task) -> LossFn:
    """``loss_fn(model, batch)``: what a run minimises."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        logits, targets = forward(task, model, batch, amp=config.amp)
        return task.loss(logits, targets, config.label_smoothing)

    return loss_fn


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict, strictly, whatever recipe it was saved under: a run's own record says which.

    Raises:
        FqtError: names or shapes differ from the model's.
    """
    try:
        live = model.state_dict()
        model.load_state_dict({name: placed(x, live.get(name)) for name, x in without_recipe(state).items()})
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise FqtError(f"the checkpoint does not fit this model ({' '.join(lines[1:3])[:200]})") from error


def pick_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device of a name; ``auto`` is a GPU if there is one. Of several processes each has a GPU of its own.

    Raises:
        FqtError: the name is not a device's, or there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks is not None and ranks.count > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise FqtError(f"several processes cannot all use {name}: say --device cuda, and each takes its own")
        name = f"cuda:{ranks.local}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FqtError(f"cannot use the device {name!r} ({reason})") from error
    return device
