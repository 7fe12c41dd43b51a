"""The optimizer's parameter groups and the learning rate as a pure function of the step.

A schedule without state has nothing to save and cannot come out of step with the run.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fqt.train.config import TrainConfig

__all__ = ["learning_rate", "make_optimizer"]

NORMS = (
    nn.modules.batchnorm._NormBase,  # every batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with two groups: normalization layers, told by their type, and everything else."""
    norms: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            (norms if isinstance(module, NORMS) else others).append(parameter)
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": config.norm_weight_decay},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) in a run of ``total_steps``.

    In units i of n (steps, or epochs) with w of warm-up: lr·(i+1)/w while i < w, then for the cosine
    lr/2·(1 + cos(π·(i − w)/(n − w))). One cycle rises by a cosine from lr/25 to lr over the first 30 % of the run
    and falls by another to lr/250,000 at its last unit (PyTorch's ``OneCycleLR``).
    """
    i, n, w = step, total_steps, config.warmup_epochs * steps_per_epoch
    if config.schedule_unit == "epoch":
        i, n, w = step // steps_per_epoch, -(-total_steps // steps_per_epoch), config.warmup_epochs
    if config.schedule == "onecycle":
        top = max(0.0, 0.3 * n - 1)  # as in PyTorch, the peak comes one unit before 30 %
        if i <= top:
            return _cosine(config.lr / 25, config.lr, i / top if top else 1.0)
        return _cosine(config.lr, config.lr / 250_000, (i - top) / (n - 1 - top))
    if i < w:
        return config.lr * (i + 1) / w
    if config.schedule == "constant":
        return config.lr
    return _cosine(config.lr, 0.0, (i - w) / (n - w))


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from ``start`` at share 0 to ``end`` at share 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
