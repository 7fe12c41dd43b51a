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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.seeds import derive_seed
from fqt.stats.moments import Moments
from fqt.stats.passes import OTHER_NOISE, LossFn, converted, trainable, undisturbed, without
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
    Unbiased for the batches' own distribution. The standard error is sd(V_b)/√B, which covers both the finite
    number of draws and the choice of batches; with few batches it is itself rough (B − 1 degrees of freedom).
    A deterministic gradient gives exactly 0.

    The model must be in training mode where noise is drawn: quantized layers are deterministic in eval mode.
    Parameters, buffers (running statistics of batch norm), ``.grad`` and the random state are left as they were.

    Args:
        model: any module; its mode is used as it is.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: at least 2 batches, of independent samples.
        draws: at least 2 backward passes per batch.
        seed: draws (b, m) use a seed derived from (seed, b, m).

    Returns:
        The variance, per parameter and in total, in units of the gradient squared.

    Raises:
        FqtError: fewer than 2 draws or batches, no trainable parameter, a model entirely in eval mode, or a loss
            that is not a finite scalar; converted layers in a model whose gradient is random without their
            noise too, such as one with active dropout.
    """
    if draws < 2:
        raise FqtError(f"a variance needs at least 2 draws per batch, got {draws}")
    if not any(module.training for module in model.modules()):
        raise FqtError("the model is in eval mode, where quantized layers draw no noise: call model.train() first")
    parameters = _parameters(model, batches)
    per_batch = Moments()
    with undisturbed(model):
        _refuse_other_noise(model, loss_fn, batches[0], parameters, seed)
        for b, batch in enumerate(batches):
            moments = Moments()
            for m in range(draws):
                moments.update(_gradient(model, loss_fn, batch, parameters, derive_seed(seed, b, m)))
            per_batch.update(_with_total(moments.variance_sums()))
    spread = per_batch.variance()[0]
    errors = (spread / len(batches)).sqrt()
    return _result(parameters, per_batch.mean[0], errors, batches=len(batches), draws=draws)


def sampling_variance(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], seed: int = 0) -> GradientVariance:
    """The variance of the gradient over mini-batches, Var_batch[g], one backward pass per batch.

    With g_b the gradient on batch b and ḡ their mean, the estimate is Σ_b ‖g_b − ḡ‖² / (B − 1): unbiased for the
    variance of a gradient on *one* batch of this size when batches are independent. On a model whose gradient
    carries quantization noise of its own the result is the total variance, so call it on the QAT model. The
    standard error is the jackknife over batches, biased slightly upward; with 2 batches it is undefined (NaN).

    Two passes over the batches are made (mean, then distances), so that nothing is kept per batch.

    Args:
        model: any module; its mode is used as it is.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: at least 2 batches, of independent samples.
        seed: batch b uses a seed derived from (seed, b), for dropout and the like.

    Returns:
        The variance, per parameter and in total, in units of the gradient squared; ``draws`` is 1.

    Raises:
        FqtError: fewer than 2 batches, no trainable parameter, or a loss that is not a finite scalar.
    """
    parameters = _parameters(model, batches)
    count = len(batches)
    moments = Moments()
    distances = []  # B rows of (P + 1,): ‖g_b − ḡ‖² per parameter and in total
    with undisturbed(model):
        for b, batch in enumerate(batches):
            moments.update(_gradient(model, loss_fn, batch, parameters, derive_seed(seed, b)))
        for b, batch in enumerate(batches):
            gradient = _gradient(model, loss_fn, batch, parameters, derive_seed(seed, b))
            squares = [(g.double() - m).square().sum().cpu() for g, m in zip(gradient, moments.mean, strict=True)]
            distances.append(_with_total(torch.stack(squares))[0])
    values = _with_total(moments.variance_sums())[0]
    if count == 2:
        errors = torch.full_like(values, float("nan"))
    else:
        # leaving batch b out: V_(b) = ((B−1)·V − B/(B−1)·‖g_b − ḡ‖²) / (B−2)
        without = ((count - 1) * values - count / (count - 1) * torch.stack(distances)) / (count - 2)
        errors = ((count - 1) / count * (without - without.mean(0)).square().sum(0)).sqrt()
    return _result(parameters, values, errors, batches=count, draws=1)


def _parameters(model: nn.Module, batches: Sequence[Any]) -> dict[str, nn.Parameter]:
    if len(batches) < 2:
        raise FqtError(f"a variance and its error need at least 2 batches, got {len(batches)}")
    return trainable(model)


def _gradient(
    model: nn.Module, loss_fn: LossFn, batch: Any, parameters: dict[str, nn.Parameter], seed: int
) -> list[Tensor]:
    """The gradient of every parameter (zeros where the loss does not reach it), leaving ``.grad`` alone."""
    torch.manual_seed(seed)
    with torch.enable_grad():
        loss = loss_fn(model, batch)
        if loss.numel() != 1:
            raise FqtError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
        if not torch.isfinite(loss):
            raise FqtError(f"the loss is {loss.item()}: the gradient's variance is undefined at this point")
        gradients = torch.autograd.grad(loss.reshape(()), list(parameters.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters.values(), strict=True)]


def _refuse_other_noise(
    model: nn.Module, loss_fn: LossFn, batch: Any, parameters: dict[str, nn.Parameter], seed: int
) -> None:
    """Raises if the gradient still varies once converted layers return it exactly: that is not quantization.

    Converted layers and dropout draw from one generator, so that their noise could not be told apart.
    """
    layers = converted(model)
    if not layers:
        return  # whatever this model's noise is, the caller wants it measured
    with without(layers):
        first, second = (
            _gradient(model, loss_fn, batch, parameters, derive_seed(seed, "other", i)) for i in (0, 1)
        )
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(first, second, strict=True))
    if apart > 1e-6 * sum(float(a.double().square().sum()) for a in first):
        raise FqtError(OTHER_NOISE)


def _with_total(sums: Tensor) -> list[Tensor]:
    """Per-parameter sums (P,) with their total appended, as one observation of shape (P + 1,)."""
    return [torch.cat([sums, sums.sum().reshape(1)])]


def _result(
    parameters: dict[str, nn.Parameter], values: Tensor, errors: Tensor, *, batches: int, draws: int
) -> GradientVariance:
    estimates = [Estimate(value=v, error=e) for v, e in zip(values.tolist(), errors.tolist(), strict=True)]
    return GradientVariance(
        total=estimates[-1],
        parameters=dict(zip(parameters, estimates[:-1], strict=True)),
        batches=batches,
        draws=draws,
    )
