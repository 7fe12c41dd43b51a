"""What each layer's bits cost: sampling variance, quantization variance, and where the latter comes from.

Three measurements on the same batches, each holding one copy of the gradient at most:

1. the exact (QAT) gradient on every batch: the sampling variance Var_batch[g], and ‖g‖²;
2. repeated FQT gradients on every batch: the quantization variance E_batch Var[ĝ | batch]; the first of them is
   observed, which gives the exact variance of every gradient operand at every width without sampling;
3. unless left out, the layer × layer table of Theorem 2 (`fqt.stats.decomposition`).

ρ is the second over the first. Below some hundredths quantization is hard to notice in training; at 1 it is as
noisy as the choice of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fqt.errors import FqtError
from fqt.nn import Recipe
from fqt.nn.arithmetic import again
from fqt.nn.between import is_compressed, uncompressed
from fqt.nn.dropout import WithoutDropout
from fqt.nn.layers import linear_map
from fqt.nn.wrappers import check_module
from fqt.seeds import derive_seed
from fqt.stats.decomposition import Decomposition, decompose
from fqt.stats.moments import Moments
from fqt.stats.operands import Operand, Operands
from fqt.stats.passes import (
    ROLES,
    Backward,
    LossFn,
    check_batches,
    check_loss,
    check_model,
    converted,
    measuring,
    owner,
    without,
)
from fqt.stats.spread import Estimate, Spread, estimates, ratio

__all__ = ["Diagnosis", "Noise", "diagnose"]


_NONE = Estimate(value=0.0, error=0.0)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The gradient of one layer's parameters, or of all.

    Attributes:
        sampling: Var_batch of the exact gradient on one batch of this size, summed over entries; the standard error
            is that of squared Helmert contrasts (NaN with 2 batches).
        quantization: E_batch Var[ĝ | batch], summed over entries; the standard error is that over batches.
        energy: mean of ‖exact gradient of a batch‖².
        rho: quantization over sampling, its error to first order.
        kept: the part of the quantization variance that what `fqt.compress_` keeps as codes makes alone, all
            gradients exact; 0 where nothing is.
    """

    sampling: Estimate
    quantization: Estimate
    energy: Estimate
    rho: Estimate
    kept: Estimate = _NONE

    @property
    def drowned(self) -> bool:
        """Whether ‖g‖ < √3 · (standard deviation of the quantization noise).

        There quantized training becomes ineffective by the rule of arXiv 2505.19115.
        """
        return self.energy.value < 3 * self.quantization.value


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        total: the whole gradient as one vector.
        layers: by the qualified name of the module that owns the parameters, batch norms and the like included.
        operands: every quantized gradient operand, in the order of the backward pass.
        table: Theorem 2's layer × layer table; None if it was left out.
        recipes: each converted layer's recipe.
        again: the products whose right operand is quantized again ("0 grad_input"). That noise is in `total`,
            `layers` and `table`, which are measured on gradients; `operands` are exact variances of grad_output
            alone, which do not have it: multiplied by what grad_output is, it is no figure of one operand.
        batches, draws: what sampling and quantization variance were measured on, draws per batch.
    """

    total: Noise
    layers: dict[str, Noise]
    operands: tuple[Operand, ...]
    table: Decomposition | None
    recipes: dict[str, Recipe]
    batches: int
    draws: int
    again: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = {**{name or "(model)": noise for name, noise in self.layers.items()}, "(whole gradient)": self.total}
        width = max(map(len, rows))
        lines = [f"{'layer':{width}} {'sampling':>10} {'quantization':>12} {'ρ':>10}"]
        for name, noise in rows.items():
            figures = f"{noise.sampling.value:10.3g} {noise.quantization.value:12.3g} {noise.rho.value:10.3g}"
            kept = f"  of it kept codes {noise.kept.value:.3g}" if noise.kept.value else ""
            lines.append(f"{name:{width}} {figures}{kept}" + ("  ‖g‖ < √3·noise" if noise.drowned else ""))
        if self.again:
            lines.append(f"right operands quantized again, which no operand figure has: {', '.join(self.again)}")
        return "\n".join(lines)

    @property
    def drowned(self) -> tuple[str, ...]:
        """The layers that fail the √3 rule."""
        return tuple(name for name, noise in self.layers.items() if noise.drowned)


def diagnose(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    draws: int = 2,
    table: int = 1,
    seed: int = 0,
    equal: bool = True,
) -> Diagnosis:
    """Measures where the noise of a converted model's gradient comes from, at its present weights.

    Each batch costs 1 exact and `draws` quantized backward passes, and (L + 2)·`table` more for the table of L
    layers, and `draws` more where `fqt.compress_` keeps codes: their noise is in the quantization variance, and by
    itself in `Noise.kept`; the exact gradient and the table are without it. `quantization_variance` has the same
    estimate of the total from the same draws, in float64; here it is good to the rounding of float32.

    Dropout is off in all passes: what is measured is the network without it. Parameters, buffers, `.grad` and the
    random state are left as they were.

    Defined cases: a frozen parameter has no gradient and no column, its layer's `grad_input` still counts; a layer
    used several times reports sums over its uses, but has no place in the table if other layers come between;
    a batch of one sample is measured like any other (its per-sample quantizers have one row).

    Args:
        model: in training mode, with layers that quantize their gradient ("shq8", not "qat"). A compiled model is
            run eagerly, one in `DistributedDataParallel` as this process has it.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: at least 2 independent batches of one size, gone through repeatedly (an iterator's are kept).
        draws: at least 2 quantized gradients per batch.
        table: draws per batch for Theorem 2's table; 0 leaves it out (`plan` needs it).
        seed: of all noise.
        equal: refuse batches whose first axes differ in length, where one is usually an epoch's smaller last. False
            for batches that are alike otherwise, such as sentences of about equally many tokens in all: the
            sampling variance is then that of one such batch, what its gradient owes to its size included.

    Returns:
        The diagnosis; every estimator in it is unbiased.

    Raises:
        FqtError: no converted layer, none that quantizes its gradient, one in eval mode, one that keeps a part of
            grad_output's rows, no trainable parameter,
            parameters sharded over processes, too few batches or draws, batches of unequal size, a loss that is not
            a finite scalar, a gradient that is random by other noise than that of quantizers and dropout.
    """
    if draws < 2:
        raise FqtError(f"a variance needs at least 2 draws per batch, got {draws}")
    if table < 0:
        raise FqtError(f"table is a number of draws, got {table}")
    check_module(model, "diagnose")
    check_loss(loss_fn)
    batches = batches if isinstance(batches, Sequence) else list(batches)
    check_batches(batches, 2, equal)
    layers = check_model(model)
    with WithoutDropout(), measuring(model, loss_fn) as backward:
        with uncompressed(model):
            variance, energies = _sampling(backward, batches, layers, seed)
        operands = Operands(model)
        quantization = _quantization(backward, batches, draws, seed, operands)
        if not operands.order:
            raise FqtError("no converted layer that quantizes its gradient takes part in the loss")
        kept = {}
        if any(map(is_compressed, model.modules())):
            with without(layers):
                kept = _quantization(backward, batches, draws, derive_seed(seed, "kept"))
        with uncompressed(model):
            decomposition = decompose(model, loss_fn, batches, table, seed) if table else None
    noise = {
        name: Noise(
            sampling=variance[name],
            quantization=quantization[name],
            energy=energies[name],
            rho=ratio(quantization[name], variance[name]),
            **({"kept": kept[name]} if kept else {}),
        )
        for name in variance
    }
    return Diagnosis(
        total=noise[Spread.TOTAL],
        layers={name: value for name, value in noise.items() if name is not None},
        operands=operands.result(),
        table=decomposition,
        recipes={name: module.fqt_recipe for name, module in converted(model).items()},  # type: ignore[misc]
        batches=len(batches),
        draws=draws,
        again=tuple(_again(converted(model))),
    )


def _again(layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """The backward products whose right operand is quantized again by a rounding that draws."""
    for name, layer in layers.items():
        for role in ROLES:
            recipe: Recipe = layer.fqt_recipe  # type: ignore[assignment]
            right = again(role, linear_map(layer), recipe)
            if right is not None and right.draws:
                yield f"{name} {role}".strip()


def _sampling(
    backward: Backward, batches: Sequence[Any], layers: dict[str, nn.Module], seed: int
) -> tuple[dict[str | None, Estimate], dict[str | None, Estimate]]:
    """The exact gradient's variance over batches and its energy; on the way, that only quantizers draw noise."""
    spread = Spread(_groups(backward))
    with without(layers):
        for b, batch in enumerate(batches):
            backward(batch, spread.add, derive_seed(seed, b))
            spread.end()
            if b == 0:  # the mean of one observation is itself
                backward.refuse_other_noise(batch, spread.mean, derive_seed(seed, "other"))
    return spread.variance(), spread.energy()


def _quantization(
    backward: Backward, batches: Sequence[Any], draws: int, seed: int, operands: Operands | None = None
) -> dict[str | None, Estimate]:
    """E_batch Var[ĝ | batch] by layer and in total; the first draw on each batch may be observed."""
    per_batch = Moments()
    names: list[str | None] = []
    for b, batch in enumerate(batches):
        spread = Spread(_groups(backward))
        for m in range(draws):
            backward(batch, spread.add, derive_seed(seed, b, m), operands if m == 0 else None)
            spread.end()
        if operands is not None:
            operands.end()
        names = spread.names
        per_batch.update([torch.tensor([e.value for e in spread.variance().values()], dtype=torch.float64)])
    return dict(zip(names, estimates(per_batch), strict=True))


def _groups(backward: Backward) -> dict[str, str]:
    """The layer of each parameter."""
    return {name: owner(name) for name in backward.parameters}
