"""`fqt report`, and the reports that `fqt compare` ends with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from fqt.cli.common import PLACE, complain, keep_clear, say
from fqt.files import write_bytes
from fqt.paper.figures import SECTIONS
from fqt.report import (
    collect,
    comparison_figure,
    has_costs,
    markdown,
    noise_figure,
    read_comparison,
    save_figure,
    summarize,
    terminal_table,
    write_page,
)

__all__ = ["report_command", "write_reports"]


@click.command("report", short_help="Make one web page of records.")
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
    write_reports(paths, html)


def write_reports(paths: Sequence[Path], html: Path | None) -> None:
    """One page of all records under the paths; of a comparison that is a path itself, its table and plot."""
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
