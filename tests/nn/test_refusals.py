"""What cannot be converted: named by a rule it is an error before anything changes, otherwise it is reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

import fqt
from fqt import ConversionError, FqtError, Recipe, Rule


class MyLinear(nn.Linear):
    """A forward of one's own may compute anything."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


class MyAttention(nn.MultiheadAttention):
    """A forward of one's own, with a layer of its own."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.adapter = nn.Linear(4, 4)

    def forward(self, query: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        return self.adapter(super().forward(query, *args)[0])


class BareAttention(nn.MultiheadAttention):
    """A forward of one's own, without one."""

    def __init__(self) -> None:
        super().__init__(4, 2)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return super().forward(*args)[0]


def _two(layer: nn.Linear) -> nn.Linear:
    """A weight of a class that multiplies in its own way."""
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()))
    return layer


LEFT: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(3, 3),
    "GRU": lambda: nn.GRU(3, 3),
    "RNN": lambda: nn.RNN(3, 3),
    "LSTMCell": lambda: nn.LSTMCell(3, 3),
    "Bilinear": lambda: nn.Bilinear(3, 3, 2),
    "MyLinear": lambda: MyLinear(3, 3),
    "LazyLinear": lambda: nn.LazyLinear(3),
    "LazyConv2d": lambda: nn.LazyConv2d(3, 1),
    "LazyConvTranspose1d": lambda: nn.LazyConvTranspose1d(3, 1),
    "complex64": lambda: nn.Linear(3, 3, dtype=torch.complex64),
    "add_bias_kv": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "add_zero_attn": lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True),
    "BareAttention": BareAttention,
    "TwoTensor": lambda: _two(nn.Linear(3, 3)),
}


def rows(model: nn.Module, layer: str) -> list:
    return [p for p in fqt.explain(model).products if p.layer == layer]


def snapshot(model: nn.Module) -> list:
    return [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", LEFT)
def test_left_alone_and_reported(kind: str) -> None:
    model = nn.ModuleDict({"odd": LEFT[kind](), "plain": nn.Linear(3, 3)})
    before = snapshot(model["odd"])
    fqt.quantize_(model, "psq4")
    assert snapshot(model["odd"]) == before
    (row,) = rows(model, "odd")
    assert (row.product, row.arithmetic) == ("all", "float")
    assert kind in row.why
    assert "\n" not in row.why
    assert kind in str(fqt.explain(model))
    assert len(rows(model, "plain")) == 3


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", LEFT)
def test_named_by_a_rule_it_is_an_error(kind: str) -> None:
    model = nn.ModuleDict({"odd": LEFT[kind](), "plain": nn.Linear(3, 3)})
    if kind == "MyAttention":
        del model["odd"].adapter
    before = snapshot(model)
    with pytest.raises(ConversionError, match="odd") as error:
        fqt.quantize_(model, Recipe(rules=[Rule("odd", "psq4")]))
    assert kind in str(error.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["LSTM", "MyLinear", "BareAttention"])
def test_the_whole_model_is_one_such_layer(kind: str) -> None:
    model = LEFT[kind]()
    with pytest.raises(ConversionError, match=kind):
        fqt.quantize_(model, "psq4")
    assert kind in str(fqt.explain(model))


def test_a_subclass_of_attention_does_not_hide_its_layers() -> None:
    """Its own layer is either converted or reported; skipped silently it must not be."""
    model = fqt.quantize_(nn.ModuleDict({"odd": MyAttention()}), "psq4")
    assert rows(model, "odd.adapter")


class Double(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


def test_explain_sees_a_layer_parametrized_after_conversion() -> None:
    """Its class changes under us: the report says what really runs."""
    layer, x = fqt.quantize_(nn.Linear(16, 16), "ptq2"), torch.randn(8, 16)
    parametrize.register_parametrization(layer, "weight", Double())
    quantized = not torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    says_float = all(p.arithmetic == "float" for p in fqt.explain(layer).products)
    assert quantized != says_float


def test_restore_reaches_a_layer_parametrized_after_conversion() -> None:
    layer, x = fqt.quantize_(nn.Linear(16, 16), "ptq2"), torch.randn(8, 16)
    parametrize.register_parametrization(layer, "weight", Double())
    fqt.restore_(layer)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_every_problem_at_once_and_nothing_changed() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "lstm": nn.LSTM(2, 2), "b": nn.Bilinear(2, 2, 2)})
    before = snapshot(model)
    named = {"lstm": "psq4", "b": "ptq8", "decoder.*": "none", "a": "bhq4", "A": "qat"}
    rules = [Rule(pattern, recipe) for pattern, recipe in named.items()]
    with pytest.raises(ConversionError) as error:
        fqt.quantize_(model, Recipe(rules=rules))
    head, *lines = str(error.value).splitlines()
    assert "nothing was changed" in head
    assert len(lines) == 4
    for word in ("'lstm'", "'b'", "'decoder.*'", "'A'"):
        assert sum(word in line for line in lines) == 1
    assert "'a'" in next(line for line in lines if "decoder" in line)  # it says which layers there are
    assert snapshot(model) == before


@pytest.mark.parametrize("pattern", ["nothing", "0.*", "", "1", "2", "*.weight"])
def test_a_rule_that_matches_no_layer(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout())
    with pytest.raises(FqtError, match="pattern" if pattern == "" else "rule"):
        fqt.quantize_(model, Recipe(rules=[Rule(pattern, "psq4")]))
    assert type(model[0]) is nn.Linear


def test_a_rule_in_another_ones_shadow() -> None:
    with pytest.raises(ConversionError, match="'0'"):
        fqt.quantize_(nn.Sequential(nn.Linear(2, 2)), Recipe(rules=[Rule("*", "psq4"), Rule("0", "none")]))


def test_a_rule_may_leave_out_what_stays_float_anyway() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(2, 2), "a": nn.Linear(2, 2)})
    fqt.quantize_(model, Recipe(rules=[Rule("lstm", "none")]))
    assert hasattr(model["a"], "fqt_recipe")


def test_a_container_with_an_odd_layer_inside() -> None:
    model = nn.ModuleDict({"enc": nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))})
    fqt.quantize_(model, Recipe(rules=[Rule("enc", "psq4")]))
    assert hasattr(model["enc"][0], "fqt_recipe")
    assert rows(model, "enc.1")


@pytest.mark.parametrize("thing", [torch.zeros(3), "psq4", None, nn.Linear])
def test_not_a_model(thing: object) -> None:
    with pytest.raises(FqtError, match=r"torch\.nn\.Module"):
        fqt.quantize_(thing, "psq4")


@pytest.mark.parametrize("recipe", ["psq", "psq9", "int8", "", "bhq4z", 3, None, {"grad": "psq4"}, {"base": "x"}])
def test_a_bad_recipe_changes_nothing(recipe: object) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(FqtError) as error:
        fqt.quantize_(model, recipe)
    assert "\n" not in str(error.value)
    assert type(model[0]) is nn.Linear


def test_a_model_without_layers_to_convert() -> None:
    """Training in float unnoticed is what nobody wants; "none" asks for nothing."""
    with pytest.raises(ConversionError, match="no layer that can be converted"):
        fqt.quantize_(nn.Sequential(nn.ReLU(), MyLinear(2, 2)), "bhq4")
    fqt.quantize_(nn.Sequential(nn.ReLU()), "none")


def test_a_matrix_of_ones_own_is_reported() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(2, 2))

    model = fqt.quantize_(nn.ModuleDict({"own": Own(), "a": nn.Linear(2, 2), "e": nn.Embedding(3, 2)}), "psq4")
    (row,) = rows(model, "own")
    assert "matrix" in row.why
    assert not rows(model, "e")


def test_another_recipe_for_a_layer_parametrized_after_conversion() -> None:
    layer = fqt.quantize_(nn.Linear(16, 16), "psq4")
    parametrize.register_parametrization(layer, "weight", Double())
    fqt.quantize_(layer, "bhq2")
    assert layer.fqt_recipe.operand("grad_input").grid.bits == 2


class Packed(torch.Tensor):
    """A weight whose class stands for int8 data, as libraries that quantize weights have them."""

    def __new__(cls, codes: torch.Tensor) -> Packed:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes = codes
        return made

    @classmethod
    def __torch_dispatch__(cls, op: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        if op is torch.ops.aten.detach.default:
            return Packed(args[0].codes)
        raise NotImplementedError(op)


class Tagged(nn.Parameter):
    """A parameter with a class of its own that is a plain tensor."""


def packed() -> nn.Parameter:
    return nn.Parameter(Packed(torch.ones(3, 3, dtype=torch.int8)), requires_grad=False)


def test_a_weight_that_holds_no_floats_is_left_alone() -> None:
    model = nn.ModuleDict({"odd": nn.Linear(3, 3), "plain": nn.Linear(3, 3)})
    model["odd"].weight = packed()
    fqt.quantize_(model, "psq4")
    assert type(model["odd"]) is nn.Linear
    (row,) = rows(model, "odd")
    assert "Packed" in row.why
    with pytest.raises(ConversionError, match="Packed"):
        fqt.quantize_(model, Recipe(rules=[Rule("odd", "psq4")]))


def test_a_weight_that_lost_its_floats_after_conversion() -> None:
    layer = fqt.quantize_(nn.Linear(3, 3), "psq4")
    layer.weight = packed()
    with pytest.raises(FqtError, match=r"Packed.*fqt\.restore_"):
        layer(torch.ones(2, 3))


def test_a_plain_subclass_of_parameter_is_converted() -> None:
    layer = nn.Linear(3, 3)
    layer.weight = Tagged(layer.weight.detach())
    fqt.quantize_(layer, "psq4")(torch.ones(2, 3)).sum().backward()
    assert layer.weight.grad is not None
