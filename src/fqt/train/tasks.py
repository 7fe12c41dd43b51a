"""The tasks by name. A row is a function of the configuration and a device that opens the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from fqt.errors import FqtError
from fqt.train.classify import open_lines
from fqt.train.config import TrainConfig
from fqt.train.images import ImageArrays, folders
from fqt.train.named import imported
from fqt.train.readers import read_cifar10, read_digits, read_fashion_mnist
from fqt.train.task import Task
from fqt.train.text import open_characters
from fqt.train.translation import open_translation

__all__ = ["TASKS", "load_task"]

TASKS: dict[str, Callable[[TrainConfig, torch.device], Task]] = {
    "digits": ImageArrays(read=read_digits, peak=16, mean=(0.305,), std=(0.376,), pad=1, flip=False),
    "fashion-mnist": ImageArrays(read=read_fashion_mnist, peak=255, mean=(0.286,), std=(0.353,), pad=2, flip=True),
    "cifar10": ImageArrays(
        read=read_cifar10, peak=255, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262), pad=4, flip=True
    ),
    "imagefolder": folders,
    "shakespeare": open_characters,
    "classify": open_lines,
    "translation": open_translation,
}


def load_task(config: TrainConfig, device: torch.device) -> Task:
    """Opens the data of a configuration's task: one of `TASKS`, or ``package.module:function`` called alike.

    Raises:
        FqtError: an unknown task, or its files are missing or damaged.
    """
    if ":" in config.task:
        open_task = imported("task", config.task)
        try:
            inspect.signature(open_task).bind(config, device)
        except (TypeError, ValueError) as error:
            raise FqtError(f"task {config.task}: cannot be called with (config, device) ({error})") from error
        task = open_task(config, device)
        if not isinstance(task, Task):
            raise FqtError(f"task {config.task}: returned {type(task).__name__}, not a fqt.train.Task")
        return task
    if config.task not in TASKS:
        raise FqtError(
            f"unknown task {config.task!r}; known: {', '.join(TASKS)}, or an import path such as "
            "package.module:open"
        )
    return TASKS[config.task](config, device)
