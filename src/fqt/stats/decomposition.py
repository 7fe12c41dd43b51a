"""Theorem 2: which layer's quantizer adds how much to the variance of which parameter's gradient.

Given the batch, the noise of a gradient is a sum of martingale differences, one per layer l in the order of the
backward pass (Chen et al. 2020, Theorem 2):

    Var[ĝ_k | batch] = Σ_l E‖ĝ_k(quantizers 1 … l) − ĝ_k(quantizers 1 … l − 1)‖²,

where quantizers are counted from the loss down, ĝ_k(1 … l) has the first l layers' quantizers on and the rest
exact, and both gradients of a difference use the same random numbers. A layer's own term is therefore conditioned
on the noisy gradient that reaches it. Turning on one layer at a time is not the theorem: it misses that noise
begets noise (4 times too little at 2 bits on five linear layers).

Each layer quantizes grad_output twice (bifurcation). Its `grad_weight` quantizer reaches only its own weight and
its `grad_input` quantizer only what lies below: the diagonal of the table is the former, the rest the latter.
Where a layer makes several products in a row, such as an attention, or shares its weight with another, the two
quantizers are turned on one after the other to tell their effects apart.

One chain of L + 2 passes, exact → all on → … → first on → exact, gives the total and all differences while one
gradient is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats as distributions
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.seeds import derive_seed
from fqt.stats.moments import Moments
from fqt.stats.operands import Operands
from fqt.stats.passes import ROLES, Backward, LossFn, Observer, check_model, energy, measuring, owner, without
from fqt.stats.spread import Estimate, estimates

__all__ = ["Decomposition", "decompose"]

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The layer × layer table, in squared units of the parameter gradient.

    Attributes:
        sources: layers whose quantizers add noise, in the order of the backward pass.
        targets: layers that own parameters (batch norms among them), in the model's order.
        parts: `parts[source][target]`, unbiased; the standard error is over batches (over draws with one batch).
        effect: of each source on all parameters together, by role ("grad_input", "grad_weight").
        total: variance of each target, measured directly as ‖ĝ − g‖²; `total[None]` of the whole gradient.
        gap: total less the sum of parts; of mean zero if the quantizers are unbiased. Errors are over all draws.
        interval: half-width of the gaps' intervals, simultaneous at 95 % over all targets and the whole
            (Bonferroni, Student's t).
        operands: exact variance of each source's operands by role and width in these passes, mean over all.
        weight: multiplications of each source's grad_input product, per batch; sources without one left out.
        batches, draws: what it was measured on, draws per batch.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    parts: dict[str, dict[str, Estimate]]
    effect: dict[str, dict[str, Estimate]]
    total: dict[str | None, Estimate]
    gap: dict[str | None, Estimate]
    interval: dict[str | None, float]
    operands: dict[str, dict[str, dict[int, float]]]
    weight: dict[str, int]
    batches: int
    draws: int

    @property
    def agrees(self) -> bool:
        """Whether every sum of parts agrees with its total within the simultaneous intervals.

        Where a target has one source the gap is zero up to the rounding of float arithmetic (1e-5 of the total).
        """
        return all(
            abs(gap.value) <= self.interval[target] + 1e-5 * self.total[target].value
            for target, gap in self.gap.items()
        )


def decompose(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], draws: int, seed: int = 0
) -> Decomposition:
    """The table of a model in training mode, from `draws` chains of L + 2 passes on each batch.

    From one draw in all, errors and intervals are NaN. Parameters, buffers, `.grad` and the random state are left
    as they were. The caller has checked the batches.

    Raises:
        FqtError: what `diagnose` refuses of a model and its loss; a layer is used again after others (its two uses
            stand at two places of the order, which one row cannot express); batches do not use the same layers.
    """
    per_batch, pooled, gaps = Moments(), Moments(), Moments()
    with measuring(model, loss_fn) as backward:
        chain = _Chain(backward)
        for b, batch in enumerate(batches):
            of_batch = Moments()
            for m in range(draws):
                rows, total = chain.draw(batch, derive_seed(seed, "table", b, m))
                observation = [chain.table(rows), chain.effects(rows), total]
                of_batch.update(observation)
                pooled.update(observation)
                gaps.update([total - rows.sum(0)])
            per_batch.update(of_batch.mean)
    return chain.result(per_batch if len(batches) > 1 else pooled, gaps, len(batches), draws)


class _Chain:
    """The passes of one draw, and how their differences make up the table."""

    def __init__(self, backward: Backward) -> None:
        self.backward = backward
        self.layers = check_model(backward.model)
        self.targets = list(dict.fromkeys(map(owner, backward.parameters)))
        self.operands = Operands(backward.model, full=False)
        self.sources: list[str] = []
        self.steps: list[tuple[str, tuple[str, ...]]] = []  # what is turned on, one after the other
        self.variances = Moments()

    def draw(self, batch: Any, seed: int) -> tuple[Tensor, Tensor]:
        """(steps, K + 1) differences and (K + 1,) total of one set of random numbers; the last is the whole."""
        kept: dict[str, Tensor] = {}

        def distance(observer: Observer | None = None) -> Tensor:
            """Runs a pass under the recipes as they are; its distance from the one before, which it replaces."""
            row = torch.zeros(len(self.targets) + 1, dtype=torch.float64)

            def compare(name: str, gradient: Tensor) -> None:
                if name in kept:
                    row[[self.targets.index(owner(name)), -1]] += energy(gradient - kept[name])
                kept[name] = gradient

            self.backward(batch, compare, seed, observer)
            return row

        with without(self.layers):
            distance()
        total = distance(self.operands)
        self.operands.end()
        self._take_order()
        rows = []
        for count in reversed(range(len(self.steps))):
            off: dict[str, tuple[str, ...]] = {}
            for name, roles in self.steps[count:]:
                off[name] = off.get(name, ()) + roles
            with without(self.layers, off):
                rows.append(distance())
        return torch.stack(rows[::-1]), total

    def _take_order(self) -> None:
        order = self.operands.order
        again = sorted({name for name in order if order.count(name) > 1})
        if again:
            raise FqtError(
                f"layer {again[0]!r} is used again after others, so that its noise has no single place in the "
                "table: leave the table out (table=0)"
            )
        if self.sources and order != self.sources:
            raise FqtError(
                "the batches do not use the same layers in the same order: leave the table out (table=0)"
            )
        if not self.sources:
            self.sources = list(order)
            for name in order:
                both = [(name, ROLES)] if self._is_plain(name) else [(name, (role,)) for role in ROLES]
                self.steps += both
        found = self.operands.variances()
        self.variances.update(
            [torch.tensor([v for of in found.values() for v in of.values()], dtype=torch.float64)]
        )

    def _is_plain(self, name: str) -> bool:
        """Whether a layer's noise in its own parameters is all its grad_weight quantizer's."""
        weight = getattr(self.layers[name], "weight", None)
        own = self.backward.parameters.get(f"{name}.weight" if name else "weight")
        frozen = isinstance(weight, Tensor) and not weight.requires_grad
        return self.operands.uses[name] == 1 and (own is weight or frozen)

    def table(self, rows: Tensor) -> Tensor:
        """(L, K + 1): the steps of one source added up."""
        where = torch.tensor([self.sources.index(name) for name, _ in self.steps])
        return torch.zeros(len(self.sources), rows.shape[1], dtype=torch.float64).index_add_(0, where, rows)

    def effects(self, rows: Tensor) -> Tensor:
        """(L, 2): each source's effect on all parameters, by role."""
        effects = torch.zeros(len(self.sources), len(ROLES), dtype=torch.float64)
        for (name, roles), row in zip(self.steps, rows, strict=True):
            effect = effects[self.sources.index(name)]
            if len(roles) == 1:
                effect[ROLES.index(roles[0])] += row[-1]
            else:
                own = row[self.targets.index(name)] if name in self.targets else row.new_zeros(())
                effect += torch.stack([row[-1] - own, own])
        return effects

    def result(self, moments: Moments, gaps: Moments, batches: int, draws: int) -> Decomposition:
        """The means, with errors over the moments' observations."""
        names: list[str | None] = [*self.targets, None]
        table, effects = estimates(moments, 0), estimates(moments, 1)
        parts, effect = {}, {}
        for i, source in enumerate(self.sources):
            row = table[i * len(names) : (i + 1) * len(names)]
            parts[source] = dict(zip(self.targets, row[:-1], strict=True))
            effect[source] = dict(zip(ROLES, effects[2 * i : 2 * i + 2], strict=True))
        gap = dict(zip(names, estimates(gaps), strict=True))
        reach = float("nan")
        if gaps.count > 1:
            reach = float(distributions.t.ppf(1 - (1 - CONFIDENCE) / 2 / len(names), gaps.count - 1))
        operands: dict[str, dict[str, dict[int, float]]] = {}
        means = iter(self.variances.mean[0].tolist())
        for (layer, role), by_width in self.operands.variances().items():
            operands.setdefault(layer, {})[role] = {bits: next(means) for bits in by_width}
        return Decomposition(
            sources=tuple(self.sources),
            targets=tuple(self.targets),
            parts=parts,
            effect=effect,
            total=dict(zip(names, estimates(moments, 2), strict=True)),
            gap=gap,
            interval={name: reach * e.error for name, e in gap.items()},
            operands=operands,
            weight=self.operands.multiplications("grad_input"),
            batches=batches,
            draws=draws,
        )
