"""The parts a page is made of: sections of text, tables, charts and folded lists of facts. All text is plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fqt.report.chart import Chart

__all__ = ["Builder", "Facts", "Section", "Table", "facts", "flatten", "show"]

WORDS = 400  # a value longer than this is cut


@dataclass(frozen=True)
class Table:
    """A table; the first `text_columns` columns and those in `words` are words, the others numbers.

    `note` says what they mean.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    note: str = ""
    words: tuple[int, ...] = ()

    def is_text(self, column: int) -> bool:
        """Whether a column is of words."""
        return column < self.text_columns or column in self.words


@dataclass(frozen=True)
class Facts:
    """A folded list of names and values."""

    title: str
    rows: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under a heading.

    `lead` stands before the tables, `note` after them.
    """

    title: str
    lead: str = ""
    note: str = ""
    warnings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    details: list[Facts] = field(default_factory=list)
    footer: str = ""


Builder = Callable[[str, Mapping[str, Any]], Section]
"""Makes a section of a record and its name; raises `FqtError` where the record is damaged."""


def facts(title: str, values: Mapping[str, Any]) -> Facts:
    """A mapping as a list, nested names joined by dots."""
    return Facts(title, [(name, show(value)) for name, value in flatten(values)])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every leaf of nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def show(value: Any) -> str:
    """A value as a reader wants to see it."""
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format(value, "g" if value.is_integer() else ".4g")
    if isinstance(value, (list, tuple)):
        joined = " " if all(isinstance(item, str) for item in value) else ", "
        text = joined.join(show(item) for item in value)
    else:
        text = str(value)
    return text if len(text) <= WORDS else text[: WORDS - 1] + "…"
