"""A quantizer in the words of a table, as TOML and JSON hold it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fqt.errors import FqtError
from fqt.kernels.rounding import ROUNDINGS, Rounding
from fqt.quant.best import Best, rounded
from fqt.quant.grid import grid_from, grid_words
from fqt.quant.keep import WORDS, Sampled, keep_from
from fqt.quant.own import own, words_of
from fqt.quant.quantizer import Quantizer
from fqt.quant.scale import Scale
from fqt.quant.transform import BlockHouseholder, Identity, Kept, Rotated, ScaledHadamard, Transform

_TRANSFORMS: dict[str, type[Transform]] = {
    "none": Identity,
    "householder": BlockHouseholder,
    "hadamard": ScaledHadamard,
}
_CHOICES = frozenset({"transform", "scale", "grid", "rounding"})


def quantizer_from(table: Mapping[str, Any]) -> Quantizer:
    """The quantizer of a table's words.

    Raises:
        FqtError: says what is unknown or wrong, and what is known.
    """
    words = {
        "transform": {"transform"},
        "options": {"guard", "small_rows", "block"},
        "rotation": {"rotate"},
        "rows": {"keep"},
        "scale": {"group", "mode", "axis", "store", "range"},
        "grid": {"grid", "bits"},
        "rounding": {"rounding"},
        "class": {"class"},
    }
    check_keys(table, set().union(*words.values()), "quantizer")
    name = table.get("transform", "none")
    keep = Kept(_sampled(table["keep"])) if "keep" in table else None
    if keep is not None and name != "none":
        raise FqtError(f"a quantizer has one transform over rows: 'keep' or {name!r}")
    if not isinstance(name, str) or name not in _TRANSFORMS:
        raise FqtError(f"unknown transform {name!r}; known: {', '.join(_TRANSFORMS)}")
    options = {k: table[k] for k in words["options"] if k in table}
    check_keys(options, {f.name for f in fields(_TRANSFORMS[name])}, f"transform {name!r}")
    transform = keep or _TRANSFORMS[name](**options)
    rounding = table.get("rounding", "stochastic")
    if isinstance(rounding, Mapping) or (isinstance(rounding, str) and ":" in rounding):
        rounding = own(Rounding, rounding, "rounding")
    found = rounded(
        Rotated(transform, table["rotate"]) if "rotate" in table else transform,
        Scale(**{k: table[k] for k in words["scale"] if k in table}),
        grid_from(table),
        rounding,
    )
    if "class" not in table:
        return found
    return own(Quantizer, table["class"], "quantizer", **{name: getattr(found, name) for name in _CHOICES})


def quantizer_words(q: Quantizer) -> dict[str, Any]:
    """The table that `quantizer_from` makes `q` from; of what has no words, what it refuses."""
    table = transform_words(q.transform) or {"transform": type(q.transform).__name__}
    group = q.scale.group
    table |= {"group": group if isinstance(group, str) else list(group), "mode": q.scale.mode}
    if q.scale.axis:
        table["axis"] = q.scale.axis
    if q.scale.store != "float32":
        table["store"] = q.scale.store
    if q.scale.remembers:
        table["range"] = q.scale.range
    if type(q) not in (Quantizer, Best):
        table["class"] = words_of(q, but=_CHOICES)
    return {**table, **grid_words(q.grid), "rounding": _rounding_words(q)}


def transform_words(transform: Transform) -> dict[str, Any] | None:
    """What `quantizer_from` builds it from; None if there are no words for it."""
    if type(transform) is Rotated:
        rows = transform_words(transform.rows)
        return None if rows is None else {**rows, "rotate": transform.block}
    if type(transform) is Kept:
        return {"keep": transform.rows.words} if type(transform.rows) in WORDS else None
    name = next((name for name, kind in _TRANSFORMS.items() if type(transform) is kind), None)
    if name is None:
        return None
    return {"transform": name, **{f.name: getattr(transform, f.name) for f in fields(transform)}}


def check_keys(table: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raises FqtError for keys of `table` that are not `known`; `what` names the table in the message."""
    unknown = sorted(set(table) - known, key=str)
    if unknown:
        raise FqtError(f"unknown {what} key {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}")


def _sampled(table: Any) -> Sampled:
    keep = keep_from(table)
    if not isinstance(keep, Sampled):
        raise FqtError(f"a quantizer keeps a sample of its rows, by 'range' or 'leverage', not by {table['by']!r}")
    return keep


def _rounding_words(q: Quantizer) -> str | dict[str, Any]:
    """What `quantizer_from` knows the rounding by; of a choice that it does not make, what it refuses."""
    if isinstance(q, Best):
        return "best" if rounded(q.transform, q.scale, q.grid, "best") == q else f"best of {len(q.candidates)}"
    return str(q.rounding) if ROUNDINGS.get(str(q.rounding)) == q.rounding else words_of(q.rounding)
