"""Records of any other kind: lists of rows become tables, layer × layer tables a chart, the rest facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fqt.report.certificate import certificate_section
from fqt.report.diagnosis import diagnosis_section
from fqt.report.matrix import is_matrix, matrix_panel, matrix_table
from fqt.report.section import Builder, Facts, Section, Table, facts, flatten, show
from fqt.stats.certification.certificate import FORMAT as CERTIFICATE
from fqt.stats.record import FORMAT as DIAGNOSIS

__all__ = ["other_section"]

_SECTIONS: dict[str, Builder] = {DIAGNOSIS: diagnosis_section, CERTIFICATE: certificate_section}
ROWS = 500  # of a table; the record has them all


def other_section(name: str, record: Mapping[str, Any], more: Mapping[str, Builder]) -> Section:
    """A section for a record; of a format that is not known only the form is used.

    Args:
        name: of the record.
        record: of any kind.
        more: formats that rooms above this one know, and what makes their sections.

    Raises:
        FqtError: it is damaged.
    """
    known = {**_SECTIONS, **more}.get(str(record.get("format")))
    if known is not None:
        return known(name, record)
    rest = {key: value for key, value in record.items() if key not in ("format", "environment")}
    charts, tables = [], []
    if is_matrix(record):
        charts.append(matrix_panel(record).chart())
        tables.append(matrix_table(record))
        kept = ("batches", "draws", "agrees")
        rest["table"] = {key: record["table"][key] for key in kept if key in record["table"]}
    for key in [key for key, value in rest.items() if _is_rows(value)]:
        tables.append(_rows_table(key, rest.pop(key)))
    details = [facts("Content", rest), _environment(record)]
    kind = str(record.get("format", "record")).removeprefix("fqt ")
    return Section(
        title=f"{kind}: {name.rsplit('/', 1)[-1]}",
        note=name,
        tables=tables,
        charts=charts,
        details=[detail for detail in details if detail.rows],
    )


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    flat = [dict(flatten(row)) for row in rows[:ROWS]]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    words = next(
        (i for i, name in enumerate(columns) if any(not isinstance(row.get(name, ""), str) for row in flat)),
        len(columns),
    )
    more = f" (the first {ROWS} of {len(rows)})" if len(rows) > ROWS else ""
    cells = [[show(row.get(name)) for name in columns] for row in flat]
    return Table(title + more, columns, cells, text_columns=max(1, words))


def _environment(record: Mapping[str, Any]) -> Facts:
    stamp = record.get("environment")
    return facts("Environment", stamp if isinstance(stamp, dict) else {})
