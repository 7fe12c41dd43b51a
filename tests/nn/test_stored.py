"""The recipe beside the weights: in state dicts, in a Hugging Face configuration, and read back from both."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fqt
from fqt import FqtError, Recipe, RecipeWarning, Rule
from fqt.nn import dump_recipe, load_recipe

from .cases import small_net

MIXED = Recipe(grad_input="psq4", grad_weight="ptq8", rules=[Rule("3", "bhq5"), Rule("6", "none")])


def saved(model: nn.Module) -> dict[str, Any]:
    """Through a file, as it would be read by default."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def recipes(model: nn.Module) -> dict[str, dict]:
    return {
        name: {k: v for k, v in dump_recipe(m.fqt_recipe).items() if k != "rules"}
        for name, m in model.named_modules()
        if "fqt_recipe" in vars(m)
    }


def test_the_keys_are_those_of_the_float_model() -> None:
    state = saved(fqt.quantize_(small_net(), "bhq4"))
    assert list(state) == list(small_net().state_dict())
    small_net().load_state_dict(state, strict=True)


@pytest.mark.parametrize("recipe", ["qat", "bhq4", "default", MIXED], ids=["qat", "bhq4", "default", "mixed"])
def test_a_fresh_model_becomes_what_was_saved(recipe: str | Recipe) -> None:
    model = fqt.quantize_(small_net(), recipe)
    for source in (model, model.state_dict(), saved(model), copy.deepcopy(model)):
        found = fqt.recipe_of(source)
        fresh = fqt.quantize_(small_net(), found)
        assert recipes(fresh) == recipes(model)
        fresh.load_state_dict(saved(model))  # warnings are errors: there is none
    if isinstance(recipe, str):
        assert found == load_recipe(recipe)


def test_what_was_not_converted_stays_float() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "psq4")
    model.append(nn.Linear(2, 2))
    fresh = fqt.quantize_(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), fqt.recipe_of(saved(model)))
    assert set(recipes(fresh)) == {"0", "1"}


def odd_names() -> nn.Module:
    shared = nn.Linear(4, 4)
    return nn.ModuleDict(
        {
            "a[0]": nn.Linear(4, 4),
            "a": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "one": shared,
            "two": shared,
            "table": nn.Embedding(3, 4),
        }
    )


def test_odd_names_aliases_and_attention() -> None:
    rules = [Rule("a", "none"), Rule("attention", "bhq3"), Rule("*", "shq4")]
    model = fqt.quantize_(odd_names(), Recipe(rules=rules))
    for source in (model, saved(model)):
        assert recipes(fqt.quantize_(odd_names(), fqt.recipe_of(source))) == recipes(model)
    whole = fqt.quantize_(nn.MultiheadAttention(4, 2), "bhq3")
    assert fqt.recipe_of(saved(whole)) == load_recipe("bhq3")


def test_the_recipe_is_the_one_at_the_time_of_saving() -> None:
    model = fqt.quantize_(small_net(), "bhq4")
    fqt.quantize_(model, "shq3")
    assert fqt.recipe_of(saved(model)) == load_recipe("shq3")
    fqt.restore_(model)
    for source in (model, saved(model)):
        with pytest.raises(FqtError, match="holds no recipe"):
            fqt.recipe_of(source)


def test_none_is_a_recipe_too() -> None:
    """Of a model that it was given to, saved or not; another one has no recipe."""
    model = fqt.quantize_(small_net(), "none")
    for source in (model, copy.deepcopy(model), saved(model)):
        assert fqt.recipe_of(source) == load_recipe("none")
    fqt.quantize_(small_net(), "psq4").load_state_dict(saved(model))  # float weights are no reason to warn
    model.load_state_dict(saved(small_net()))


def test_a_part_of_a_model_and_a_model_that_is_a_part() -> None:
    model = nn.Sequential(fqt.quantize_(small_net(), "bhq4"))
    assert fqt.recipe_of(saved(model[0])) == load_recipe("bhq4")
    assert fqt.recipe_of(saved(model)) == load_recipe("bhq4")
    with pytest.warns(RecipeWarning, match="bhq4"):
        nn.Sequential(fqt.quantize_(small_net(), "psq4")).load_state_dict(saved(model))


def test_sources_without_a_recipe() -> None:
    for source in (small_net(), small_net().state_dict()):
        with pytest.raises(FqtError, match=r"holds no recipe: .* give quantize_ a recipe by name") as error:
            fqt.recipe_of(source)
        assert "\n" not in str(error.value)
    for source in ({}, dict(fqt.quantize_(small_net(), "bhq4").state_dict()), {"model": small_net().state_dict()}):
        with pytest.raises(FqtError, match="metadata") as error:
            fqt.recipe_of(source)
        assert "\n" not in str(error.value)
        assert ("pass checkpoint['model']" in str(error.value)) == ("model" in source)


LOADS = {
    "another recipe": (lambda: fqt.quantize_(small_net(), "psq4"), "go into one quantized with psq4"),
    "restored": (lambda: fqt.restore_(fqt.quantize_(small_net(), "bhq4")), "go into a float layer"),
    "left out": (lambda: fqt.quantize_(small_net(), {"rules": [{"pattern": "3", "recipe": "none"}]}), "go into"),
    "none": (lambda: fqt.quantize_(small_net(), "none"), "go into a float layer"),
    "a copy": (lambda: copy.deepcopy(fqt.quantize_(small_net(), "psq4")), "quantized with psq4"),
}


@pytest.mark.parametrize("name", LOADS)
def test_loading_into_something_else_warns_once(name: str) -> None:
    make, words = LOADS[name]
    model, state = make(), saved(fqt.quantize_(small_net(), "bhq4"))
    for _ in range(2):
        with pytest.warns(RecipeWarning) as caught:
            model.load_state_dict(state)
        assert len(caught) == 1
        text = str(caught[0].message)
        assert "\n" not in text
        assert "bhq4" in text
        assert words in text
        assert "recipe_of" in text
        assert caught[0].filename == __file__
    assert all(map(torch.equal, model.state_dict().values(), state.values()))


def test_float_weights_and_the_same_recipe_are_no_reason_to_warn() -> None:
    fqt.quantize_(small_net(), "bhq4").load_state_dict(saved(small_net()))
    state = saved(fqt.quantize_(small_net(), MIXED))
    fqt.quantize_(small_net(), MIXED).load_state_dict(state)
    # Rules that come to the same.
    same = Recipe(input=None, weight=None, rules=[Rule("0", "psq4"), Rule("3", "bhq5")])
    fqt.quantize_(small_net(), same).load_state_dict(state)


def test_a_recipe_of_a_later_version_warns_and_loads() -> None:
    state = saved(fqt.quantize_(small_net(), "bhq4"))
    for entry in state._metadata.values():
        if "fqt_recipe" in entry:
            entry["fqt_recipe"]["sparkle"] = "always"
    with pytest.warns(RecipeWarning, match="sparkle"):
        fqt.quantize_(small_net(), "bhq4").load_state_dict(state)
    with pytest.raises(FqtError, match="sparkle"):
        fqt.recipe_of(state)


@pytest.mark.filterwarnings("ignore:You are using")
def test_whole_pickles_go_on() -> None:
    model = pickle.loads(pickle.dumps(fqt.quantize_(small_net(), "bhq4")))
    assert fqt.recipe_of(saved(model)) == load_recipe("bhq4")
    plain = pickle.loads(pickle.dumps(fqt.restore_(model)))
    plain.load_state_dict(saved(fqt.quantize_(small_net(), "bhq4")))


def test_a_restored_model_is_unpickled_without_this_library() -> None:
    data = pickle.dumps(fqt.restore_(fqt.quantize_(small_net(), "bhq4")))
    assert b"fqt" not in data


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_that_take_no_hooks() -> None:
    model = nn.ModuleDict({"script": torch.jit.script(Own()), "a": nn.Linear(2, 2)})
    fqt.restore_(fqt.quantize_(model, "psq4"))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix


class Config:
    """As much of a Hugging Face configuration as matters."""

    def __init__(self, **words: Any) -> None:
        vars(self).update(words)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError


class Pretrained(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.net = config, small_net()


def test_a_configuration_holds_the_recipe_as_json() -> None:
    model = fqt.quantize_(Pretrained(Config(width=4)), Recipe(rules=[Rule("net.0", "none"), Rule("*", "shq4d")]))
    words = json.loads(json.dumps(model.config.to_dict()))
    fresh = Pretrained(Config(**words))
    assert "configuration says" in str(fqt.explain(fresh))
    assert recipes(fqt.quantize_(fresh, fqt.recipe_of(fresh))) == recipes(model)
    assert "configuration says" not in str(fqt.explain(fresh))
    fqt.restore_(fresh)
    assert fresh.config.to_dict() == {"width": 4}
    fqt.quantize_(model, "none")
    assert model.config.to_dict() == {"width": 4}


class Nested(nn.Linear):
    """A layer that holds another one."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inside = nn.Linear(4, 4)


FILTERS: dict[str, tuple[str | Recipe, Any]] = {
    "one layer": ("psq4", lambda name: name != "net.3"),
    "under rules": (
        Recipe(grad_input="psq4", rules=[Rule("net.0", "bhq4"), Rule("*.3", "shq3"), Rule("net.6", "none")]),
        lambda name: name != "net.3",  # whose rule has then no layer
    ),
    "nearly all": ("default", lambda name: name == "net.6"),
    "around a layer": ("psq4", lambda name: name != "nested"),
    "nothing": ("psq4", lambda name: True),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_configuration_knows_what_a_filter_left_out(name: str) -> None:
    """As the state dict does: both make the same model of a float one."""

    def fresh(config: Config) -> nn.Module:
        model = Pretrained(config)
        model.nested = Nested()
        return model

    recipe, keep = FILTERS[name]
    model = fqt.quantize_(fresh(Config()), recipe, filter_fn=lambda _, layer: keep(layer))
    again = fresh(Config(**json.loads(json.dumps(model.config.to_dict()))))
    assert "configuration says" in str(fqt.explain(again))
    fqt.quantize_(again, fqt.recipe_of(again))
    assert recipes(again) == recipes(model)
    assert again.config.to_dict() == model.config.to_dict()
    by_hand = fresh(Config(**model.config.to_dict()))
    fqt.quantize_(by_hand, recipe, filter_fn=lambda _, layer: keep(layer))  # the same again is no reason to warn
    assert recipes(by_hand) == recipes(model)
    with_weights = fqt.quantize_(fresh(Config()), fqt.recipe_of(saved(model)))
    assert recipes(with_weights) == recipes(model)


def test_a_filter_that_leaves_a_layer_what_it_was() -> None:
    model = fqt.quantize_(Pretrained(Config()), "shq4")
    fqt.quantize_(model, "psq4", filter_fn=lambda _, layer: layer != "net.3")
    again = Pretrained(Config(**model.config.to_dict()))
    assert recipes(fqt.quantize_(again, fqt.recipe_of(again))) == recipes(model)
    assert recipes(again)["net.3"]["grad_input"] == "shq4"


def test_a_configuration_that_says_otherwise() -> None:
    model = fqt.quantize_(Pretrained(Config()), "bhq4")
    fqt.quantize_(model, "psq4")  # a converted model may get another recipe
    with pytest.warns(RecipeWarning, match="quantized with psq4, and it gets shq4") as caught:
        fqt.quantize_(Pretrained(Config(**model.config.to_dict())), "shq4")
    assert caught[0].filename == __file__
    later = {**model.config.to_dict()["fqt_recipe"], "sparkle": 1}
    with pytest.warns(RecipeWarning, match="sparkle"):
        fqt.quantize_(Pretrained(Config(fqt_recipe=later)), "shq4")


def test_other_configurations_are_left_alone() -> None:
    model = Pretrained(Config())
    model.config = {"width": 4}  # type: ignore[assignment]
    fqt.restore_(fqt.quantize_(model, "bhq4"))
    assert model.config == {"width": 4}


def test_a_parametrized_layer_keeps_its_recipe() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(3, 3)), "bhq4")
    parametrizations.weight_norm(model[0])
    assert fqt.recipe_of(saved(model)) == load_recipe("bhq4")


def test_warnings_can_be_silenced_by_their_class() -> None:
    state = saved(fqt.quantize_(small_net(), "bhq4"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecipeWarning)
        fqt.quantize_(small_net(), "psq4").load_state_dict(state)


def test_the_state_dict_of_a_compiled_model_names_its_own_layers() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), "psq4")
    fqt.restore_(model[2])
    wrapped = torch.compile(model, backend="eager")
    found = fqt.recipe_of(wrapped.state_dict())
    assert found == fqt.recipe_of(model)
    assert [rule.pattern for rule in found.rules] == ["0"]
