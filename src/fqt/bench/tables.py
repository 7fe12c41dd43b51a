"""The tables of a bench, for the terminal and as Markdown: ratios beside their floors, and everyone's times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fqt.bench.cases import MEASURES, Case
from fqt.bench.summary import Result, median_seconds, results

_HEADINGS = {
    "bf16": "× bf16",
    "fp32": "× fp32",
    "torchao": "× torchao int8",
    "limit": "of the integer limit",
    "psq8": "time / psq8",
    "copy": "of the copy rate",
    "plain": "× plain product",
    "kept/fp32": "kept / fp32",
    "kept/bf16": "kept / bf16",
    "all/bf16": "all kept / bf16",
}
_SIGN = {">=": "≥", "<=": "≤"}
CAPTION = (
    "Medians of ratios within a round [10th, 90th percentile], and the floor. × bf16: ours under autocast against "
    "the better of eager and compiled bf16 autocast. × fp32: ours in float32 against eager float32. Integer limit: "
    "the case's products alone at the best rate of torch._int_mm in the same run (of our own where that is a "
    "scalar loop). Copy rate: bytes in and out per second, against those of a copy of the same matrices. Kept: "
    "bytes the layers keep for backward, weights left out. Spared: with the layers float that "
    "fqt.explain(model).slower names."
)


def ratio_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per case and recipe, one column per measure that occurs."""
    titles = {case["name"]: case["title"] for case in record["cases"]}
    found = results(record)
    measures = [m for m in MEASURES if any(r.measure == m for r in found)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in found:
        cells.setdefault((result.case, result.recipe), {})[result.measure] = _cell(result)
    rows = [[titles[case], recipe, *(row.get(m, "–") for m in measures)] for (case, recipe), row in cells.items()]
    return ["case", "recipe", *(_HEADINGS[m] for m in measures)], rows


def _cell(result: Result) -> str:
    ratio = result.ratio
    text = _number(ratio.median)
    if ratio.p10 != ratio.p90:
        text += f" [{_number(ratio.p10)}, {_number(ratio.p90)}]"
    if result.floor is not None:
        sign = _SIGN[MEASURES[result.measure]]
        text += f" {'met' if result.met else 'missed'} {sign} {result.floor:g}"
    return text


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def time_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per contestant of every case."""
    rows = []
    for case in record["cases"]:
        for row in case["contestants"]:
            spent = median_seconds(row)
            if spent is None:
                shown = [
                    row["status"] if row["status"] in ("skipped", "failed") else "not timed",
                    "",
                    row["reason"],
                ]
            else:
                shown = [_ms(spent.median), f"{_ms(spent.p10)} … {_ms(spent.p90)}", _note(case, row)]
            rows.append([case["title"], row["name"], *shown])
    return ["case", "contestant", "ms", "p10 … p90", "note"], rows


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _note(case: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    notes = []
    spent = median_seconds(row)
    if row.get("bytes") and spent:
        notes.append(f"{row['bytes'] / spent.median / 1e9:.1f} GB/s in and out")
    if row["group"] == "limit" and spent:
        limit = spent.median * case["macs"] / row["macs"]
        notes.append(f"{2e-12 * row['macs'] / spent.median:.2f} T/s: {_ms(limit)} ms for the case's products")
    if row.get("arithmetic"):
        notes.append(", ".join(f"{n} {kind}" for kind, n in sorted(row["arithmetic"].items())) + " products")
    if row.get("peak_bytes"):
        notes.append(f"{row['peak_bytes'] / 2**30:.2f} GiB at the peak")
    if row.get("graph_breaks"):
        notes.append(f"{row['graph_breaks']} graph breaks")
    if row.get("error"):
        notes.append(f"error {row['error']:.2g}")
    return "; ".join(notes)


def terminal_tables(record: Mapping[str, Any]) -> list[Table]:
    """Two tables for a `rich.console.Console`; the ratios one to a line, so that they fit a narrow terminal."""
    titles = {case["name"]: case["title"] for case in record["cases"]}
    rows = [[titles[r.case], r.recipe, _HEADINGS[r.measure], _cell(r)] for r in results(record)]
    ratios = Table(title="Ratios", caption=CAPTION, caption_justify="left")
    header = ["case", "recipe", "measure", "ratio and floor"]
    return [_fill(ratios, header, rows), _fill(Table(title="Times"), *time_rows(record))]


def list_table(cases: Sequence[Case]) -> Table:
    """The registry, for a console."""
    rows = [
        [
            c.name + ("" if c.default else " *") + ("" if c.device == "cpu" else f" ({c.device})"),
            c.title,
            ", ".join(c.recipes),
            _floors_of(c),
        ]
        for c in cases
    ]
    table = Table(caption="* only when named", caption_justify="left")
    return _fill(table, ["case", "what", "recipes", "floors"], rows)


def _floors_of(case: Case) -> str:
    lines = []
    for floor in case.floors:
        sign = _SIGN[MEASURES[floor.measure]]
        lines.append(f"{', '.join(floor.recipes)}: {_HEADINGS[floor.measure]} {sign} {floor.value:g}")
    return "\n".join(lines)


def _fill(table: Table, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    for name in header:
        table.add_column(name, overflow="fold")
    last = None
    for first, *rest in rows:
        # The case's title once is enough on a terminal; a rule separates the cases.
        if last not in (None, first):
            table.add_section()
        table.add_row("" if first == last else first, *rest)
        last = first
    return table


def markdown(record: Mapping[str, Any]) -> str:
    """Both tables as Markdown, with what they were measured on."""
    parts = [_markdown(*ratio_rows(record)), CAPTION, _markdown(*time_rows(record)), provenance(record)]
    return "\n\n".join(parts) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def gpu_words(gpu: Mapping[str, Any]) -> str:
    """The GPU of a record, with what drives it."""
    driver = gpu["driver"] or "unknown"
    return f"{gpu['name']}, driver {driver}, CUDA {gpu['cuda']}, Triton {gpu['triton'] or 'not installed'}"


def provenance(record: Mapping[str, Any]) -> str:
    """One line: when, with what, on what, and whether it is whole."""
    stamp, native = record["environment"], record["kernels"]
    commit = (stamp["commit"] or "unknown")[:12] + (" with local changes" if stamp["dirty"] else "")
    parts = [
        stamp["time"],
        f"fqt {stamp['fqt']}, commit {commit}",
        f"torch {stamp['torch']}",
        f"torchao {record['torchao']}" if record["torchao"] else "torchao not installed",
        f"{stamp['processor']}, {stamp['threads']} threads",
        gpu_words(record["device"]) if record.get("device") else f"{native['level']} kernels",
        f"{record['repeats']} rounds",
    ]
    if not record["compile"]:
        parts.append("without compiled contestants")
    if record["interrupted"]:
        parts.append("interrupted: what was complete by then")
    return "; ".join(parts) + "."
