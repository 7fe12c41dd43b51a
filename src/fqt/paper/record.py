"""The records that `fqt reproduce` leaves, one per figure, and those it makes of another command's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fqt.errors import FqtError
from fqt.records import NUMBER, TEXT, check_shape, is_width
from fqt.report.matrix import check_matrix
from fqt.report.summary import runs_of

__all__ = ["FORMAT", "accuracy_record", "check_paper", "layers_record"]

FORMAT = "fqt paper 1"


def _width_or_none(value: Any) -> bool:
    return value is None or is_width(value)


SHAPES: dict[str, dict[str, Any]] = {
    "variance": {
        "sampling": {"value": NUMBER, "error": NUMBER},
        "rows": [{"method": (str, type(None)), "bits": _width_or_none, "grad_weight": TEXT, "value": NUMBER}],
    },
    "profile": {
        "settings": {"bits": [is_width]},
        "rows": [{"layer": TEXT, "rows": (int,), "columns": (int,), "energy": NUMBER, "variance": {}}],
    },
    "histogram": {
        "layer": TEXT,
        "shape": [(int,)],
        "settings": {"bits": is_width},
        "rows": [{"method": TEXT, "counts": [(int,)], "bins": [NUMBER], "variance": NUMBER}],
    },
    "accuracy": {"baseline": TEXT, "rows": [{"recipe": TEXT, "accuracy": [NUMBER], "loss_curve": [(list,)]}]},
    "overhead": {"settings": {"convolution": {"samples": (int,)}}, "rows": [{"samples": (int,), "seconds": {}}]},
    "layers": {"table": {}},
}


def check_paper(record: Any, where: str) -> None:
    """Checks a record's form.

    Raises:
        FqtError: it is no record of `fqt reproduce`, or is damaged.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("figure") not in SHAPES:
        raise FqtError(f"{where} is no record of `fqt reproduce`")
    check_shape(record, {"environment": {}, **SHAPES[record["figure"]]}, where)
    if record["figure"] == "layers":
        check_matrix(record, where)


def accuracy_record(comparison: Mapping[str, Any], source: str, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the accuracy figure, from a comparison's."""
    rows = []
    for recipe in comparison["recipes"]:
        runs = runs_of(comparison, recipe)
        if runs:
            rows.append(
                {
                    "recipe": recipe,
                    "accuracy": [run["metrics"]["accuracy"] for run in runs],
                    "loss_curve": runs[0]["loss_curve"],
                    "diverged": sum(run["diverged"] for run in runs),
                }
            )
    return {
        "format": FORMAT,
        "figure": "accuracy",
        "environment": dict(stamp),
        "source": {"record": source, "commit": comparison["environment"]["commit"], **comparison["config"]},
        "baseline": comparison["baseline"],
        "rows": rows,
    }


def layers_record(record: Any, source: str, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the layer × layer figure, from another record that has the table, such as a diagnosis.

    Raises:
        FqtError: it has none.
    """
    check_matrix(record, source)
    kept = {name: record[name] for name in ("table", "settings", "network") if name in record}
    return {"format": FORMAT, "figure": "layers", "environment": dict(stamp), "source": source, **kept}
