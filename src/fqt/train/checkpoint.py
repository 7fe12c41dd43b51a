"""Checkpoints: one file, written whole or not at all, sealed, read without running code from it.

A checkpoint is a dictionary of tensors and plain values, so that ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import io
import random
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fqt.errors import FqtError, FqtWarning
from fqt.files import DIGITS, Seal, read_bytes, write_bytes
from fqt.records import check_shape

__all__ = ["load_checkpoint", "restore_rng", "rng_state", "save_checkpoint", "seed_all"]

FORMAT = "fqt checkpoint 2"
UNSEALED = "fqt checkpoint 1"  # of versions that did not seal
SEAL = Seal(b"", b"fqt digest ", b"")  # as the comment that a ZIP archive, which torch writes, may end with


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values())


def _is_adapter(value: Any) -> bool:
    if value is not None:
        check_shape(value, {"recipe": (dict, type(None))}, "the checkpoint's adapter")
    return True


def _is_window(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.float64)


RNG = {"torch": (Tensor,), "cuda": (list,), "numpy": (tuple,), "python": (tuple,)}
SHAPES = {
    "config": {},
    "recipe": {},
    "step": lambda step: type(step) is int and step >= 0,
    "model": _is_state,
    "optimizer": {"state": {...: {}}, "param_groups": [{}]},
    "window": _is_window,
    "average": lambda average: average is None or _is_state(average),
    "adapter": _is_adapter,
    "rng": RNG,
    "others": [{"window": _is_window, "rng": RNG}],  # of the processes after the first
    "messages": lambda state: state is None or (isinstance(state, dict) and type(state.get("count")) is int),
    "metrics_bytes": lambda size: type(size) is int and size >= 0,
}


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` (tensors and plain values) to ``path``, atomically and sealed.

    The file is put together in memory first: a full disk then shows as one clear error of the write, and the
    checkpoint that was there stays.

    Raises:
        FqtError: the disk is full, or the folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    length = len(SEAL.lead) + DIGITS  # of the comment; the archive's last two bytes say it
    write_bytes(path, SEAL.put(buffer.getvalue()[:-2] + length.to_bytes(2, "little")))


def load_checkpoint(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU and makes sure that it holds ``keys``. No code in it is run.

    A checkpoint of a version that did not seal them is checked as far as its archive's own sums go, with a warning.

    Raises:
        FqtError: the file is missing, cut short, damaged, or was not written by `save_checkpoint`.
    """
    if not path.is_file():
        raise FqtError(f"there is no checkpoint {path}")
    data = read_bytes(path)
    sealed = SEAL.holds(data)
    try:
        if sealed is False:
            raise ValueError("it is not what was written: its digest is another")
        if sealed is None and (record := zipfile.ZipFile(io.BytesIO(data)).testzip()):
            raise ValueError(f"{record} has another checksum")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FqtError(
            f"{path} is damaged or is no checkpoint of fqt ({reason[:120]}); "
            "put back an intact copy, or start the run again with --force"
        ) from error
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, UNSEALED):
        raise FqtError(f"{path} is a file that PyTorch can read, but no checkpoint of fqt; name another folder")
    if sealed is None:
        if content["format"] == FORMAT:
            raise FqtError(f"{path} is damaged: its digest is missing; put back an intact copy")
        warnings.warn(
            f"{path} was written by an earlier version of fqt, without a digest: it is taken as it is",
            FqtWarning,
            stacklevel=2,
        )
    missing = [key for key in keys if key not in content]
    if missing:
        raise FqtError(f"the checkpoint {path} lacks {', '.join(missing)}; it was written for another purpose")
    check_shape(content, {key: SHAPES[key] for key in SHAPES if key in content}, str(path))
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
