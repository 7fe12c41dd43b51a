"""Conversion in place and back: which layers, by which rule, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fqt
from fqt import FqtError, Recipe, Rule
from fqt.nn import load_recipe

from .cases import LAYERS, Case, equal, gradients, ids, small_net

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def recipes_of(model: nn.Module) -> dict[str, Recipe]:
    return {n: m.fqt_recipe for n, m in model.named_modules() if hasattr(m, "fqt_recipe")}


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_there_and_back(case: Case) -> None:
    layer = case.layer()
    layer.register_forward_hook(lambda *_: None)
    kind, parameters, keys = type(layer), dict(layer.named_parameters()), list(layer.state_dict())
    before, attributes = str(layer), set(vars(layer))
    assert fqt.quantize_(layer, "bhq4") is layer
    assert type(layer) is not kind
    assert isinstance(layer, kind)
    assert list(layer.state_dict()) == keys
    assert all(p is parameters[n] for n, p in layer.named_parameters())
    assert fqt.restore_(layer) is layer
    assert type(layer) is kind
    assert (str(layer), set(vars(layer)), list(layer.state_dict())) == (before, attributes, keys)
    assert all(p is parameters[n] for n, p in layer.named_parameters())
    assert len(layer._forward_hooks) == 1


def test_state_dict_loads_both_ways() -> None:
    plain, quantized = small_net(), fqt.quantize_(small_net(), "psq4")
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1)
    quantized.load_state_dict(plain.state_dict(), strict=True)
    assert all(map(torch.equal, quantized.parameters(), plain.parameters()))
    small_net().load_state_dict(quantized.state_dict(), strict=True)
    small_net().load_state_dict(fqt.restore_(quantized).state_dict(), strict=True)


def test_optimizer_keeps_its_parameters() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fqt.quantize_(model, "psq8")
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(4, 2, 6, 6)).sum().backward()
    optimizer.step()
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


def test_last_conversion_wins_and_none_restores() -> None:
    model = small_net()
    for name in ("psq4", "bhq8", "none", "default"):
        fqt.quantize_(model, name)
        found = recipes_of(model)
        assert set(found) == (set() if name == "none" else {"0", "3", "6"})
        assert all(r == load_recipe(name) for r in found.values())
    fqt.quantize_(model, "none")
    assert [type(m) for m in model] == [type(m) for m in small_net()]
    fqt.restore_(fqt.restore_(model))


def test_default_is_the_default_recipe() -> None:
    assert set(recipes_of(fqt.quantize_(small_net())).values()) == {load_recipe("default")}


class Nested(nn.Module):
    """Blocks with names that are prefixes of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2))})
        self.block1 = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


# rules, and the recipe each layer ends up with
RULES = {
    "exact": ([("head", "none")], {"block.a": "psq4", "block.b.0": "psq4", "block1": "psq4"}),
    "container": ([("block", "none")], {"block1": "psq4", "head": "psq4"}),
    "star": ([("block*", "none")], {"head": "psq4"}),
    "star_spans_dots": ([("*0", "none")], {"block.a": "psq4", "block1": "psq4", "head": "psq4"}),
    "question": ([("block.?", "bhq4")], {"block.a": "bhq4", "block.b.0": "psq4", "block1": "psq4", "head": "psq4"}),
    "first_wins": (
        [("block.a", "none"), ("block", "shq4"), ("*", "qat")],
        {"block.b.0": "shq4", "block1": "qat", "head": "qat"},
    ),
    "set": ([("block.[ab]", "none")], {"block.b.0": "psq4", "block1": "psq4", "head": "psq4"}),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    rules, expected = RULES[name]
    recipe = Recipe(grad_input="psq4", grad_weight="ptq8", rules=[Rule(p, r) for p, r in rules])
    found = recipes_of(fqt.quantize_(Nested(), recipe))
    wanted = {n: load_recipe(r) for n, r in expected.items()}
    assert set(found) == set(wanted)
    for layer, own in found.items():
        fields = ("input", "weight", "grad_input", "grad_weight", "fold")
        assert all(getattr(own, f) == getattr(wanted[layer], f) for f in fields)


def test_rule_on_an_alias_and_on_the_model_itself() -> None:
    model = nn.Module()
    model.encoder = nn.Linear(2, 2)
    model.decoder = model.encoder
    fqt.quantize_(model, Recipe(rules=[Rule("decoder", "bhq4")]))
    assert model.encoder.fqt_recipe == load_recipe("bhq4")
    layer = fqt.quantize_(nn.Linear(2, 2), Recipe(rules=[Rule("*", "shq8")]))
    assert layer.fqt_recipe == load_recipe("shq8")


def test_same_module_twice() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(5, 4)
    truth = gradients(model, x)
    mine = gradients(fqt.quantize_(model, "qat"), x)
    for a, b in zip(mine, truth, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm()
    fqt.quantize_(model, "psq4")
    assert not equal(gradients(model, x), gradients(model, x))


def test_same_parameter_in_two_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(5, 4)
    truth = gradients(model, x)
    fqt.quantize_(model, "qat")
    assert model[2].weight is model[0].weight
    assert len(list(model.parameters())) == 1
    for a, b in zip(gradients(model, x), truth, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm()
    assert fqt.restore_(model)[2].weight is model[0].weight


def test_from_file_and_mapping(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "bhq5"\n[[rules]]\npattern = "0"\nrecipe = "none"\n')
    for source in (path, str(path), {"base": "bhq5", "rules": [{"pattern": "0", "recipe": "none"}]}):
        assert set(recipes_of(fqt.quantize_(small_net(), source))) == {"3", "6"}


def test_hooks_still_run() -> None:
    layer = fqt.quantize_(nn.Linear(3, 2), "psq8")
    seen = []
    layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
    layer.register_forward_hook(lambda *_: seen.append("post"))
    layer.register_full_backward_hook(lambda *_: seen.append("back"))
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert seen == ["pre", "post", "back"]


def test_pruning_keeps_working() -> None:
    """It recomputes `weight` in a hook before every forward, and keeps the layer's class."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    prune.random_unstructured(layer, "weight", amount=0.5)
    fqt.quantize_(layer, "psq8")
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.weight_orig.grad.isfinite().all()
    assert (layer.weight_orig.grad == 0).sum() == 6


def test_layers_and_mixed_recipes_print_what_they_are() -> None:
    class Own(nn.Linear):
        def extra_repr(self) -> str:
            return "of one's own"

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Own(4, 2), nn.Linear(2, 2))
    recipe = load_recipe({"base": "shq4d", "rules": [Rule("0", "none"), Rule("1", "psq8"), Rule("3", "psq8")]})
    assert str(recipe) == "shq4d; none for 0; psq8 for 1, 3"
    fqt.quantize_(model, recipe)
    assert str(fqt.recipe_of(model)) == "none; psq8 for 1, 3; shq4d for 2"
    assert [repr(layer) for layer in model] == [
        "Linear(in_features=4, out_features=4, bias=True)",
        "QuantizedLinear(in_features=4, out_features=4, bias=True, recipe=psq8)",
        "QuantizedOwn(of one's own, recipe=shq4d)",
        "QuantizedLinear(in_features=2, out_features=2, bias=True, recipe=psq8)",
    ]
    assert "recipe" not in repr(fqt.restore_(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_asks_for_the_restored_model() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Conv2d(2, 3, 1), nn.MultiheadAttention(4, 2)), "psq8")
    for module in (model, *model):
        with pytest.raises(FqtError, match="restore_"):
            torch.jit.script(module)
    torch.jit.script(fqt.restore_(model)[0])


@pytest.mark.parametrize("function", [fqt.quantize_, fqt.restore_, fqt.compress_, fqt.explain])
def test_what_is_no_model_is_named_by_its_type(function: Callable[..., object]) -> None:
    with pytest.raises(FqtError, match=r"^\w+ takes the model first, a torch.nn.Module, not str$"):
        function("psq8")
    if function is fqt.quantize_:  # arguments swapped
        with pytest.raises(FqtError, match=r"not str$"):
            function("psq8", nn.Linear(2, 2))


@pytest.mark.parametrize("filter_fn", ["0", lambda module: True, lambda module, name, more: True])
def test_a_filter_of_other_arguments_is_refused(filter_fn: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(FqtError, match=r"filter_fn\(module, name\): "):
        fqt.quantize_(model, filter_fn=filter_fn)
    assert type(model[0]) is nn.Linear
    assert type(fqt.quantize_(model, filter_fn=lambda *both: True)[0]) is not nn.Linear
