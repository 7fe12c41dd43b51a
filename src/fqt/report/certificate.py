"""A certificate as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fqt.stats import Certificate
from fqt.stats.certification.certificate import HEADER

__all__ = ["certificate_table"]

_STYLES = {"pass": "green", "FAIL": "bold red", "reported": "dim"}


def certificate_table(certificate: Certificate) -> Group:
    """The table and the lines below it, for a `rich.console.Console`."""
    table = Table(title=f"certificate of {certificate.subject}", title_justify="left", box=SIMPLE_HEAD)
    for name in HEADER:
        number = name in ("score", "effect")
        table.add_column(name, justify="right" if number else "left", no_wrap=number or name in ("test", "outcome"))
    for row in certificate.rows():
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    head, *rest = certificate.summary()
    style = "bold green" if certificate.exact else "bold red"
    return Group(table, Text(head, style=style), *(Text(line) for line in rest))
