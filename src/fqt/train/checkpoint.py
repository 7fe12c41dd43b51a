"""Checkpoints: one file, written whole or not at all, read without running code from it.

A checkpoint is a dictionary of tensors and plain values, so that ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fqt.errors import FqtError
from fqt.records import write_bytes

__all__ = ["load_checkpoint", "restore_rng", "rng_state", "save_checkpoint", "seed_all"]

FORMAT = "fqt checkpoint 1"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` (tensors and plain values) to ``path``, atomically.

    The file is put together in memory first: a full disk then shows as one clear error of the write, and the
    checkpoint that was there stays.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU and makes sure that it holds ``keys``.

    Raises:
        FqtError: the file is missing, cut short, damaged, or was not written by `save_checkpoint`.
    """
    if not path.is_file():
        raise FqtError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FqtError(
            f"{path} is damaged or is no checkpoint of fqt ({reason[:120]}); "
            "put back an intact copy, or start the run again with --force"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FqtError(f"{path} is a file that PyTorch can read, but no checkpoint of fqt; name another folder")
    missing = [key for key in keys if key not in content]
    if missing:
        raise FqtError(f"the checkpoint {path} lacks {', '.join(missing)}; it was written for another purpose")
    return content


def seed_all(seed: int) -> None:
    """Seeds the global generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every global generator, as tensors and plain values."""
    _, keys, *rest = np.random.get_state(legacy=True)  # ("MT19937", words, position, has_gauss, cached_gaussian)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned; generators of GPUs that are not there are left out."""
    torch.set_rng_state(state["torch"])
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
