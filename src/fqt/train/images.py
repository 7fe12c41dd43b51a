"""Classification of images: digits, Fashion-MNIST, CIFAR-10, or folders in ImageNet's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.train.config import TrainConfig
from fqt.train.imagefolder import FolderLoader
from fqt.train.loaders import ArrayLoader, Batch, Loader
from fqt.train.models.images import build_model
from fqt.train.readers import Arrays
from fqt.train.task import ACCURACY, Metric, Task

__all__ = ["ImageArrays", "ImageTask", "folders", "views"]

VIEWS = Metric(name="accuracy of views", unit="%", times=100.0)


class ImageTask(Task):
    """Images (N, C, H, W) float32 with labels (N,) int64, and the nets for them.

    Args:
        loader: of the batches.
        config: batch_size, test_views, dropout.
        mirror: whether a mirrored image is one of its class.
    """

    samples = "images"

    def __init__(self, loader: Loader, config: TrainConfig, mirror: bool) -> None:
        self.loader, self.batch_size = loader, config.batch_size
        self._test_views, self._mirror, self._dropout = config.test_views, mirror, config.dropout
        self.metrics = (ACCURACY, VIEWS) if config.test_views else (ACCURACY,)
        self.steps_per_epoch = loader.steps_per_epoch

    def build(self, name: str) -> nn.Module:
        """A net of this many channels and classes; one that starts from data sees training images."""
        return build_model(
            name,
            in_channels=self.loader.in_channels,
            num_classes=self.loader.num_classes,
            images=self._images,
            dropout=self._dropout,
        )

    def _images(self, count: int) -> Tensor:
        """The first training images (at most count, C, H, W), of one epoch."""
        found: list[Tensor] = []
        for images, _ in self.loader.train(0):
            found.append(images)
            if len(found) * self.batch_size >= count:
                break
        return torch.cat(found)[:count]

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch."""
        return self.loader.train(epoch, start)

    def eval(self) -> Iterator[Batch]:
        """The evaluation batches."""
        return self.loader.eval()

    def score(self, model: nn.Module, amp: bool) -> Mapping[str, float]:
        """With ``test_views``, the accuracy of the mean logits of each image's views."""
        if not self._test_views:
            return {}
        right = count = 0
        for images, labels in self.eval():
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp):
                parts = [share * model(view).float() for share, view in views(images, self._mirror)]
            right += int((torch.stack(parts).sum(0).argmax(1) == labels).sum())
            count += len(labels)
        return {VIEWS.name: right / count}

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
            pad=(self.pad if config.shift is None else config.shift) if config.augment else 0,
            flip=self.flip and config.augment,
            alternating=config.flip == "alternating",
            padding=config.padding,
            seed=config.seed,
            batch_size=config.batch_size,
            drop_last=config.drop_last,
            device=device,
        )
        return ImageTask(loader, config, self.flip)


def folders(config: TrainConfig, device: torch.device) -> Task:
    """Images read from disk as they are needed.

    Raises:
        FqtError: options that only images in memory have.
    """
    if config.flip != "random" or config.shift is not None or config.padding != "zeros":
        raise FqtError("the task imagefolder crops and mirrors at random: leave --flip, --shift and --padding out")
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
    return ImageTask(loader, config, mirror=True)


def views(images: Tensor, mirror: bool) -> list[tuple[float, Tensor]]:
    """Images (N, C, H, W), and shifted by a pixel along both axes, forth and back; each also mirrored.

    Returns:
        The views and their shares: half for what is not shifted.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    found = [(0.5, images), (0.25, padded[..., :height, :width]), (0.25, padded[..., 2:, 2:])]
    return found if not mirror else [(share / 2, v) for share, view in found for v in (view, view.flip(-1))]
