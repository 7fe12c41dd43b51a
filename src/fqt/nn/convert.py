"""Conversion: one line turns a model's layers into their quantized forms, one line turns them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from fqt.errors import ConversionError, FqtError
from fqt.nn import coverage, layers, stored
from fqt.nn.attention import QuantizedMultiheadAttention
from fqt.nn.recipe import DEFAULT, Recipe, Rule, load_recipe

Model = TypeVar("Model", bound=nn.Module)

QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: layers.QuantizedLinear,
    nn.Conv1d: layers.QuantizedConv1d,
    nn.Conv2d: layers.QuantizedConv2d,
    nn.Conv3d: layers.QuantizedConv3d,
    nn.ConvTranspose1d: layers.QuantizedConvTranspose1d,
    nn.ConvTranspose2d: layers.QuantizedConvTranspose2d,
    nn.ConvTranspose3d: layers.QuantizedConvTranspose3d,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
}
"""The quantized form of each layer class; a new layer is a new row."""

_FLOAT_FORM = {quantized: plain for plain, quantized in QUANTIZED.items()}
# Modules that multiply by a weight but have no quantized form here: named in every report.
_PRODUCTS_IN_FLOAT = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.Linear, nn.modules.conv._ConvNd)
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
        reason: why it stays as it is; empty if it does not.
        by_request: whether it would stay float even if it could be converted.
    """

    name: str
    module: nn.Module
    recipe: Recipe | None
    reason: str = ""
    by_request: bool = False


def quantize_(
    model: Model, recipe: Recipe | str | Path | Mapping[str, Any] = DEFAULT, *, strict: bool = False
) -> Model:
    """Train this model fully quantized from now on, in place.

    Parameters, their names and the training loop stay what they are. Modules of other kinds that own a matrix
    stay float and are listed by `explain`; one line to the logger "fqt" says how much that is, as a warning if it
    is over a hundredth of the weights that are multiplied and no rule asked for it. State dicts hold each layer's
    recipe beside the weights (`recipe_of`), and so does a Hugging Face model's configuration. Convert a
    `nn.TransformerEncoder` as a whole: the switch that keeps torch's fused inference path from bypassing converted
    layers sits in the encoder.

    Args:
        model: any module.
        recipe: a name ("bhq4"), a `Recipe`, a TOML file, or a mapping with its words.
        strict: whether a layer that would stay float without having been asked to is an error.

    Returns:
        The model.

    Raises:
        FqtError: the recipe is wrong.
        ConversionError: no layer can be converted, a rule selects nothing, or names a layer that cannot be
            converted; with `strict`, a layer would stay float. All problems are listed, and the model is unchanged.
    """
    resolved = load_recipe(recipe)
    if not isinstance(model, nn.Module):
        raise FqtError(f"quantize_ takes a torch.nn.Module, not {type(model).__name__}")
    selections, problems = select(model, resolved)
    if strict:
        problems += [
            f"{s.name or '(model)'!r} would stay float: {s.reason}" for s in coverage.left_float(selections)
        ]
    if problems:
        raise ConversionError("cannot convert the model; nothing was changed:\n  " + "\n  ".join(problems))
    if not any(is_converted(selection.module) for selection in selections):
        stored.compare_configuration(model, resolved)
    for selection in selections:
        if selection.recipe is not None:
            _convert(selection.module, selection.recipe)
    for module in model.modules():
        _set_fast_path(module)
    converted = any(is_converted(selection.module) for selection in selections)
    stored.attach(selection.module for selection in selections)
    stored.write_configuration(model, resolved if converted else None)
    coverage.tell(selections)
    return model


def restore_(model: Model) -> Model:
    """Turn all layers back into torch's own, in place, with the same parameters. Returns the model.

    They still warn when weights are loaded into them that were saved quantized.
    """
    for module in model.modules():
        if is_converted(module):
            _convert(module, load_recipe("none"))
        stored.detach(module, keep_comparing=True)
    for module in model.modules():
        _set_fast_path(module)
    stored.write_configuration(model, None)
    return model


def select(model: nn.Module, recipe: Recipe) -> tuple[list[Selection], list[str]]:
    """What `quantize_` would do with every layer that has products, and the problems it would raise."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    # An attention's output projection is not called as a layer: it belongs to the attention.
    inside_attention = {m.out_proj for m in names if isinstance(m, nn.MultiheadAttention)}
    used: set[Rule] = set()
    selections, problems = [], []
    for module, aliases in names.items():
        rule = next((r for r in recipe.rules if _match_any(r, aliases)), None)
        if module in inside_attention:
            if rule is not None and rule.pattern in aliases:
                problems.append(f"{aliases[0]!r} is part of an attention module: name that module instead")
            continue
        reason = _obstacle(module)
        wanted = recipe if rule is None else load_recipe(rule.recipe)
        asked = rule is not None and not load_recipe(rule.recipe).is_float
        if reason is None:
            selections.append(Selection(aliases[0], module, wanted))
            # A rule in another one's shadow does no harm where both say the same, of a layer with two names.
            used.update(r for r in recipe.rules if rule and r.recipe == rule.recipe and _match_any(r, aliases))
        elif asked and rule is not None and rule.pattern in aliases and not _inside_convertible(module):
            problems.append(f"rule {rule.pattern!r} names a layer that cannot be converted: {reason}")
            used.add(rule)
        elif reason != _NO_PRODUCT:
            selections.append(Selection(aliases[0], module, None, reason, wanted.is_float))
            used.update([rule] if rule and not asked else [])
    for rule in recipe.rules:
        if rule not in used:
            layers_ = ", ".join(repr(s.name) for s in selections if s.recipe is not None) or "none"
            problems.append(f"rule {rule.pattern!r} selects no layer; the layers are: {_shorten(layers_)}")
    if not recipe.is_float and not any(s.recipe is not None for s in selections):
        found = "; ".join(f"{s.name or '(model)'}: {s.reason}" for s in selections) or "it has no products"
        problems.append(f"the model has no layer that can be converted ({_shorten(found)})")
    return selections, problems


_NO_PRODUCT = "it has no product with a weight"


def _inside_convertible(module: nn.Module) -> bool:
    """Whether a container holds a layer that can be converted, so that naming it makes sense."""
    return any(_obstacle(m) is None for m in module.modules() if m is not module)


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
    kind = type(module)
    if is_converted(module):
        return None
    if kind not in QUANTIZED:
        if isinstance(module, (*QUANTIZED, *_PRODUCTS_IN_FLOAT)):
            if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
                return f"{kind.__name__} has no parameters yet: run one batch through the model first"
            return f"{kind.__name__} is not a class fqt has a quantized form of"
        own = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if own and not isinstance(module, _NO_PRODUCT_INSIDE):
            return f"{kind.__name__} has parameters of its own ({', '.join(own)}) that fqt cannot see the use of"
        return _NO_PRODUCT
    if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        return "MultiheadAttention with add_bias_kv or add_zero_attn has no quantized form"
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not a real floating-point tensor"
    return (layers.foreign(weight) or None) if isinstance(weight, torch.Tensor) else None


def is_converted(module: nn.Module) -> bool:
    """Whether this module's products run on quantized operands."""
    return isinstance(module, tuple(_FLOAT_FORM))


def _convert(module: nn.Module, recipe: Recipe) -> None:
    kind = type(module)
    plain = _FLOAT_FORM.get(kind, kind)
    if recipe.is_float:
        if is_converted(module) and kind not in _FLOAT_FORM:
            # torch.nn.utils.parametrize has put a class of its own on top since: rebuild it on the float form.
            members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            plain = type(kind.__name__.replace("Quantized", ""), (_FLOAT_FORM[kind.__bases__[0]],), members)
        module.__class__ = plain
        module.__dict__.pop("fqt_recipe", None)
        module.__dict__.pop("__module__", None)
    else:
        if not is_converted(module):
            module.__class__ = QUANTIZED[plain]
        module.fqt_recipe = recipe  # type: ignore[assignment]
        module.__dict__["__module__"] = "torch.nn"  # by which torch.fx knows a leaf, as the float layer is one


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
