"""The command line: wires the rooms together and turns errors into one line and an exit status.

Exit status: 0 done; 1 the training diverged, a bench found a wrong result, a certificate's verdict is not "exact",
or standard output could not be written; 2 bad input, or a record that could not be written; 130 interrupted with
the state saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress, TextColumn

import fqt
from fqt import bench
from fqt.cli_common import PLACE, complain, keep_clear, say, steady_output, typed
from fqt.cli_reproduce import reproduce_command
from fqt.errors import FqtError
from fqt.files import shown, write_bytes
from fqt.paper.figures import SECTIONS
from fqt.records import TEXT, check_shape, environment, plain, read_json, write_json
from fqt.report import (
    catalog_table,
    certificate_table,
    collect,
    comparison_figure,
    diagnosis_tables,
    has_costs,
    markdown,
    noise_figure,
    plan_table,
    read_comparison,
    rich_table,
    save_figure,
    summarize,
    terminal_table,
    write_page,
)
from fqt.report.section import Table
from fqt.report.tables import screen
from fqt.stats import catalog_record, certified, diagnosis_from, diagnosis_record, quantization_variance
from fqt.train import MODELS, Comparison, Interrupted, TrainConfig, compare, preset_names, resolve, train
from fqt.train.compare import recipe_label
from fqt.train.config import FLIPS, PADDINGS, SCHEDULES, UNITS
from fqt.train.models.encoders import ENCODERS
from fqt.train.models.transformers import GPTS
from fqt.train.models.translator import TRANSLATORS
from fqt.train.progress import ConsoleObserver
from fqt.train.ranks import Ranks, claims, started
from fqt.train.run import continue_config
from fqt.train.snapshot import Snapshot, check_run
from fqt.train.tasks import load_task
from fqt.train.trainer import make_model, pick_device, training_loss

__all__ = ["cli", "main"]

RECIPES = "none,qat,ptq4,psq4,bhq4,shq4,shq4d"
Command = Callable[..., Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``fqt``; ends the process with the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.path.append(os.getcwd())  # so that --model finds a module beside the user; last, so that it hides none
    with steady_output() as out:
        status = _status(arguments)
        out.flush()
        if out.failure:
            complain(f"cannot write to standard output: {out.failure}")
            status = status or 1
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    """Runs a command; what ended it is said in one line, by one process if there are several."""
    status = 2
    try:
        return cli.main(args=arguments, prog_name="fqt", standalone_mode=False) or 0
    except click.ClickException as error:
        line = error.format_message()
    except FqtError as error:
        line = str(error)
    except OSError as error:  # of the system, not of ours: where it was is all that there is to say
        where = f" ({shown(os.fsdecode(error.filename))})" if isinstance(error.filename, str | bytes) else ""
        line = f"{error.strerror or error}{where}"
    except Interrupted as stop:
        line, status = f"{stop}; the same command with --resume (not --force) continues", 130
    except (KeyboardInterrupt, click.Abort):
        line, status = "interrupted", 130
    if claims("the end"):
        complain(line)
    return status


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(fqt.__version__, prog_name="fqt")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train PyTorch models with low-bit weights, activations and gradients, and see what each bit costs."""
    if context.invoked_subcommand != "train" and started() > 1:
        raise FqtError(
            f"only `fqt train` runs on several processes: start `fqt {context.invoked_subcommand}` without torchrun"
        )


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


@cli.command("train")
@_training_options
@click.option("--recipe", help="none, qat, default, int4all, a quantizer such as bhq4, or a TOML file.")
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


@cli.command("compare")
@_training_options
@click.option("--recipes", default=RECIPES, show_default=True, help="Recipes to compare, separated by commas.")
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
@click.option("--resume", is_flag=True, hidden=True, help="A comparison always continues.")
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
    folder = out or Path("runs") / f"compare-{config.task}"
    comparison = Comparison(base=config, recipes=recipes, seeds=tuple(range(first, first + seeds)), **measure)
    console = Console(stderr=True)
    compare(comparison, folder, force=force, command=typed(), observer=ConsoleObserver(console))
    _write_reports((folder,), None)


@cli.command("report")
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=PLACE)
@click.option(
    "--html",
    type=PLACE,
    help="File of the page [default: report.html in the folder; with several, in the current one].",
)
def report_command(paths: tuple[Path, ...], html: Path | None) -> None:
    """Make one web page, complete in itself, of records: folders of runs or comparisons, or folders above them.

    Of a comparison that is named itself, the table and the plot are made again too.
    """
    keep_clear(html)
    _write_reports(paths, html)


def _write_reports(paths: Sequence[Path], html: Path | None) -> None:
    found = collect(paths)
    for folder in paths:
        if (folder / "compare.json").is_file() and any(c.name == str(folder) for c in found.comparisons):
            _write_report(folder)
    page = html or (paths[0] if len(paths) == 1 and paths[0].is_dir() else Path()) / "report.html"
    problems = write_page(found, page, SECTIONS)
    say(f"page: {page}")
    for problem in problems:
        complain(problem)


def _write_report(folder: Path) -> None:
    record = read_comparison(folder)
    rows = summarize(record)
    write_bytes(folder / "compare.md", markdown(record, rows).encode(errors="backslashreplace"))
    figures = {"compare": comparison_figure(record, rows)}
    if has_costs(rows):
        figures["noise"] = noise_figure(record, rows)
    for name, figure in figures.items():
        for ending in ("png", "svg"):
            save_figure(figure, folder / f"{name}.{ending}")
    Console().print(terminal_table(record, rows))
    say(f"table and plots: {folder}/compare.md, " + ", ".join(f"{name}.png, {name}.svg" for name in figures))


@cli.command("diagnose")
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
        _print_whole(table)
    say(f"record: {path}")


@cli.command("plan")
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
    _print_whole(plan_table(made.widths, made.costs.weight))
    say(f"mean width {made.mean_width:.2f} bits, predicted ρ {made.rho:.3g}; recipe: {target}")
    if check:
        snapshot = Snapshot.of_run(Path(record["run"]), at=record["at"], **given)
        fresh = snapshot.batches(check, start=record["batches"])
        noise = quantization_variance(snapshot.model(made.recipe), snapshot.loss, fresh, draws=2).total
        say(f"quantization variance: predicted {made.variance:.3g}, measured {noise.value:.3g} ± {noise.error:.2g}")


def _print_whole(table: Table) -> None:
    """A table at the width it needs: cut columns say nothing, and a pipe has no width."""
    console, shown = Console(), rich_table(table)
    needed = Measurement.get(console, console.options.update(max_width=1000), shown).maximum
    Console(width=max(console.width, needed)).print(shown)


cli.add_command(reproduce_command)


@cli.command("explain")
@click.argument("task", required=False)
@click.option("--model", help="A model's name, or package.module:ClassOrFactory.")
@click.option("--recipe", default="default", show_default=True, help="A recipe's name, or a TOML file.")
@click.option("--data", help="Folder with the task's files.")
@click.option("--batch", is_flag=True, help="Run one training batch: what really runs, what in float beside it.")
def explain_command(task: str | None, model: str | None, recipe: str, data: str | None, batch: bool) -> None:
    """Say, layer by layer, which products of TASK's model run on integers under a recipe, and why."""
    config = resolve(task, None, {"model": model, "data": data, "recipe": recipe})
    opened = load_task(config, pick_device("cpu"))
    network = make_model(config, opened, config.recipe)
    given = (next(iter(opened.train(0))), training_loss(config, opened)) if batch else ()
    say(str(fqt.explain(network, *given)))


@cli.command("bench")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--list", "list_cases", is_flag=True, help="Show the cases and their floors, and end.")
@click.option("--recipe", "recipes", multiple=True, help="Repeatable; instead of each case's own recipes.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …; each has its own cases.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch [default: torch's choice].")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds per case [default: 20; 5 when quick].")
@click.option("--quick", is_flag=True, help="Few rounds and no compiled contestants: a look, not a measurement.")
@click.option(
    "--out",
    type=PLACE,
    default=Path("runs/bench.json"),
    show_default=True,
    help="File of the record; one that is there is replaced.",
)
@click.option("--table", type=PLACE, help="Print the Markdown tables of that record, and end.")
def bench_command(
    cases: tuple[str, ...],
    list_cases: bool,
    recipes: tuple[str, ...],
    device: str,
    threads: int | None,
    repeats: int | None,
    quick: bool,
    out: Path,
    table: Path | None,
) -> int:
    """Measure layers, training steps and quantizers against fp32, bf16 autocast and torchao's int8 training.

    Every result is verified before it is timed. The exit status is 1 if one was wrong; a floor that is missed is
    a result like any other, and the status stays 0. Ctrl-C keeps what was measured.
    """
    keep_clear(out)
    console = Console()
    if table is not None:
        say(bench.markdown(bench.read_bench(table)), end="")
        return 0
    chosen = bench.select(cases, device=bench.device_named(device).type if not list_cases else "cpu")
    if list_cases:
        console.print(bench.list_table(bench.CASES if not cases else chosen))
        return 0
    request = bench.Request(
        cases=chosen,
        recipes=recipes,
        device=device,
        threads=threads,
        repeats=repeats or (5 if quick else 20),
        seeds=2 if quick else 4,
        compile=not quick,
        command=typed(),
    )
    with bench.ConsoleObserver(Console(stderr=True)) as observer:
        record = bench.run(request, out, observer)
    for tables in bench.terminal_tables(record):
        console.print(tables)
    say(f"record in {out}" + (", as far as it came" if record["interrupted"] else ""))
    for line in bench.failures(record):
        print(f"wrong result: {line}", file=sys.stderr)
    if record["interrupted"]:
        return 130
    return 1 if bench.failures(record) else 0


@cli.command("catalog")
@click.option("--certify", is_flag=True, help="Test each for bias and dependence, too; takes minutes.")
@click.option("--json", "file", type=PLACE, help="Write the table to this file, too.")
def catalog_command(certify: bool, file: Path | None) -> None:
    """List the quantizers of the literature: their choices, bits, bias, and exact variance on real gradients."""
    keep_clear(file)
    record = catalog_record()
    console = Console(stderr=True)
    for row in record["rows"] if certify else ():
        with console.status(f"certifying {row['name']}", spinner="line"):
            row["certified"] = certified(row["name"])
    if file is not None:
        write_json(file, {**record, "environment": environment(typed())})
    _print_whole(catalog_table(record))


@cli.command("certify")
@click.argument("subject")
@click.option("--draws", default=1024, show_default=True, help="Estimates per input.")
@click.option("--rate", default=1e-3, show_default=True, help="False alarms at most, over all tests.")
@click.option("--seed", default=0, show_default=True, help="What inputs and noise derive from.")
@click.option(
    "--mixes",
    default="none",
    show_default=True,
    help="Of a function: the axis it may mix: rows, features or none. Correlation there is not judged.",
)
@click.option(
    "--json",
    "file",
    type=PLACE,
    help="Write the certificate to this file, too; `fqt report` shows it.",
)
def certify_command(subject: str, draws: int, rate: float, seed: int, mixes: str, file: Path | None) -> int:
    """Test whether SUBJECT is an unbiased estimate with independent noise, on inputs chosen to break it.

    SUBJECT is a quantizer's name such as bhq4, or package.module:function for any f(x, seed) → x̂. Ends with
    status 0 if the verdict is "exact", otherwise 1.
    """
    axes = {"rows": 0, "features": 1, "none": None}
    if mixes not in axes:
        raise FqtError(f"--mixes must be rows, features or none, not {mixes!r}")
    keep_clear(file)
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[input]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("certify", total=None, input="")
        certificate = fqt.certify(
            subject,
            draws=draws,
            rate=rate,
            seed=seed,
            mixes=axes[mixes],
            progress=lambda name, done, total: bars.update(task, completed=done, total=total, input=name),
        )
    if file is not None:
        write_json(file, {**certificate.to_dict(), "environment": environment(typed())})
    wide = screen()
    wide.print(certificate_table(certificate, wide.width))
    return 0 if certificate.exact else 1


if __name__ == "__main__":
    main()
