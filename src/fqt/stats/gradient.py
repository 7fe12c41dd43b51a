"""How noisy a parameter gradient is, split into what quantization adds and what mini-batches bring.

With g the gradient of a quantized network and the law of total variance,

    Var[g] = E_batch Var[g | batch]  +  Var_batch E[g | batch],

where the first term is the **quantization variance**, measured by repeating the backward on a fixed batch with
fresh noise, and the second the **sampling variance**, measured as the spread over batches of a gradient that has
no noise of its own (the forward-quantized, QAT network). Variances of a vector are summed over its entries:
Var[g] = E‖g − E g‖².

The alternative, subtracting the sampling variance from the total, is the difference of two noisy numbers of which
one is usually a hundred times the other; it can come out negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.nn.between import uncompressed
from fqt.nn.dropout import WithoutDropout
from fqt.nn.wrappers import check_module
from fqt.seeds import derive_seed
from fqt.stats.moments import Moments
from fqt.stats.passes import Backward, LossFn, check_loss, converted, measuring, without
from fqt.stats.spread import Estimate

__all__ = ["GradientVariance", "quantization_variance", "sampling_variance"]


@dataclass(frozen=True, kw_only=True)
class GradientVariance:
    """The variance of a parameter gradient, summed over entries.

    Attributes:
        total: of the whole gradient as one vector.
        parameters: of each parameter, by its qualified name; the values add up to ``total.value``.
        batches: number of batches used.
        draws: backward passes per batch.
    """

    total: Estimate
    parameters: dict[str, Estimate]
    batches: int
    draws: int


def quantization_variance(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], draws: int, seed: int = 0
) -> GradientVariance:
    """The variance of the gradient given the batch, averaged over batches: E_batch Var[g | batch].

    For each batch b, ``draws`` backward passes differ only in torch's random state; V_b is the unbiased variance
    (M − 1 in the denominator) summed over entries, and the estimate is the mean of V_b over the B batches.
    Unbiased for the batches' own distribution. All that a backward pass draws is in it: the quantizers of
    grad_output, those of right operands that are quantized again, the rows that are kept. The standard error is
    sd(V_b)/√B, which covers both the finite number of draws and the choice of batches; with few batches it is
    itself rough (B − 1 degrees of freedom).
    A deterministic gradient gives exactly 0. From the same seed `diagnose` makes the same draws and has the same
    estimate up to the rounding of float32 (measured: 1e-7 of it), since it keeps one copy of the gradient in the
    gradient's own precision; here are two in float64, which see noise of any size.

    The model must be in training mode where noise is drawn: quantized layers are deterministic in eval mode. In a
    model with converted layers dropout is off; in another one its noise is what is measured.
    Parameters, buffers (running statistics of batch norm), ``.grad`` and the random state are left as they were.

    Args:
        model: any module; its mode is used as it is. A compiled model is run eagerly, one in
            `DistributedDataParallel` as this process has it.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: at least 2 batches, of independent samples.
        draws: at least 2 backward passes per batch.
        seed: draws (b, m) use a seed derived from (seed, b, m).

    Returns:
        The variance, per parameter and in total, in units of the gradient squared.

    Raises:
        FqtError: fewer than 2 draws or batches, no trainable parameter, a model entirely in eval mode, or a loss
            that is not a finite scalar; converted layers in a model whose gradient is random without their
            noise and that of dropout; parameters sharded over processes.
    """
    check_module(model, "quantization_variance")
    if draws < 2:
        raise FqtError(f"a variance needs at least 2 draws per batch, got {draws}")
    if not any(module.training for module in model.modules()):
        raise FqtError("the model is in eval mode, where quantized layers draw no noise: call model.train() first")
    check_loss(loss_fn)
    _check_number(batches)
    per_batch = Moments()
    without_dropout = WithoutDropout() if converted(model) else nullcontext()
    with without_dropout, measuring(model, loss_fn) as backward:
        _refuse_other_noise(backward, batches[0], seed)
        for b, batch in enumerate(batches):
            gradient = _Gradient(backward)
            for m in range(draws):
                backward(batch, gradient.add, derive_seed(seed, b, m))
            per_batch.update([gradient.variance()])
    errors = (per_batch.variance()[0] / len(batches)).sqrt()
    return _result(backward, per_batch.mean[0], errors, batches=len(batches), draws=draws)


def sampling_variance(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], seed: int = 0) -> GradientVariance:
    """The variance of the gradient over mini-batches, Var_batch[g], one backward pass per batch.

    With g_b the gradient on batch b and ḡ their mean, the estimate is Σ_b ‖g_b − ḡ‖² / (B − 1): unbiased for the
    variance of a gradient on *one* batch of this size when batches are independent. On a model whose gradient
    carries quantization noise of its own the result is the total variance, so call it on the QAT model. The
    standard error is the jackknife over batches, biased slightly upward; with 2 batches it is undefined (NaN).

    Two passes over the batches are made (mean, then distances), so that nothing is kept per batch.

    Args:
        model: any module; its mode is used as it is. A compiled model is run eagerly, one in
            `DistributedDataParallel` as this process has it.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: at least 2 batches, of independent samples.
        seed: batch b uses a seed derived from (seed, b), for dropout and the like.

    Returns:
        The variance, per parameter and in total, in units of the gradient squared; ``draws`` is 1.

    Raises:
        FqtError: fewer than 2 batches, no trainable parameter, parameters sharded over processes, or a loss that is
            not a finite scalar.
    """
    check_module(model, "sampling_variance")
    _check_number(batches)
    count = len(batches)
    distances = []  # B rows of (P + 1,): ‖g_b − ḡ‖² per parameter and in total
    with measuring(model, loss_fn) as backward:
        gradient = _Gradient(backward)
        for b, batch in enumerate(batches):
            backward(batch, gradient.add, derive_seed(seed, b))
        for b, batch in enumerate(batches):
            backward(batch, gradient.compare, derive_seed(seed, b))
            distances.append(gradient.distance())
    values = gradient.variance()
    if count == 2:
        errors = torch.full_like(values, float("nan"))
    else:
        # leaving batch b out: V_(b) = ((B−1)·V − B/(B−1)·‖g_b − ḡ‖²) / (B−2)
        without = ((count - 1) * values - count / (count - 1) * torch.stack(distances)) / (count - 2)
        errors = ((count - 1) / count * (without - without.mean(0)).square().sum(0)).sqrt()
    return _result(backward, values, errors, batches=count, draws=1)


def _check_number(batches: Sequence[Any]) -> None:
    if len(batches) < 2:
        raise FqtError(f"a variance and its error need at least 2 batches, got {len(batches)}")


def _refuse_other_noise(backward: Backward, batch: Any, seed: int) -> None:
    """Raises if the gradient still varies once converted layers return it exactly: that is not quantization."""
    layers = converted(backward.model)
    if not layers:
        return  # whatever this model's noise is, the caller wants it measured
    first: dict[str, Tensor] = {}
    with without(layers), uncompressed(backward.model):
        backward(batch, first.__setitem__, derive_seed(seed, "other", 0))
        backward.refuse_other_noise(batch, first, derive_seed(seed, "other", 1))


class _Gradient:
    """Moments in float64 of a gradient that arrives parameter by parameter.

    Figures are of each of the P parameters, then of all: (P + 1,).
    """

    def __init__(self, backward: Backward) -> None:
        self._moments = {name: Moments() for name in backward.parameters}
        self._squares: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """One parameter's gradient of the present observation."""
        self._moments[name].update([gradient])

    def variance(self) -> Tensor:
        """Unbiased, summed over entries."""
        return _with_total(torch.cat([moments.variance_sums() for moments in self._moments.values()]))

    def compare(self, name: str, gradient: Tensor) -> None:
        """One parameter's gradient whose distance from the mean is wanted."""
        self._squares[name] = (gradient.double() - self._moments[name].mean[0]).square().sum().cpu()

    def distance(self) -> Tensor:
        """‖gradient − mean‖² of what was last compared."""
        return _with_total(torch.stack([self._squares[name] for name in self._moments]))


def _with_total(sums: Tensor) -> Tensor:
    """Per-parameter sums (P,) with their total appended."""
    return torch.cat([sums, sums.sum().reshape(1)])


def _result(backward: Backward, values: Tensor, errors: Tensor, *, batches: int, draws: int) -> GradientVariance:
    estimates = [Estimate(value=v, error=e) for v, e in zip(values.tolist(), errors.tolist(), strict=True)]
    return GradientVariance(
        total=estimates[-1],
        parameters=dict(zip(backward.parameters, estimates[:-1], strict=True)),
        batches=batches,
        draws=draws,
    )
