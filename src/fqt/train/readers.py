"""Reads the standard files of the small image sets into arrays: digits, idx (MNIST and its kin), CIFAR-10.

Nothing is downloaded. A missing file is answered with the names that were expected and the folders looked into.
"""

from __future__ import annotations

import codecs
import gzip
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fqt.errors import FqtError

__all__ = ["Arrays", "read_cifar10", "read_digits", "read_fashion_mnist"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """A whole image set: uint8 images (N, C, H, W) and int64 labels (N,), for training and for evaluation."""

    train_images: np.ndarray
    train_labels: np.ndarray
    eval_images: np.ndarray
    eval_labels: np.ndarray


def read_digits(folder: str = "") -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 1×8×8, values 0…16: 1,297 to train on and 500 to evaluate.

    The split is fixed and keeps the ten classes' shares. ``folder`` is not used: the images come with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train_x, eval_x, train_y, eval_y = train_test_split(
        images, labels, test_size=500, random_state=0, stratify=labels
    )
    return Arrays(train_images=train_x, train_labels=train_y, eval_images=eval_x, eval_labels=eval_y)


def read_fashion_mnist(folder: str) -> Arrays:
    """Fashion-MNIST (or any set in MNIST's four idx files, .gz or not), 1×28×28, 60,000 + 10,000 images.

    Raises:
        FqtError: a file is missing or is not an idx file of that kind.
    """
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    home = _home(folder, names, ("", "fashion-mnist", "FashionMNIST/raw"), "fashion-mnist", optional=".gz")
    train_x, train_y, eval_x, eval_y = (_read_idx(home / name) for name in names)
    for x, y in ((train_x, train_y), (eval_x, eval_y)):
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
            raise FqtError(f"the idx files in {home} do not belong together: images {x.shape}, labels {y.shape}")
    return Arrays(
        train_images=train_x[:, None],
        train_labels=train_y.astype(np.int64),
        eval_images=eval_x[:, None],
        eval_labels=eval_y.astype(np.int64),
    )


def read_cifar10(folder: str) -> Arrays:
    """CIFAR-10 from the six files of ``cifar-10-batches-py``, 3×32×32, 50,000 + 10,000 images.

    Raises:
        FqtError: a file is missing or is not a CIFAR batch.
    """
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    home = _home(folder, names, ("", "cifar-10-batches-py"), "cifar10")
    parts = [_read_cifar_batch(home / name) for name in names]
    return Arrays(
        train_images=np.concatenate([x for x, _ in parts[:-1]]),
        train_labels=np.concatenate([y for _, y in parts[:-1]]),
        eval_images=parts[-1][0],
        eval_labels=parts[-1][1],
    )


def _home(folder: str, names: Sequence[str], below: Sequence[str], task: str, optional: str = "") -> Path:
    """The first of the folders ``folder/below`` that holds every name (with the optional ending or without)."""
    if not folder:
        raise FqtError(f"the task {task} needs its files: name their folder with --data (expected: {names[0]}, …)")
    root = Path(folder)
    if not root.is_dir():
        raise FqtError(f"there is no folder {folder}; --data must name the one that holds {', '.join(names)}")
    places = [root / sub if sub else root for sub in below]
    for place in places:
        if (place / names[0]).exists() or (optional and (place / (names[0] + optional)).exists()):
            missing = [
                n for n in names if not ((place / n).exists() or (optional and (place / (n + optional)).exists()))
            ]
            if missing:
                raise FqtError(f"{place} lacks {', '.join(missing)}, which the task {task} needs")
            return place
    looked = ", ".join(str(p) for p in places)
    raise FqtError(f"no {task} files in {looked}; expected: {', '.join(names)}")


def _read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes: two zeros, 0x08, the number of axes, their lengths (big-endian), the data."""
    try:
        if path.exists():
            raw = path.read_bytes()
        else:
            raw = gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    except (OSError, EOFError) as error:
        raise FqtError(f"cannot read {path}: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise FqtError(f"{path} is not an idx file of unsigned bytes")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise FqtError(f"{path} is cut short: it announces {shape} and holds {max(0, len(raw) - start)} bytes")
    return np.frombuffer(bytearray(raw), dtype=np.uint8, offset=start).reshape(shape)  # which torch may write to


def _read_cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[b"labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise FqtError(f"{path} is not a batch file of cifar-10-batches-py ({error})") from error
    if len(images) != len(labels):
        raise FqtError(f"{path} holds {len(images)} images but {len(labels)} labels")
    return images, labels


class _ArrayUnpickler(pickle.Unpickler):
    """Loads NumPy arrays and plain values only: a pickle from elsewhere must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that an array's pickle refers to, under NumPy's old and new module names."""
        allowed = {
            ("numpy", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,  # how Python 3 writes bytes for Python 2
        }
        key = (module.partition(".")[0], name)
        if key in allowed:
            return allowed[key]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
