"""Where in a network quantizing the gradient costs what: every layer's gradient under many quantizers at once.

The conditional variance of a quantizer given its input is known in closed form (`Quantizer.variance`), so one
backward pass answers for every method and every number of bits, without sampling. What it does not say is how
much of a layer's noise reaches which parameter; that is Theorem 2's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.nn import GradientOperand
from fqt.nn.wrappers import named_modules
from fqt.quant import Quantizer
from fqt.seeds import derive_seed
from fqt.stats.passes import LossFn, Observer, measuring

__all__ = ["CodeHistogram", "LayerProfile", "code_histogram", "gradient_of_layer", "layer_profile"]


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One layer's gradient, as it arrives at the quantizer of grad_input.

    Attributes:
        layer: its qualified name.
        rows, columns: of the matrix that is quantized, (N, D); of the first call, if there are more per pass.
        energy: ‖grad_output‖², mean over batches.
        variance: by quantizer: its exact variance on this gradient, summed over entries, mean over batches.
    """

    layer: str
    rows: int
    columns: int
    energy: float
    variance: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class CodeHistogram:
    """What a quantizer makes of one matrix.

    Attributes:
        counts: how often each code 0 … B occurs.
        bins: (N,) the bin size of each quantized row i, as it comes back: step_i · ‖S⁻¹e_i‖. With stochastic
            rounding the variance is Σ_i bins_i² Σ_j p_ij(1 − p_ij).
        variance: exact, summed over entries.
    """

    counts: list[int]
    bins: list[float]
    variance: float


def layer_profile(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], quantizers: Mapping[str, Quantizer], seed: int = 0
) -> list[LayerProfile]:
    """The exact variance of each quantizer on each layer's gradient, from one backward pass per batch.

    The gradient is the one that flows in `model`: choose a recipe that adds next to no noise of its own (8 bits).
    Layers come in the order of the model. Buffers, ``.grad`` and the random state are left as they were.

    Args:
        model: with converted layers that quantize grad_input, in training mode.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: at least one.
        quantizers: by name.
        seed: of torch's generator, and so of the model's noise and of random transforms.

    Raises:
        FqtError: no batch, no layer of the model quantizes its grad_input, or what `diagnose` refuses of a loss.
    """
    if not batches:
        raise FqtError("a profile needs at least one batch")
    shapes: dict[str, tuple[int, int]] = {}
    energy: dict[str, float] = {}
    sums: dict[str, dict[str, float]] = {}

    def note(name: str, operand: GradientOperand) -> None:
        if operand.role != "grad_input":
            return
        x, rows = operand.gradient, operand.rows
        count = 1
        for axis in rows:
            count *= x.shape[axis]
        shapes.setdefault(name, (count, x.numel() // max(count, 1)))
        energy[name] = energy.get(name, 0.0) + float(x.double().square().sum()) / len(batches)
        into = sums.setdefault(name, dict.fromkeys(quantizers, 0.0))
        for label, q in quantizers.items():
            into[label] += float(q.variance(x, operand.seed, axis=rows)) / len(batches)

    _watch(model, loss_fn, batches, seed, note)
    order = [name for name, _ in named_modules(model) if name in shapes]
    if not order:
        raise FqtError("no layer of the model quantizes its grad_input in training mode: nothing to profile")
    return [
        LayerProfile(
            layer=name, rows=shapes[name][0], columns=shapes[name][1], energy=energy[name], variance=sums[name]
        )
        for name in order
    ]


def gradient_of_layer(
    model: nn.Module, loss_fn: LossFn, batch: Any, layer: str | None = None, seed: int = 0
) -> tuple[str, Tensor]:
    """One layer's gradient as a matrix of the rows and columns that are quantized.

    Args:
        model, loss_fn, batch: as in `layer_profile`.
        layer: its qualified name; None for the middle one of those that quantize grad_input.
        seed: as in `layer_profile`.

    Returns:
        The layer's name and its gradient, (N, D).

    Raises:
        FqtError: there is no such layer; the message lists those there are.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, operand: GradientOperand) -> None:
        if operand.role == "grad_input":
            axes = operand.rows + tuple(d for d in range(operand.gradient.ndim) if d not in operand.rows)
            rows = operand.gradient.permute(axes).flatten(0, len(operand.rows) - 1)
            found.setdefault(name, rows.reshape(rows.shape[0], -1).clone())

    _watch(model, loss_fn, [batch], seed, note)
    order = [name for name, _ in named_modules(model) if name in found]
    if not order:
        raise FqtError("no layer of the model quantizes its grad_input in training mode: there is nothing to show")
    name = order[len(order) // 2] if layer is None else layer
    if name not in found:
        raise FqtError(f"the model has no layer {name!r} that quantizes its grad_input; known: {', '.join(order)}")
    return name, found[name]


def code_histogram(q: Quantizer, x: Tensor, seed: int = 0) -> CodeHistogram:
    """Codes and bin sizes of `x`, (N, D), under a quantizer with one step per tensor or per row, affine codes.

    Raises:
        FqtError: the quantizer has other steps or codes.
    """
    if q.scale.group == "column" or q.scale.mode == "symmetric":
        raise FqtError("a histogram of codes needs affine codes, with one step per tensor or per row")
    quantized = q.quantize(x, seed)
    step = quantized.matrix_step.double().expand(x.shape[0], 1).flatten()
    cost = torch.ones_like(step) if quantized.mixing is None else quantized.mixing.cost.double()
    counts = torch.bincount(quantized.matrix_codes.flatten().long(), minlength=q.grid.levels(q.scale.mode).high + 1)
    return CodeHistogram(
        counts=counts.tolist(),
        bins=(step * cost.sqrt()).tolist(),
        variance=float(q.variance(x, seed)),
    )


def _watch(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], seed: int, observer: Observer) -> None:
    """One pass per batch, for what it quantizes."""
    with measuring(model, loss_fn) as backward:
        for b, batch in enumerate(batches):
            backward(batch, seed=derive_seed(seed, "profile", b), observer=observer)
