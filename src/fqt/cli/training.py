"""`fqt train` and `fqt compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fqt.cli.common import PLACE, say, typed
from fqt.cli.reports import write_reports
from fqt.errors import FqtError
from fqt.train import MODELS, Comparison, TrainConfig, compare, preset_names, resolve, train
from fqt.train.compare import recipe_label
from fqt.train.config import FLIPS, PADDINGS, SCHEDULES, UNITS, tell_of_presets
from fqt.train.models.encoders import ENCODERS
from fqt.train.models.transformers import GPTS
from fqt.train.models.translator import TRANSLATORS
from fqt.train.progress import ConsoleObserver
from fqt.train.ranks import Ranks
from fqt.train.run import continue_config

__all__ = ["compare_command", "train_command"]


RECIPES = "none,qat,ptq4,psq4,bhq4,shq4,shq4d"
Command = Callable[..., Any]


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _training_options(command: Command) -> Command:
    """The options that `train` and `compare` share; an option that is not given leaves the preset's value."""
    options = [
        click.option("--preset", help=f"Values under the other options': {_list(preset_names())}, or a TOML file."),
        click.option(
            "--model", help=f"{_list([*MODELS, *GPTS, *ENCODERS, *TRANSLATORS])}, or package.module:ClassOrFactory."
        ),
        click.option("--data", help="Folder with the task's files."),
        click.option("--epochs", type=int, help="Passes over the training data."),
        click.option("--steps", type=int, help="End after this many steps."),
        click.option("--batch-size", type=int, help="Samples of a step; tokens (translation)."),
        click.option("--accumulate", type=int, help="Parts of a batch, one after the other, to save memory."),
        click.option("--optimizer", help="sgd, adam, adamw, or package.module:Class."),
        click.option("--lr", type=float, help="Peak learning rate."),
        click.option("--min-lr", type=float, help="Where the cosine or linear schedule ends."),
        click.option("--momentum", type=float),
        click.option("--nesterov/--no-nesterov", default=None),
        click.option("--beta1", type=float, help="Of Adam."),
        click.option("--beta2", type=float, help="Of Adam."),
        click.option("--weight-decay", type=float, help="Of all but normalization layers."),
        click.option(
            "--norm-lr-factor", type=float, help="Learning rate of normalization layers over the others'."
        ),
        click.option("--clip-norm", type=float, help="Longest gradient; 0: any."),
        click.option("--average", type=float, help="What averaged weights keep per step; 0: no averaging."),
        click.option("--average-power", type=float, help="Exponent of the run's share that it grows with."),
        click.option("--lookahead", type=int, help="Steps between averages that training goes on from; 0: never."),
        click.option("--schedule", help=_list(SCHEDULES)),
        click.option("--schedule-unit", help=f"When the rate changes: {_list(UNITS)}."),
        click.option("--warmup-epochs", type=int),
        click.option("--warmup-steps", type=int),
        click.option("--warmup-start", type=float, help="Share of the rate that warm-up rises from."),
        click.option("--label-smoothing", type=float),
        click.option("--drop-last/--keep-last", default=None, help="The last, smaller batch of an epoch."),
        click.option("--augment/--no-augment", default=None, help="Random crops and flips."),
        click.option("--flip", help=f"Which images are mirrored: {_list(FLIPS)}."),
        click.option("--shift", type=int, help="Pixels by which images are shifted at most (in memory)."),
        click.option("--padding", help=f"What a shifted image is filled up with: {_list(PADDINGS)}."),
        click.option(
            "--test-views/--no-test-views", default=None, help="At the end, evaluate the mean over copies, too."
        ),
        click.option("--image-size", type=int, help="Side of a crop (imagefolder)."),
        click.option("--context", type=int, help="Tokens of a sequence at most (text)."),
        click.option("--dropout", type=float, help="Of transformers."),
        click.option("--vocabulary", type=int, help="Tokens (translation) or words (classify) that are known."),
        click.option("--source", help="Ending of the files to translate from."),
        click.option("--target", help="Ending of the files to translate to."),
        click.option("--test", help="Name, without ending, of the files whose translation is scored."),
        click.option("--beam", type=int, help="Width of the search for translations; 1 is greedy."),
        click.option("--device", help="auto, cpu, cuda, cuda:1 …"),
        click.option("--workers", type=int, help="Processes that read images (imagefolder)."),
        click.option("--amp/--no-amp", default=None, help="bfloat16 autocast."),
        click.option("--compile/--no-compile", default=None, help="Train with torch.compile."),
        click.option("--graph/--no-graph", default=None, help="On a GPU, replay steps as CUDA graphs."),
        click.option(
            "--checkpointing/--no-checkpointing",
            default=None,
            help="Compute a transformer's blocks again in backward.",
        ),
        click.option("--window", type=int, help="Steps per line of metrics."),
        click.option("--eval-every", type=int, help="Steps between evaluations; 0: one per epoch."),
        click.option("--seed", type=int, help="What all randomness derives from; the first one, for compare."),
        click.option("--out", type=PLACE, help="Folder of the record [default: under runs/]."),
        click.option("--force", is_flag=True, help="Discard what is in the folder."),
    ]
    for option in reversed(options):
        command = option(command)
    return click.argument("task", required=False)(command)


@click.command("train", short_help="Train on a task and keep the record in a folder.")
@_training_options
@click.option(
    "--recipe", help="none, qat, default, int4all, a quantizer such as bhq4, a TOML file, or package.module:name."
)
@click.option("--adapt/--no-adapt", default=None, help="Let the widths of grad_input follow the noise.")
@click.option("--rho", type=float, help="With --adapt: quantization over sampling variance to stay at [0.1].")
@click.option("--adapt-every", type=int, help="With --adapt: steps between measurements [50].")
@click.option("--fsdp/--no-fsdp", default=None, help="Under torchrun: each process keeps a part of the model.")
@click.option("--messages", help="Under torchrun: the quantizer of the gradients that processes send each other.")
@click.option("--resume", is_flag=True, help="Continue the run in --out to the same numbers.")
def train_command(
    task: str | None, preset: str | None, out: Path | None, force: bool, resume: bool, **given: Any
) -> int:
    """Train on TASK and keep the record in a folder.

    Tasks: digits, fashion-mnist, cifar10, imagefolder, shakespeare, translation, classify, or
    package.module:function.
    """
    config = resolve(task, preset, given)
    if not resume and not config.adapt:
        for option in ("rho", "adapt_every"):
            if given[option] is not None:
                raise FqtError(f"--{option.replace('_', '-')} says how to adapt the widths: add --adapt")
    if not preset and not resume:
        tell_of_presets(config)
    folder = out or Path("runs") / f"{config.task}-{recipe_label(config.recipe)}-seed{config.seed}"
    if resume and force:
        raise FqtError("--resume continues and --force discards: give one of them")
    watcher = ConsoleObserver(Console(stderr=True))
    with Ranks.start() as ranks:
        if resume:
            said = _explicit(config, task, preset, given)
            config = ranks.lead(lambda: continue_config(folder, said))
        result = train(config, folder, resume=resume, force=force, command=typed(), observer=watcher, ranks=ranks)
    if ranks.first:
        say(f"{result}, training loss {result.train_loss:.4f}, {result.steps} steps, record in {folder}")
    return 1 if result.diverged else 0


def _explicit(config: TrainConfig, task: str | None, preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What the user said of the run to continue; with a preset, that is the whole configuration."""
    said = {name: value for name, value in given.items() if value is not None}
    return {**config.to_dict(), **said} if preset else {**said, **({"task": task} if task else {})}


@click.command("compare", short_help="Train with several recipes and seeds: a table, a plot, a page.")
@_training_options
@click.option(
    "--recipes",
    default=RECIPES,
    show_default=True,
    help="Recipes to compare, separated by commas, as `fqt train --recipe` takes them.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of seeds.")
@click.option("--baseline", default="qat", show_default=True, help="What runs and noise are measured against.")
@click.option(
    "--batches",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Batches for the gradient's noise; 0 leaves it out.",
)
@click.option(
    "--draws", type=click.IntRange(min=2), default=8, show_default=True, help="Backward passes per batch."
)
@click.option("--resume", is_flag=True, help="Not needed: a comparison always continues.")
def compare_command(
    task: str | None, preset: str | None, out: Path | None, force: bool, resume: bool, **given: Any
) -> None:
    """Train on TASK with several recipes and seeds; end with a table and a plot.

    Finished runs in the folder are not made again: repeat the command after an interruption, or with more seeds.
    """
    if resume and force:
        raise FqtError("--resume continues and --force discards: give one of them")
    recipes = tuple(name.strip() for name in given.pop("recipes").split(",") if name.strip())
    seeds, first = given.pop("seeds"), given.pop("seed") or 0
    measure = {name: given.pop(name) for name in ("baseline", "batches", "draws")}
    config = resolve(task, preset, given)
    if not preset:
        tell_of_presets(config)
    folder = out or Path("runs") / f"compare-{config.task}"
    comparison = Comparison(base=config, recipes=recipes, seeds=tuple(range(first, first + seeds)), **measure)
    console = Console(stderr=True)
    compare(comparison, folder, force=force, command=typed(), observer=ConsoleObserver(console))
    write_reports((folder,), None)
