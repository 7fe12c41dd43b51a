"""ρ during training, from one and a half extra passes every k steps.

With ĝ the gradient that training has just computed on a batch of n samples, g the exact (QAT) gradient of the same
batch and g₁ that of its first n₁ samples (n₂ = n − n₁ the rest),

    quantization:  ‖ĝ − g‖²                E = Var[ĝ | batch]
    sampling:      n₁/n₂ · ‖g₁ − g‖²       E = Var_batch[g] for a loss that is a mean over independent samples,

since g₁ − g = (n₂/n)(g₁ − g₂). Both are unbiased up to this: batch norm sees half a batch in g₁, so that the
sampling variance gets the difference of the two normalizations on top (measured: see docs/statistics.md), and
active dropout draws other masks for g₁, which adds twice its share of the variance. The pass for g replays the
random state of the training forward, so that ĝ − g is quantization only.

A single reading is rough (one draw, one pair of halves), so variances are averaged over readings with exponentially
decaying weights, and ρ is the quotient of the averages. The alternative, differences of successive training
gradients, costs no pass but takes the progress of training for noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.stats.passes import (
    LossFn,
    alone,
    check_model,
    energy,
    owner,
    stream,
    tensors,
    trainable,
    undisturbed,
    without,
)

__all__ = ["Monitor", "first_half"]


class Monitor:
    """Measures ρ of a model in training, per layer, every `every` steps.

    >>> import torch, fqt
    >>> model = fqt.quantize_(torch.nn.Linear(4, 2), "psq4")
    >>> loss_fn = lambda model, batch: model(batch).square().mean()
    >>> monitor, batch = fqt.Monitor(model, loss_fn, every=2), torch.randn(8, 4)
    >>> readings = []
    >>> for _ in range(4):
    ...     model.zero_grad()
    ...     loss_fn(model, batch).backward()
    ...     readings.append(monitor.step(batch))
    >>> [reading is None for reading in readings], sorted(readings[1])
    ([True, False, True, False], ['layers', 'quantization', 'rho', 'sampling'])

    Args:
        model: in training, with layers that quantize their gradient.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the training loss, a mean over samples.
        every: steps between readings.
        memory: weight of the past at each reading, in [0, 1).
        half: gives ``(first part, share)`` of a batch: a batch of the first samples, and the share of all samples
            that it holds. By default every tensor with as many rows as the first one is cut there.

    Raises:
        FqtError: no layer that quantizes its gradient, no trainable parameter, values that make no sense, or a
            model whose gradients are sharded or averaged over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        every: int = 100,
        memory: float = 0.7,
        half: Callable[[Any], tuple[Any, float]] | None = None,
    ) -> None:
        if every < 1:
            raise FqtError(f"every must be at least 1 step, got {every}")
        if not 0 <= memory < 1:
            raise FqtError(f"memory must lie in [0, 1), got {memory}")
        check_model(model, awake=False)
        self.model, self.loss_fn, self.every, self.memory = alone(model, averaged=True), loss_fn, every, memory
        self.half = half or first_half
        self.names = list(dict.fromkeys(map(owner, trainable(model))))
        self.count = 0
        self._quantization = _Average(len(self.names) + 1)
        self._sampling = _Average(len(self.names) + 1)
        self._random: tuple[Tensor, list[Tensor]] | None = None
        self._hook = model.register_forward_pre_hook(self._before_forward)

    def close(self) -> None:
        """Takes the monitor off the model."""
        self._hook.remove()

    def step(self, batch: Any) -> dict[str, Any] | None:
        """Call it once per step, after ``backward()`` and before anything changes the gradients or the weights.

        Parameters, buffers, gradients and the random state are left as they were.

        Args:
            batch: the one that `.grad` belongs to, and nothing else (no accumulation over batches, no loss scale).

        Returns:
            None between readings; else ``rho``, ``quantization``, ``sampling`` of the whole gradient and
            ``layers``, ρ by layer (NaN where its sampling variance is zero), averaged over readings.

        Raises:
            FqtError: a batch of one sample, no gradients, a loss that is not finite, or no forward pass of the
                model in training mode since the last step.
        """
        self.count += 1
        if self.count % self.every:
            self._random = None
            return None
        quantization, sampling = self._measure(batch)
        self._quantization.update(quantization, self.memory)
        self._sampling.update(sampling, self.memory)
        return self.reading()

    def skip(self) -> None:
        """Call it instead of `step` for a batch smaller than the others, whose sampling variance is another's."""
        self._random = None

    def reading(self) -> dict[str, Any]:
        """The averages as they are; NaN before the first reading."""
        quantization, sampling = self._quantization.value(), self._sampling.value()
        rho = torch.where(sampling > 0, quantization / sampling, torch.nan).tolist()
        return {
            "rho": rho[-1],
            "quantization": float(quantization[-1]),
            "sampling": float(sampling[-1]),
            "layers": dict(zip(self.names, rho[:-1], strict=True)),
        }

    def forget_quantization(self) -> None:
        """Starts the average of the quantization variance anew: the recipe has changed."""
        self._quantization = _Average(len(self.names) + 1)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to continue to the same readings."""
        return {
            "count": self.count,
            "quantization": self._quantization.state(),
            "sampling": self._sampling.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state.

        Raises:
            FqtError: it belongs to another model.
        """
        sizes = {len(state[key]["sum"]) for key in ("quantization", "sampling")}
        if sizes != {len(self.names) + 1}:
            raise FqtError("the monitor's state belongs to a model with other layers")
        self.count = state["count"]
        self._quantization = _Average.of(state["quantization"])
        self._sampling = _Average.of(state["sampling"])

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        """Remembers the random state at the step's first forward pass, from which the next reading will repeat."""
        due = (self.count + 1) % self.every == 0
        if due and self._random is None and model.training and torch.is_grad_enabled():
            self._random = (torch.get_rng_state(), _device_states())

    def _measure(self, batch: Any) -> tuple[Tensor, Tensor]:
        layers = check_model(self.model)
        noisy = {name: p.grad for name, p in trainable(self.model).items() if p.grad is not None}
        parameters = {name: p for name, p in trainable(self.model).items() if name in noisy}
        if not parameters:
            raise FqtError("there are no gradients: call Monitor.step between backward() and the optimizer's step")
        part, share = self.half(batch)
        if not 0 < share < 1:
            raise FqtError("a batch of one sample has no halves to tell its sampling variance from")
        if self._random is None:
            raise FqtError("no forward pass in training mode was seen since the last step: call the model itself")
        state = self._random
        exact: dict[str, Tensor] = {}
        quantization = torch.zeros(len(self.names) + 1, dtype=torch.float64)
        sampling = torch.zeros_like(quantization)

        def against_training(name: str, gradient: Tensor) -> None:
            exact[name] = gradient
            quantization[self._where(name)] += energy(noisy[name] - gradient)

        def against_whole(name: str, gradient: Tensor) -> None:
            sampling[self._where(name)] += energy(gradient - exact.pop(name)) * (share / (1 - share))

        with undisturbed(self.model), without(layers):
            for piece, sink in ((batch, against_training), (part, against_whole)):
                torch.set_rng_state(state[0])
                _set_device_states(state[1])
                stream(self.model, self.loss_fn, piece, parameters, sink)
        self._random = None  # what the passes above left
        return quantization, sampling

    def _where(self, name: str) -> list[int]:
        return [self.names.index(owner(name)), -1]


class _Average:
    """An average with exponentially decaying weights that sum to one from the first value on."""

    def __init__(self, size: int) -> None:
        self.sum, self.weight = torch.zeros(size, dtype=torch.float64), 0.0

    def update(self, value: Tensor, memory: float) -> None:
        """Adds a value; the earlier ones count `memory` times what they did."""
        self.sum = memory * self.sum + value
        self.weight = memory * self.weight + 1

    def value(self) -> Tensor:
        """The average; NaN without values."""
        return self.sum / self.weight if self.weight else torch.full_like(self.sum, torch.nan)

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {"sum": self.sum.tolist(), "weight": self.weight}

    @staticmethod
    def of(state: Mapping[str, Any]) -> _Average:
        """From `state`."""
        average = _Average(len(state["sum"]))
        average.sum, average.weight = torch.tensor(state["sum"], dtype=torch.float64), state["weight"]
        return average


def first_half(batch: Any) -> tuple[Any, float]:
    """The first half of a batch (a tensor, or tensors in lists, tuples and dicts), and its share of the samples.

    Raises:
        FqtError: the batch holds no tensor with an axis of samples.
    """
    found = [t for t in tensors(batch) if t.ndim]
    if not found:
        raise FqtError("cannot halve a batch without tensors: pass half= to the monitor")
    count = len(found[0])

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[: count // 2] if value.ndim and len(value) == count else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(cut, value))
        if isinstance(value, list | tuple):
            return type(value)(map(cut, value))
        return value

    return cut(batch), (count // 2) / max(count, 1)


def _device_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_device_states(states: list[Tensor]) -> None:
    if states:
        torch.cuda.set_rng_state_all(states)
