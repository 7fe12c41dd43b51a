"""ρ during training, from one and a half extra passes every k steps.

With ĝ the gradient that training has just computed on a batch of n samples, g the exact (QAT) gradient of the same
batch and g₁ that of its first n₁ samples (n₂ = n − n₁ the rest),

    quantization:  ‖ĝ − g‖²                E = Var[ĝ | batch]
    sampling:      n₁/n₂ · ‖g₁ − g‖²       E = Var_batch[g] for a loss that is a mean over independent samples,

since g₁ − g = (n₂/n)(g₁ − g₂). Both are unbiased up to this: batch norm sees half a batch in g₁, so that the
sampling variance gets the difference of the two normalizations on top (measured: see docs/statistics.md), and
active dropout draws other masks for g₁, which adds twice its share of the variance. The pass for g replays the
random state of the training forward, so that ĝ − g is quantization only. Of a gradient accumulated over batches, g₁
is that of the first half of the batches, and batch norm sees whole ones.

A single reading is rough (one draw, one pair of halves), so variances are averaged over readings with exponentially
decaying weights, and ρ is the quotient of the averages. The alternative, differences of successive training
gradients, costs no pass but takes the progress of training for noise.

All of it rests on ĝ being the gradient of that batch. Where it is, the quantized pass made again from the same
random state gives ĝ back, whatever the noise; where gradients were scaled, clipped, accumulated or are another
batch's, it does not. That check costs a pass. It is made for the first reading, and for each that stands out:
‖ĝ − g‖² is over `JUMP` times its average; more than `SUSPECT` of it lies along g (noise of many entries has hardly
a part in any one direction, a wrong factor lies wholly along it); or forward passes of the step are left over.
Standing out alone convicts nobody: in tiny layers noise has few directions and jumps, and another batch's gradient
has hardly a part along this one's where sampling noise dominates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.nn.wrappers import check_module
from fqt.stats.likeness import Comparison, looks_like
from fqt.stats.passes import (
    Backward,
    LossFn,
    Sink,
    alone,
    check_loss,
    check_model,
    energy,
    owner,
    tensors,
    trainable,
    undisturbed,
    without,
)
from fqt.stats.processes import Processes
from fqt.stats.replay import Passes

if TYPE_CHECKING:  # torch may have been built without what messages need
    from fqt.distributed import Messages

__all__ = ["Monitor", "first_half"]

JUMP = 2.0
SUSPECT = 0.25
_UNLIKE = 0.05  # of ‖ĝ − g‖² that may come from something else than the rounding of this batch's gradient
_MESSAGES = 10.0


class Scaler(Protocol):
    """What multiplies the loss before `backward`, such as `torch.amp.GradScaler`."""

    def get_scale(self) -> float:
        """The factor in force."""


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

    What `step` refuses, and what it cannot know, is said there.

    Args:
        model: in training, with layers that quantize their gradient.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the training loss, a mean over samples. It must be what
            training computes, autocast and label smoothing included, and random through torch's generators only.
        every: steps between readings.
        memory: weight of the past at each reading, in [0, 1).
        half: gives ``(first part, share)`` of a batch: a batch of the first samples, and the share of all samples
            that it holds. By default every tensor with as many rows as the first one is cut there.
        messages: the state of the communication hook, if gradients are averaged in quantized messages
            (`fqt.distributed`): their noise is part of ``quantization``, and a reading says their exact variance.
        process_group: that gradients are averaged over, such as ``torch.distributed.group.WORLD``, where the model
            is not the `DistributedDataParallel` itself, whose group is taken otherwise.

    Raises:
        FqtError: no layer that quantizes its gradient, no trainable parameter, values that make no sense, or a
            model whose gradients are sharded over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        every: int = 100,
        memory: float = 0.7,
        half: Callable[[Any], tuple[Any, float]] | None = None,
        messages: Messages | None = None,
        process_group: Any = None,
    ) -> None:
        if every < 1:
            raise FqtError(f"every must be at least 1 step, got {every}")
        if not 0 <= memory < 1:
            raise FqtError(f"memory must lie in [0, 1), got {memory}")
        _check_messages(messages)
        check_module(model, "Monitor")
        check_loss(loss_fn)
        check_model(model, awake=False)
        self.model, self.loss_fn, self.every, self.memory = alone(model, averaged=True), loss_fn, every, memory
        self.half, self.messages = half or first_half, messages
        self.processes = Processes.of(model, process_group)
        self.names = list(dict.fromkeys(map(owner, trainable(model))))
        self.count = 0
        self._quantization = _Average(len(self.names) + 1)
        self._sampling = _Average(len(self.names) + 1)
        self._sent = _Average(1)
        self._passes = Passes(self.model)
        self._await_next()

    def close(self) -> None:
        """Takes the monitor off the model."""
        self._passes.close()

    def step(
        self,
        batch: Any,
        *more: Any,
        reduction: Literal["mean", "sum"] = "mean",
        scale: float | Scaler = 1.0,
    ) -> dict[str, Any] | None:
        """Call it once per optimizer step, after ``backward()`` and before anything changes gradients or weights.

        Parameters, buffers, gradients and the random state are left as they were. A gradient accumulated over
        several batches is read as such: its variances are those of the accumulated gradient. In
        `DistributedDataParallel` every process calls it with its own batch, and all get the same reading, of the
        averaged gradient.

            for batch in batches: (loss_fn(model, batch) / len(batches)).backward()
            monitor.step(*batches)

        With a `GradScaler`, give it, and call this before ``unscale_`` (or after, without giving it); the scale is
        divided out of what is returned. Clip afterwards.

        Refused is what is seen to be something else than the quantized gradient of the batches: other tensors went
        into the model; or the gradient is not what the same passes give when they are made again, up to 5 % of the
        reading. The latter, tried in the first reading and in each that stands out (more than twice the average; a
        quarter or more along g; forward passes unaccounted for), sees gradients that are scaled, clipped, not
        zeroed, accumulated, averaged over workers or of other targets, and a `loss_fn` that is not the training
        loss. It never refuses a right gradient whose pass is deterministic. What goes wrong later, and so little
        that the reading stays within twice the average, is not seen; nor is a loss that is no mean over
        independent samples, which makes ``sampling`` wrong.

        Args:
            batch: the one that `.grad` belongs to.
            more: further batches that `.grad` was accumulated over, in that order.
            reduction: "mean" where each batch's loss was divided by their number, "sum" where it was not.
            scale: what the loss was multiplied by before ``backward()``: a number, or a `GradScaler`.

        Returns:
            None between readings, and where the gradient is not finite, which has no variance (a `GradScaler` skips
            that step, too); else ``rho``, ``quantization``, ``sampling`` of the whole gradient and ``layers``,
            ρ by layer (NaN where its sampling variance is zero), averaged over readings; ``messages``, the exact
            variance that messages between processes are of ``quantization``, if they are quantized.

        Raises:
            FqtError: the gradients are not those of the batches; a single batch of one sample, no gradients, a loss
                that is not finite, or no forward pass of the model in training mode since the last step.
        """
        self.count += 1
        try:
            found = None
            if self.count % self.every == 0:
                batches, unit = [batch, *more], _number(scale)
                found = self._measure(batches, unit, unit / _parts(reduction, len(batches)))
        finally:
            self._await_next()
        if found is None:
            return None
        for average, value in zip((self._quantization, self._sampling, self._sent), found, strict=True):
            average.update(value, self.memory)
        return self.reading()

    def skip(self) -> None:
        """Call it instead of `step` for a batch smaller than the others, whose sampling variance is another's."""
        self._await_next()

    def reading(self) -> dict[str, Any]:
        """The averages as they are; NaN before the first reading."""
        quantization, sampling = self._quantization.value(), self._sampling.value()
        rho = torch.where(sampling > 0, quantization / sampling, torch.nan).tolist()
        sent = {} if self.messages is None else {"messages": float(self._sent.value()[0])}
        return {
            "rho": rho[-1],
            "quantization": float(quantization[-1]),
            "sampling": float(sampling[-1]),
            "layers": dict(zip(self.names, rho[:-1], strict=True)),
            **sent,
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
            "messages": self._sent.state(),
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
        self._sent = _Average.of(state["messages"]) if "messages" in state else _Average(1)
        self._await_next()

    def _await_next(self) -> None:
        """Forgets the passes that were seen; the next step's are recorded if it is due for a reading."""
        self._passes.clear()
        due = (self.count + 1) % self.every == 0
        self._passes.recording = due
        if self.messages is not None:
            self.messages.measure(due)

    def _measure(self, batches: Sequence[Any], unit: float, factor: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """Quantization and sampling variance by layer and in all, and the messages' variance; None where the
        gradient is not finite.

        Args:
            batches: that `.grad` was accumulated over.
            unit: what `.grad` is a multiple of the gradient by.
            factor: what each batch's loss was multiplied by.
        """
        layers = check_model(self.model)
        noisy, (first, share, weight) = self.processes.together(lambda: self._gradients_and_first_part(batches))
        if not all(torch.isfinite(gradient).all() for gradient in noisy.values()):
            return None
        exact: dict[str, Tensor] = {}
        apart = Comparison()
        quantization = torch.zeros(len(self.names) + 1, dtype=torch.float64)
        sampling = torch.zeros_like(quantization)
        (rest_over_first,) = self.processes.means((1 - share) / share)
        sent = 0.0 if self.messages is None else self.messages.variance

        def against_training(name: str, gradient: Tensor) -> None:
            exact[name] = gradient
            quantization[self._where(name)] += apart.add(noisy[name], gradient)

        def against_whole(name: str, gradient: Tensor) -> None:
            sampling[self._where(name)] += energy(gradient - exact.pop(name)) / rest_over_first

        with undisturbed(self.model):
            with without(layers), self._passes.again() as seen:
                self._gradients(batches, factor, noisy, against_training)
            if self.processes.total(seen.unknown):
                raise FqtError(
                    "Monitor.step got another batch than the model in this step: give it the one that .grad "
                    "belongs to, and a loss_fn that prepares it as training does"
                )
            usual = JUMP * float(self._quantization.value()[-1]) * unit**2  # NaN before the first reading
            left = self.processes.total(seen.left)
            if self.processes.total(left > 0 or not (apart.square <= usual and apart.along < SUSPECT)):
                self._check(batches, factor, noisy, apart, left, sent)
            with without(layers), self._passes.again():
                self._gradients(first, factor * weight, noisy, against_whole)
        return quantization / unit**2, sampling / unit**2, torch.tensor([sent], dtype=torch.float64) / unit**2

    def _gradients_and_first_part(
        self, batches: Sequence[Any]
    ) -> tuple[dict[str, Tensor], tuple[Sequence[Any], float, float]]:
        """What training has computed, by name, and what `_first_part` gives."""
        noisy = {name: p.grad for name, p in trainable(self.model).items() if p.grad is not None}
        if not noisy:
            raise FqtError("there are no gradients: call Monitor.step between backward() and the optimizer's step")
        found = self._first_part(batches)
        if not self._passes:
            raise FqtError("no forward pass in training mode was seen since the last step: call the model itself")
        return noisy, found

    def _first_part(self, batches: Sequence[Any]) -> tuple[Sequence[Any], float, float]:
        """A first part of the samples, its share of them, and what makes its sum one for the whole."""
        if len(batches) > 1:
            count = len(batches) // 2
            return batches[:count], count / len(batches), len(batches) / count
        part, share = self.half(batches[0])
        if not 0 < share < 1:
            raise FqtError(
                "a batch of one sample has no halves to tell its sampling variance from: take larger ones, or "
                "accumulate several"
            )
        return [part], share, 1.0

    def _gradients(self, batches: Sequence[Any], factor: float, names: Mapping[str, Any], sink: Sink) -> None:
        """The summed gradient of `factor` times each batch's loss, parameter by parameter, over all processes.

        It is held as a whole if there are several batches, or processes, which must agree on the order.
        """
        parameters = {name: p for name, p in trainable(self.model).items() if name in names}

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            loss = self.loss_fn(model, batch)
            return loss if factor == 1 else loss * factor

        backward = Backward(self.model, loss_fn, parameters)
        if len(batches) == 1 and self.processes.count == 1:
            backward(batches[0], sink)
            return
        total: dict[str, Tensor] = {}

        def accumulate(name: str, gradient: Tensor) -> None:
            total[name] = total[name].add_(gradient) if name in total else gradient

        def all_batches() -> None:
            for batch in batches:
                backward(batch, accumulate)

        self.processes.together(all_batches)
        for name in parameters:
            sink(name, self.processes.mean(total.pop(name)))

    def _check(
        self,
        batches: Sequence[Any],
        factor: float,
        noisy: Mapping[str, Tensor],
        apart: Comparison,
        left: int,
        sent: float,
    ) -> None:
        """Makes the passes again, noise included, and compares what they give with the gradients.

        Raises:
            FqtError: they differ, by more than `_UNLIKE` of what sets them apart from the exact gradient and
                `_MESSAGES` times the variance of messages, whose noise is not made again.
        """
        repeated = Comparison()

        def against_training(name: str, gradient: Tensor) -> None:
            repeated.add(noisy[name], gradient)

        with self._passes.again():
            self._gradients(batches, factor, noisy, against_training)
        like = repeated.square <= max(_UNLIKE * apart.square, repeated.last_bits) + _MESSAGES * sent
        if self.processes.total(not like):
            raise FqtError(looks_like(repeated, len(batches), left))

    def _where(self, name: str) -> list[int]:
        return [self.names.index(owner(name)), -1]


def _check_messages(messages: object) -> None:
    if messages is None:
        return
    from fqt.distributed import Messages

    if not isinstance(messages, Messages):
        raise FqtError(f"messages is the communication hook's state, fqt.distributed.Messages(…), not {messages!r}")


def _number(scale: float | Scaler) -> float:
    """The number that `scale` stands for.

    Raises:
        FqtError: it stands for none, or for none that could be divided out.
    """
    value = scale.get_scale() if hasattr(scale, "get_scale") else scale
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value == 0:
        raise FqtError(f"scale must be a finite number other than 0, or a GradScaler, not {scale!r}")
    return float(value)


def _parts(reduction: str, count: int) -> int:
    """What each of `count` batches' losses was divided by.

    Raises:
        FqtError: `reduction` is no word for it.
    """
    if reduction not in ("mean", "sum"):
        raise FqtError(f'reduction must be "mean" or "sum" (of the batches\' losses), not {reduction!r}')
    return count if reduction == "mean" else 1


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


def first_half(batch: Any, rows: int | None = None) -> tuple[Any, float]:
    """The first half of a batch (a tensor, or tensors in lists, tuples and dicts), and its share of the samples.

    Args:
        batch: every tensor with as many rows as the first one is cut.
        rows: of the first part, if it is not to be the half.

    Raises:
        FqtError: the batch holds no tensor with an axis of samples.
    """
    found = [t for t in tensors(batch) if t.ndim]
    if not found:
        raise FqtError("cannot halve a batch without tensors: pass half= to the monitor")
    count = len(found[0])
    first = count // 2 if rows is None else rows

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:first] if value.ndim and len(value) == count else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(cut, value))
        if isinstance(value, list | tuple):
            return type(value)(map(cut, value))
        return value

    return cut(batch), first / max(count, 1)
