"""A diagnosis as plain values that JSON can hold, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from fqt.errors import FqtError
from fqt.nn import Recipe, dump_recipe, load_recipe
from fqt.quant.quantizer import Quantizer
from fqt.records import MAYBE, TEXT, check_shape, is_width
from fqt.stats.decomposition import Decomposition
from fqt.stats.diagnose import Diagnosis, Noise
from fqt.stats.operands import Operand
from fqt.stats.spread import Estimate

__all__ = ["FORMAT", "diagnosis_from", "diagnosis_record", "table_record"]

FORMAT = "fqt diagnosis 1"
WHOLE = "*"  # stands for the whole gradient where a layer's name could stand

_ESTIMATE = {"value": MAYBE, "error": MAYBE}
_NOISE = {"sampling": _ESTIMATE, "quantization": _ESTIMATE, "energy": _ESTIMATE, "rho": _ESTIMATE}
_OPERAND = {
    "layer": TEXT, "role": TEXT, "quantizer": (str, dict), "bits": is_width, "shape": [(int,)],
    "multiplications": (int,), "energy": _ESTIMATE, "variance": {...: _ESTIMATE}, "bound": {...: MAYBE},
    "limit": (dict, type(None)), "range_ratio": MAYBE, "histogram": [(int,)], "empty": MAYBE,
}  # fmt: skip
SHAPE: dict[str, Any] = {
    "total": _NOISE, "layers": {...: _NOISE}, "drowned": [TEXT], "operands": [_OPERAND],
    "table": (dict, type(None)), "recipes": {...: (str, dict)}, "batches": (int,), "draws": (int,),
}  # fmt: skip
_TABLE: dict[str, Any] = {
    "sources": [TEXT], "targets": [TEXT], "parts": {...: {...: _ESTIMATE}},
    "effect": {...: {"grad_input": _ESTIMATE, "grad_weight": _ESTIMATE}},
    "total": {...: _ESTIMATE}, "gap": {...: _ESTIMATE}, "interval": {...: MAYBE},
    "operands": {...: {...: {...: MAYBE}}}, "weight": {...: lambda w: type(w) is int and w > 0},
    "batches": (int,), "draws": (int,),
}  # fmt: skip


def diagnosis_record(diagnosis: Diagnosis) -> dict[str, Any]:
    """The record of a diagnosis; `diagnosis_from` reads it."""
    return {
        "format": FORMAT,
        "total": asdict(diagnosis.total),
        "layers": {name: asdict(noise) for name, noise in diagnosis.layers.items()},
        "drowned": list(diagnosis.drowned),
        "operands": [{**asdict(o), "quantizer": _dump(o.quantizer), "bits": o.bits} for o in diagnosis.operands],
        "table": None if diagnosis.table is None else table_record(diagnosis.table),
        "recipes": {name: dump_recipe(recipe) for name, recipe in diagnosis.recipes.items()},
        "batches": diagnosis.batches,
        "draws": diagnosis.draws,
        "again": list(diagnosis.again),
    }


def table_record(table: Decomposition) -> dict[str, Any]:
    """The record of Theorem 2's table; "*" stands for the whole gradient."""
    record = asdict(table)
    for field in ("total", "gap", "interval"):
        record[field] = {WHOLE if name is None else name: value for name, value in record[field].items()}
    return {**record, "agrees": table.agrees}


def diagnosis_from(record: Any) -> Diagnosis:
    """The diagnosis of a record.

    Raises:
        FqtError: it is no record of a diagnosis.
    """
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        raise FqtError("this is no record of fqt diagnose")
    try:
        check_shape(record, SHAPE, "its content")
        if record["table"] is not None:
            check_shape(record["table"], _TABLE, "its table")
        recipes = _recipes(record["recipes"])
        found = Diagnosis(
            total=_noise(record["total"]),
            layers={name: _noise(value) for name, value in record["layers"].items()},
            operands=tuple(map(_operand, record["operands"])),
            table=None if record["table"] is None else _table(record["table"]),
            recipes=recipes,
            batches=record["batches"],
            draws=record["draws"],
            again=tuple(record.get("again", ())),  # older records have none
        )
        if found.table is not None:
            _check_names(found.table, found.recipes)
    except _Unreadable as error:
        raise FqtError(f"the recipes in the record of fqt diagnose cannot be made here: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, FqtError) else f"{type(error).__name__}: {error}"
        raise FqtError(f"the record of fqt diagnose is damaged ({reason})") from error
    return found


class _Unreadable(FqtError):
    """A recipe names what is not here: a class of somebody's own whose module is not imported, say."""


def _recipes(words: Mapping[str, Any]) -> dict[str, Recipe]:
    try:
        return {name: load_recipe(recipe) for name, recipe in words.items()}
    except FqtError as error:
        raise _Unreadable(str(error)) from error


def _check_names(table: Decomposition, recipes: Mapping[str, Recipe]) -> None:
    """Every layer of the table has what a plan asks of it; ValueError or KeyError."""
    for layer in table.sources:
        table.effect[layer]
        widths = table.operands[layer].get("grad_input")
        quantizer = recipes[layer].operand("grad_input")
        if widths is not None and (quantizer is None or {*quantizer.grid.widths} != {*widths}):
            raise ValueError(f"{layer} has not all widths of grad_input")
        if widths is not None:
            table.weight[layer]


def _dump(quantizer: Quantizer) -> Any:
    return dump_recipe(Recipe(grad_input=quantizer))["grad_input"]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _estimate(value: Mapping[str, Any]) -> Estimate:
    return Estimate(value=_number(value["value"]), error=_number(value["error"]))


def _noise(value: Mapping[str, Any]) -> Noise:
    return Noise(**{name: _estimate(estimate) for name, estimate in value.items()})


def _by_width(value: Mapping[str, Any], read: Callable[[Any], Any] = _number) -> dict[int, Any]:
    return {int(bits): read(item) for bits, item in value.items()}


def _operand(value: Mapping[str, Any]) -> Operand:
    quantizer = load_recipe({"grad_input": value["quantizer"]}).operand("grad_input")
    if quantizer is None:
        raise ValueError("an operand is not quantized")
    return Operand(
        **{
            **{name: item for name, item in value.items() if name != "bits"},
            "quantizer": quantizer,
            "shape": tuple(value["shape"]),
            "energy": _estimate(value["energy"]),
            "variance": _by_width(value["variance"], _estimate),
            "bound": _by_width(value["bound"]),
            "limit": None if value["limit"] is None else _by_width(value["limit"]),
            "histogram": tuple(value["histogram"]),
        }
    )


def _table(value: Mapping[str, Any]) -> Decomposition:
    def named(field: str, read: Callable[[Any], Any]) -> dict[str | None, Any]:
        return {None if name == WHOLE else name: read(item) for name, item in value[field].items()}

    def nested(field: str) -> dict[str, dict[str, Estimate]]:
        return {a: {b: _estimate(e) for b, e in row.items()} for a, row in value[field].items()}

    return Decomposition(
        sources=tuple(value["sources"]),
        targets=tuple(value["targets"]),
        parts=nested("parts"),
        effect=nested("effect"),
        total=named("total", _estimate),
        gap=named("gap", _estimate),
        interval=named("interval", _number),
        operands={
            layer: {role: _by_width(widths) for role, widths in roles.items()}
            for layer, roles in value["operands"].items()
        },
        weight=dict(value["weight"]),
        batches=value["batches"],
        draws=value["draws"],
    )
