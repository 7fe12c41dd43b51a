"""From names to quantizers and back: `psq4`, `shq4d`, `psq8d@channel`, `mxfp4`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fqt.errors import FqtError, UnknownName, nearest
from fqt.quant.catalog import METHODS
from fqt.quant.method import ROUNDING_SUFFIX, Method
from fqt.quant.quantizer import Quantizer

_LONGEST_FIRST = sorted(METHODS.values(), key=lambda method: -len(method.stem))


def name_meant(name: object, others: Iterable[str] = ()) -> str | None:
    """The name, without an axis, of a quantizer or of these others that is nearest to what was written, if any."""
    endings = "".join(ROUNDING_SUFFIX)
    rows = METHODS.values()
    names = [name + ending for m in rows for name in m.names for ending in ("", *endings) if ending in m.suffixes]
    return nearest(name.partition("@")[0], [*others, *names]) if isinstance(name, str) else None


def quantizer(name: str, bits: int | None = None) -> Quantizer:
    """The quantizer of that name.

    Args:
        name: a method, with or without its bits, rounding and axis: "bhq4", "shq4d", "psq8d@channel", "bhq".
        bits: if the name does not say; most methods have 2 to 8.

    Raises:
        FqtError: the name or the bits are unknown, missing, or said twice differently.

    >>> quantizer("psq4") == quantizer("psq", bits=4)
    True
    >>> quantizer("shq4d").rounding
    Dithered()
    """
    method, (digits, suffix, axis) = _match(name)
    return method.quantizer(_width(name, method, digits, bits), suffix, axis)


def _match(name: str) -> tuple[Method, tuple[str, str, str | None]]:
    """The row that a name belongs to, and what the name says: bits, the rounding's suffix, axis."""
    for method in _LONGEST_FIRST:
        match = method.pattern.fullmatch(name) if isinstance(name, str) else None
        if match is not None:
            return method, (match[1], match[2], match[3])
    bits = width_meant(name)
    meant = f"psq{bits}" if bits else name_meant(name)
    near = f"did you mean {meant!r}?" if meant else _SOME
    raise UnknownName(f"unknown quantizer {name!r}; {near}")


_SOME = (
    "known: ptq, psq, bhq, shq, thq and others, with bits behind and 'd' for dithered, as in 'psq4' and 'shq4d'; "
    "`fqt catalog` lists them all; recipes are for quantize_"
)
_WIDTH = re.compile(r"(?:u?int|bits?|fp(?=8))?[ _-]?([2-8])[ _-]?(?:bits?)?")


def width_meant(name: object) -> str:
    """The number of bits if a name says no more: "8", "int8", "8-bit"; else empty."""
    match = _WIDTH.fullmatch(name.strip().lower()) if isinstance(name, str) else None
    return match[1] if match else ""


def _width(name: str, method: Method, digits: str, bits: int | None) -> int:
    """The bits, from the name or from beside it."""
    if digits and bits is not None and int(digits) != bits:
        raise FqtError(f"quantizer {name!r} says {digits} bits and bits={bits}: say one")
    if digits:
        return int(digits)
    if bits is not None:
        return bits
    if "*" in method.name:
        some = "" if len(method.widths) == 1 else f" … {method.names[-1]!r}"
        raise FqtError(f"quantizer {name!r} needs its bits: {method.names[0]!r}{some}, or bits=")
    return method.widths[0]


def quantizer_name(q: Quantizer) -> str | None:
    """The name that `quantizer` would build `q` from, or None if the catalog has none."""
    return next((name for method in METHODS.values() if (name := method.name_of(q)) is not None), None)


def method_of(name: str) -> Method:
    """The row that a quantizer's name belongs to.

    Raises:
        FqtError: it belongs to none.
    """
    return _match(name)[0]
