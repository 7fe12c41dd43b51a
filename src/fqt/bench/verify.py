"""Is the result right? Asked of every contestant before it is timed.

Two questions. Is one pass near fp32's: a relative error per row of a layer's output and gradients, or per weight
gradient of a step, within the case's bound, which is a matter of 8 bits, not of a defect; quantizers that err more
have a bound as much wider. And for ours, is the noise without bias: the mean over seeds must lie as near to the
gradient without noise as the spread between the seeds says,

    bias = ‖mean − exact‖ / sqrt(V/S + (ε·‖exact‖)²),   V the variance over S seeds, ε the rounding of the dtype,

of a step four times that, for the layers on a gradient's way.

Without bias this is about 1: its square is F-distributed, with as many degrees of freedom as there are independent
entries. A relative error alone would let a rounding to nearest pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_BIAS = 1.5
"""In standard errors of the mean; without bias 0.7 to 1.1 on every case, the lower the more the dtype rounds."""
OUTPUT_BOUND = 0.05
"""Of the output or the loss in 8 bits, whatever the bound on gradients."""
MOST_OUTPUT_BOUND = 1.5
"""In fewer bits: a negated output is 2 off; right ones with inputs of 2 bits were 1.05."""
FEWEST_ENTRIES = 1024
"""Smaller gradients are too few numbers for a statistic."""


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        error: the largest relative error against fp32 of any row (or tensor).
        bias: of the worst gradient, in standard errors; None where there is no noise to average.
        problem: why the contestant is not timed; empty if it is right.
        errors: of each tensor.
    """

    error: float
    bias: float | None = None
    problem: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)


def relative_error(got: Tensor, want: Tensor, *, by_row: bool) -> float:
    """The largest ‖got − want‖/‖want‖ over rows (first axis), or of the whole; not below the rows' mean size.

    A row's error is taken against the larger of its own norm and the root mean square norm of all rows.
    Infinite where shapes differ or anything is not finite.
    """
    if got.shape != want.shape:
        return math.inf
    rows = want.shape[0] if by_row and want.ndim > 1 else 1
    got, want = got.float().reshape(rows, -1), want.float().reshape(rows, -1)
    difference = torch.linalg.vector_norm(got - want, dim=1, dtype=torch.float64)
    size = torch.linalg.vector_norm(want, dim=1, dtype=torch.float64)
    typical = size.square().mean().sqrt()
    if not torch.isfinite(difference).all():
        return math.inf
    if typical == 0:
        return 0.0 if not difference.any() else math.inf
    return float((difference / size.clamp(min=typical)).max())


def check_error(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    bound: float,
    *,
    by_row: bool,
    slack: Mapping[str, float] | None = None,
) -> Verification:
    """One pass against fp32's.

    Args:
        got, want: outcomes of `fqt.bench.contestants.Runner`.
        bound: on the gradients' errors.
        by_row: whether every row must be right (a layer), or every matrix as a whole (a step). Gradients of
            vectors are left out then: sums over the batch in which almost everything cancels.
        slack: `Contestant.slack`.
    """
    if got.keys() != want.keys():
        return Verification(math.inf, problem=f"it returned {', '.join(got)} instead of {', '.join(want)}")
    names = [n for n in want if by_row or n == "output" or want[n].ndim > 1]
    errors = {name: relative_error(got[name], want[name], by_row=by_row) for name in names}
    of = {"output": 1.0, "grad_input": 1.0, "grad_weight": 1.0, **(slack or {})}
    bounds = {name: _bound(name, want[name], bound, by_row, of) for name in names}
    worst = max(names, key=lambda name: (not math.isfinite(errors[name]), errors[name] / bounds[name]))
    problem = ""
    if not math.isfinite(errors[worst]) or not errors[worst] <= bounds[worst]:
        problem = f"{worst} is {errors[worst]:.3g} off fp32, more than {bounds[worst]:g}"
    return Verification(max(errors.values()), problem=problem, errors=errors)


def _bound(name: str, want: Tensor, bound: float, layer: bool, slack: Mapping[str, float]) -> float:
    """On one tensor's error: by its own product, of a step's gradients by the worst of all."""
    if name == "output":
        return min(OUTPUT_BOUND * slack["output"], MOST_OUTPUT_BOUND)
    if not layer:
        return bound * max(slack.values())
    if name == "grad_input":
        return bound * slack["grad_input"]
    return bound * slack["grad_weight"] if want.ndim > 1 else bound  # a bias's is a sum, never quantized


def bias(
    outcomes: Iterable[Mapping[str, Tensor]], exact: Mapping[str, Tensor], rounding: float
) -> dict[str, float]:
    """How far each gradient's mean lies from the exact one, in standard errors; see the module.

    Args:
        outcomes: of at least two seeds.
        exact: without noise.
        rounding: ε, relative.
    """
    names = [n for n in exact if n != "output" and exact[n].numel() >= FEWEST_ENTRIES]
    total = {name: torch.zeros_like(exact[name], dtype=torch.float32) for name in names}
    squares = dict.fromkeys(names, 0.0)
    seeds = 0
    for outcome in outcomes:
        seeds += 1
        for name in names:
            difference = outcome[name].float() - exact[name].float()
            total[name] += difference
            squares[name] += _energy(difference)
    found = {}
    for name in names:
        mean = _energy(total[name]) / seeds**2
        variance = max(0.0, squares[name] - seeds * mean) / (seeds - 1)
        found[name] = math.sqrt(mean / (variance / seeds + rounding**2 * _energy(exact[name]) + 1e-300))
    return found


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float(), dtype=torch.float64).square())


def check_bias(
    verified: Verification, outcomes: Iterable[Mapping[str, Tensor]], exact: Mapping[str, Tensor], rounding: float
) -> Verification:
    """`verified`, with the second question answered too."""
    found = bias(outcomes, exact, rounding)
    if not found:
        return verified
    worst = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
    problem = verified.problem
    if not found[worst] <= MOST_BIAS:
        problem = f"{worst} is biased: the mean over seeds is {found[worst]:.3g} standard errors off"
    return Verification(verified.error, found[worst], problem, verified.errors)
