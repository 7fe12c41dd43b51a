"""The recipe beside the weights: written into a state dict by value, compared when one is loaded, and read back.

A state dict's keys stay those of the float model. What layers were quantized with goes where torch keeps the
versions of modules: `state_dict()._metadata`, which `torch.save` writes and `torch.load(weights_only=True)` reads.
Formats that keep tensors only (safetensors) and plain copies of the dictionary lose it; a Hugging Face model's
configuration, which is saved as JSON beside them, holds the recipe too.

A float model that has never met `quantize_` cannot know that what it loads was trained quantized: torch ignores
metadata it does not know, and to change that would be to change torch for everybody. `recipe_of` is how to ask.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError, RecipeWarning
from fqt.nn import ranges
from fqt.nn.recipe import Recipe, Rule, dump_recipe, load_recipe
from fqt.nn.wrappers import bare, named_modules, unwrapped

KEY = "fqt_recipe"
"""Of a layer's own metadata, and of a Hugging Face configuration: the mapping of `dump_recipe`."""


def recipe_of(source: nn.Module | Mapping[str, Any]) -> Recipe:
    """The recipe that makes a float model quantized as this one is, or as the one was that was saved.

    >>> import fqt, torch
    >>> saved = fqt.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 2)), "bhq4").state_dict()
    >>> fresh = fqt.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 2)), fqt.recipe_of(saved))
    >>> print(fqt.recipe_of(fresh))
    bhq4

    Args:
        source: a model, or what its `state_dict()` returned, saved and loaded or not. Of a Hugging Face model
            without converted layers, what its configuration says that it was. Names in the state dict of a compiled
            model are the model's own; of a `DistributedDataParallel` call torch's
            `consume_prefix_in_state_dict_if_present` on it first.

    Returns:
        One recipe without rules where all layers had the same; else a rule by name for every layer that was
        quantized, on top of "none". Other layers stay float.

    Raises:
        FqtError: the model has not met `quantize_`, nor had the one that was saved (one that met it with "none"
            says "none"), or was restored; the mapping has no metadata (torch's own state dicts do); a recipe cannot
            be read.
    """
    if isinstance(source, nn.Module):
        return _of_model(source)
    if not _has_metadata(source):
        inside = (f"pass checkpoint[{key!r}]" for key, value in _items(source) if _has_metadata(value))
        raise FqtError(
            "recipe_of takes a model or its state dict as model.state_dict() or torch.load returned it; this "
            f"{type(source).__name__} has no metadata, where the recipe is kept: "
            + next(inside, "safetensors and copies, such as those without their prefixes, lose it")
        )
    metadata: Mapping[str, Any] = source._metadata  # type: ignore[attr-defined]
    found = {bare(name): load_recipe(entry[KEY]) for name, entry in metadata.items() if KEY in entry}
    if not found:
        raise FqtError(
            "the state dict holds no recipe: the model that it was saved from had not met fqt.quantize_, or was "
            "restored; give quantize_ a recipe by name"
        )
    matrices = (key for key, value in source.items() if isinstance(value, Tensor) and value.ndim > 1)
    return _assemble(found, (bare(key.rpartition(".")[0]) for key in matrices))


def _items(source: Any) -> Iterable[tuple[Any, Any]]:
    return source.items() if isinstance(source, Mapping) else ()


def _has_metadata(value: Any) -> bool:
    return isinstance(getattr(value, "_metadata", None), Mapping)


def _of_model(model: nn.Module) -> Recipe:
    found = {name: own_recipe(module) for name, module in named_modules(model) if _met(module)}
    if all(recipe.is_float for recipe in found.values()):
        config = configured_recipe(model)
        if config is None and not found:
            raise FqtError(
                "the model holds no recipe: it has not met fqt.quantize_, or was restored, and its configuration "
                "names none (a folder of adapters holds none, either); give quantize_ a recipe by name"
            )
        return config or load_recipe("none")
    matrices = (name for name, module in named_modules(model) if any(p.ndim > 1 for p in module.parameters(False)))
    return _assemble(found, matrices)


def _assemble(found: Mapping[str, Recipe], with_matrices: Iterable[str]) -> Recipe:
    """One recipe from those of layers: `with_matrices` names the modules that could have been converted too."""
    found = {name: recipe for name, recipe in found.items() if not recipe.is_float}
    if not found:
        return load_recipe("none")
    if "" in found:
        return found[""]
    others = [name for name in with_matrices if not any(_within(name, layer) for layer in found)]
    if not others and len(set(found.values())) == 1:
        return next(iter(found.values()))
    rules = tuple(Rule(literal(name), recipe) for name, recipe in found.items())
    return replace(load_recipe("none"), rules=rules)


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(layer + ".")


def literal(name: str) -> str:
    """The pattern that only this name matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _met(module: nn.Module) -> bool:
    """Whether a layer is converted, or met `quantize_` and was left float."""
    return KEY in module.__dict__ or _write in module._state_dict_hooks.values()


def own_recipe(module: nn.Module) -> Recipe:
    """A layer's recipe without the rules for others."""
    recipe = module.__dict__.get(KEY) or load_recipe("none")
    return replace(recipe, rules=()) if recipe.rules else recipe


def _is(recipe: Recipe, saved: Any) -> bool:
    """Whether this is what was saved: the same words, or others for the same (of another version, say).

    The words alone decide where they cannot be read, or lead to a class of one's own that was defined again.
    """
    return dump_recipe(recipe) == saved or _readable(saved) == recipe


def _readable(saved: Any) -> Any:
    """The recipe that was saved; the words as they are if this version cannot read them."""
    try:
        return load_recipe(saved)
    except FqtError:
        return saved


# ---- state dicts ---------------------------------------------------------------------------------------------


def attach(layers: Iterable[nn.Module]) -> None:
    """From now on these layers write the recipe they have into state dicts, and compare what they load.

    All layers of one call share one comparison, which warns once per load.
    """
    compare = _Compare()
    for layer in layers:
        if isinstance(layer, torch.jit.ScriptModule):
            continue  # takes no hooks, and is never converted
        detach(layer)
        layer.register_state_dict_post_hook(_write)
        layer.register_load_state_dict_pre_hook(compare)


def detach(layer: nn.Module, keep_comparing: bool = False) -> None:
    """Takes back what `attach` did; with `keep_comparing`, all but the comparison."""
    if isinstance(layer, torch.jit.ScriptModule):
        return
    hooks = layer._state_dict_hooks
    for key in [key for key, hook in hooks.items() if hook is _write]:
        del hooks[key]
    loading = layer._load_state_dict_pre_hooks
    for key in [key for key, hook in loading.items() if isinstance(getattr(hook, "hook", None), _Compare)]:
        if not keep_comparing:
            del loading[key]


def without_recipe(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The same tensors, to be loaded under another recipe on purpose: nothing is compared."""
    copy, metadata = OrderedDict(state_dict), getattr(state_dict, "_metadata", None)
    if metadata is not None:
        kept = {name: {k: v for k, v in entry.items() if k != KEY} for name, entry in metadata.items()}
        copy._metadata = kept  # type: ignore[attr-defined]
    return copy


def _write(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    local_metadata[KEY] = dump_recipe(own_recipe(module))


class _Compare:
    """Warns where weights were saved under another recipe than that of the layer they go into.

    What they remember of ranges is not the other recipe's: it is left out, and this one's starts anew.
    """

    def __init__(self) -> None:
        self._load: list[str] | None = None  # torch hands one list of missing keys to all layers of a load

    def __call__(
        self,
        module: nn.Module,
        state_dict: Any,
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        *_: Any,
    ) -> None:
        ranges.fit(module, state_dict, prefix)
        if KEY not in local_metadata or missing_keys is self._load:
            return
        saved = local_metadata[KEY]
        own = own_recipe(module) if KEY in module.__dict__ else None
        recipe = _readable(saved)
        if (own is not None and _is(own, saved)) or (isinstance(recipe, Recipe) and recipe.is_float):
            return
        self._load = missing_keys
        warnings.warn(
            f"fqt: weights saved from a model quantized with {_readable(saved)} go into "
            f"{'a float layer' if own is None else f'one quantized with {own}'} ({prefix[:-1] or 'the model'}, and "
            "perhaps others); fqt.quantize_(model, fqt.recipe_of(state_dict)) makes it what it was",
            RecipeWarning,
            stacklevel=_callers_level(),
        )

    def __deepcopy__(self, memo: Any) -> _Compare:
        return _Compare()

    def __reduce__(self) -> tuple[Any, ...]:
        # A layer that was restored is torch's own: pickled, it must not ask for this library. What it gets
        # instead takes any arguments and does nothing.
        return getattr, ("", "format")


def _callers_level() -> int:
    """How far up the stack the first frame outside torch and this file is, for `warnings.warn`."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "torch":
        frame, level = frame.f_back, level + 1
    return level


# ---- Hugging Face configurations -----------------------------------------------------------------------------


def _configuration(model: nn.Module) -> Any:
    """The model's configuration if it is one that is saved beside the weights, else None."""
    config = getattr(unwrapped(model), "config", None)
    saved = (getattr(config, method, None) for method in ("to_dict", "save_pretrained"))
    return config if all(map(callable, saved)) else None


def configured_recipe(model: nn.Module) -> Recipe | None:
    """What a Hugging Face model's configuration says that it was converted with; None if it says nothing."""
    saved = getattr(_configuration(model), KEY, None)
    return None if saved is None else load_recipe(saved)


def stored_in_configuration(model: nn.Module) -> bool:
    """Whether a Hugging Face model's configuration holds a recipe."""
    return getattr(_configuration(model), KEY, None) is not None


def compare_configuration(model: nn.Module, recipe: Recipe) -> None:
    """Warns if weights that came with one recipe are about to be quantized with another."""
    saved = getattr(_configuration(model), KEY, None)
    if saved is None:
        return
    if not _is(recipe, saved):
        warnings.warn(
            "fqt: the model's configuration says that its weights were trained quantized with "
            f"{_readable(saved)}, "
            f"and it gets {recipe}; fqt.quantize_(model, fqt.recipe_of(model)) makes it what it was",
            RecipeWarning,
            stacklevel=3,
        )


def write_configuration(model: nn.Module, recipe: Recipe | None) -> None:
    """Puts the recipe into a Hugging Face model's configuration, as plain values, or takes it out."""
    config = _configuration(model)
    if config is None:
        return
    if recipe is not None:
        setattr(config, KEY, dump_recipe(recipe))
    elif hasattr(config, KEY):
        delattr(config, KEY)
