"""What a converted model computes on integers, what it simulates, what stays float, and why.

Without a batch: what the layers' conversion says, and no more; whether a layer's own forward is what runs cannot be
seen from outside where somebody put another one in its place. With a batch: what ran (`fqt.nn.trace`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fqt.kernels import integer
from fqt.kernels.linear_map import LinearMap
from fqt.kernels.ranges import RangeState
from fqt.nn import patched
from fqt.nn.arithmetic import again, gathers, is_slower, kernel, obstacle, operands, summed_in_blocks, untried
from fqt.nn.between import is_compressed
from fqt.nn.convert import Selection, is_converted, select
from fqt.nn.coverage import is_layer, multiplied_weights, percent
from fqt.nn.entries import dump_operand
from fqt.nn.keeping import Kept, summary
from fqt.nn.layers import linear_map
from fqt.nn.product import INPUT_AGAIN, PRODUCTS, SAVED, WEIGHT_AGAIN
from fqt.nn.ranges import remembered
from fqt.nn.recipe import Recipe, load_recipe
from fqt.nn.stored import stored_in_configuration
from fqt.nn.trace import OUTSIDE, LossFn, Site, Trace, trace
from fqt.nn.wrappers import check_module, named_modules, named_tensors

ARITHMETIC = ("integer", "simulated", "float", "unknown", "not run")
_INTEGER = "both operands are integer codes"
_ACTIVATIONS = "products of two activations have no weight to quantize"


@dataclass(frozen=True)
class Row:
    """One product of one layer.

    Attributes:
        layer: qualified name.
        product: "output", "grad_input", "grad_weight", "all", or what else is computed: "matmul, forward".
        arithmetic: "integer", "simulated" (float arithmetic on integer codes), "float", "unknown" (it cannot be
            told without a batch) or "not run".
        operands: what is multiplied, e.g. "ptq8 × ptq8".
        why: the reason for the arithmetic.
        weights: how many weights are multiplied in it; of "all", three times the layer's. 0 if that is not known.
        calls: how often it ran; None without a batch.
        multiplications: in all its calls; None without a batch.
    """

    layer: str
    product: str
    arithmetic: str
    operands: str
    why: str
    weights: int = 0
    calls: int | None = None
    multiplications: int | None = None


@dataclass(frozen=True)
class Explanation:
    """All products of a model, as rows; prints as a table with a line of totals, and what else was noticed.

    Attributes:
        products: the rows.
        traced: whether one batch was run, so that rows say what ran.
        notes: a line each.
        never_ran: layers with a product, converted or not, that did not run on the batch.
        repeated: layers that were called more than once, with how often.
        kept: what the forward pass keeps for backward, by module and operation, the largest first; empty without a
            batch.
        slower: converted layers whose training step takes longer on this CPU's integers than in float: an estimate
            from the layer's size, nothing is measured (`fqt.nn.arithmetic.is_slower`).
    """

    products: tuple[Row, ...]
    traced: bool = False
    notes: tuple[str, ...] = ()
    never_ran: tuple[str, ...] = ()
    repeated: tuple[tuple[str, int], ...] = ()
    kept: tuple[Kept, ...] = ()
    slower: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, float]:
        """The share of each arithmetic: of all multiplications if a batch was run, else of multiplied weights.

        A weight is multiplied three times, once per product. Empty where there is nothing to share.
        """
        sizes = dict.fromkeys(ARITHMETIC, 0)
        for p in self.products:
            sizes[p.arithmetic] += (p.multiplications or 0) if self.traced else p.weights
        total = sum(sizes.values())
        return {arithmetic: size / total for arithmetic, size in sizes.items() if size}

    def __str__(self) -> str:
        header = ["layer", "product", "arithmetic", "operands", "why"]
        rows = [[p.layer, p.product, p.arithmetic, p.operands, p.why] for p in self.products]
        if self.traced:
            header[4:4] = ["calls", "share"]
            whole = sum(p.multiplications or 0 for p in self.products)
            for p, row in zip(self.products, rows, strict=True):
                share = percent(p.multiplications, whole) if p.multiplications else ""
                row[4:4] = [str(p.calls or ""), share]
        rows.insert(0, header)
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, *self._total_line(), *self.notes])

    def _total_line(self) -> list[str]:
        shares = ", ".join(f"{percent(share, 1)} {arithmetic}" for arithmetic, share in self.totals.items())
        if not shares:
            return []
        if self.traced:
            return [f"total: {shares} (share of multiplications)"]
        return [
            f"total: {shares} (share of multiplied weights, over the three products, as they were converted; "
            "explain(model, batch) says what runs)"
        ]


def explain(model: nn.Module, batch: Any = None, loss_fn: LossFn | None = None) -> Explanation:
    """Which of the model's products run on integers, and why the others do not.

    Without a batch this is read off the layers. With one, the model runs forward and backward once, in the mode it
    is in, and the rows say what really ran: every product of converted layers, and beside them every matrix
    product that no converted layer made (a layer left float, `F.linear` or attention with somebody's weights,
    `matmul`, `einsum`), with its share of all multiplications. Kernels of other libraries that torch does not
    dispatch as a matrix product are not seen. The pass leaves no trace: `.grad`, buffers, random states and modes
    are as before. A model in `DistributedDataParallel` runs as this process has it; a sharded one needs all
    processes.

    Args:
        model: any module, converted or not.
        batch: a tensor, a tuple of positional arguments, or a mapping of keyword arguments, as the model's forward
            takes them; with `loss_fn`, whatever that takes.
        loss_fn: ``loss_fn(model, batch) -> scalar``. Without it what is differentiated is the output's `loss` if it
            has one, else the sum of the output.

    Returns:
        A table with one row per product of every layer that has one, and per float product beside them.

    Raises:
        FqtError: a batch is given, and the model has lazy layers without parameters yet, checkpoints activations
            with use_reentrant=True, or does not take it.
    """
    check_module(model, "explain")
    layers = [replace(s, name=_shown(s.name)) for s in select(model, load_recipe("none"))[0]]
    if batch is None and loss_fn is None:
        rows = tuple(product for layer in layers for product in _conversion(layer))
        slower = _slower(layers)
        return Explanation(rows, notes=(*_between(model), *_hints(model, layers, slower)), slower=slower)
    return _Traced(model, layers, trace(model, batch, loss_fn)).explanation()


# ---- what conversion says ------------------------------------------------------------------------------------


def _conversion(layer: Selection) -> Iterator[Row]:
    """The rows of one layer, without a batch."""
    name, module, weights = layer.name, layer.module, multiplied_weights(layer.module) or 0
    if not is_converted(module):
        yield Row(name, "all", "float", "", _unconverted(layer), 3 * weights)
        return
    hidden = patched.hidden(module)
    if hidden:
        why = f"{hidden}; with a batch, explain says whether fqt's is still called"
        yield Row(name, "all", "unknown", "", why, 3 * weights)
        return
    for product in PRODUCTS:
        yield replace(_product(name, module, product), weights=weights)
    if isinstance(module, nn.MultiheadAttention):
        yield Row(name, "query·keyᵀ, weights·value", "float", "", _ACTIVATIONS)


def _unconverted(layer: Selection) -> str:
    return layer.reason or layer.module.__dict__.get("fqt_reason") or "not converted"


def _product(layer: str, module: nn.Module, product: str) -> Row:
    recipe: Recipe = module.fqt_recipe  # type: ignore[assignment]
    unit, map = recipe.product(product), linear_map(module)
    name, other = PRODUCTS[product]
    saved = unit.right == SAVED or product == "output"
    anew = WEIGHT_AGAIN if other == "weight" else INPUT_AGAIN
    second = (other, recipe.operand(other)) if saved else (anew, unit.right)
    words = " × ".join(_words(dump_operand(*said)) for said in ((name, unit.left), second))
    left, right = operands(product, map, recipe)
    if left is None or right is None:
        exact = "grad_output" if product != "output" else "an operand"
        why = f"{exact if left is None else 'an operand'} stays float"
        return Row(layer, product, "float", words, why + _more(product, map, recipe))
    why = obstacle(product, map, recipe) or _machine(module, map)
    if why:
        return Row(layer, product, "simulated", words, why + _more(product, map, recipe))
    block = summed_in_blocks(product, map, recipe)
    why = f"{_INTEGER}, scaled between blocks of {block}" if block else _INTEGER
    if gathers(product, map, recipe):
        why += ", in which terms are gathered by their shifts"
    how = kernel(product, map, recipe, next(module.parameters()).device.type)
    why = f"{why}; {how}" if how else why
    return Row(layer, product, "integer", words, why + _more(product, map, recipe))


def _more(product: str, map: LinearMap, recipe: Recipe) -> str:
    """What a product does that its operands' names do not say."""
    unit, found = recipe.product(product), ""
    if product == "output" and unit.rotate is not None:
        found += f"; features rotated in blocks of {unit.rotate}"
    if product != "output" and unit.right == SAVED and again(product, map, recipe) is not None:
        found += f"; {PRODUCTS[product][1]} turned too, and quantized again to 8 bits"
    return found if unit.keep is None else f"{found}; rows kept by {unit.keep}"


def _machine(module: nn.Module, map: LinearMap) -> str:
    """What keeps the products of this module's parameters off integer units."""
    weight = next(module.parameters())
    if weight.dtype == torch.float64:
        return "float64 is computed in float64"
    return integer.machine_obstacle(weight.device.type) or untried(map, weight.device.type)


def _words(entry: str | dict[str, Any]) -> str:
    """An operand's entry of `dump_recipe`, on one line."""
    if isinstance(entry, str):
        return "float" if entry == "none" else entry
    return "{" + ", ".join(f"{key}={value}" for key, value in entry.items()) + "}"


def _slower(layers: list[Selection]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers if _is_slower(layer.module))


def _hints(model: nn.Module, layers: list[Selection], slower: tuple[str, ...]) -> Iterator[str]:
    if slower:
        yield (
            f"slower on integers here than in float, as estimated from the size of {len(slower)} of the layers "
            f"(explain(model).slower has all names; rules leave them float): {_few(slower)}"
        )
    if found := remembered(model):
        yield _clipped(found)
    if stored_in_configuration(model) and not any(is_converted(layer.module) for layer in layers):
        yield (
            "note: the model's configuration says that it was trained quantized, and no layer is now; "
            "fqt.quantize_(model, fqt.recipe_of(model)) makes it what it was"
        )


def _is_slower(layer: nn.Module) -> bool:
    """Whether a converted layer's step takes longer on the integers of this machine than in float."""
    if not is_converted(layer) or not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
        return False
    map, recipe, weight = linear_map(layer), layer.fqt_recipe, layer.weight
    elsewhere = weight.device.type != "cpu" or weight.dtype == torch.float64 or _machine(layer, map)
    assert isinstance(recipe, Recipe)
    if elsewhere or not is_slower(map, weight.shape, recipe):
        return False
    pairs = {product: operands(product, map, recipe) for product in PRODUCTS}
    return not any(None in pair or obstacle(product, map, recipe) for product, pair in pairs.items())


def _between(model: nn.Module) -> Iterator[str]:
    """What is known of memory without a batch."""
    widths = {module.fqt_bits for module in model.modules() if is_compressed(module)}
    if widths:
        words = ", ".join(map(str, sorted(widths)))  # type: ignore[type-var]
        yield (
            f"between products masks are kept as bits and numbers in {words} bits, unbiased; with a batch, explain "
            "says what is kept in full"
        )


def _clipped(found: dict[tuple[str, str], RangeState]) -> str:
    """One line on what remembered ranges have cut off so far."""
    _, entries, clipped = torch.stack([state.counts.cpu() for state in found.values()]).sum(0).tolist()
    shares = {" ".join(key).strip(): float(state.clipped_share) for key, state in found.items()}
    most = max(shares, key=lambda name: shares[name])
    where = f"; most in {most}, {percent(shares[most], 1)}" if clipped else ""
    return f"remembered ranges have clipped {clipped:,} of {entries:,} entries{where} (fqt.nn.remembered has each)"


# ---- what ran ------------------------------------------------------------------------------------------------


class _Traced:
    """The rows of one traced pass: layers in the model's order, float products at the module where they ran."""

    def __init__(self, model: nn.Module, layers: list[Selection], seen: Trace) -> None:
        self.model, self.seen = model, seen
        self.layers = {layer.name: layer for layer in layers}
        self.floats: dict[str, list[Site]] = {}
        for site in seen.floats:
            self.floats.setdefault(_shown(site.module), []).append(site)
        self.witnesses = {_shown(name): witness for name, witness in seen.layers.items()}
        self.entered = {_shown(name): times for name, times in seen.entered.items()}
        tensors = dict(named_tensors(model))
        owned = {
            id(p): layer.name
            for layer in layers
            if is_converted(layer.module)
            for p in _own_parameters(layer.module)
        }
        self.owner = {name: owned[id(t)] for name, t in tensors.items() if id(t) in owned}
        """The converted layer that a parameter belongs to, by the parameter's name."""

    def explanation(self) -> Explanation:
        rows: list[Row] = []
        places = [_shown(name) for name, _ in named_modules(self.model)]
        for place in [*places, OUTSIDE]:
            if place in self.layers:
                rows += self._layer(self.layers[place])
            rows += [row for site in self.floats.get(place, ()) for row in self._float(place, site)]
        ran = {p.layer for p in rows if p.calls}
        never = tuple(name for name in self.layers if name not in ran and not self._is_idle_matrix(name))
        repeated = tuple((name, n) for name, n in self.entered.items() if n > 1 and name in self.layers)
        slower = _slower(list(self.layers.values()))
        notes = tuple(self._notes(never, repeated, slower))
        return Explanation(tuple(rows), True, notes, never, repeated, self.seen.kept, slower)

    def _layer(self, layer: Selection) -> Iterator[Row]:
        """A converted layer's products, or one row for a layer that did not run."""
        module, weights = layer.module, multiplied_weights(layer.module) or 0
        witness = self.witnesses.get(layer.name)
        if witness is None:
            if layer.name not in self.floats:
                why = _unconverted(layer) + ("; no product used them" if self._is_idle_matrix(layer.name) else "")
                yield Row(layer.name, "all", "not run", "", why, 3 * weights, 0, 0)
            return
        if not witness.products:
            yield Row(layer.name, "all", "not run", "", self._why_not(layer.name), 3 * weights, 0, 0)
            return
        for product in PRODUCTS:
            said = replace(_product(layer.name, module, product), weights=weights)
            ran = [(arithmetic, count) for (name, arithmetic), count in witness.products.items() if name == product]
            for arithmetic, count in ran:
                row = said if arithmetic == said.arithmetic else _corrected(said, arithmetic, module)
                yield replace(row, calls=count.calls, multiplications=count.multiplications)
            if not ran:
                why = self.seen.no_backward or "nothing asked for this gradient"
                yield replace(said, arithmetic="not run", why=why, calls=0, multiplications=0)

    def _is_idle_matrix(self, name: str) -> bool:
        """Whether a module that is no layer ran, and its matrices were in no product: positions that are added."""
        return name in self.entered and name not in self.floats and not is_layer(self.layers[name].module)

    def _why_not(self, name: str) -> str:
        """Why a converted layer told of no product."""
        sites = [site for site in self.seen.floats if self.owner.get(site.weight) == name]
        if sites:
            return f"its weight was multiplied in float by {sites[0].operation} in {_shown(sites[0].module)}"
        if name in self.entered:
            return "it was called, but fqt's forward was not: another one was put in its place"
        return "it was not called"

    def _float(self, place: str, site: Site) -> Iterator[Row]:
        operands, why = f"float × {site.weight.removeprefix(place + '.') or 'float'}", self._why_float(site)
        for direction, count in zip(("forward", "backward"), self.seen.floats[site], strict=True):
            if count.calls:
                name = f"{site.operation}, {direction}"
                yield Row(place, name, "float", operands, why, 0, count.calls, count.multiplications)

    def _why_float(self, site: Site) -> str:
        owner = self.owner.get(site.weight)
        if owner is not None:
            return f"the weight of {owner} was handed to another product than that layer's"
        layer = self.layers.get(_shown(site.module))
        if layer is not None and not is_converted(layer.module):
            return _unconverted(layer)
        if site.weight:
            return "no converted layer made it"
        attends = site.operation == "scaled_dot_product_attention" or (
            layer is not None and isinstance(layer.module, nn.MultiheadAttention)
        )
        return _ACTIVATIONS if attends else "neither operand is a parameter of the model"

    def _notes(
        self, never: tuple[str, ...], repeated: tuple[tuple[str, int], ...], slower: tuple[str, ...]
    ) -> Iterator[str]:
        if never:
            yield f"never ran on this batch: {_few(never)}"
        if repeated:
            yield f"ran more than once: {_few([f'{name} ({times} ×)' for name, times in repeated])}"
        if self.seen.no_backward:
            yield f"no backward pass: {self.seen.no_backward}"
        asleep = [
            name for name, layer in self.layers.items() if is_converted(layer.module) and not layer.module.training
        ]
        if asleep:
            yield f"in eval mode, where gradients are exact: {_few(asleep)}; training runs after model.train()"
        if self.seen.kept and any(map(is_compressed, self.model.modules())):
            yield summary(self.seen.kept)
        yield from _hints(self.model, list(self.layers.values()), slower)


def _shown(name: str) -> str:
    """A module's name in rows and notes."""
    return name or "(model)"


def _few(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    own = list(module.parameters(recurse=False))
    return [*own, *module.out_proj.parameters()] if isinstance(module, nn.MultiheadAttention) else own


def _corrected(said: Row, arithmetic: str, module: nn.Module) -> Row:
    """The row of a product that ran otherwise than the recipe and the parameters say."""
    if arithmetic == "float" and not module.training:
        operands = f"float × {said.operands.split(' × ', 1)[1]}"
        return replace(said, arithmetic=arithmetic, operands=operands, why="eval mode: the gradient is exact")
    why = {"integer": _INTEGER, "simulated": "its values were float64, or on a device without integer kernels"}
    return replace(said, arithmetic=arithmetic, why=why.get(arithmetic, "an operand came as float"))
