"""The tasks by name: where the images come from and how they are normalized and augmented.

Every task is classification; its metric is the share of images classified right. Adding one is adding a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fqt.errors import FqtError
from fqt.train.config import TrainConfig
from fqt.train.imagefolder import FolderLoader
from fqt.train.loaders import ArrayLoader, Loader
from fqt.train.readers import Arrays, read_cifar10, read_digits, read_fashion_mnist

__all__ = ["TASKS", "load_task"]


@dataclass(frozen=True, kw_only=True)
class ArrayTask:
    """A task whose images fit in memory: how to read, normalize (after division by ``peak``) and augment them."""

    read: Callable[[str], Arrays]
    peak: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    def open(self, config: TrainConfig, device: torch.device) -> Loader:
        """Reads the files and returns the loader."""
        return ArrayLoader(
            self.read(config.data),
            peak=self.peak,
            mean=self.mean,
            std=self.std,
            pad=self.pad if config.augment else 0,
            flip=self.flip and config.augment,
            seed=config.seed,
            batch_size=config.batch_size,
            drop_last=config.drop_last,
            device=device,
        )


@dataclass(frozen=True, kw_only=True)
class FolderTask:
    """Images read from disk as they are needed."""

    def open(self, config: TrainConfig, device: torch.device) -> Loader:
        """Lists the files and returns the loader."""
        return FolderLoader(
            config.data,
            image_size=config.image_size,
            augment=config.augment,
            seed=config.seed,
            batch_size=config.batch_size,
            drop_last=config.drop_last,
            workers=config.workers,
            device=device,
        )


TASKS: dict[str, ArrayTask | FolderTask] = {
    "digits": ArrayTask(read=read_digits, peak=16, mean=(0.305,), std=(0.376,), pad=1, flip=False),
    "fashion-mnist": ArrayTask(read=read_fashion_mnist, peak=255, mean=(0.286,), std=(0.353,), pad=2, flip=True),
    "cifar10": ArrayTask(
        read=read_cifar10, peak=255, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262), pad=4, flip=True
    ),
    "imagefolder": FolderTask(),
}


def load_task(config: TrainConfig, device: torch.device) -> Loader:
    """Opens the data of a configuration's task.

    Raises:
        FqtError: an unknown task, or its files are missing or damaged.
    """
    if config.task not in TASKS:
        raise FqtError(f"unknown task {config.task!r}; known: {', '.join(TASKS)}")
    return TASKS[config.task].open(config, device)
