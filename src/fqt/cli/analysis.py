"""`fqt explain`, `fqt diagnose` and `fqt plan`: a model's products, a run's noise, the bits that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

import fqt
from fqt.cli.common import PLACE, keep_clear, print_whole, say, typed
from fqt.errors import FqtError
from fqt.records import TEXT, check_shape, environment, plain, read_json, write_json
from fqt.report import diagnosis_tables, plan_table
from fqt.stats import diagnosis_from, diagnosis_record, quantization_variance
from fqt.train import resolve
from fqt.train.compare import recipe_label
from fqt.train.snapshot import Snapshot, check_run
from fqt.train.tasks import load_task
from fqt.train.trainer import make_model, pick_device, training_loss

__all__ = ["diagnose_command", "explain_command", "plan_command"]


@click.command("explain", short_help="Say which products of a model run on integers, and why.")
@click.argument("task", required=False)
@click.option("--model", help="A model's name, or package.module:ClassOrFactory.")
@click.option(
    "--recipe", default="default", show_default=True, help="A recipe's name, a TOML file, or package.module:name."
)
@click.option("--data", help="Folder with the task's files.")
@click.option("--batch", is_flag=True, help="Run one training batch: what really runs, what in float beside it.")
def explain_command(task: str | None, model: str | None, recipe: str, data: str | None, batch: bool) -> None:
    """Say, layer by layer, which products of TASK's model run on integers under a recipe, and why."""
    config = resolve(task, None, {"model": model, "data": data, "recipe": recipe})
    opened = load_task(config, pick_device("cpu"))
    network = make_model(config, opened, config.recipe)
    given = (next(iter(opened.train(0))), training_loss(config, opened)) if batch else ()
    say(str(fqt.explain(network, *given)))


@click.command("diagnose", short_help="Measure where the gradient noise of a run comes from.")
@click.argument("folder", type=PLACE)
@click.option("--recipe", help="Recipe to measure with [default: the run's].")
@click.option("--at", type=click.Choice(["checkpoint", "halfway"]), default="checkpoint", show_default=True)
@click.option("--batches", default=8, show_default=True, help="Fresh training batches.")
@click.option("--draws", default=2, show_default=True, help="Quantized gradients per batch.")
@click.option("--table", default=1, show_default=True, help="Draws per batch for Theorem 2's table; 0: without.")
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option("--data", help="Folder with the task's files, if it has moved.")
@click.option("--device", help="auto, cpu, cuda, cuda:1 …")
@click.option("--out", type=PLACE, help="Record [default: diagnosis.json in the folder].")
def diagnose_command(
    folder: Path, recipe: str | None, at: str, batches: int, out: Path | None, **given: Any
) -> None:
    """Measure where the gradient noise of the run in FOLDER comes from, at its latest weights."""
    keep_clear(out)
    snapshot = Snapshot.of_run(folder, at=at, data=given.pop("data"), device=given.pop("device"))
    console = Console(stderr=True)
    with console.status("measuring gradients", spinner="line"):
        found = fqt.diagnose(
            snapshot.model(recipe),
            snapshot.loss,
            snapshot.batches(batches),
            equal=snapshot.task.equal_batches,
            **given,
        )
    adapted = ", adapted" if recipe is None and snapshot.recipe != snapshot.config.recipe else ""
    record = {
        "run": str(folder),
        "step": snapshot.step,
        "at": at,
        "recipe": recipe_label(recipe or snapshot.config.recipe) + adapted,
        **diagnosis_record(found),
        "environment": environment(typed()),
    }
    path = out or folder / "diagnosis.json"
    write_json(path, record)
    for table in diagnosis_tables(plain(record)):
        print_whole(table)
    say(f"record: {path}")


@click.command("plan", short_help="Plan each layer's bits for a target, from a diagnosis.")
@click.argument("source", type=PLACE)
@click.option("--rho", type=float, help="Fewest bits with quantization over sampling variance at most this [0.1].")
@click.option("--mean-width", type=float, help="Least variance at this mean width by multiplications instead.")
@click.option(
    "--check",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Fresh batches to measure the plan on, at least 2; 0: none.",
)
@click.option("--data", help="For --check: folder with the task's files, if it has moved.")
@click.option("--device", help="For --check: auto, cpu, cuda …")
@click.option("--out", type=PLACE, help="Recipe file [default: plan.toml beside the record].")
def plan_command(
    source: Path, rho: float | None, mean_width: float | None, check: int, out: Path | None, **given: Any
) -> None:
    """Plan each layer's bits from SOURCE, a diagnosed run's folder or the record, for `fqt train --recipe`."""
    path = source / "diagnosis.json" if source.is_dir() else source
    if source.is_dir() and not path.is_file():
        check_run(source)
        raise FqtError(f"{source} has no diagnosis yet: run `fqt diagnose {source}` first")
    if check == 1:
        raise FqtError("--check needs at least 2 batches, to tell how sure the measurement is")
    record = read_json(path)
    made = fqt.plan(diagnosis_from(record), rho=rho, mean_width=mean_width)
    if check:
        check_shape(record, {"run": TEXT, "at": TEXT}, f"{path}, for --check")
    target = out or path.with_name("plan.toml")
    keep_clear(out)
    made.save(target)
    print_whole(plan_table(made.widths, made.costs.weight))
    say(f"mean width {made.mean_width:.2f} bits, predicted ρ {made.rho:.3g}; recipe: {target}")
    if check:
        snapshot = Snapshot.of_run(Path(record["run"]), at=record["at"], **given)
        fresh = snapshot.batches(check, start=record["batches"])
        noise = quantization_variance(snapshot.model(made.recipe), snapshot.loss, fresh, draws=2).total
        say(f"quantization variance: predicted {made.variance:.3g}, measured {noise.value:.3g} ± {noise.error:.2g}")
