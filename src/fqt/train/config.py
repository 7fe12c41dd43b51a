"""What a training run is: one frozen configuration, validated here and nowhere else.

A configuration is put together from the defaults of the task, a preset and the user's flags, later ones winning.
Defaults and presets are the same thing, TOML files under ``presets/``; the file that bears a task's name holds its
defaults. Paths and machine matters (``data``, ``device``, ``workers``, ``fsdp``, ``graph``), and the number of
processes, may change when a run is continued; everything else would make it a different run.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fqt.errors import FqtError, FqtWarning
from fqt.records import read_toml

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its earlier name
    import tomli as tomllib

__all__ = ["MACHINE_FIELDS", "TrainConfig", "differing", "preset_names", "resolve", "tell_of_presets"]

SCHEDULES = ("cosine", "onecycle", "constant", "linear", "inverse-sqrt")
UNITS = ("step", "epoch")
FLIPS = ("random", "alternating")
PADDINGS = ("zeros", "reflect")
MACHINE_FIELDS = ("data", "device", "workers", "fsdp", "graph")
NOT_NEGATIVE = (
    "seed", "warmup_epochs", "warmup_steps", "workers", "weight_decay", "norm_weight_decay", "min_lr", "clip_norm",
    "eval_every", "norm_lr_factor", "average_power", "lookahead", "length_penalty",
)  # fmt: skip
AT_LEAST_ONE = (
    "epochs", "batch_size", "accumulate", "window", "image_size", "context", "adapt_every", "vocabulary", "beam",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Raises `FqtError` on construction when a value makes no sense.

    Attributes:
        task: name of the data and what is asked of it, e.g. ``digits``, or ``package.module:function``.
        model: a model's name, or ``package.module:ClassOrFactory``.
        recipe: a quantization recipe: a name, the path of a TOML file, or "package.module:name" of a recipe, a
            mapping or a `Quantizer`.
        seed: the only source of randomness: weights, data order, crops and quantization noise derive from it.
        epochs: passes over the training data.
        steps: if set, the run ends after this many optimizer steps; the schedule spans the shorter run.
        batch_size: samples per step, tokens per step for translation; evaluation uses the same.
        accumulate: parts that a batch is cut into, one after the other, to save memory.
        optimizer: ``sgd``, ``adam``, ``adamw``, or ``package.module:Class``.
        lr: peak learning rate.
        min_lr: where ``cosine`` and ``linear`` end.
        momentum: of SGD.
        nesterov: whether the momentum is Nesterov's.
        beta1: of Adam.
        beta2: of Adam.
        weight_decay: coefficient of everything but normalization layers; L2, but for ``adamw``.
        norm_weight_decay: coefficient of normalization layers' weights and biases.
        norm_lr_factor: what the learning rate of normalization layers' parameters is multiplied by.
        decay_biases: whether ``weight_decay`` is for biases, too; else they have ``norm_weight_decay``.
        clip_norm: the gradient is scaled down to this norm where it is longer; 0 never.
        average: share that averaged weights, which are then evaluated, keep per step; 0 for no averaging.
        average_power: p, where that share grows over the run as (step/steps)^p.
        lookahead: steps between two times that weights are averaged and training goes on from the average; 0:
            averaged every step, and training goes on from its own.
        schedule: ``cosine`` or ``linear`` to ``min_lr``, ``onecycle`` (cosine up from lr/25 over 30 %, then down
            to lr/250,000), ``inverse-sqrt`` (of the step, from the end of warm-up on), or ``constant``.
        schedule_unit: whether the rate changes every ``step`` or every ``epoch``.
        warmup_epochs: linear warm-up before all but ``onecycle``: lr·(i+1)/w in unit i of w.
        warmup_steps: the same in steps.
        warmup_start: share of ``lr`` from which the warm-up rises.
        label_smoothing: of the cross entropy in training.
        drop_last: leave out the last, smaller batch of an epoch.
        augment: random crops and flips as the task defines them.
        flip: which training images are mirrored, where the task mirrors any: each time a ``random`` half, or
            ``alternating``: a half, drawn once, in even epochs, and the others in odd ones.
        shift: pixels by which training images are shifted at most; unset: as the task has it. Images in memory.
        padding: what comes in from outside then: ``zeros``, or the image mirrored at its edge (``reflect``).
        test_views: at the end also evaluate the mean over each image's shifted and mirrored copies.
        image_size: side of a training crop, for tasks that resize.
        context: tokens of a sequence at most, for tasks on text.
        dropout: of transformers.
        source: ending of the files to translate from.
        target: ending of the files to translate to.
        test: name, without ending, of the files whose translation is scored; empty for the validation files.
        vocabulary: tokens that text is written in, for tasks that learn them from it.
        beam: width of the search for translations; 1 is greedy.
        length_penalty: exponent of the length that a translation's log probability is divided by.
        data: folder of the task's files; empty for tasks that need none.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` …
        workers: processes that read images, for tasks that read them from disk.
        amp: run the model under bfloat16 autocast.
        compile: train with ``torch.compile``.
        graph: on a GPU, replay what a step launches as a CUDA graph; to the same numbers, if every step has a
            gradient for every parameter (one that has none is not left alone, but has a gradient of zeros).
        checkpointing: compute the insides of a transformer's blocks again in backward instead of keeping them.
        fsdp: of several processes each keeps a part of the model (`fully_shard`) instead of all of it.
        messages: a quantizer, by name, in whose codes processes send each other gradients; empty: as floats.
        window: steps per line of training metrics.
        eval_every: steps between evaluations; 0 evaluates after every epoch. The last step is always evaluated.
        adapt: change the widths of ``grad_input`` so that quantization noise stays at ``rho``.
        rho: target of ``adapt``: variance of the gradient due to quantization over that due to the mini-batch.
        adapt_every: steps between two measurements of it.
    """

    task: str
    model: str = "convnet"
    recipe: str = "default"
    seed: int = 0
    epochs: int = 10
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    min_lr: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    norm_lr_factor: float = 1.0
    decay_biases: bool = True
    clip_norm: float = 0.0
    average: float = 0.0
    average_power: float = 0.0
    lookahead: int = 0
    schedule: str = "cosine"
    schedule_unit: str = "step"
    warmup_epochs: int = 0
    warmup_steps: int = 0
    warmup_start: float = 0.0
    label_smoothing: float = 0.0
    drop_last: bool = True
    augment: bool = True
    flip: str = "random"
    shift: int | None = None
    padding: str = "zeros"
    test_views: bool = False
    image_size: int = 224
    context: int = 64
    dropout: float = 0.0
    source: str = "en"
    target: str = "de"
    test: str = ""
    vocabulary: int = 10_000
    beam: int = 5
    length_penalty: float = 1.0
    data: str = ""
    device: str = "auto"
    workers: int = 2
    amp: bool = False
    compile: bool = False
    graph: bool = False
    checkpointing: bool = False
    fsdp: bool = False
    messages: str = ""
    window: int = 50
    eval_every: int = 0
    adapt: bool = False
    rho: float = 0.1
    adapt_every: int = 50

    def __post_init__(self) -> None:
        """Validates every value; integers given for floats become floats."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        for name in AT_LEAST_ONE:
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(self.shift is None or self.shift >= 0, f"shift must not be negative, got {self.shift}")
        _require(
            self.average > 0 or not (self.lookahead or self.average_power),
            "lookahead and average_power need an average above 0",
        )
        _require(self.lr > 0, f"lr must be positive, got {self.lr}")
        _require(self.rho > 0, f"rho must be positive, got {self.rho}")
        _require(
            self.batch_size > 1 or not self.adapt, "adapt compares halves of a batch: batch_size must be over 1"
        )
        _require(not (self.adapt and self.compile), "adapt changes the model while it trains: leave compile out")
        others = ("adapt", "compile", "checkpointing", "fsdp")
        with_graph = [name for name in others if getattr(self, name)] + ["accumulate"] * (self.accumulate > 1)
        _require(
            not (self.graph and with_graph), f"graph does not go with {' and '.join(with_graph)}: leave one out"
        )
        _require(
            not (self.fsdp and self.adapt),
            "a gradient's noise is measured on whole models: leave fsdp or adapt out",
        )
        _require(
            not (self.fsdp and self.messages), "messages are sent between whole models: leave fsdp or messages out"
        )
        _require(
            not (self.adapt and self.accumulate > 1),
            "adapt makes the passes of whole batches again, not of their parts: leave accumulate at 1",
        )
        _require(self.accumulate <= self.batch_size, "accumulate cuts a batch into more parts than it has samples")
        _require(self.min_lr <= self.lr, f"min_lr must not be above lr ({self.lr}), got {self.min_lr}")
        for name in ("momentum", "beta1", "beta2", "average", "dropout", "label_smoothing", "warmup_start"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
        _require(self.momentum > 0 or not self.nesterov, "nesterov needs a momentum above 0")
        _require(
            not (self.warmup_epochs and self.warmup_steps),
            "warm up by warmup_epochs or by warmup_steps, not by both",
        )
        _require(
            not self.warmup_steps or self.schedule_unit == "step",
            "warmup_steps needs a rate that changes every step: leave schedule_unit at step",
        )
        for name, allowed in (
            ("schedule", SCHEDULES),
            ("schedule_unit", UNITS),
            ("flip", FLIPS),
            ("padding", PADDINGS),
        ):
            value = getattr(self, name)
            _require(value in allowed, f"unknown {name} {value!r}; known: {', '.join(allowed)}")
        for name in ("task", "model", "recipe", "device", "optimizer", "source", "target"):
            _require(getattr(self, name) != "", f"{name} must not be empty")

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as plain values that TOML and JSON can hold."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str = "the configuration") -> TrainConfig:
        """Builds a configuration from a mapping.

        Raises:
            FqtError: an unknown key, a value of the wrong type, or one that makes no sense.
        """
        known = [field.name for field in dataclasses.fields(TrainConfig)]
        unknown = sorted(set(values) - set(known))
        _require(not unknown, f"{source} has unknown keys {', '.join(unknown)}; known: {', '.join(known)}")
        _require("task" in values, f"{source} names no task")
        return TrainConfig(**values)


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields in which two saved configurations make different runs.

    A field that one of them lacks, because it was saved before the field existed, has its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    names = {*was, *now} - set(MACHINE_FIELDS)
    return sorted(n for n in names if was.get(n, defaults.get(n)) != now.get(n, defaults.get(n)))


def resolve(task: str | None, preset: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Puts a configuration together: the task's defaults, then the preset, then the overrides.

    Args:
        task: the task, or ``None`` to take the preset's (``digits`` without a preset).
        preset: a name from `preset_names`, or the path of a TOML file.
        overrides: fields the user set; ``None`` values count as not set.

    Raises:
        FqtError: an unknown preset or key, a preset made for another task, or a value that makes no sense.
    """
    chosen = load_preset(preset) if preset else {}
    if task and chosen.get("task", task) != task:
        raise FqtError(f"preset {preset} is for the task {chosen['task']}, not {task}")
    task = task or chosen.get("task", "digits")
    defaults = load_preset(task) if task in preset_names() else {}
    given = {name: value for name, value in overrides.items() if value is not None}
    return TrainConfig.from_dict({**defaults, **chosen, **given, "task": task}, preset or "the configuration")


def tell_of_presets(config: TrainConfig) -> None:
    """Warns, before a training without a preset, where the model has one and is not the task's usual model."""
    presets = {name: load_preset(name) for name in preset_names()}
    if config.model == presets.get(config.task, {}).get("model"):
        return
    asked = config.task, config.model
    made = [name for name, of in presets.items() if (of.get("task"), of.get("model")) == asked]
    if made:
        warnings.warn(
            f"model {config.model} is trained as {config.task} is by default; as it is meant to be, by --preset "
            f"{made[0]}",
            FqtWarning,
            stacklevel=2,
        )


def preset_names() -> list[str]:
    """The names of the TOML files that come with the package."""
    return sorted(f.name[:-5] for f in _presets().iterdir() if f.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """Reads a preset, one of `preset_names` or a path ending in ``.toml``.

    Raises:
        FqtError: no such preset, or the file is not TOML.
    """
    if name in preset_names():
        return tomllib.loads((_presets() / f"{name}.toml").read_text(encoding="utf-8"))
    if name.endswith(".toml"):
        return read_toml(Path(name))
    raise FqtError(f"unknown preset {name!r}; known: {', '.join(preset_names())}, or the path of a .toml file")


def _presets() -> Any:
    return resources.files("fqt.train") / "presets"


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` as the field's type; bool is not taken for a number, nor a fraction for an integer."""
    kind = str(field.type)  # annotations are strings in this module
    if kind == "int | None":
        if value is None:
            return None
        kind = "int"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(not isinstance(value, int) or abs(value) < 2**63, f"{field.name} must have less than 64 bits")
    if kind == "float" and is_number:
        _require(math.isfinite(value), f"{field.name} must be finite, got {value}")
        return float(value)
    right = {
        "int": isinstance(value, int) and is_number,
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
    }.get(kind, False)
    _require(right, f"{field.name} must be {_WORDS[kind]}, got {value!r}")
    return value


_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FqtError(message)
