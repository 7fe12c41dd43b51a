"""`fqt bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from fqt import bench
from fqt.cli.common import PLACE, keep_clear, say, typed

__all__ = ["bench_command"]


@click.command("bench", short_help="Measure speed and memory beside float and int8 training.")
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
