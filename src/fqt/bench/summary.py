"""From a record to ratios: paired within rounds, with quantiles, each beside its floor. Reads records only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fqt.bench.cases import MEASURES
from fqt.errors import FqtError
from fqt.records import NUMBER, TEXT, check_shape, read_json

Entry = Mapping[str, Any]
_TIMES = [lambda t: isinstance(t, float) and t > 0]
SHAPE: dict[str, Any] = {
    "cases": [
        {
            "name": TEXT, "title": TEXT, "kind": TEXT,
            "floors": [{"measure": TEXT, "value": NUMBER, "recipes": [TEXT]}],
            "contestants": [{"name": TEXT, "group": TEXT, "status": TEXT, "reason": TEXT, "seconds": _TIMES}],
        }
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Quantiles:
    """Of a sample: the median, and the tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: Sequence[float] | np.ndarray) -> Quantiles:
        """From at least one number."""
        p10, median, p90 = np.quantile(np.asarray(values, dtype=float), [0.1, 0.5, 0.9])
        return Quantiles(float(median), float(p10), float(p90))


@dataclass(frozen=True)
class Result:
    """One measure of one recipe in one case.

    Attributes:
        case: its name.
        recipe: whose.
        measure: a key of `MEASURES`.
        ratio: what was measured; p10 and p90 equal the median where there is nothing to time.
        floor: what it must reach; None if nothing was asked.
    """

    case: str
    recipe: str
    measure: str
    ratio: Quantiles
    floor: float | None

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the floor; None without one."""
        if self.floor is None:
            return None
        at_least = MEASURES[self.measure] == ">="
        return self.ratio.median >= self.floor if at_least else self.ratio.median <= self.floor


def read_bench(path: Path) -> dict[str, Any]:
    """The record of a bench.

    Raises:
        FqtError: the file is missing or holds something else.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("kind") != "bench":
        raise FqtError(f"{path} is not the record of a bench: make one with fqt bench --out")
    if record.get("format") != 1:
        raise FqtError(f"{path} has format {record.get('format')!r}; this version reads format 1: measure again")
    check_shape(record, SHAPE, str(path))
    return record


def results(record: Mapping[str, Any]) -> list[Result]:
    """All measures of all recipes, in the order of cases, recipes and `MEASURES`."""
    return [result for case in record["cases"] for result in _of_case(case)]


def median_seconds(row: Entry) -> Quantiles | None:
    """Of a contestant; None if it was not timed."""
    return Quantiles.of(row["seconds"]) if row["seconds"] else None


def _of_case(case: Entry) -> list[Result]:
    found = []
    for recipe in dict.fromkeys(row["recipe"] for row in case["contestants"] if row.get("recipe")):
        for measure in MEASURES:
            ratio = _ratio(case, recipe, measure)
            if ratio is not None:
                found.append(Result(case["name"], recipe, measure, ratio, _floor(case, recipe, measure)))
    return found


def _floor(case: Entry, recipe: str, measure: str) -> float | None:
    floors = case["floors"]
    return next((f["value"] for f in floors if f["measure"] == measure and recipe in f["recipes"]), None)


def _ratio(case: Entry, recipe: str, measure: str) -> Quantiles | None:
    """One measure. Like is compared with like: ours under autocast with bf16, ours in float32 with fp32."""
    if measure.startswith(("kept/", "all/")):
        which, _, baseline = measure.partition("/")
        return _kept(case, recipe, baseline, "layers" if which == "kept" else "total")
    ours = [row for row in case["contestants"] if row.get("recipe") == recipe]
    if measure == "copy":
        return _rates(_fastest(ours), _fastest(_group(case, "copy")))
    if measure == "psq8":
        psq8 = [row for row in case["contestants"] if row.get("recipe") == "psq8"]
        layer = case["kind"] == "layer" and recipe != "psq8"
        return _paired(_fastest(ours), _fastest(psq8)) if layer else None
    if measure == "plain":
        return _paired(_fastest(_group(case, "plain")), _fastest(ours))
    if case["kind"] in ("quantizer", "product"):
        return None
    if measure == "limit":
        best, product = _fastest(ours), _fastest(_group(case, "limit"))
        ratio = _paired(product, best)
        factor = case["macs"] / product["macs"] if product else 0.0
        return ratio and Quantiles(ratio.median * factor, ratio.p10 * factor, ratio.p90 * factor)
    if measure == "torchao" and not case.get("device"):
        return None
    same = [row for row in ours if row["autocast"] == (measure != "fp32")]
    return _paired(_fastest(_group(case, measure)), _fastest(same))


def _group(case: Entry, group: str) -> list[Entry]:
    return [row for row in case["contestants"] if row["group"] == group]


def _fastest(rows: Sequence[Entry]) -> Entry | None:
    """The row with the lowest median; one choice for all rounds, since the best of each would favor many rows."""
    timed = [row for row in rows if row["seconds"]]
    return min(timed, key=lambda row: float(np.median(row["seconds"])), default=None)


def _paired(over: Entry | None, under: Entry | None) -> Quantiles | None:
    if over is None or under is None:
        return None
    return Quantiles.of(np.asarray(over["seconds"]) / np.asarray(under["seconds"]))


def _rates(ours: Entry | None, copy: Entry | None) -> Quantiles | None:
    ratio = _paired(copy, ours)
    if ratio is None or ours is None or copy is None:
        return None
    factor = ours["bytes"] / copy["bytes"]
    return Quantiles(ratio.median * factor, ratio.p10 * factor, ratio.p90 * factor)


def _kept(case: Entry, recipe: str, baseline: str, part: str) -> Quantiles | None:
    kept = case.get("kept", {})
    ours = kept.get(recipe if baseline == "fp32" else f"{recipe} bf16")
    if ours is None or baseline not in kept or not kept[baseline][part]:
        return None
    ratio = ours[part] / kept[baseline][part]
    return Quantiles(ratio, ratio, ratio)
