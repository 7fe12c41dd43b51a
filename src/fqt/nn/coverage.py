"""How much of a model a conversion reaches, in one line: layers, and the weights that are multiplied."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from fqt.nn.forms import is_quantized

if TYPE_CHECKING:
    from fqt.nn.convert import Selection

LOG = logging.getLogger("fqt")
NEGLIGIBLE = 0.01
"""The share of multiplied weights that may stay float without a word."""
_NAMED = 5
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)


def multiplied_weights(layer: nn.Module) -> int | None:
    """How many weights this layer multiplies its input by; None if it has no parameters yet.

    A parametrized weight counts once, by its largest part.
    """
    own: list[Tensor] = list(fused(layer).values()) or [
        p for p in layer.parameters(recurse=False) if p.ndim > 1 or isinstance(p, UninitializedParameter)
    ]
    if isinstance(layer, nn.MultiheadAttention):
        own.append(layer.out_proj.weight)
    if any(isinstance(p, UninitializedParameter) for p in own):
        return None
    total = sum(p.numel() for p in own)
    if parametrize.is_parametrized(layer):
        total += sum(max(p.numel() for p in parts.parameters()) for parts in layer.parametrizations.values())  # type: ignore[operator]
    return total


def fused(module: nn.Module) -> dict[str, Tensor]:
    """The weights that hold a matrix per expert, by name: of three axes, in no layer of torch's."""
    if isinstance(module, _LAYERS):
        return {}
    own = {n: p for n, p in module.named_parameters(recurse=False) if not isinstance(p, UninitializedParameter)}
    is_known = "expert" in type(module).__name__.lower() or hasattr(module, "num_experts")
    return {name: p for name, p in own.items() if is_known and p.ndim == 3}


def is_layer(module: nn.Module) -> bool:
    """Whether this is a layer as torch knows them, rather than a module with matrices of its own of unknown use."""
    return isinstance(module, _LAYERS)


def left_float(selections: Sequence[Selection]) -> list[Selection]:
    """The layers that stay float although nobody asked for it.

    Of modules with matrices of unknown use (a fused layer, but also a table of positions that is added) only those
    whose class holds more than `NEGLIGIBLE` of all weights.
    """
    unasked = [s for s in selections if s.recipe is None and not s.by_request]
    held: Counter[type] = Counter()
    for s in unasked:
        held[type(s.module)] += multiplied_weights(s.module) or 0
    least = NEGLIGIBLE * _weights(selections)
    return [s for s in unasked if is_layer(s.module) or held[type(s.module)] > least]


def kept(selections: Sequence[Selection]) -> list[Selection]:
    """The layers that a filter left out and that were converted before: it turns none back."""
    return [s for s in selections if s.recipe is None and is_quantized(type(s.module))]


def summary(selections: Sequence[Selection], idle_filter: bool = False) -> str:
    """One line: how much runs quantized, what stays float unasked, and how much by request."""
    as_before = kept(selections)
    converted = [*as_before, *(s for s in selections if s.recipe is not None and not s.recipe.is_float)]
    unasked = left_float(selections)
    line = f"fqt: {len(converted)} of {len(selections)} layers run quantized"
    total = _weights(selections)
    if total:
        line += f", {percent(_weights(converted), total)} of the weights that are multiplied"
    by_request = sum(s.by_request or (s.recipe is not None and s.recipe.is_float) for s in selections)
    if by_request > len(as_before):
        line += f"; {by_request - len(as_before)} left in float by request"
    if as_before:
        line += (
            f"; {len(as_before)} that filter_fn left out keep the recipe they had: fqt.restore_(model) first, or a "
            "rule that says 'none', makes them float"
        )
    if idle_filter:
        line += "; filter_fn(module, name) left no layer out"
    if unasked:
        largest = sorted(unasked, key=lambda s: -(multiplied_weights(s.module) or 0))
        named = [f"{s.name or '(model)'} ({s.reason})" for s in largest[:_NAMED]]
        more = [f"{len(unasked) - _NAMED} more"] if len(unasked) > _NAMED else []
        line += f"; left in float: {', '.join([*named, *more])}; fqt.explain(model) says why"
    return line


def tell(selections: Sequence[Selection], idle_filter: bool = False) -> None:
    """Logs the summary to the logger "fqt": as a warning if more than `NEGLIGIBLE` stays float unasked.

    Or if a filter left nothing out, as one does that takes its arguments in the other order, or layers that go on
    as they were converted before.
    """
    sizes = [multiplied_weights(s.module) for s in left_float(selections)]
    known, total = sum(size or 0 for size in sizes), _weights(selections)
    matters = idle_filter or bool(kept(selections)) or None in sizes or known > NEGLIGIBLE * total
    LOG.log(logging.WARNING if matters else logging.INFO, "%s", summary(selections, idle_filter))


def percent(part: float, whole: float) -> str:
    """A share in words that say neither "0 %" of something nor "100 %" of not quite everything."""
    share = 100 * part / whole
    if share == 0 or share == 100:
        return f"{share:.0f} %"
    if share < 0.1:
        return "under 0.1 %"
    if share > 99.9:
        return "over 99.9 %"
    return f"{share:.1f} %" if share < 1 or share > 99 else f"{share:.0f} %"


def _weights(selections: Sequence[Selection]) -> int:
    return sum(multiplied_weights(s.module) or 0 for s in selections)
