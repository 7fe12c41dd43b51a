"""The optimizer's parameter groups and the learning rate as a pure function of the step.

A schedule without state has nothing to save and cannot come out of step with the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fqt.errors import FqtError
from fqt.train.config import TrainConfig
from fqt.train.named import asked_for, imported

__all__ = ["learning_rate", "make_optimizer", "set_rate"]

NORMS = (
    nn.modules.batchnorm._NormBase,  # every batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer with two groups: normalization layers, told by their type, and everything else.

    Biases are with the norms if the configuration does not decay them. One of the user's own, by import path, is
    called with the groups and those of the keywords lr, momentum, nesterov and betas that its signature names.

    Raises:
        FqtError: an unknown optimizer, or one that cannot be called so.
    """
    norms: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            spared = isinstance(module, NORMS) or (name.endswith("bias") and not config.decay_biases)
            (norms if spared else others).append(parameter)
    groups = [
        {"params": others, "weight_decay": config.weight_decay, "lr_factor": 1.0},
        {"params": norms, "weight_decay": config.norm_weight_decay, "lr_factor": config.norm_lr_factor},
    ]
    return _optimizer(config, [group for group in groups if group["params"]])


def _optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    name = config.optimizer
    if name not in OPTIMIZERS and ":" not in name:
        raise FqtError(
            f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}, or an import path such as "
            "package.module:Class"
        )
    make = OPTIMIZERS[name] if name in OPTIMIZERS else imported("optimizer", name)
    offered = {
        "lr": config.lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "betas": (config.beta1, config.beta2),
    }
    try:
        optimizer = make(groups, **asked_for(make, offered))
    except (TypeError, ValueError) as error:
        raise FqtError(f"optimizer {name}: cannot be made ({error})") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise FqtError(f"optimizer {name}: returned {type(optimizer).__name__}, not a torch.optim.Optimizer")
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group: ``rate`` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)  # checkpoints of earlier versions have none


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) in a run of ``total_steps``.

    In units i of n (steps, or epochs) with w of warm-up: lr·(f + (1 − f)·(i+1)/w) while i < w, where f is
    ``warmup_start``, then with s = (i − w)/(n − w) for the cosine min + (lr − min)/2·(1 + cos πs), linearly
    min + (lr − min)·(1 − s), and as inverse square root lr·√(w/(i+1)), w at least 1 (Vaswani et al. 2017, with lr
    as its peak). One cycle rises by a cosine from lr/25 to lr over the first 30 % of the run and falls by another
    to lr/250,000 at its last unit (PyTorch's ``OneCycleLR``).
    """
    i, n, w = step, total_steps, config.warmup_epochs * steps_per_epoch + config.warmup_steps
    if config.schedule_unit == "epoch":
        i, n, w = step // steps_per_epoch, -(-total_steps // steps_per_epoch), config.warmup_epochs
    if config.schedule == "onecycle":
        top = max(0.0, 0.3 * n - 1)  # as in PyTorch, the peak comes one unit before 30 %
        if i <= top:
            return _cosine(config.lr / 25, config.lr, i / top if top else 1.0)
        return _cosine(config.lr, config.lr / 250_000, (i - top) / (n - 1 - top))
    if i < w:
        start = config.warmup_start
        return config.lr * (start + (1 - start) * (i + 1) / w)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse-sqrt":
        return config.lr * math.sqrt(max(w, 1) / (i + 1))
    share = (i - w) / (n - w)
    if config.schedule == "linear":
        return config.lr + (config.min_lr - config.lr) * share
    return _cosine(config.lr, config.min_lr, share)


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from ``start`` at share 0 to ``end`` at share 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
