"""How many bits each layer's `grad_input` needs.

By Theorem 2 the quantization variance of the gradient is a sum over layers,

    V(b_1 … b_L) = V_own + Σ_l c_l(b_l),   c_l(b) = effect_l · v_l(b) / v_l(b'),

with effect_l what layer l's `grad_input` quantizer adds at the width b' that it was measured at (the table's row,
own weight left out), v_l(b) the exact variance of its operand at width b, and V_own the `grad_weight` quantizers'
part, which is left as it is. Two approximations: the gain effect_l / v_l, how much of a layer's noise arrives at
the parameters, is taken to be the same at every width (the noise's covariance changes little); and noise from above
is taken as it was when measured (at few bits noise begets noise: measure again at the plan to be exact).

**Allocation.** Minimise Σ c_l(b_l) under Σ w_l b_l ≤ budget, w_l the multiplications of layer l; or the other way
round, Σ w_l b_l under V ≤ limit. Both sums are separable, so an optimal allocation is optimal in its first l
layers for the width that those use: a better choice there would improve the whole. So it is enough to keep, layer
by layer, the allocations that no other beats in both sums, and to read either target off the last such frontier.
With every c_l convex and the budget divisible this is the textbook rule, bits where −Δc/(w_l Δb) is largest until
the budget is spent; but bits are whole, layers few and of very different size, and that rule then leaves budget
over (measured: 0.3 bits on three layers), which is why it was rejected. The frontier may have as many points as
there are sums; it is thinned to the cheapest point in each of 16,384 equal intervals of width, whose sums stay
exact. The optimum can be missed by what an interval spans, 1/2,700 of a bit per layer; it is never worse than a
uniform allocation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fqt.errors import FqtError
from fqt.files import write_bytes
from fqt.nn import Recipe, Rule, dump_recipe
from fqt.stats.decomposition import Decomposition
from fqt.stats.diagnose import Diagnosis

POINTS = 16_384

__all__ = ["Costs", "Plan", "allocate", "plan", "with_widths"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What widths cost, layer by layer.

    Attributes:
        variance: c_l(b), by layer and width; squared units of the parameter gradient.
        weight: w_l, multiplications of the layer's grad_input product per batch.
        fixed: V_own, the part that no width here changes.
    """

    variance: dict[str, dict[int, float]]
    weight: dict[str, int]
    fixed: float

    def choices(self, layer: str, ladder: Sequence[int]) -> tuple[int, ...]:
        """The widths of `ladder` that a layer's grid has; the one that it has, if it has no choice."""
        by_width = self.variance[layer]
        return tuple(bits for bits in ladder if bits in by_width) if len(by_width) > 1 else tuple(by_width)

    def uniform(self, bits: int) -> dict[str, int]:
        """The same width in all layers that have it; those without a choice keep theirs."""
        return {layer: self.choices(layer, (bits,))[0] for layer in self.variance}

    def total(self, widths: Mapping[str, int]) -> float:
        """V at these widths."""
        return self.fixed + sum(self.variance[layer][bits] for layer, bits in widths.items())

    def mean_width(self, widths: Mapping[str, int]) -> float:
        """The mean width, weighted by multiplications."""
        return sum(self.weight[layer] * bits for layer, bits in widths.items()) / sum(self.weight.values())

    def scaled(self, factor: float) -> Costs:
        """All variances times `factor`."""
        variance = {
            layer: {bits: factor * v for bits, v in by_width.items()} for layer, by_width in self.variance.items()
        }
        return replace(self, variance=variance, fixed=factor * self.fixed)

    @staticmethod
    def of(table: Decomposition, recipes: Mapping[str, Recipe]) -> Costs:
        """The costs that a table shows for the layers that have a grad_input product."""
        variance: dict[str, dict[int, float]] = {}
        fixed = sum(effect["grad_weight"].value for effect in table.effect.values())
        for layer in table.sources:
            by_width = table.operands[layer].get("grad_input")
            effect = table.effect[layer]["grad_input"].value
            if by_width is None:
                continue
            quantizer = recipes[layer].operand("grad_input")
            assert quantizer is not None
            measured = by_width[quantizer.bits]
            gain = effect / measured if measured > 0 else 0.0
            variance[layer] = {bits: gain * v for bits, v in by_width.items()}
        return Costs(variance=variance, weight={layer: table.weight[layer] for layer in variance}, fixed=fixed)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bits per layer.

    Attributes:
        recipe: for `fqt.quantize_` on the float model; `save` writes it for `fqt train --recipe`.
        widths: bits of `grad_input` by layer.
        mean_width: weighted by multiplications.
        variance: predicted quantization variance of the whole gradient.
        rho: the same over the sampling variance.
        uniform: predicted variance if every layer had the same whole number of bits, by that number.
        costs: what it was computed from.
    """

    recipe: Recipe
    widths: dict[str, int]
    mean_width: float
    variance: float
    rho: float
    uniform: dict[int, float]
    costs: Costs

    def __str__(self) -> str:
        rows = [("layer", "bits"), *((layer or "(model)", str(bits)) for layer, bits in self.widths.items())]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}} {bits:>4}" for name, bits in rows]
        return "\n".join([*lines, self._heading()])

    def save(self, path: str | Path) -> None:
        """Writes the recipe as TOML.

        Raises:
            FqtError: the file cannot be written.
        """
        write_bytes(Path(path), toml(self.recipe, self._heading()).encode())

    def _heading(self) -> str:
        return (
            f"mean grad_input width {self.mean_width:.2f} bits by multiplications; predicted quantization variance "
            f"{self.variance:.3g}, {self.rho:.3g} of the sampling variance"
        )


def plan(
    diagnosis: Diagnosis,
    *,
    rho: float | None = None,
    mean_width: float | None = None,
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8),
) -> Plan:
    """Bits per layer: the fewest with ρ at most `rho`, or the least variance at a mean width.

    Only widths of `grad_input` change; methods, and everything else of each layer's recipe, stay. Layers without a
    grad_input product (the first) keep their recipe; those whose grid has one width keep that, and it counts in the
    mean. The allocation rule is derived at the top of this module.

    Args:
        diagnosis: with a table.
        rho: quantization over sampling variance that may not be exceeded; 0.1 if neither target is given.
        mean_width: bits, weighted by each layer's multiplications.
        widths: the bits to choose from.

    Returns:
        The plan with its prediction, whose error is that of the table and the two approximations above.

    Raises:
        FqtError: no table, two targets, a target that no allocation reaches, or no grad_input of several widths.
    """
    if not isinstance(diagnosis, Diagnosis):
        raise FqtError(f"plan wants what fqt.diagnose returns, not {type(diagnosis).__name__}")
    if diagnosis.table is None:
        raise FqtError(
            "the diagnosis has no table, which a plan needs: diagnose(…, table=1), or fqt diagnose --table 1"
        )
    if rho is not None and mean_width is not None:
        raise FqtError("give rho or mean_width, not both")
    if mean_width is not None and mean_width > max(widths):
        raise FqtError(f"a mean width of {mean_width} bits is more than the {max(widths)} of the widest choice")
    costs = Costs.of(diagnosis.table, diagnosis.recipes)
    if rho is not None and not 0 < rho < math.inf:
        raise FqtError(f"rho must be a positive number, not {rho!r}")
    sampling = diagnosis.total.sampling.value
    if mean_width is None and not sampling > 0:
        raise FqtError("the batches are all alike: rho has no sampling variance to refer to; give mean_width")
    limit = None if mean_width is not None else (0.1 if rho is None else rho) * sampling
    chosen = allocate(costs, limit=limit, mean_width=mean_width, widths=widths)
    variance = costs.total(chosen)
    return Plan(
        recipe=with_widths(diagnosis.recipes, chosen),
        widths=chosen,
        mean_width=costs.mean_width(chosen),
        variance=variance,
        rho=variance / sampling if sampling > 0 else math.nan,
        uniform={bits: costs.total(costs.uniform(bits)) for bits in widths},
        costs=costs,
    )


def allocate(
    costs: Costs,
    *,
    limit: float | None = None,
    mean_width: float | None = None,
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8),
) -> dict[str, int]:
    """The widths by layer: fewest bits with variance at most `limit`, or least variance at `mean_width`.

    Raises:
        FqtError: nothing to plan for, unknown widths, or a target out of reach.
    """
    if not costs.variance:
        raise FqtError("no layer quantizes grad_input, so there are no widths to plan")
    if all(len(by_width) == 1 for by_width in costs.variance.values()):
        raise FqtError(
            "every grad_input has a grid of one width, so there is nothing to plan: diagnose a recipe of integers, "
            "such as 'shq4'"
        )
    if not widths or set(widths) - set(range(2, 9)):
        raise FqtError(f"widths are bits from 2 to 8, not {widths!r}")
    ladder = tuple(sorted(set(widths)))
    uniform = [costs.uniform(bits) for bits in ladder]
    width, variance, history = _frontier(costs, ladder)
    if mean_width is not None:
        where = np.flatnonzero(width <= mean_width * sum(costs.weight.values()) * (1 + 1e-12))[-1:]
        fits = lambda a: costs.mean_width(a) <= mean_width * (1 + 1e-12)
        order = lambda a: (costs.total(a), costs.mean_width(a))
    else:
        assert limit is not None
        where = np.flatnonzero(variance + costs.fixed <= limit)[:1]
        fits = lambda a: costs.total(a) <= limit * (1 + 1e-12)
        order = lambda a: (costs.mean_width(a), costs.total(a))
    found = [_allocation(point, costs, ladder, history) for point in where]
    fitting = [a for a in found + uniform if fits(a)]
    if fitting:
        return min(fitting, key=order)
    if mean_width is not None:
        raise FqtError(f"a mean width of {mean_width:g} bits is below the {ladder[0]} that every layer needs")
    raise FqtError(
        f"no widths up to {ladder[-1]} bits bring the quantization variance below "
        f"{variance[-1] + costs.fixed:.3g}, of which {costs.fixed:.3g} comes from the grad_weight quantizers; "
        f"{limit:.3g} is asked for"
    )


History = list[tuple[np.ndarray, np.ndarray]]


def _frontier(costs: Costs, ladder: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, History]:
    """Widths Σ w_l b_l and variances Σ c_l of what no other allocation beats in both, up to thinning; narrow first.

    With them each layer's (parent, choice): which point of the frontier before, and which of its choices.
    """
    width, variance = np.zeros(1), np.zeros(1)
    history: History = []
    span = sum(costs.weight.values()) * (ladder[-1] - ladder[0]) / POINTS
    for layer, by_width in costs.variance.items():
        choices = costs.choices(layer, ladder)
        bits = np.array(choices, dtype=float)
        all_width = (width[:, None] + costs.weight[layer] * bits).ravel()
        all_variance = (variance[:, None] + np.array([by_width[b] for b in choices])).ravel()
        kept = _undominated(all_width, all_variance, span)
        width, variance = all_width[kept], all_variance[kept]
        history.append((kept // len(choices), kept % len(choices)))
    return width, variance, history


def _allocation(point: int, costs: Costs, ladder: tuple[int, ...], history: History) -> dict[str, int]:
    """The widths by layer of a point of the last frontier."""
    chosen = {}
    for layer, (parent, choice) in zip(reversed(costs.variance), reversed(history), strict=True):
        chosen[layer] = costs.choices(layer, ladder)[choice[point]]
        point = parent[point]
    return {layer: chosen[layer] for layer in costs.variance}


def _undominated(width: np.ndarray, variance: np.ndarray, span: float) -> np.ndarray:
    """Indices of points that no other beats, the best of each interval `span` of width; by rising width."""
    order = np.lexsort((variance, width))
    best = np.minimum.accumulate(variance[order])
    order = order[np.concatenate([[True], variance[order][1:] < best[:-1]])]
    if span > 0:  # along the frontier variance falls, so that the last of an interval is its best
        interval = np.floor(width[order] / span)
        order = order[np.concatenate([interval[1:] != interval[:-1], [True]])]
    return order


def with_widths(recipes: Mapping[str, Recipe], widths: Mapping[str, int]) -> Recipe:
    """One recipe for a model whose layers have `recipes`, with these widths of `grad_input`; the rest float."""
    changed = {}
    for layer, recipe in recipes.items():
        quantizer = recipe.operand("grad_input")
        if layer in widths and quantizer is not None:
            recipe = recipe.with_operand("grad_input", quantizer.with_bits(widths[layer]))
        changed[layer] = replace(recipe, rules=())
    if set(changed) == {""}:
        return changed[""]  # the model is one layer
    float_ = Recipe(input=None, weight=None)
    return replace(float_, rules=tuple(Rule(layer, recipe) for layer, recipe in changed.items()))


def toml(recipe: Recipe, heading: str = "") -> str:
    """The recipe as TOML, with a comment above it."""
    table: dict[str, Any] = dump_recipe(recipe)
    return (f"# {heading}\n" if heading else "") + tomli_w.dumps(table)
