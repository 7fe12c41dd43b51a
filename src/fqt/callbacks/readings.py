"""What both callbacks do: readings of ρ every k steps, their names in a log, and the recipe of a checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fqt.errors import FqtError, FqtWarning, RecipeWarning
from fqt.nn import dump_recipe, load_recipe, quantize_
from fqt.nn.convert import is_converted, select, whole_recipe
from fqt.nn.stored import configured_recipe
from fqt.stats import Monitor
from fqt.stats.passes import LossFn, tensors

RECIPE = "fqt_recipe"
"""Of a checkpoint: the mapping of `dump_recipe`."""


class Readings:
    """ρ of a model in training at step 1 and every `every` steps, measured by a `Monitor`.

    The first reading is refused with an error where gradients are not those of the batches: what is wrong then is
    wrong from the start. A later one is left out with a warning: a run is not ended for it.

    Args:
        model, loss_fn, half: as `Monitor` has them.
        every: steps between readings, at multiples of it.
        layers: whether a reading has ρ by layer, too.
        process_group: as `Monitor` has it; every process makes its own readings, and all get the same.
        advice: what to do where readings are refused, for the end of the message.

    Raises:
        FqtError: as `Monitor`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        every: int,
        half: Callable[[Any], tuple[Any, float]] | None = None,
        layers: bool = True,
        process_group: Any = None,
        advice: str = "pass every=None for no readings",
    ) -> None:
        self.every, self.layers, self.advice = every, layers, advice
        with self._advised():
            self.monitor = Monitor(model, loss_fn, every=every, half=half, process_group=process_group)
        self._tried = False
        self._usual: tuple[float, ...] | None = None
        self.monitor.count = every - 1  # the first step is due
        self.monitor.skip()

    @contextmanager
    def _advised(self) -> Iterator[None]:
        """Says at the end of an error how to train without readings."""
        try:
            yield
        except FqtError as error:
            raise FqtError(f"{error}; {self.advice}") from error

    @property
    def is_due(self) -> bool:
        """Whether the step under way will be read."""
        return (self.monitor.count + 1) % self.every == 0

    def step(self, number: int, batches: Sequence[Any], **how: Any) -> dict[str, float] | None:
        """To be called once per optimizer step, with the batches that `.grad` was accumulated over.

        Args:
            number: of the step, from 1.
            batches: may be empty where `is_due` is not.
            how: `reduction` and `scale` of `Monitor.step`.

        Returns:
            "rho" and "rho/LAYER" of the layers that have one; None if there is no reading.

        Raises:
            FqtError: the first reading is refused.
        """
        if not self.is_due:
            self.monitor.step(None)
            return None
        if not self._is_usual(batches):
            self.monitor.skip()
            return None
        try:
            with self._advised():
                found = self.monitor.step(*batches, **how)
        except FqtError as error:
            if not self._tried:
                raise
            warnings.warn(f"fqt: no reading of ρ at step {number}: {error}", FqtWarning, stacklevel=2)
            found = None
        self._tried = True
        self.monitor.count = number
        self.monitor.skip()
        return None if found is None else _flat(found, self.layers)

    def wait(self, number: int, why: str) -> None:
        """Instead of `step`, where it is due and its batch cannot be read: the next step is due."""
        warnings.warn(f"fqt: no reading of ρ at step {number}, but at the next: {why}", FqtWarning, stacklevel=2)
        self.monitor.skip()

    def _is_usual(self, batches: Sequence[Any]) -> bool:
        """Whether this step is as large as the first: an epoch's smaller last one has another sampling variance."""
        rows = sum(len(found[0]) for found in map(tensors, batches) if found and found[0].ndim)
        size = self.monitor.processes.means(len(batches), rows)
        self._usual = self._usual or size
        return size >= self._usual

    def state_dict(self) -> dict[str, Any]:
        """The averages, as plain values."""
        return self.monitor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; the next step is due, since what is wrong in this process is not known yet."""
        self.monitor.load_state_dict({**state, "count": self.every - 1})

    def close(self) -> None:
        """Takes the monitor off the model."""
        self.monitor.close()


def _flat(reading: Mapping[str, Any], layers: bool) -> dict[str, float]:
    named = {f"rho/{name or 'model'}": value for name, value in reading["layers"].items() if layers}
    return {name: value for name, value in {"rho": reading["rho"], **named}.items() if not math.isnan(value)}


def refuse_parts(strategy: str) -> None:
    """Raises FqtError where there are several processes, of which none has the whole model.

    Args:
        strategy: what the trainer calls the way it spreads a model.
    """
    begun = torch.distributed.is_available() and torch.distributed.is_initialized()
    if begun and torch.distributed.get_world_size() > 1:
        raise FqtError(
            "a callback measures ρ where every process has the whole model, as under DistributedDataParallel, not "
            f"under {strategy}: pass every=None, which keeps the recipe with the checkpoint"
        )


def check_every(every: int | None) -> None:
    """Raises FqtError for what is no number of steps."""
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise FqtError(f"every must be at least 1 step, or None for no readings, not {every!r}")


def check_converted(model: nn.Module) -> None:
    """Raises FqtError for a model without converted layers; warns of layers that came later and are float.

    The latter only where a Hugging Face configuration tells what the model as a whole was converted with.
    """
    if not any(map(is_converted, model.modules())):
        raise FqtError("the model has no converted layer: call fqt.quantize_(model, 'shq8') before training")
    recipe = configured_recipe(model)
    if recipe is None:
        return
    wanted = [s for s in select(model, recipe)[0] if s.recipe is not None and not s.recipe.is_float]
    late = [s.name for s in wanted if not is_converted(s.module)]
    if late:
        names = ", ".join(late[:3]) + (f" and {len(late) - 3} more" if len(late) > 3 else "")
        warnings.warn(
            f"fqt: float, though the recipe means them: {names} (adapters, or a head that came after conversion?); "
            "call fqt.quantize_ again",
            FqtWarning,
            stacklevel=3,
        )


def saved_recipe(model: nn.Module) -> dict[str, Any]:
    """The model's recipe as a checkpoint keeps it."""
    return dump_recipe(whole_recipe(model) if any(map(is_converted, model.modules())) else load_recipe("none"))


def restore_recipe(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Makes a float model what the checkpoint's was; warns if it is quantized otherwise.

    The parameters stay the same objects, so that an optimizer that holds them is right before and after.
    """
    recipe = load_recipe(saved)
    if not any(map(is_converted, model.modules())):
        quantize_(model, recipe)
    elif (own := whole_recipe(model)) != recipe:
        warnings.warn(
            f"fqt: the checkpoint was trained with {recipe}, and the model has {own}: convert it with the "
            "checkpoint's recipe if that is not what you want",
            RecipeWarning,
            stacklevel=3,
        )
