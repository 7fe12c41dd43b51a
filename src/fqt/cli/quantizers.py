"""`fqt catalog` and `fqt certify`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, TextColumn

import fqt
from fqt.cli.common import PLACE, keep_clear, print_whole, typed
from fqt.records import environment, write_json
from fqt.report import catalog_table, certificate_table
from fqt.report.tables import screen
from fqt.stats import catalog_record, certified

__all__ = ["catalog_command", "certify_command"]


@click.command("catalog", short_help="List the quantizers of the literature, with bits and noise.")
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
    print_whole(catalog_table(record))


@click.command("certify", short_help="Test whether a quantizer is unbiased.")
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
            mixes=int(mixes) if mixes in ("0", "1") else mixes,
            progress=lambda name, done, total: bars.update(task, completed=done, total=total, input=name),
        )
    if file is not None:
        write_json(file, {**certificate.to_dict(), "environment": environment(typed())})
    wide = screen()
    wide.print(certificate_table(certificate, wide.width))
    return 0 if certificate.exact else 1
