"""One's own classes in the words of a recipe: an import path, and the values of the fields.

Words are read in other processes, and from files that others wrote. So nothing is imported for them: a class is
looked for among those that are defined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fqt.errors import FqtError

Kind = TypeVar("Kind")


def words_of(choice: Any, but: frozenset[str] = frozenset()) -> str | dict[str, Any]:
    """What `own` makes it again from: "module:Class", or a table with that as `class`, and the fields.

    Args:
        choice: a dataclass instance.
        but: fields that are written elsewhere.

    Returns:
        If a field holds what is no number, text, truth or sequence of these: its repr, which `own` refuses.
    """
    values = {f.name: _plain(getattr(choice, f.name)) for f in fields(choice) if f.init and f.name not in but}
    values = {name: value for name, value in values.items() if value is not None}
    if any(value is _UNSAYABLE for value in values.values()):
        return repr(choice)
    path = _path(type(choice))
    return {"class": path, **values} if values else path


def own(kind: type[Kind], words: str | Mapping[str, Any], what: str, **more: Any) -> Kind:
    """The value that `words_of` wrote down.

    Args:
        kind: what its class is a subclass of.
        words: as `words_of` returns them.
        what: for messages.
        more: the fields that are written elsewhere.

    Raises:
        FqtError: there is no such class yet, or it does not take these fields.
    """
    table = words if isinstance(words, Mapping) else {"class": words}
    path = table.get("class")
    found = [each for each in _below(kind) if _path(each) == path]
    if not found:
        raise FqtError(f"unknown {what} {path!r}: no such {kind.__name__} is defined here; import its module first")
    values = {name: _frozen(value) for name, value in table.items() if name != "class"}
    try:
        return found[-1](**more, **values)  # defined again, as in a notebook, the last counts
    except TypeError as error:
        raise FqtError(f"{what} {path}: cannot be made of {', '.join(values) or 'no fields'} ({error})") from error


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _below(kind: type[Kind]) -> Iterator[type[Kind]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


_UNSAYABLE = object()


def _plain(value: Any) -> Any:
    """As TOML holds it; None stays None."""
    if isinstance(value, list | tuple):
        found = [_plain(each) for each in value]
        return _UNSAYABLE if any(each is _UNSAYABLE or each is None for each in found) else found
    return value if value is None or isinstance(value, bool | int | float | str) else _UNSAYABLE


def _frozen(value: Any) -> Any:
    """With tuples for lists: a choice is hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
