"""Images on disk in ImageNet's layout, ``train/CLASS/*`` and ``val/CLASS/*``, read by worker processes.

The crops are the paper's: for training a random 8–100 % of the area at an aspect ratio of 3/4 to 4/3, resized to
``image_size``, mirrored half the time; for evaluation the shorter side resized to 256/224 of ``image_size`` and the
centre cut out. A sample's crop is drawn from (seed, epoch, index), so it depends neither on the number of workers
nor on where a run was interrupted.
"""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fqt.errors import FqtError
from fqt.seeds import derive_seed
from fqt.train.loaders import Batch, count_steps, epoch_order

__all__ = ["FolderLoader"]

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FolderLoader:
    """A `Loader` of an image folder.

    Args:
        folder: holds ``train`` and ``val``, each with one folder per class; classes are numbered in sorted order.
        image_size: side of a crop in pixels.
        augment: random crops and flips in training; without, the evaluation's centre crop.
        seed: determines order, crops and flips.
        batch_size: samples per batch.
        drop_last: leave out an epoch's last, smaller batch.
        workers: processes that read and crop; 0 reads in the training process.
        device: where the batches go.

    Raises:
        FqtError: the layout is not as described, the two parts have different classes, or there are no images.
    """

    in_channels = 3

    def __init__(
        self,
        folder: str,
        *,
        image_size: int,
        augment: bool,
        seed: int,
        batch_size: int,
        drop_last: bool,
        workers: int,
        device: torch.device,
    ) -> None:
        if not folder:
            raise FqtError("the task imagefolder needs images: name the folder with train/ and val/ by --data")
        classes = _classes(Path(folder) / "train")
        if _classes(Path(folder) / "val") != classes:
            raise FqtError(f"{folder}/train and {folder}/val must hold the same class folders")
        self._train = _Images(Path(folder) / "train", classes, image_size, seed if augment else None)
        self._eval = _Images(Path(folder) / "val", classes, image_size, None)
        self._seed, self._batch = seed, batch_size
        self._workers, self._device = workers, device
        self._mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(STD, device=device).view(1, 3, 1, 1) * 255
        self.num_classes = len(classes)
        self.steps_per_epoch = count_steps(len(self._train), batch_size, drop_last)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch, from batch ``start`` on."""
        order = epoch_order(self._seed, epoch, len(self._train)).tolist()
        yield from self._batches(self._train, order[: self.steps_per_epoch * self._batch], epoch, start)

    def eval(self) -> Iterator[Batch]:
        """The evaluation batches, always the same."""
        yield from self._batches(self._eval, list(range(len(self._eval))), 0, 0)

    def _batches(self, images: _Images, order: Sequence[int], epoch: int, start: int) -> Iterator[Batch]:
        keys = [(epoch, index) for index in order[start * self._batch :]]
        loader = DataLoader(
            images,
            batch_sampler=[keys[i : i + self._batch] for i in range(0, len(keys), self._batch)],
            num_workers=self._workers,
            worker_init_fn=_ignore_interrupt,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # DataLoader draws from it; from the global one it would shift our noise
        )
        for pixels, labels in loader:
            x = pixels.to(self._device, non_blocking=True).float().sub_(self._mean).div_(self._std)
            yield x, labels.to(self._device, non_blocking=True)


class _Images(Dataset[tuple[Tensor, int]]):
    """Images by (epoch, index), as uint8 (3, S, S); centre crops if ``seed`` is ``None``."""

    def __init__(self, folder: Path, classes: Sequence[str], size: int, seed: int | None) -> None:
        self._files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted(entry.path for entry in os.scandir(folder / name))
            if path.lower().endswith(ENDINGS)
        ]
        if not self._files:
            raise FqtError(f"no images in the class folders of {folder} (known endings: {' '.join(ENDINGS)})")
        self._size, self._seed = size, seed

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        path, label = self._files[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise FqtError(f"cannot read the image {path}: {error}") from error
        if self._seed is None:
            image = _centre_crop(image, self._size)
        else:
            image = _random_crop(image, self._size, random.Random(derive_seed(self._seed, "crop", epoch, index)))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), label


def _random_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A random area and aspect ratio, resized; ten tries to fit, then the largest centre crop of a legal ratio."""
    width, height = image.size
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:
        w, h = min(width, round(height * high)), min(height, round(width / low))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to 256/224 of ``size``, then the centre."""
    width, height = image.size
    short = round(size * 256 / 224)
    scale = short / min(width, height)
    width, height = max(short, round(width * scale)), max(short, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FqtError(f"there is no folder {folder}; --data must name a folder with train/CLASS/* and val/CLASS/*")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise FqtError(f"{folder} has no class folders; expected {folder}/CLASS/*.jpg")
    return classes


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
