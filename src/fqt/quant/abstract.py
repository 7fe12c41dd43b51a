"""Kinds of choices: only what fills one in can be made."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from fqt.errors import FqtError


class Abstract(ABC):
    """A kind of choice. Python would say at the first use, deep in a layer, or with a bare error, what is lacking.

    Attributes:
        instead: what there is to choose from, in the words of an error.
    """

    instead: ClassVar[str]

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        """An instance.

        Raises:
            FqtError: a method is left to a subclass.
        """
        lacking = sorted(cls.__abstractmethods__)
        if lacking:
            what = f"{cls.__name__}() leaves {', '.join(lacking)} to a subclass"
            raise FqtError(f"{what}: give {cls.instead}, or a class of your own that has this")
        return super().__new__(cls)
