"""A certificate as a table for the terminal, and as a section of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from fqt.report.section import Section, Table, facts
from fqt.stats import Certificate
from fqt.stats.certification.certificate import HEADER

__all__ = ["certificate_section", "certificate_table"]

_STYLES = {"pass": "green", "FAIL": "bold red", "reported": "dim"}
_MEANING = HEADER.index("what the effect is")
_NUMBERS = ("score", "effect")
_WIDE = 140  # characters that a line with the effects' meanings takes


def certificate_table(certificate: Certificate, width: int = _WIDE) -> Group:
    """The table and the lines below it, for a `rich.console.Console` of this width.

    On a narrow one the meanings of the effects are left out.
    """
    table = RichTable(title=f"certificate of {certificate.subject}", title_justify="left", box=SIMPLE_HEAD)
    shown = [i for i in range(len(HEADER)) if i != _MEANING or width >= _WIDE]
    for name in (HEADER[i] for i in shown):
        number = name in _NUMBERS
        table.add_column(name, justify="right" if number else "left", no_wrap=number or name in ("test", "outcome"))
    for row in certificate.rows():
        table.add_row(*(Text(row[i], style=_STYLES.get(row[i], "")) for i in shown))
    head, *rest = certificate.summary()
    style = "bold green" if certificate.exact else "bold red"
    return Group(table, Text(head, style=style), *(Text(line) for line in rest))


def certificate_section(name: str, record: Mapping[str, Any]) -> Section:
    """The verdict, the worst finding of every kind of test, and every failure.

    Raises:
        FqtError: the record is damaged.
    """
    certificate = Certificate.from_dict(record)
    _, *rest = certificate.summary()
    convicted = [line for line in rest if line.startswith("convicted on ")]
    words = tuple(i for i, column in enumerate(HEADER) if column not in _NUMBERS)
    return Section(
        title=f"Certificate of {certificate.subject}: {certificate.verdict}",
        warnings=convicted,
        tables=[Table("The largest score of each kind of test", HEADER, certificate.rows(), words=words)],
        note=" ".join(f"{line[0].upper()}{line[1:]}." for line in rest if line not in convicted),
        details=[facts("Environment", record.get("environment", {}))],
        footer=name,
    )
