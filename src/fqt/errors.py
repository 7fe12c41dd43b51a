"""The errors that `fqt` raises on purpose, and its warnings. A leaf: any room may import it."""

from __future__ import annotations


class FqtError(ValueError):
    """Bad input from the user; the message says in one line what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class ConversionError(FqtError):
    """A model cannot be converted as asked; the message lists every problem. The model is unchanged."""


class FqtWarning(UserWarning):
    """Something a user should know that is no error; the command line prints it as one line."""


class RecipeWarning(FqtWarning):
    """Weights that were saved quantized are loaded into a model that computes with them in another way."""
