"""Names of quantizers: `method` `bits` `rounding` `@axis`, as in `ptq8`, `bhq4`, `shq4d`, `psq8d@channel`.

A method is a row of a table; a new one from the literature is a new row.
"""

from __future__ import annotations

import re
from dataclasses import replace

from fqt.errors import FqtError
from fqt.quant.grid import Grid, Integers
from fqt.quant.quantizer import Best, Quantizer
from fqt.quant.scale import AXES, Scale
from fqt.quant.transform import BlockHouseholder, Identity, Rotated, ScaledHadamard, Transform

METHODS: dict[str, tuple[Transform, Scale]] = {
    "ptq": (Identity(), Scale("tensor")),
    "psq": (Identity(), Scale("row")),
    "bhq": (BlockHouseholder(), Scale("row")),
    "shq": (ScaledHadamard(), Scale("row")),
    "thq": (Rotated(ScaledHadamard()), Scale("row")),
}
"""Per-tensor, per-sample, block Householder (the paper's three), scaled and two-sided Hadamard quantizer."""

ROUNDING_SUFFIX = {"": "stochastic", "d": "dithered", "x": "best", "n": "nearest"}
_NAME = re.compile(r"([a-z]+?)((?:0|[1-9][0-9]*)?)([dxn]?)(?:@([a-z]+))?")


def known_names() -> str:
    """One line that says which names there are."""
    methods = ", ".join(METHODS)
    return (
        f"{methods}, each with its bits 2–8 ('psq4'), then 'd' for dithered, 'x' for the best of stochastic and "
        f"dithered or 'n' for nearest rounding, then '@' and an axis ({', '.join(AXES)}) for layers"
    )


def quantizer(name: str, bits: int | None = None) -> Quantizer:
    """The quantizer of that name.

    Args:
        name: a method, with or without its bits, rounding and axis: "bhq4", "shq4d", "psq8d@channel", "bhq".
        bits: 2 to 8, if the name does not say.

    Raises:
        FqtError: the name or the bits are unknown, missing, or said twice differently.

    >>> quantizer("psq4") == quantizer("psq", bits=4)
    True
    >>> quantizer("shq4d").rounding
    Dithered()
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or match[1] not in METHODS:
        raise FqtError(f"unknown quantizer {name!r}; known: {known_names()}")
    method, digits, suffix, axis = match.groups()
    if digits and bits is not None and int(digits) != bits:
        raise FqtError(f"quantizer {name!r} says {digits} bits and bits={bits}: say one")
    if not digits and bits is None:
        raise FqtError(f"quantizer {name!r} needs its bits: '{method}2' … '{method}8', or bits=")
    if digits and not 2 <= int(digits) <= 8:
        raise FqtError(f"quantizer {name!r} has {digits} bits: there are 2 to 8")
    transform, scale = METHODS[method]
    grid = Integers(int(digits) if digits else bits)  # type: ignore[arg-type]
    rounding = ROUNDING_SUFFIX[suffix]
    # Without a transform exact zeros stay exact, which dithered rounding cannot give.
    mode = "zero" if rounding == "best" and isinstance(transform, Identity) else scale.mode
    return rounded(transform, replace(scale, axis=axis, mode=mode), grid, rounding)


def rounded(transform: Transform, scale: Scale, grid: Grid, rounding: str) -> Quantizer:
    """The quantizer of these choices.

    Args:
        transform, scale, grid: as `Quantizer` takes them.
        rounding: as `Quantizer` takes it; or "best": of stochastic rounding on this scale and on the affine one, and
            dithered rounding on that, whichever has the least exact variance.
    """
    if rounding != "best":
        return Quantizer(transform=transform, scale=scale, grid=grid, rounding=rounding)
    if scale.mode == "symmetric":
        raise FqtError("the best rounding is one of affine scales, not of a symmetric one")
    own = Quantizer(transform=transform, scale=scale, grid=grid, rounding="stochastic")
    affine = replace(own, scale=replace(scale, mode="affine"))
    return Best(candidates=tuple(dict.fromkeys((own, affine, replace(affine, rounding="dithered")))))


def quantizer_name(q: Quantizer) -> str | None:
    """The name that `quantizer` would build `q` from, or None if the catalog has none."""
    for method in METHODS:
        for suffix in ROUNDING_SUFFIX:
            axis = f"@{q.scale.axis}" if q.scale.axis else ""
            name = f"{method}{q.bits}{suffix}{axis}"
            if quantizer(name) == q:
                return name
    return None
