"""Batches, as a function of (seed, epoch, position).

A loader has no state. The order of an epoch's samples and the crop and flip of each are drawn from a generator
seeded by (seed, epoch), never from torch's global one: a run continued in the middle of an epoch sees the batches
it would have seen, and recipes that draw noise at different rates see the same data.

`ArrayLoader` keeps a whole set in memory as uint8 and crops, flips and normalizes batches at once; for images of
32×32 a `DataLoader` of single samples would cost more than a small model's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.errors import FqtError
from fqt.seeds import derive_seed
from fqt.train.readers import Arrays

__all__ = ["ArrayLoader", "Batch", "Loader", "epoch_order"]

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) float32, labels (N,) int64


class Loader(Protocol):
    """What the training loop asks of a task's data."""

    in_channels: int
    num_classes: int
    steps_per_epoch: int

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch, from batch ``start`` on."""

    def eval(self) -> Iterator[Batch]:
        """The evaluation batches, always the same."""


class ArrayLoader:
    """An image set in memory.

    Args:
        arrays: the images and labels.
        peak: the largest pixel value; images are divided by it.
        mean: per channel, after the division.
        std: per channel, after the division.
        pad: training crops are taken at random from images padded by this many pixels; 0 for no crops.
        flip: mirror half of the training images.
        alternating: not a new half in every epoch, but one half in even and the other in odd ones.
        padding: ``zeros``, or ``reflect``: the image mirrored at its edge, which is not repeated.
        seed: determines order, crops and flips.
        batch_size: samples per batch.
        drop_last: leave out an epoch's last, smaller batch.
        device: where the batches go.

    Raises:
        FqtError: fewer training images than a batch takes, or images too small to be mirrored at their edges.
    """

    def __init__(
        self,
        arrays: Arrays,
        *,
        peak: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pad: int,
        flip: bool,
        seed: int,
        batch_size: int,
        drop_last: bool,
        device: torch.device,
        alternating: bool = False,
        padding: str = "zeros",
    ) -> None:
        self._train = (torch.from_numpy(arrays.train_images), torch.from_numpy(arrays.train_labels))
        self._eval = (torch.from_numpy(arrays.eval_images), torch.from_numpy(arrays.eval_labels))
        # x/peak normalized, as one multiply-add: x·scale + shift
        shape = (1, -1, 1, 1)
        self._scale = (1 / (peak * torch.tensor(std))).view(shape)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(shape)
        self._pad, self._flip, self._seed = pad, flip, seed
        self._alternating, self._padding = alternating, padding
        self._batch, self._device = batch_size, device
        self.in_channels, *sides = self._train[0].shape[1:]
        if padding == "reflect" and pad >= min(sides):
            raise FqtError(
                f"images of {sides[0]}×{sides[1]} cannot be mirrored at their edges to {pad} pixels: shift less"
            )
        self.num_classes = int(self._train[1].max()) + 1
        self.steps_per_epoch = count_steps(len(self._train[0]), batch_size, drop_last)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch, from batch ``start`` on."""
        images, labels = self._train
        count = len(images)
        order = epoch_order(self._seed, epoch, count)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "augment", epoch))
        corners = torch.randint(0, 2 * self._pad + 1, (count, 2), generator=generator)
        mirrored = (
            self._mirrored(epoch, order) if self._alternating else torch.rand(count, generator=generator) < 0.5
        )
        for step in range(start, self.steps_per_epoch):
            where = slice(step * self._batch, (step + 1) * self._batch)
            picked = order[where]
            x = images[picked]
            if self._pad:
                x = _crop(x, corners[where], self._pad, self._padding)
            if self._flip:
                x = torch.where(mirrored[where, None, None, None], x.flip(-1), x)
            yield self._ready(x, labels[picked])

    def eval(self) -> Iterator[Batch]:
        """The evaluation batches, always the same."""
        images, labels = self._eval
        for first in range(0, len(images), self._batch):
            yield self._ready(images[first : first + self._batch], labels[first : first + self._batch])

    def _mirrored(self, epoch: int, order: Tensor) -> Tensor:
        """Which images, in this order, are mirrored in an epoch: a half drawn once, then the other, in turn."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "mirror"))
        half = torch.rand(len(order), generator=generator) < 0.5
        return half[order] ^ (epoch % 2 == 1)

    def _ready(self, images: Tensor, labels: Tensor) -> Batch:
        x = torch.addcmul(self._shift, images.float(), self._scale)
        return x.to(self._device), labels.to(self._device)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The permutation of the training samples in an epoch, int64 of shape (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


def count_steps(samples: int, batch_size: int, drop_last: bool) -> int:
    """Batches per epoch.

    Raises:
        FqtError: there would be none.
    """
    if samples == 0 or (drop_last and samples < batch_size):
        raise FqtError(f"{samples} training images do not fill a batch of {batch_size}: lower --batch-size")
    return samples // batch_size if drop_last else -(-samples // batch_size)


def _crop(images: Tensor, corners: Tensor, pad: int, padding: str = "zeros") -> Tensor:
    """Crops each image (N, C, H, W), padded by ``pad`` pixels, at its own corner (N, 2)."""
    n, _, height, width = images.shape
    if padding == "reflect":  # by indices: torch's own knows no uint8
        padded = images[:, :, _reflected(height, pad)[:, None], _reflected(width, pad)]
    else:
        padded = F.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view, no copy
    return windows[torch.arange(n), :, corners[:, 0], corners[:, 1]]


def _reflected(side: int, pad: int) -> Tensor:
    """Where the pixels of a padded side come from, int64 (side + 2·pad,)."""
    last = side - 1
    return last - (last - torch.arange(-pad, side + pad).abs()).abs()
