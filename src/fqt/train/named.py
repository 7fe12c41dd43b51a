"""What a configuration names: something known, or something of the user's by its import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fqt.errors import FqtError
from fqt.nn import Recipe, load_recipe

__all__ = ["asked_for", "construct", "imported", "named_recipe"]


def named_recipe(source: Any) -> Recipe:
    """What `load_recipe` makes of it; of ``package.module:name`` what stands there.

    Recipes that come out of files of weights never import anything: only what a user names does.

    Raises:
        FqtError: it cannot be imported, or is no recipe.
    """
    if not isinstance(source, str) or ":" not in source or source.endswith(".toml"):
        return load_recipe(source)
    found = _found("recipe", source)
    try:
        return load_recipe(found)
    except FqtError as error:
        raise FqtError(f"recipe {source}: {error}") from None


def imported(kind: str, path: str) -> Callable[..., Any]:
    """What ``package.module:Name`` leads to.

    Args:
        kind: of thing, for the message.
        path: module and name.

    Raises:
        FqtError: it cannot be imported, or is not callable.
    """
    found = _found(kind, path)
    if not callable(found):
        raise FqtError(f"{kind} {path}: is not a class or a function")
    return found


def _found(kind: str, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a module named ".."
        raise FqtError(f"{kind} {path}: cannot be imported ({error})") from error
    return found


def construct(name: str, known: Mapping[str, Callable[..., nn.Module]], **offered: Any) -> nn.Module:
    """A model by its name or import path.

    Args:
        name: one of ``known``, or ``package.module:ClassOrFactory``.
        known: what can be named; each takes some of the keywords.
        offered: what the data says of the model; a factory is called with those that its signature names.

    Raises:
        FqtError: an unknown name, or an import path that leads to no module.
    """
    if name not in known and ":" not in name:
        raise FqtError(
            f"unknown model {name!r}; known: {', '.join(known)}, or an import path such as package.module:Factory"
        )
    factory = known[name] if name in known else imported("model", name)
    try:
        model = factory(**asked_for(factory, offered))
    except TypeError as error:
        raise FqtError(f"model {name}: cannot be called ({error})") from error
    if not isinstance(model, nn.Module):
        raise FqtError(f"model {name}: returned {type(model).__name__}, not a torch.nn.Module")
    return model


def asked_for(factory: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords that a factory's signature names.

    Raises:
        TypeError: its signature cannot be read, as that of some functions written in C.
    """
    try:
        wanted = inspect.signature(factory).parameters
    except ValueError as error:
        raise TypeError(str(error)) from error
    return {key: value for key, value in offered.items() if key in wanted}
