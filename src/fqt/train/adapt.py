"""`fqt train --adapt`: bits that follow the noise.

A monitor measures ρ, quantization over sampling variance, every few steps on the batch of the step. When ρ leaves
its band around the target, Theorem 2's table is measured on that batch and the widths of `grad_input` are planned
anew for the target. The table's total on one batch is scaled to the monitor's average, which is over several.

The band is the hysteresis: it reaches from target/1.5 to 1.25·target, while a plan aims just below the target. So
a plan that came out right is not touched until training itself has moved ρ; one that came out high (few bits make
noise beget noise, which a table measured at more bits does not know) is corrected at the next reading.

All of it is a function of the run's state: what a checkpoint holds is the recipe in force, the monitor's averages
and the sum of widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from fqt.errors import FqtError
from fqt.nn import Recipe, dump_recipe, load_recipe, quantize_
from fqt.seeds import derive_seed
from fqt.stats import Monitor
from fqt.stats.decomposition import decompose
from fqt.stats.operands import WIDTHS, Operands
from fqt.stats.passes import LossFn, converted, measuring
from fqt.stats.plan import Costs, allocate, with_widths
from fqt.train.ranks import Ranks

if TYPE_CHECKING:  # torch may have been built without what messages need
    from fqt.distributed import Messages

__all__ = ["Adapter"]

BAND = (1 / 1.5, 1.25)


class Adapter:
    """Keeps a model's ρ near a target by changing the widths of `grad_input`.

    Args:
        model: converted to a recipe that quantizes grad_input, in training.
        loss_fn: the training loss of a batch.
        target: of ρ.
        every: steps between readings.
        seed: of the measurements' noise.
        ranks: the processes that train it; the first measures tables on its part of the batch, for all of them.
        messages: in which they send gradients.

    Raises:
        FqtError: no layer quantizes grad_input on a grid of several widths.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        target: float,
        every: int,
        seed: int,
        ranks: Ranks | None = None,
        messages: Messages | None = None,
    ) -> None:
        self.model, self.loss_fn, self.target, self.seed = model, loss_fn, target, seed
        if not self._widths(movable=True):
            raise FqtError(
                "--adapt changes the widths of grad_input: give a recipe that quantizes it, such as shq8 "
                "(a grid of floats has one width)"
            )
        self.ranks = ranks or Ranks()
        self.monitor = Monitor(model, loss_fn, every=every, messages=messages)
        self.weight: dict[str, int] = {}
        self.recipe: Recipe | None = None  # None: still the one that the run was started with
        self.width_sum, self.steps = 0.0, 0

    def step(self, batch: Any, number: int, whole: bool = True) -> list[dict[str, Any]]:
        """Call it between backward and the optimizer's step.

        Args:
            batch: the step's.
            number: of the step, from 1.
            whole: whether the batch is of full size; readings wait for one that is.

        Returns:
            Records for the metrics: of kind "monitor" for a reading, of kind "adapt" for a change.
        """
        if not self.weight:
            self.weight = self.ranks.lead(lambda: self._weigh(batch))
        self.width_sum += self._mean_width()
        self.steps += 1
        if not whole:
            self.monitor.skip()
            return []
        reading = self.monitor.step(batch)
        if reading is None:
            return []
        records = [{"kind": "monitor", "step": number, "mean_width": self._mean_width(), **reading}]
        if self._is_off(reading["rho"]):
            records += self._plan(batch, number, reading)
        return records

    def _is_off(self, rho: float) -> bool:
        """Whether ρ has left its band on a side where widths can still follow."""
        if not math.isfinite(rho):
            return False
        widths = self._widths(movable=True).values()
        fewer, more = any(bits > WIDTHS[0] for bits in widths), any(bits < WIDTHS[-1] for bits in widths)
        return (rho < BAND[0] * self.target and fewer) or (rho > BAND[1] * self.target and more)

    def _plan(self, batch: Any, number: int, reading: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Widths for the target; no record where they stay what they are."""
        costs, before = self.ranks.lead(lambda: self._costs(batch, number)), self._widths()
        measured = costs.total({layer: before[layer] for layer in costs.variance})
        if not measured > 0:
            return []
        costs = costs.scaled(reading["quantization"] / measured)
        limit = max(self.target * reading["sampling"], costs.total(costs.uniform(WIDTHS[-1])))
        chosen = allocate(costs, limit=limit)
        if all(before[layer] == bits for layer, bits in chosen.items()):
            return []
        self.recipe = with_widths(self._recipes(), chosen)
        quantize_(self.model, self.recipe)
        self.monitor.forget_quantization()
        return [
            {
                "kind": "adapt",
                "step": number,
                "rho": reading["rho"],
                "predicted": costs.total(chosen) / reading["sampling"],
                "mean_width": self._mean_width(),
                "widths": chosen,
            }
        ]

    def _costs(self, batch: Any, number: int) -> Costs:
        table = decompose(self.model, self.loss_fn, [batch], 1, derive_seed(self.seed, "adapt", number))
        return Costs.of(table, self._recipes())

    def _weigh(self, batch: Any) -> dict[str, int]:
        """Multiplications of each layer's grad_input product, from one pass."""
        operands = Operands(self.model, widths=(), full=False)
        with measuring(self.model, self.loss_fn) as backward:
            backward(batch, observer=operands)
        operands.end()
        return operands.multiplications("grad_input")

    def _recipes(self) -> dict[str, Recipe]:
        return {name: module.fqt_recipe for name, module in converted(self.model).items()}  # type: ignore[misc]

    def _widths(self, movable: bool = False) -> dict[str, int]:
        """Bits of grad_input by layer; only of those that can change, if `movable`."""
        quantizers = {name: recipe.operand("grad_input") for name, recipe in self._recipes().items()}
        return {
            name: q.bits for name, q in quantizers.items() if q is not None and len(q.grid.widths) > int(movable)
        }

    def _mean_width(self) -> float:
        widths = self._widths()
        return sum(w * widths[layer] for layer, w in self.weight.items()) / max(sum(self.weight.values()), 1)

    @property
    def mean_width(self) -> float:
        """The mean over steps so far of the mean width by multiplications; NaN before the first step."""
        return self.width_sum / self.steps if self.steps else math.nan

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {
            "recipe": None if self.recipe is None else dump_recipe(self.recipe),
            "monitor": self.monitor.state_dict(),
            "weight": self.weight,
            "width_sum": self.width_sum,
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a state, the recipe in force included."""
        if state["recipe"] is not None:
            self.recipe = load_recipe(state["recipe"])
            quantize_(self.model, self.recipe)
        self.monitor.load_state_dict(state["monitor"])
        self.weight = dict(state["weight"])
        self.width_sum, self.steps = state["width_sum"], state["steps"]
