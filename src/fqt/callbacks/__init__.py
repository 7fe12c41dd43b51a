"""Quantized training in other people's trainers: one callback each for Hugging Face's `Trainer` and for Lightning.

A callback measures ρ by layer (`fqt.Monitor`) into the trainer's logs, refuses what would be measured or trained
wrongly before it goes on, and keeps the recipe with the checkpoint. Their libraries are imported when a callback is
asked for. Accelerate's loop is the user's own: `fqt.Monitor` serves there as it is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fqt.errors import FqtError

if TYPE_CHECKING:
    from fqt.callbacks.hugging_face import HuggingFaceCallback as HuggingFaceCallback
    from fqt.callbacks.lightning import LightningCallback as LightningCallback

_HOMES = {"HuggingFaceCallback": ("hugging_face", "hf"), "LightningCallback": ("lightning", "lightning")}
"""By name of a callback: its module, and the extra that installs what it needs."""

__all__ = ["HuggingFaceCallback", "LightningCallback"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _HOMES[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fqt"):
            raise
        raise FqtError(
            f"{name} needs {error.name}, which is not installed: in a checkout of fqt, pip install '.[{extra}]'"
        ) from error
