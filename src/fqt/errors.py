"""The errors that `fqt` raises on purpose, and its warnings. A leaf: any room may import it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FqtError(ValueError):
    """Bad input from the user; the message says in one line what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class UnknownName(FqtError):
    """A name that stands for nothing."""


class ConversionError(FqtError):
    """A model cannot be converted as asked; the message lists every problem. The model is unchanged."""


class FqtWarning(UserWarning):
    """Something a user should know that is no error; the command line prints it as one line."""


class RecipeWarning(FqtWarning):
    """Weights that were saved quantized are loaded into a model that computes with them in another way."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: letters swapped, left out or in capitals; None if none is near."""
    found = difflib.get_close_matches(name.strip().lower(), list(known), n=1, cutoff=0.7)
    return found[0] if found else None
