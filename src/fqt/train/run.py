"""A training run with its folder: metrics, checkpoints, interruption, continuation.

The folder holds

=====================  ===========================================================================================
``config.toml``        the whole configuration, and the recipe in full under ``[resolved_recipe]``
``environment.json``   where and with what the run was started, and each time it was continued
``metrics.jsonl``      a line that says what the metrics are (``kind = "task"``), then one
                       per window of steps (``"train"``) and per evaluation (``"eval"``), with
                       ``--adapt`` one per reading of ρ (``"monitor"``) and per change of widths (``"adapt"``); a
                       last line of kind ``"end"`` marks a finished run
``metrics.sums``       how long that file was after each line, and the digest of it
``checkpoint.pt``      the latest state, enough to continue to the same numbers
``halfway.pt``         the weights after half of the steps, where `fqt compare` measures gradients
``.lock``              while a process is at work there: which one
=====================  ===========================================================================================

A checkpoint is written after every evaluation, every ten minutes between two, and when the user ends the run
(Ctrl-C, SIGTERM, a terminal that is closed). It remembers how long ``metrics.jsonl`` was, so that a continued run
cuts off lines from steps that will be done again. All files are sealed (`fqt.files`): a damaged one is refused.

The process may be killed between any two writes. ``config.toml`` is therefore the first file to be there and the
last to go, and is replaced, never removed, where a run starts again; the checkpoint goes before all that it
refers to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fqt.errors import FqtError
from fqt.files import check_path, locked, tidy
from fqt.nn import load_recipe
from fqt.records import RecordLog, check_shape, environment, read_json, read_toml, write_json, write_toml
from fqt.train.checkpoint import load_checkpoint, save_checkpoint
from fqt.train.config import MACHINE_FIELDS, TrainConfig, differing
from fqt.train.named import named_recipe
from fqt.train.ranks import Ranks, launched
from fqt.train.results import RunResult, is_finished, read_result
from fqt.train.trainer import Trainer

__all__ = ["Interrupted", "Observer", "Silent", "continue_config", "discard", "train"]

CHECKPOINT_SECONDS = 600.0
# In the order in which they are removed: see the module.
FILES = ("checkpoint.pt", "metrics.sums", "metrics.jsonl", "halfway.pt", "environment.json", "config.toml")
STAMPS: dict[str, Any] = {"started": (dict, type(None)), "continued": [{}]}
STATE = ("config", "recipe", "step", "model", "optimizer", "window", "rng", "metrics_bytes")


class Interrupted(Exception):
    """The user stopped the run; its state is saved in ``folder`` after ``step`` steps."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the state is saved in {folder}")
        self.folder, self.step = folder, step


class Observer(Protocol):
    """Whoever wants to watch a run."""

    def begin(self, title: str, total: int, done: int) -> None:
        """A run of ``total`` steps starts with ``done`` of them behind it."""

    def step(self) -> None:
        """A step was made."""

    def record(self, record: Mapping[str, Any]) -> None:
        """A line was added to the metrics."""

    def end(self) -> None:
        """The run is over, finished or not."""


class Silent:
    """An observer that does not say anything."""

    def begin(self, title: str, total: int, done: int) -> None:
        """Nothing."""

    def step(self) -> None:
        """Nothing."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    force: bool = False,
    command: Sequence[str] = (),
    observer: Observer | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Trains, and leaves the record in ``folder``.

    Interrupted (Ctrl-C, SIGTERM, a closed terminal), killed or stopped by an error and then resumed, a run gives
    the same metrics, bit for bit, as one that was left alone: on the same machine, with the same number of threads
    and of processes, and on a GPU as far as its kernels are deterministic. (DDP adds gradients up in another order
    in its first step than later: more than two processes, and messages, see it.)

    Args:
        config: the run.
        folder: where the record goes; created.
        resume: continue from the checkpoint; a folder without one starts from the beginning, a finished run is
            read and not run again.
        force: discard the run that is in the folder.
        command: what the user typed, for the record.
        observer: told of every step and record.
        ranks: the processes that make the run together, this one among them; each calls this function, and the
            first keeps the record. By default this one alone.

    Returns:
        The run's numbers, read back from the record.

    Raises:
        FqtError: bad configuration, missing data, a folder that already holds a run or where another process is at
            work, a checkpoint that cannot be used, a damaged record, a full disk. What was saved before is intact.
        Interrupted: the user stopped it.
    """
    ranks = ranks or Ranks()
    if config.messages and ranks.count == 1 and not resume:
        raise FqtError("--messages go between processes, and this is one: start it by torchrun, or leave it out")
    with contextlib.ExitStack() as held:
        if ranks.lead(lambda: _is_free(config, folder, held, resume=resume, force=force)):
            state = ranks.lead(lambda: _saved_state(config, folder) if resume else None)
            trainer = Trainer(config, ranks)  # finds every fault of the configuration before anything is touched
            log = _take_up(trainer, state, folder, command) if state else _open_folder(trainer, folder, command)
            watcher: Observer = observer if observer is not None and ranks.first else Silent()
            watcher.begin(f"{config.recipe} seed {config.seed}", trainer.total_steps, trainer.step)
            watcher.record(trainer.description())
            held.callback(watcher.end)
            with _StopRequest() as stop:
                try:
                    _Loop(trainer, folder, log, watcher, stop).run()
                except Exception as error:
                    if log is not None and trainer.step == 0 and not isinstance(error, Interrupted):
                        discard(folder)  # nothing was trained: the command, mended, finds no run in its way
                    raise
        return ranks.lead(lambda: read_result(folder))


def _is_free(config: TrainConfig, folder: Path, held: contextlib.ExitStack, *, resume: bool, force: bool) -> bool:
    """Whether there is something to do in the folder, which is then locked until `held` ends."""
    check_path(folder)
    if folder.exists() and not folder.is_dir():
        raise FqtError(f"{folder} is a file, not a folder: name another --out")
    if _is_done(config, folder, resume=resume, force=force):
        tidy(folder)
        return False
    held.enter_context(locked(folder))
    # Else meanwhile, by the process that held the lock.
    return not _is_done(config, folder, resume=resume, force=force)


def _is_done(config: TrainConfig, folder: Path, *, resume: bool, force: bool) -> bool:
    """Whether the folder holds this run, finished.

    Raises:
        FqtError: it holds another run, or one that was not to be there.
    """
    occupied = any((folder / name).exists() for name in FILES)
    if occupied and not (resume or force):
        raise FqtError(
            f"{folder} already holds a run: continue it with --resume, discard it with --force, "
            "or name another --out"
        )
    if not resume:
        return False
    if (folder / "config.toml").exists():
        _check_same(folder, _saved_config(folder), config)
        _check_recipe(folder, config)
    try:
        return is_finished(folder)
    except FqtError:
        if (folder / "checkpoint.pt").exists():  # from which what is damaged after it is made again
            return False
        raise


def discard(folder: Path) -> None:
    """Removes the run in ``folder``, and nothing else that lies there."""
    _remove(folder, FILES)


def _remove(folder: Path, names: Sequence[str]) -> None:
    try:
        for name in names:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise FqtError(f"cannot remove {error.filename}: {error.strerror}") from error


def continue_config(folder: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of the run in ``folder``, with the machine's matters as given now.

    Raises:
        FqtError: there is no run, or a given value would make it a different one.
    """
    if not (folder / "config.toml").is_file():
        raise FqtError(f"{folder} holds no run to continue (no config.toml); start one without --resume")
    config = _saved_config(folder)
    wanted = config.replace(**{name: value for name, value in given.items() if value is not None})
    _check_same(folder, config, wanted)
    return wanted


def _saved_config(folder: Path) -> TrainConfig:
    values = read_toml(folder / "config.toml")
    values.pop("resolved_recipe", None)
    return TrainConfig.from_dict(values, str(folder / "config.toml"))


def _check_same(folder: Path, saved: TrainConfig, wanted: TrainConfig) -> None:
    for field in dataclasses.fields(TrainConfig):
        was, now = getattr(saved, field.name), getattr(wanted, field.name)
        if now != was and field.name not in MACHINE_FIELDS:
            raise FqtError(
                f"the run in {folder} was started with {field.name} = {was}; {now} would make it a different run: "
                "name another --out, or discard the old run with --force"
            )


def _check_recipe(folder: Path, config: TrainConfig) -> None:
    """A recipe file may have been edited since: its name alone does not say that it is the same run."""
    was = read_toml(folder / "config.toml").get("resolved_recipe")
    now = named_recipe(config.recipe)  # first: it may import the classes that the other names
    if was is not None and load_recipe(was) != now:
        raise FqtError(
            f"the recipe {config.recipe} is no longer what the run was started with; put the old recipe back, "
            f"name another --out, or discard the run in {folder} with --force"
        )


class _Loop:
    """Steps, windows, evaluations and checkpoints, in order."""

    def __init__(
        self, trainer: Trainer, folder: Path, log: RecordLog | None, observer: Observer, stop: _StopRequest
    ) -> None:
        self.trainer, self.folder, self.log, self.observer, self.stop = trainer, folder, log, observer, stop
        self.clock = self.saved_at = time.monotonic()

    def run(self) -> None:
        """Runs to the end of training, to divergence, or to the user's interruption."""
        trainer = self.trainer
        while trainer.step < trainer.total_steps:
            for batch in trainer.batches():
                self._step(batch)
                if trainer.at_window_end and not self._report(trainer.take_window()):
                    self._report(trainer.evaluate())
                    self._end(diverged=True)
                    return
                if trainer.at_evaluation:
                    self._report(trainer.evaluate())
                    self._save()
                    self._maybe_stop()
                elif self._any(self.stop.requested or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS):
                    self._save()
                    self._maybe_stop()
        self._end(diverged=False)

    def _step(self, batch: Any) -> None:
        if self.trainer.step == self.trainer.total_steps // 2:
            weights = {"config": self.trainer.config.to_dict(), "step": self.trainer.step}
            weights["model"] = self.trainer.weights()
            if self.log is not None:
                save_checkpoint(self.folder / "halfway.pt", weights)
        self.trainer.train_step(batch)
        for record in self.trainer.take_events():
            self._note(record)
        self.observer.step()

    def _any(self, flag: bool) -> bool:
        """Whether a flag is up on any process: all of them must go the same way."""
        return self.trainer.ranks.any(flag)

    def _note(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.append(record)
            self.observer.record(record)

    def _report(self, record: dict[str, Any]) -> bool:
        """Writes a line of metrics; whether its loss is finite."""
        now = time.monotonic()
        record["seconds"], self.clock = round(now - self.clock, 3), now
        self._note(record)
        return math.isfinite(record["loss"])

    def _save(self) -> None:
        state = self.trainer.state()
        if self.log is not None:
            size = self.log.sync()  # the lines must not be younger on the disk than the state
            save_checkpoint(self.folder / "checkpoint.pt", {**state, "metrics_bytes": size})
        self.saved_at = time.monotonic()

    def _maybe_stop(self) -> None:
        if self._any(self.stop.requested):  # also after the last step: a comparison must not go on to its next run
            raise Interrupted(self.folder, self.trainer.step)

    def _end(self, *, diverged: bool) -> None:
        record: dict[str, Any] = {"kind": "end", "step": self.trainer.step, "diverged": diverged}
        if self.trainer.adapter is not None:
            record["mean_width"] = self.trainer.adapter.mean_width
        self._note(record)


def _open_folder(trainer: Trainer, folder: Path, command: Sequence[str]) -> RecordLog | None:
    """Starts the run's record in the place of what is there of a run; the first process's matter."""
    if not trainer.ranks.first:
        return None
    _remove(folder, FILES[:-1])
    write_toml(folder / "config.toml", {**trainer.config.to_dict(), "resolved_recipe": trainer.recipe})
    write_json(folder / "environment.json", {"started": _stamp(trainer, command), "continued": []})
    log = RecordLog(folder / "metrics.jsonl")
    log.append(trainer.description())
    return log


def _saved_state(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The checkpoint's content; None where there is none.

    Raises:
        FqtError: it is damaged or of another run.
    """
    if not (folder / "checkpoint.pt").exists():
        return None
    state = load_checkpoint(folder / "checkpoint.pt", STATE)
    changed = differing(state["config"], config.to_dict())
    if changed:
        raise FqtError(f"the checkpoint in {folder} is of another run ({', '.join(changed)} differ)")
    return state


def _stamp(trainer: Trainer, command: Sequence[str]) -> dict[str, Any]:
    return {**environment(command), "processes": trainer.ranks.count}


def _take_up(trainer: Trainer, state: dict[str, Any], folder: Path, command: Sequence[str]) -> RecordLog | None:
    """Continues where the checkpoint was written, and the first process the run's record."""
    stamps = folder / "environment.json"
    record = read_json(stamps) if trainer.ranks.first and stamps.exists() else {"started": None, "continued": []}
    check_shape(record, STAMPS, str(stamps))
    try:
        trainer.restore(state)
    except FqtError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # Of the right shape, yet no state: only a file without a digest comes this far.
        reason = " ".join(str(error).split())[:120]
        raise FqtError(f"{folder / 'checkpoint.pt'} is damaged ({type(error).__name__}: {reason})") from error
    if not trainer.ranks.first:
        return None
    log = RecordLog(folder / "metrics.jsonl", state["metrics_bytes"])
    record["continued"].append({"step": trainer.step, **_stamp(trainer, command)})
    write_json(stamps, record)
    return log


class _StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request, so that the step in progress is finished and saved.

    SIGHUP (the terminal is closed) stays ignored where it was, as under nohup. A second one of the others
    interrupts at once, but not under `torchrun`, which sends on what the terminal has sent already. Outside the
    main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        at_once = number in (signal.SIGINT, signal.SIGTERM) and not launched()  # SIGHUP comes twice of itself
        if self.requested and at_once:
            raise KeyboardInterrupt
        self.requested = True
