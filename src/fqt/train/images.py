"""Classification of images: digits, Fashion-MNIST, CIFAR-10, or folders in ImageNet's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fqt.train.config import TrainConfig
from fqt.train.imagefolder import FolderLoader
from fqt.train.loaders import ArrayLoader, Batch, Loader
from fqt.train.models.images import build_model
from fqt.train.readers import Arrays
from fqt.train.task import Task

__all__ = ["ImageArrays", "ImageTask", "folders"]


class ImageTask(Task):
    """Images (N, C, H, W) float32 with labels (N,) int64, and the nets for them.

    Args:
        loader: of the batches.
        batch_size: images in a full batch.
    """

    samples = "images"

    def __init__(self, loader: Loader, batch_size: int) -> None:
        self.loader, self.batch_size = loader, batch_size
        self.steps_per_epoch = loader.steps_per_epoch

    def build(self, name: str) -> nn.Module:
        """A net of this many channels and classes."""
        return build_model(name, in_channels=self.loader.in_channels, num_classes=self.loader.num_classes)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch."""
        return self.loader.train(epoch, start)

    def eval(self) -> Iterator[Batch]:
        """The evaluation batches."""
        return self.loader.eval()

    def is_whole(self, batch: Batch) -> bool:
        """Whether a batch is of the full size, or the only one."""
        return len(batch[1]) == self.batch_size or self.steps_per_epoch == 1


@dataclass(frozen=True, kw_only=True)
class ImageArrays:
    """Images that fit in memory: how to read, normalize (after division by ``peak``) and augment them."""

    read: Callable[[str], Arrays]
    peak: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    def __call__(self, config: TrainConfig, device: torch.device) -> Task:
        """Reads the files."""
        loader = ArrayLoader(
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
        return ImageTask(loader, config.batch_size)


def folders(config: TrainConfig, device: torch.device) -> Task:
    """Images read from disk as they are needed."""
    loader = FolderLoader(
        config.data,
        image_size=config.image_size,
        augment=config.augment,
        seed=config.seed,
        batch_size=config.batch_size,
        drop_last=config.drop_last,
        workers=config.workers,
        device=device,
    )
    return ImageTask(loader, config.batch_size)
