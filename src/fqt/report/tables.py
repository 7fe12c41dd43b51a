"""The table of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fqt.report.section import Table
from fqt.report.summary import MeanStd, Row, runs_of
from fqt.train.results import kinds_of
from fqt.train.task import Metric

__all__ = [
    "caption",
    "cells",
    "header",
    "markdown",
    "provenance",
    "rich_table",
    "screen",
    "terminal_table",
    "title",
]


def terminal_table(record: Mapping[str, Any], rows: Sequence[Row]) -> RichTable:
    """A table for a `rich.console.Console`."""
    table = RichTable(title=title(record), caption=caption(record), caption_justify="left")
    for i, name in enumerate(header(record)):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(record, row))
    return table


def screen() -> Console:
    """A console for tables; into a file or a pipe nothing needs to be cut."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def rich_table(table: Table) -> RichTable:
    """Any table for a console."""
    rich = RichTable(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
    for i, name in enumerate(table.header):
        justify: Literal["left", "right"] = "left" if table.is_text(i) else "right"
        rich.add_column(Text(name), justify=justify, no_wrap=True)
    for row in table.rows:
        rich.add_row(*map(Text, row))
    return rich


def markdown(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The same table as Markdown, with what it was measured on below it."""
    names = header(record)
    lines = [
        f"# {title(record)}",
        "",
        "| " + " | ".join(names) + " |",
        "|---" + "|---:" * (len(names) - 1) + "|",
        *("| " + " | ".join(cells(record, row)) + " |" for row in rows),
        "",
        caption(record),
        "",
        provenance(record),
        "",
    ]
    return "\n".join(lines)


def caption(record: Mapping[str, Any]) -> str:
    """What the columns mean."""
    measured, runs = record["measurement"], [len(runs_of(record, recipe)) for recipe in record["recipes"]]
    least, most = min(filter(None, runs), default=1), max(runs, default=1)
    seeds = f"{most} seeds." if least == most else f"{least} to {most} seeds: the comparison is not whole."
    text = "Mean ± standard deviation over " + (seeds if most > 1 else "seeds (here: one, no spread).")
    if record["baseline"] in record["recipes"]:
        text += f" Against {record['baseline']}: difference between runs of one seed, mean ± standard error."
    if record["gradient"]:
        text += (
            " Noise ρ: variance of the parameter gradient due to quantization over that due to the mini-batch, "
            f"at the {measured['reference']} run's weights half-way, {measured['batches']} batches × "
            f"{measured['draws']} draws."
        )
    return " ".join([text, *(f"{kind.name}: {kind.note}." for kind in kinds_of(record["metrics"]) if kind.note)])


def title(record: Mapping[str, Any]) -> str:
    """What was trained, and for how long."""
    config = record["config"]
    length = f"{config['steps']} steps" if "steps" in config else f"{config['epochs']} epochs"
    return f"{config['task']}, {config['model']}, {length}"


def header(record: Mapping[str, Any]) -> list[str]:
    """Names of the columns."""
    first, *others = [kind.heading for kind in kinds_of(record["metrics"])]
    return ["recipe", first, f"against {record['baseline']}", *others, "final loss", "noise ρ"]


def cells(record: Mapping[str, Any], row: Row) -> list[str]:
    """One recipe under these columns."""
    first, *others = kinds_of(record["metrics"])
    name = row.recipe + (f" ({row.diverged} diverged)" if row.diverged else "")
    difference = "–"
    if row.difference is not None:
        difference = _spread(first, row.difference.mean, row.difference.error, "+")
    return [
        name,
        _spread(first, row.metrics[first.name].mean, row.metrics[first.name].std),
        difference,
        *(_spread(kind, row.metrics[kind.name].mean, row.metrics[kind.name].std) for kind in others),
        _plus_minus(row.loss.mean, row.loss.std, ".4f"),
        _significant(row.ratio),
    ]


def _spread(kind: Metric, value: float, spread: float, sign: str = "") -> str:
    return _plus_minus(kind.times * value, kind.times * spread, f"{sign}.{kind.digits}f")


def _plus_minus(value: float, spread: float, form: str) -> str:
    if not math.isfinite(value):
        return "–"
    text = format(value, form)
    return f"{text} ± {format(spread, form.lstrip('+'))}" if math.isfinite(spread) else text


def _significant(spread: MeanStd) -> str:
    """Ratios span orders of magnitude: two significant digits of the mean, the deviation to the same place."""
    if not math.isfinite(spread.mean):
        return "–"
    if spread.mean == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(spread.mean))))
    return _plus_minus(spread.mean, spread.std, f".{digits}f")


def provenance(record: Mapping[str, Any]) -> str:
    """When, with what and where the record was made, in one line."""
    stamp = record["environment"]
    commit = (stamp["commit"] or "unknown")[:12] + (" with local changes" if stamp["dirty"] else "")
    return (
        f"{stamp['time']}; fqt {stamp['fqt']}, commit {commit}; torch {stamp['torch']}; {stamp['processor']}, "
        f"{stamp['threads']} threads{''.join(', ' + name for name in stamp['accelerators'])}."
    )
