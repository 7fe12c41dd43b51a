"""The same training with several recipes and seeds, and what each recipe's gradient noise is.

Runs with one seed share initial weights, data order and crops across recipes, so differences between recipes are
paired. A finished run is never made twice: an interrupted comparison continues where it was, and one with more
recipes or seeds adds to what is there.

**Gradient variance against the mini-batch's.** For each seed the weights of a reference run (the baseline's, if it
is part of the comparison, else the first recipe's) after half of its steps are put into the model converted to each
recipe. On fixed training batches the backward is repeated with fresh quantization noise; the variance of the whole
parameter gradient given the batch, averaged over the batches, is divided by the variance that the baseline's
gradient has from batch to batch at the same weights:

    ρ = E_batch Var[g_recipe | batch] / Var_batch[g_baseline].

At ρ = 1 quantization is as noisy as sampling the batch; below some hundredths it is hard to notice in training.
Dropout is switched off in the measurement.
Half-way weights are neither random nor converged; at the end of training on a small set the loss, and with it both
variances, are nearly zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.files import check_path, locked
from fqt.records import MAYBE, TEXT, check_shape, environment, read_json, write_json
from fqt.stats import quantization_variance, sampling_variance
from fqt.stats.spread import ratio
from fqt.train.config import TrainConfig, differing
from fqt.train.named import named_recipe
from fqt.train.results import METRICS, RunResult, is_share
from fqt.train.run import Observer, Silent, discard, train
from fqt.train.snapshot import Snapshot
from fqt.train.task import ACCURACY, Metric
from fqt.train.tasks import load_task
from fqt.train.trainer import make_model, pick_device

__all__ = ["Comparison", "check_comparison", "compare"]

FORMAT = "fqt compare 2"
FIRST = "fqt compare 1"  # of versions that knew no metric but accuracy
_ESTIMATE = {"value": MAYBE, "error": MAYBE}
# What everyone who reads a record of a comparison may rely on.
SHAPE: dict[str, Any] = {
    "environment": {"time": TEXT, "commit": (str, type(None)), "dirty": (bool, type(None)), "accelerators": [TEXT]},
    "config": {"task": TEXT, "model": TEXT},
    "baseline": TEXT,
    "recipes": [TEXT],
    "seeds": [(int,)],
    "measurement": {"reference": TEXT, "batches": (int,), "draws": (int,)},
    "metrics": METRICS,
    "runs": [
        {
            "recipe": TEXT, "seed": (int,), "metrics": {...: MAYBE}, "train_loss": MAYBE, "diverged": (bool,),
            "loss_curve": [[MAYBE]], "metric_curves": {...: [[MAYBE]]},
        }
    ],
    "gradient": [{"recipe": TEXT, "seed": (int,), "ratio": _ESTIMATE}],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare. Raises `FqtError` on construction when it makes no sense.

    Attributes:
        base: the training, but for recipe and seed.
        recipes: names, or paths of TOML files, at least one.
        seeds: at least one.
        baseline: the recipe whose mini-batch variance is the unit; it need not be among ``recipes``.
        batches: fixed batches on which quantization noise is measured; 0 leaves the measurement out.
        draws: backward passes per batch.
        sampling_batches: batches for the mini-batch variance.
    """

    base: TrainConfig
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str = "qat"
    batches: int = 4
    draws: int = 8
    sampling_batches: int = 16

    def __post_init__(self) -> None:
        """Validates, recipe names included."""
        if not self.recipes or not self.seeds:
            raise FqtError("a comparison needs at least one recipe and one seed")
        labels = [recipe_label(recipe) for recipe in self.recipes]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise FqtError(f"the recipes {', '.join(twice)} are named twice")
        for recipe in (*self.recipes, self.baseline):
            named_recipe(recipe)
        if self.batches and (self.batches < 2 or self.draws < 2 or self.sampling_batches < 2):
            raise FqtError("a variance needs at least 2 batches, 2 draws and 2 sampling batches")

    @property
    def reference(self) -> str:
        """The recipe whose half-way weights the gradients are measured at."""
        return self.baseline if self.baseline in self.recipes else self.recipes[0]

    def settings(self) -> dict[str, Any]:
        """What the measured variances depend on besides the weights."""
        return {
            "reference": recipe_label(self.reference),
            "baseline": recipe_label(self.baseline),
            "batches": self.batches,
            "draws": self.draws,
            "sampling_batches": self.sampling_batches,
        }


def recipe_label(recipe: str) -> str:
    """A recipe's name in tables and folders: itself, or the stem of its file."""
    name = Path(recipe).stem if recipe.endswith(".toml") else recipe
    return re.sub(r"[^\w.+@-]+", "_", name)


def compare(
    comparison: Comparison,
    folder: Path,
    *,
    force: bool = False,
    command: Sequence[str] = (),
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Makes the runs and measurements that are not there yet, and keeps ``compare.json`` up to date.

    Args:
        comparison: what to compare.
        folder: gets one folder per run, and ``compare.json``.
        force: discard runs that are there.
        command: what the user typed, for the record.
        observer: told of every step and record of every run.

    Returns:
        The content of ``compare.json``.

    Raises:
        FqtError: what `fqt.train.run.train` raises, or the folder holds a comparison of another training; a
            recipe that does not fit the model is found before anything runs.
        Interrupted: the user stopped it; calling again continues.
    """
    check_path(folder)
    metrics = _check_recipes(comparison)
    with locked(folder):
        return _compare(comparison, metrics, folder, force, command, observer or Silent())


def check_comparison(record: Any, where: str) -> dict[str, Any]:
    """A record of a comparison, checked; one of the first version in today's form.

    Raises:
        FqtError: it is none, or damaged.
    """
    if not isinstance(record, dict) or record.get("format") not in (FORMAT, FIRST):
        raise FqtError(f"{where} is no record of a comparison")
    if record["format"] == FIRST:
        check_shape(record, {"runs": [{"accuracy": is_share, "accuracy_curve": [[MAYBE]]}]}, where)
        record = {**record, "format": FORMAT, "metrics": [ACCURACY.to_dict()]}
        record["runs"] = [
            {**run, "metrics": {"accuracy": run["accuracy"]}, "metric_curves": {"accuracy": run["accuracy_curve"]}}
            for run in record["runs"]
        ]
    check_shape(record, SHAPE, where)
    return record


def _compare(
    comparison: Comparison,
    metrics: Sequence[Metric],
    folder: Path,
    force: bool,
    command: Sequence[str],
    observer: Observer,
) -> dict[str, Any]:
    path = folder / "compare.json"
    shared = _shared(comparison.base)
    if force:
        _discard(comparison, folder)
    old = _old(path, shared)
    record: dict[str, Any] = {
        "format": FORMAT,
        "environment": environment(command),
        "config": shared,
        "baseline": recipe_label(comparison.baseline),
        "recipes": [recipe_label(recipe) for recipe in comparison.recipes],
        "seeds": list(comparison.seeds),
        "measurement": comparison.settings(),
        "metrics": [metric.to_dict() for metric in metrics],
        "runs": [],
        "gradient": old["gradient"] if old and old["measurement"] == comparison.settings() else [],
    }
    if old is None:
        write_json(path, record)
    for seed in comparison.seeds:
        for recipe in comparison.recipes:
            config = comparison.base.replace(recipe=recipe, seed=seed)
            home = _home(folder, recipe, seed)
            result = train(config, home, resume=True, command=command, observer=observer)
            record["runs"].append(_run_record(recipe, seed, result))
            write_json(path, record)
        if comparison.batches:
            for entry in _measurements(comparison, folder, seed, record, observer):
                record["gradient"].append(entry)
                write_json(path, record)
    return record


def _check_recipes(comparison: Comparison) -> Sequence[Metric]:
    """Converts the model to every recipe, so that the last one's misfit shows before hours of training; what the
    runs will be judged by.
    """
    task = load_task(comparison.base, pick_device(comparison.base.device))
    for recipe in (*comparison.recipes, comparison.baseline):
        make_model(comparison.base, task, recipe)
    return task.metrics


def _discard(comparison: Comparison, folder: Path) -> None:
    """Removes the record and the runs that it or the new comparison names, all at once: a forced comparison that
    is interrupted can then be continued like any other.
    """
    path = folder / "compare.json"
    homes = {_home(folder, recipe, seed) for recipe in comparison.recipes for seed in comparison.seeds}
    with contextlib.suppress(FqtError, KeyError, TypeError):  # what is being discarded may be anything
        homes |= {_home(folder, run["recipe"], run["seed"]) for run in read_json(path)["runs"]}
    path.unlink(missing_ok=True)
    for home in homes:
        discard(home)


def _old(path: Path, shared: dict[str, Any]) -> dict[str, Any] | None:
    """The record that is there."""
    if not path.exists():
        return None
    old = read_json(path)
    if not isinstance(old, dict) or old.get("format") not in (FORMAT, FIRST):
        raise FqtError(f"{path} is no record of a comparison; name another --out, or discard it with --force")
    old = check_comparison(old, str(path))
    changed = differing(old["config"], shared)
    if changed:
        raise FqtError(
            f"{path.parent} holds a comparison with another {', '.join(changed)}: name another --out, "
            "or discard it with --force"
        )
    return old


def _shared(base: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in base.to_dict().items() if name not in ("recipe", "seed")}


def _home(folder: Path, recipe: str, seed: int) -> Path:
    return folder / f"{recipe_label(recipe)}-seed{seed}"


def _run_record(recipe: str, seed: int, result: RunResult) -> dict[str, Any]:
    values = dataclasses.asdict(result)
    del values["kinds"]  # the comparison says it once
    return {"recipe": recipe_label(recipe), "seed": seed, **values}


def _measurements(
    comparison: Comparison, folder: Path, seed: int, record: dict[str, Any], observer: Observer
) -> Iterator[dict[str, Any]]:
    """The gradient measurements of one seed that the record lacks; none where the reference run diverged."""
    done = {(entry["recipe"], entry["seed"]) for entry in record["gradient"]}
    missing = [recipe for recipe in comparison.recipes if (recipe_label(recipe), seed) not in done]
    reference = recipe_label(comparison.reference)
    diverged = any(r["diverged"] for r in record["runs"] if (r["recipe"], r["seed"]) == (reference, seed))
    if not missing or diverged:
        return
    snapshot = Snapshot.of_config(
        comparison.base.replace(seed=seed), _home(folder, comparison.reference, seed) / "halfway.pt"
    )
    batches = snapshot.batches(max(comparison.batches, comparison.sampling_batches))
    observer.begin(f"gradient noise seed {seed}", len(missing), 0)
    fixed, draws = batches[: comparison.batches], comparison.draws
    try:
        baseline = snapshot.model(comparison.baseline)
        sampling = sampling_variance(baseline, snapshot.loss, batches[: comparison.sampling_batches], seed).total
        for recipe in missing:
            noise = quantization_variance(snapshot.model(recipe), snapshot.loss, fixed, draws, seed).total
            observer.step()
            yield {
                "recipe": recipe_label(recipe),
                "seed": seed,
                "step": snapshot.step,
                "quantization": dataclasses.asdict(noise),
                "sampling": dataclasses.asdict(sampling),
                "ratio": dataclasses.asdict(ratio(noise, sampling)),
            }
    finally:
        observer.end()
