"""`fqt reproduce`: the paper's figures by our own code. Wires training, statistics and report together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from fqt.cli.common import PLACE, complain, say, typed
from fqt.errors import FqtError
from fqt.files import locked
from fqt.paper.figures import SECTIONS, paper_figure, paper_tables
from fqt.paper.measure import FULL, MEASURED, QUICK, Reproduction, trained_network
from fqt.paper.record import accuracy_record, check_paper, layers_record
from fqt.records import environment, read_json, write_json
from fqt.report import collect, read_comparison, save_figure, write_page
from fqt.report.tables import rich_table, screen
from fqt.train.progress import ConsoleObserver
from fqt.train.snapshot import Snapshot

__all__ = ["reproduce_command"]

FIGURES = ("variance", "layers", "profile", "histogram", "accuracy", "overhead")
RECORD = Path("results/cifar10-resnet20")


@click.command("reproduce", short_help="Make the paper's figures by this library.")
@click.argument("figures", metavar="[FIGURE]...", nargs=-1)
@click.option("--run", type=PLACE, help="A run of `fqt train` to measure, at its half-way.")
@click.option("--data", help="CIFAR-10's folder, to train the network on it; without, it is trained on digits.")
@click.option("--model", help="The network to train [default: the task's].")
@click.option(
    "--steps", type=int, help="Training steps; the network is measured half-way [default: 600 on CIFAR-10]."
)
@click.option("--layer", help="The layer of the histogram [default: the middle one].")
@click.option(
    "--comparison",
    type=PLACE,
    help=f"A record of `fqt compare`, for accuracy [default: {RECORD}].",
)
@click.option(
    "--table",
    type=PLACE,
    help="Draw layers from this record of `fqt diagnose` instead of measuring it.",
)
@click.option("--out", default=Path("runs/paper"), show_default=True, type=PLACE)
@click.option("--seed", default=0, show_default=True, help="Of the network and of all noise.")
@click.option("--quick", is_flag=True, help="Fewer bits, batches and repeats: to see that it works.")
@click.option("--force", is_flag=True, help="Discard the figures' records in the folder (not the network).")
@click.option("--resume", is_flag=True, help="Not needed: it always continues.")
def reproduce_command(
    figures: tuple[str, ...],
    run: Path | None,
    data: str | None,
    model: str | None,
    steps: int | None,
    layer: str | None,
    comparison: Path | None,
    table: Path | None,
    out: Path,
    seed: int,
    quick: bool,
    force: bool,
    resume: bool,
) -> None:
    """Make the paper's figures: variance, layers, profile, histogram, accuracy, overhead [default: all].

    What is in the folder is not measured again: repeat the command after an interruption. `accuracy` is drawn
    from the record of a comparison; without one it is left out, unless asked for by name.
    """
    unknown = [name for name in figures if name not in FIGURES]
    if unknown:
        raise FqtError(f"unknown figure {unknown[0]!r}; known: {', '.join(FIGURES)}")
    if run is not None and (model or steps):
        raise FqtError("--run brings its own model and steps: leave --model and --steps out")
    console = Console(stderr=True)
    observer = ConsoleObserver(console)
    wanted = [name for name in FIGURES if name in (figures or FIGURES)]
    network: Snapshot | None = None
    effort = QUICK if quick else FULL
    work = Reproduction(out, effort=effort, seed=seed, force=force, command=typed(), observer=observer)
    try:
        with locked(out):
            measured = [name for name in wanted if name in MEASURED and not (name == "layers" and table)]
            if set(measured) - {"overhead"}:
                if run is not None:
                    network = Snapshot.of_run(run, data=data)
                else:
                    network = trained_network(
                        out / "network",
                        data=data,
                        model=model,
                        steps=steps or (60 if quick and data else None),
                        seed=seed,
                        command=typed(),
                        observer=observer,
                    )
            for name in wanted:
                if name in measured:
                    _measure(name, work, network, layer)
                elif not _read(name, out, comparison if name == "accuracy" else table, asked=name in figures):
                    continue
                _show(out / f"{name}.json")
    except KeyboardInterrupt:
        complain(f"what was measured is kept in {out}; the same command continues")
        raise
    page = out / "report.html"
    for problem in write_page(collect([out]), page, SECTIONS):
        complain(problem)
    say(f"records and figures: {out}; page: {page}")


def _measure(name: str, work: Reproduction, network: Snapshot | None, layer: str | None) -> None:
    if name == "overhead":
        work.overhead()
        return
    assert network is not None
    measures: dict[str, Callable[[], None]] = {
        "variance": lambda: work.variance(network),
        "layers": lambda: work.layers(network),
        "profile": lambda: work.profile(network),
        "histogram": lambda: work.histogram(network, layer),
    }
    measures[name]()


def _read(name: str, out: Path, source: Path | None, *, asked: bool) -> bool:
    """Writes the record of a figure that is drawn from another command's; whether there is one."""
    path = out / f"{name}.json"
    if name == "accuracy" and source is None and RECORD.exists():
        source = RECORD
    if source is None:
        if path.exists():
            return True
        hint = "--comparison, a folder of `fqt compare` (make one: fqt compare cifar10 --data DATA --out FOLDER)"
        if asked:
            raise FqtError(f"{name} needs {hint}")
        complain(f"{name} is left out: it needs {hint}")
        return False
    stamp = environment(typed())
    if name == "accuracy":
        record = accuracy_record(read_comparison(source), str(source), stamp)
    else:
        record = layers_record(read_json(source), str(source), stamp)
    write_json(path, record)
    return True


def _show(path: Path) -> None:
    """The figure as a file, and its tables on the terminal."""
    record = read_json(path)
    check_paper(record, str(path))
    save_figure(paper_figure(record), path.with_suffix(".png"))  # the page has it as SVG
    console = screen()
    for table in paper_tables(record):
        console.print(rich_table(table))
