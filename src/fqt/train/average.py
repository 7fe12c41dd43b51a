"""Averaged weights, which are evaluated in place of the last ones, and from which training may go on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fqt.train.config import TrainConfig
from fqt.train.shards import local

__all__ = ["Average"]


class Average:
    """Weights and buffers averaged exponentially over steps; the first step's are the first average.

    At step t of T, and with ``lookahead`` k only at every k-th, the average keeps average^k·(t/T)^average_power of
    itself. With ``lookahead`` training goes on from the average (Zhang et al. 2019). Buffers are the model's own in
    training, and ranges of quantizers go on there: only weights go back.

    Args:
        model: whose weights; it is copied.
        config: average, average_power, lookahead.
        total_steps: T.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, total_steps: int) -> None:
        self.model = copy.deepcopy(model)
        self._every, self._total = max(config.lookahead, 1), total_steps
        self._keep, self._power = config.average**self._every, config.average_power
        self._goes_back = config.lookahead > 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the model after optimizer step ``step``, counted from 1."""
        if step % self._every:
            return
        keep = self._keep * (step / self._total) ** self._power if step > self._every else 0.0
        means, now = _tensors(self.model), _tensors(model)
        floats = [i for i, tensor in enumerate(now) if tensor.is_floating_point()]
        for mean, tensor in zip(means, now, strict=True):
            if not tensor.is_floating_point():
                mean.copy_(tensor)
        torch._foreach_lerp_([means[i] for i in floats], [now[i] for i in floats], 1 - keep)
        if self._goes_back:
            for parameter, mean in zip(model.parameters(), self.model.parameters(), strict=True):
                parameter.copy_(mean)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [local(tensor) for tensor in (*model.parameters(), *model.buffers())]
