"""The catalog of quantizers as a table, as a page of the documentation, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fqt.quant.catalog import METHODS
from fqt.report.chart import Point, colour
from fqt.report.plot import figure_of, log_axis
from fqt.report.section import Table

__all__ = ["catalog_figure", "catalog_markdown", "catalog_table"]

PICTURE = "catalog.svg"
_PRODUCTS = ("integer", "blocked", "simulated")
_NOTE = (
    "stored: bits per entry of a 1024 × 1024 tensor with scales; variance: exact, over psq's at the name's width, "
    "geometric mean over the shipped gradients"
)


def catalog_table(record: Mapping[str, Any]) -> Table:
    """The table, for a terminal."""
    certified = any("certified" in row for row in record["rows"])
    header = ("name", "paper", "year", "choices", "stored", "bias", *(("certified",) if certified else ()))
    rows = [
        (
            row["name"],
            row["paper"],
            str(row["year"]),
            row["what"],
            f"{row['stored']:.2f}",
            row["bias"],
            *((_verdict(row),) if certified else ()),
            row["product"],
            *(_number(value) for value in row["variance"].values()),
        )
        for row in record["rows"]
    ]
    words = (5, 6, 7) if certified else (5, 6)
    return Table("Quantizers", (*header, "product", "conv", "transformer"), rows, 4, _NOTE, words)


def catalog_markdown(record: Mapping[str, Any]) -> str:
    """The page docs/catalog.md."""
    header = ("name", "method", "choices", "stored", "bias", "certified", "product", "conv", "transformer")
    lines = [header, ["---"] * 3 + ["---:"] + ["---"] * 3 + ["---:"] * 2]
    for row in record["rows"]:
        paper = f"{row['paper']}, {row['year']}"
        if row["arxiv"]:
            paper += f", [{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']})"
        variance = [_number(value) for value in row["variance"].values()]
        cells = (f"`{row['name']}`", f"{row['title']} ({paper})", row["what"], f"{row['stored']:.2f}", row["bias"])
        lines.append([*cells, _verdict(row), row["product"], *variance])
    date = record["environment"]["time"][:10]
    page = resources.files("fqt.report").joinpath("templates/catalog.md").read_text(encoding="utf-8")
    return page.format(
        table="\n".join("| " + " | ".join(line) + " |" for line in lines),
        date=date,
        draws=" or ".join(map(str, sorted({row["certified"]["draws"] for row in record["rows"]}))),
        certified=", ".join(sorted({row["certified"].get("date", date) for row in record["rows"]})),
        conv=record["matrices"]["convolution"],
        transformer=record["matrices"]["transformer"],
        picture=PICTURE,
        left_out="\n".join(f"| `{', '.join(names)}` | {what} |" for what, names in _left_out().items()),
    )


def _left_out() -> dict[str, list[str]]:
    """What methods leave out of their papers, with the methods that do."""
    found: dict[str, list[str]] = {}
    for method in METHODS.values():
        if method.left_out:
            found.setdefault(method.left_out, []).append(method.name.replace("*", "…").removesuffix("…"))
    return found


def catalog_figure(record: Mapping[str, Any]) -> Figure:
    """Exact variance against bits stored per entry, of the 4-bit rows: a panel per family of matrices."""
    rows = [row for row in record["rows"] if row["width"] == 4]
    panels = [
        (f"{family}: variance over psq4's", lambda axes, family=family: _scatter(axes, rows, family))
        for family in record["matrices"]
    ]
    note = "bits stored per entry of a 1024 × 1024 tensor, scales included; lower left is better"
    return figure_of(panels, title="4-bit quantizers on real gradients", note=note, size=(10, 5))


def _scatter(axes: Axes, rows: list[Mapping[str, Any]], family: str) -> list[Point]:
    points: list[Point] = []
    for row in rows:
        x, y = row["stored"], row["variance"][family]
        at = _PRODUCTS.index(row["product"])
        label = row["product"] if row["product"] not in [p.cells[1] for p in points] else None
        axes.plot(x, y, "os^"[at], color=colour(at + 1), label=label, linestyle="")
        axes.annotate(row["name"], (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6)
        points.append(Point(x, y, (row["name"], row["product"])))
    axes.set_xscale("log", base=2)
    axes.set_xticks([4, 4.25, 4.5, 5, 6, 8], ["4", "4.25", "4.5", "5", "6", "8"])
    axes.minorticks_off()
    log_axis(axes)
    axes.legend(fontsize=7, title="product", title_fontsize=7)
    return points


def _verdict(row: Mapping[str, Any]) -> str:
    found = row.get("certified")
    return "" if found is None else str(found["verdict"])


def _number(value: float) -> str:
    return f"{value:.3g}"
