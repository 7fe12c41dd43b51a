"""Functions that no compiler looks into, nor into what they call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def not_compiled(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `torch.compiler.disable(reason=…)`, which imports Dynamo at once: here only a call does.

    That import takes as long as the rest of fqt with torch.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        disabled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def lazy(*arguments: Any) -> Any:
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*arguments)

        # What Dynamo looks for in a function that it meets while it traces.
        lazy._torchdynamo_disable = True  # type: ignore[attr-defined]
        lazy._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return lazy

    return decorate
