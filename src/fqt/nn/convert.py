"""Conversion: one line turns a model's layers into their quantized forms, one line turns them back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from fqt.errors import ConversionError, FqtError
from fqt.nn import compiled, coverage, layers, patched, ranges, stored
from fqt.nn.arithmetic import misfit
from fqt.nn.forms import float_form, is_quantized, known, quantized_form, replaced
from fqt.nn.layers import linear_map
from fqt.nn.recipe import DEFAULT, Recipe, Rule, load_recipe
from fqt.nn.wrappers import check_module, named_modules
from fqt.quant.quantizer import Quantizer

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]

# Modules whose parameters scale, shift or are looked up.
_NO_PRODUCT_INSIDE = (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, ParametrizationList)
_FAST_PATHS: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


@dataclass(frozen=True)
class Selection:
    """What conversion does with one module.

    Attributes:
        name: its qualified name ("" is the model itself).
        module: the module.
        recipe: what it gets; None if it stays as it is.
        reason: why it stays as it is, or becomes float by a rule; else empty.
        by_request: whether it would stay float even if it could be converted.
        rule: the recipe's rule that is about it.
    """

    name: str
    module: nn.Module
    recipe: Recipe | None
    reason: str = ""
    by_request: bool = False
    rule: Rule | None = None


def quantize_(
    model: Model,
    recipe: Recipe | Quantizer | str | Path | Mapping[str, Any] = DEFAULT,
    *,
    filter_fn: Filter | None = None,
    strict: bool = False,
) -> Model:
    """Train this model fully quantized from now on, in place.

    Parameters, their names and the training loop stay what they are. Besides torch's own layers, what is converted
    are subclasses that keep their forward, layers that torch has parametrized or sharded, the `Conv1D` and fused
    experts of transformers, and classes that `fqt.register` was told of. Modules of other kinds that own a matrix
    stay float and are listed by `explain`; so does a layer whose forward was replaced on the instance by something
    that cannot be seen through. One line to the logger "fqt" says how much that is, as a warning if it is over a
    hundredth of the weights that are multiplied and no rule asked for it, if a filter left nothing out, or left out
    what was converted before and goes on with its recipe. Names are those of the model inside `torch.compile`,
    `DistributedDataParallel` and the like. State dicts hold each layer's recipe beside the weights (`recipe_of`),
    and so does a Hugging Face model's configuration. A converted model may be converted again, with another recipe.
    Convert a `nn.TransformerEncoder` as a whole: the switch that keeps torch's fused inference path from bypassing
    converted layers sits in the encoder.

    Args:
        model: any module.
        recipe: a name ("bhq4"), a `Recipe`, a TOML file, or a mapping with its words; a `Quantizer` as its name
            would be: it for `grad_input`, the rest as the paper has it.
        filter_fn: ``filter_fn(module, name) -> bool``, asked for every layer that could be converted; one that it
            refuses stays as it is, whatever the rules say. What is stored says so by a rule for each.
        strict: whether a layer that would stay float without having been asked to is an error.

    Returns:
        The model.

    Raises:
        FqtError: there is no module, the recipe is wrong, or the filter takes other arguments.
        ConversionError: no layer can be converted, a rule selects nothing, or names a layer that cannot be
            converted; with `strict`, a layer would stay float. All problems are listed, and the model is unchanged.
    """
    check_module(model, "quantize_")
    resolved = load_recipe(recipe)
    _check_filter(filter_fn, model)
    selections, problems = select(model, resolved, filter_fn)
    problems += [
        f"{s.name or '(model)'!r} is {several}, which cannot share one remembered range: give it another recipe "
        "by a rule"
        for s in selections
        if s.recipe is not None and (several := _several(s.module)) and ranges.remembering(s.recipe)
    ]
    problems += [
        f"{s.name or '(model)'!r}: {why}"
        for s in selections
        if s.recipe is not None and (why := misfit(linear_map(s.module), s.recipe))
    ]
    if strict:
        problems += [
            f"{s.name or '(model)'!r} would stay float, and no rule says 'none': {s.reason}"
            for s in coverage.left_float(selections)
        ]
    if problems:
        raise ConversionError("cannot convert the model; nothing was changed:\n  " + "\n  ".join(problems))
    compiled.count_flops()
    whole = _whole(resolved, selections)
    if not any(is_converted(selection.module) for selection in selections):
        stored.compare_configuration(model, whole)
    _switch(model, {s.module: s.recipe for s in selections if s.recipe is not None})
    for s in selections:
        asked = s.recipe is not None or s.reason == _FILTERED  # what is found by looking, explain finds again
        _remember(s.module, s.reason if asked and not is_converted(s.module) else "")
    converted = any(is_converted(selection.module) for selection in selections)
    stored.attach(selection.module for selection in selections)
    stored.write_configuration(model, whole if converted else None)
    idle = filter_fn is not None and not any(s.reason == _FILTERED for s in selections)
    coverage.tell(selections, idle_filter=idle)
    return model


def restore_(model: Model) -> Model:
    """Turn all layers back into their float classes, in place, with the same parameters. Returns the model.

    They still warn when weights are loaded into them that were saved quantized.

    Raises:
        FqtError: it is no module.
        ConversionError: a layer's class cannot be changed; the model is unchanged.
    """
    check_module(model, "restore_")
    _switch(model, dict.fromkeys(filter(is_converted, model.modules()), load_recipe("none")))
    for module in model.modules():
        stored.detach(module, keep_comparing=True)
        _remember(module, "")
    stored.write_configuration(model, None)
    return model


def _check_filter(filter_fn: Any, model: nn.Module) -> None:
    try:
        if filter_fn is not None:
            inspect.signature(filter_fn).bind(model, "")
    except TypeError as error:
        raise FqtError(
            f"filter_fn is a function of a module and its name, filter_fn(module, name): {error}"
        ) from None
    except ValueError:
        pass  # a signature that cannot be read, as of some functions written in C


def whole_recipe(model: nn.Module) -> Recipe:
    """What a converted model's layers have: in the words of its configuration where they say that, else by layer.

    They do not if a part of the model was converted or restored by itself, or a layer came later.
    """
    said = stored.configured_recipe(model)
    if said is None:
        return stored.recipe_of(model)
    wanted = {s.module: load_recipe("none") if s.recipe is None else s.recipe for s in select(model, said)[0]}
    true = all(stored.own_recipe(module) == replace(recipe, rules=()) for module, recipe in wanted.items())
    return said if true else stored.recipe_of(model)


def select(model: nn.Module, recipe: Recipe, filter_fn: Filter | None = None) -> tuple[list[Selection], list[str]]:
    """What `quantize_` would do with every layer that has products, and the problems it would raise."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        names.setdefault(module, []).append(name)
    wrapped: dict[nn.Module, list[str]] = {module: [] for module in names}  # what wrappers make of the names
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names and name not in names[module]:
            wrapped[module].append(name)
    # An attention's output projection is not called as a layer: it belongs to the attention.
    inside_attention = {m.out_proj for m in names if isinstance(m, nn.MultiheadAttention)}
    used: set[Rule] = set()
    selections, problems = [], []
    for module, aliases in names.items():
        rule = _rule(recipe, aliases) or _rule(recipe, wrapped[module], wrapped=True)
        if module in inside_attention:
            if rule is not None and rule.pattern in aliases:
                problems.append(f"{aliases[0]!r} is part of an attention module: name that module instead")
            continue
        reason = _obstacle(module)
        wanted = recipe if rule is None else load_recipe(rule.recipe)
        asked = rule is not None and not load_recipe(rule.recipe).is_float
        if reason is None:
            left = filter_fn is not None and not filter_fn(module, aliases[0])
            floats = rule is not None and wanted.is_float
            why = _FILTERED if left else f"rule {rule.pattern!r} says 'none'" if rule and floats else ""
            selections.append(Selection(aliases[0], module, None if left else wanted, why, left, rule))
            # A rule in another one's shadow does no harm where both say the same, of a layer with two names.
            used.update(r for r in recipe.rules if rule and r.recipe == rule.recipe and _match_any(r, aliases))
            used.update([rule] if rule else [])  # also by a wrapper's word
        elif asked and rule is not None and rule.pattern in aliases and not _holds_convertible(module):
            problems.append(f"rule {rule.pattern!r} names a layer that cannot be converted: {reason}")
            used.add(rule)
        elif reason != _NO_PRODUCT:
            selections.append(Selection(aliases[0], module, None, reason, wanted.is_float, rule))
            used.update([rule] if rule and not asked else [])
    for rule in recipe.rules:
        if rule not in used:
            layers_ = ", ".join(repr(s.name) for s in selections if s.recipe is not None) or "none"
            problems.append(f"rule {rule.pattern!r} selects no layer; the layers are: {_shorten(layers_)}")
    if not recipe.is_float and not any(s.recipe is not None for s in selections):
        found = "; ".join(f"{s.name or '(model)'}: {s.reason}" for s in selections) or "it has no products"
        problems.append(f"the model has no layer that can be converted ({_shorten(found)})")
    return selections, problems


def _whole(recipe: Recipe, selections: list[Selection]) -> Recipe:
    """The recipe that does without `filter_fn` what was done with it: layers that it left out have rules."""
    left = [s for s in selections if s.reason == _FILTERED and s.name]
    if not left:
        return recipe
    rules = [_exception(s, selections) for s in left]
    used = {s.rule for s in selections if s.reason != _FILTERED}
    return replace(recipe, rules=(*rules, *(rule for rule in recipe.rules if rule in used)))


def _exception(left: Selection, selections: list[Selection]) -> Rule:
    """That a layer keeps what it has; a pattern, which means it alone, where others are inside it."""
    pattern = stored.literal(left.name)
    if pattern == left.name and any(s.name.startswith(left.name + ".") for s in selections):
        pattern = f"[{pattern[0]}]{pattern[1:]}"
    return Rule(pattern, stored.own_recipe(left.module))


def _several(module: nn.Module) -> str:
    """What products of different weights a converted layer has; empty if it has one weight."""
    if isinstance(module, nn.MultiheadAttention):
        return "an attention of several projections"
    return "made of experts" if coverage.fused(module) else ""


_NO_PRODUCT = "it has no product with a weight"
_FILTERED = "filter_fn left it out"


def _holds_convertible(module: nn.Module) -> bool:
    """Whether a container holds a layer that can be converted, so that naming it makes sense."""
    own = {module, module.out_proj} if isinstance(module, nn.MultiheadAttention) else {module}
    return any(_obstacle(m) is None for m in module.modules() if m not in own)


def _rule(recipe: Recipe, names: list[str], wrapped: bool = False) -> Rule | None:
    """The first rule that one of the names matches; a wrapper's word alone means a layer of that name."""
    rules = (rule for rule in recipe.rules if "." in rule.pattern or not wrapped)
    return next((rule for rule in rules if _match_any(rule, names)), None)


def _match_any(rule: Rule, names: list[str]) -> bool:
    return any(_matches(rule.pattern, name) for name in names)


def _matches(pattern: str, name: str) -> bool:
    if fnmatchcase(name, pattern):
        return True
    return not any(c in pattern for c in "*?[") and name.startswith(pattern + ".")


def _shorten(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(",", 1)[0] + ", …"


def _obstacle(module: nn.Module) -> str | None:
    """Why a module cannot be converted, or None if it can."""
    if is_converted(module):
        return None
    kind = type(module)
    if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
        return f"{kind.__name__} has no parameters yet: run one batch through the model first"
    base = known(kind)
    if base is None:
        return _no_form(module)
    methods = replaced(kind, base)
    if methods:
        own = f"{kind.__name__} has its own {' and '.join(methods)}"
        return f"{own}, and what that computes cannot be seen: tell fqt its quantized form with fqt.register"
    if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        return "MultiheadAttention with add_bias_kv or add_zero_attn has no quantized form"
    tensors = {**dict(module.named_parameters(recurse=False)), "weight": getattr(module, "weight", None)}
    for name, weight in tensors.items():
        if not isinstance(weight, torch.Tensor):
            continue
        if not weight.is_floating_point():
            return f"its {name} is {weight.dtype}, not a real floating-point tensor"
        if why := layers.foreign(weight):
            return why
    hidden = patched.hidden(module)
    return f"{hidden}: convert it before" if hidden else None


def _no_form(module: nn.Module) -> str:
    """Why a module of a class that nobody knows stays float."""
    kind = type(module).__name__
    if coverage.is_layer(module):
        return f"{kind} is not a class fqt has a quantized form of"
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim > 1}
    if not own or isinstance(module, _NO_PRODUCT_INSIDE):
        return _NO_PRODUCT
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module: convert before scripting or tracing"
    if stacks := coverage.fused(module):
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in stacks.items())
        return f"{kind} multiplies by fused expert weights, one matrix per expert: {shapes}"
    if "router" in kind.lower():
        return f"{kind} chooses experts by the products of its {', '.join(own)}, which rounding would change"
    return f"{kind} has parameters of its own ({', '.join(own)}) that fqt cannot see the use of"


def _remember(module: nn.Module, reason: str) -> None:
    """Keeps on a module why the last conversion left it in float, for `explain`."""
    module.__dict__.pop("fqt_reason", None)
    if reason and not isinstance(module, torch.jit.ScriptModule):
        module.__dict__["fqt_reason"] = reason


def is_converted(module: nn.Module) -> bool:
    """Whether this module's products run on quantized operands."""
    return is_quantized(type(module))


def _switch(model: nn.Module, recipes: Mapping[nn.Module, Recipe]) -> None:
    """Gives modules of the model their recipes, and with them their classes: all of them, or none.

    Raises:
        ConversionError: a class cannot be made or given to a module.
    """
    with all_or_nothing(model):
        forms = {m: (float_form if r.is_float else quantized_form)(type(m)) for m, r in recipes.items()}
        swaps: patched.Swaps = {m: (type(m).forward, form.forward) for m, form in forms.items()}
        for module, recipe in recipes.items():
            if type(module) is not forms[module]:
                module.__class__ = forms[module]
            if recipe.is_float:
                module.__dict__.pop("fqt_recipe", None)
                module.__dict__.pop("__module__", None)
            else:
                module.fqt_recipe = recipe  # type: ignore[assignment]
                module.__dict__["__module__"] = "torch.nn"  # by which torch.fx knows a leaf, as the float layer is
        patched.rewire(model, {m: s for m, s in swaps.items() if s[0] is not s[1]})
        for module in model.modules():
            _set_fast_path(module)
    for module, recipe in recipes.items():
        ranges.attach(module, recipe)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts every module's class and attributes back if what is inside fails."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException as error:
        for module, kind, members in before:
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(members)
        if not isinstance(error, Exception) or isinstance(error, ConversionError):
            raise
        why = f"{type(error).__name__}: {error}"
        raise ConversionError(f"cannot change the model's layers; nothing was changed: {why}") from error


def _set_fast_path(module: nn.Module) -> None:
    """Keep torch's fused inference path from bypassing converted layers inside an encoder.

    That path reads the layers' weights directly. A layer takes it only if its attribute says ReLU or GELU, an
    encoder packs a padded batch for it only if its attribute says so.
    """
    for kind, attribute, off in _FAST_PATHS:
        if not isinstance(module, kind) or not hasattr(module, attribute):
            continue
        saved = f"_fqt_{attribute}"
        converted = any(is_converted(m) for m in module.modules())
        if converted and saved not in module.__dict__:
            module.__dict__[saved] = getattr(module, attribute)
            setattr(module, attribute, off)
        elif not converted and saved in module.__dict__:
            setattr(module, attribute, module.__dict__.pop(saved))
