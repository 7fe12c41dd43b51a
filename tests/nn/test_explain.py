"""The report: a row per product, what it computes on, and a reason that is true."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import fqt
from fqt import Recipe
from fqt.kernels import Status, integer
from fqt.kernels.cpu import fused, library
from fqt.kernels.integer import machine_obstacle

from .cases import q, small_net

LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Conv2d(4, 4, 3),
    "grouped": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "wide groups": lambda: nn.Conv2d(64, 96, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(20, 20, 3, groups=20),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
    "padded by a stride": lambda: nn.ConvTranspose2d(4, 4, 3, dilation=3, output_padding=2),
    "volume": lambda: nn.Conv3d(4, 4, 3),
}
ROWS = Recipe(input="psq8", weight="psq8", grad_input="psq4", grad_weight="psq4")
COLUMN = q("column", axis="sample")
SYMMETRIC = q("row", "symmetric", "token", rounding="nearest")
FOLDED = {"grad_input": "psq4", "grad_weight": "psq4@channel", "fold": "always"}
INTEGER, OBSTACLE = "both operands are integer codes", "contracted"
# layer, recipe, product, a word of the reason
TABLE = [
    ("linear", "psq4", "output", INTEGER),
    ("linear", "psq4", "grad_input", INTEGER),
    ("linear", "psq4", "grad_weight", INTEGER),
    ("conv", "bhq4d", "grad_input", INTEGER),
    ("conv", "default", "grad_input", INTEGER),
    ("conv", "default", "grad_weight", INTEGER),
    ("linear", "default", "grad_weight", INTEGER),
    ("linear", ROWS, "output", INTEGER),
    ("linear", ROWS, "grad_input", "fold"),
    ("linear", ROWS, "grad_weight", "fold"),
    ("conv", ROWS, "output", INTEGER),
    ("conv", ROWS, "grad_input", "fold"),
    ("conv", ROWS, "grad_weight", "fold"),
    ("conv", Recipe(input="psq8@token"), "output", OBSTACLE),
    ("linear", Recipe(input="psq8@token"), "output", INTEGER),
    ("conv", Recipe(grad_input="psq4@token"), "grad_input", OBSTACLE),
    ("linear", Recipe(grad_input="psq4@token"), "grad_input", INTEGER),
    ("linear", Recipe(grad_input="psq4@channel"), "grad_input", OBSTACLE),
    ("linear", Recipe(grad_weight="psq4@token"), "grad_weight", OBSTACLE),
    ("conv", Recipe(grad_weight="psq4@sample"), "grad_weight", OBSTACLE),
    ("conv", Recipe(grad_weight=COLUMN), "grad_weight", OBSTACLE),
    ("conv", Recipe(input=q("column", rounding="nearest")), "output", OBSTACLE),
    ("conv", Recipe(grad_weight="bhq4@channel"), "grad_weight", INTEGER),
    ("linear", Recipe(grad_weight="shq4@channel"), "grad_weight", INTEGER),
    # A transform over channels mixes groups whose patches differ, so that it cannot be undone after the product.
    ("grouped", Recipe(grad_weight="bhq4@channel"), "grad_weight", "group"),
    ("grouped", "psq4", "output", INTEGER),
    ("grouped", "psq4d", "grad_input", INTEGER),
    ("depthwise", "default", "grad_weight", INTEGER),
    ("wide groups", "psq4", "output", INTEGER),
    ("wide groups", "bhq4", "grad_input", INTEGER),
    ("wide groups", "default", "grad_weight", INTEGER),
    ("wide groups", Recipe(grad_weight="bhq4@channel"), "grad_weight", "mixes channels of different groups"),
    ("transposed", "default", "output", INTEGER),
    ("transposed", "bhq4", "grad_input", INTEGER),
    ("transposed", "psq4", "grad_weight", INTEGER),
    ("padded by a stride", "psq4", "output", "output padding"),
    ("volume", "psq4d", "grad_weight", INTEGER),
    # A step per token moves into grad_output only where its positions are the input's.
    ("linear", Recipe(input=SYMMETRIC, **FOLDED), "grad_weight", INTEGER),
    ("conv", Recipe(input=SYMMETRIC, **FOLDED), "grad_weight", "other positions"),
    ("conv", Recipe(input=q("row", "symmetric", rounding="nearest"), **FOLDED), "grad_weight", INTEGER),
    ("linear", Recipe(weight="psq8", **{**FOLDED, "fold": "auto"}), "grad_input", "fold is 'auto'"),
    # One step for all has no axis, whatever its name says.
    ("linear", Recipe(grad_input="ptq4d@sample"), "grad_input", INTEGER),
    ("conv", Recipe(grad_input="ptq4d@token", grad_weight="ptq8x@sample"), "grad_weight", INTEGER),
]


@pytest.mark.parametrize("row", range(len(TABLE)))
def test_reasons(row: int) -> None:
    layer, recipe, product, word = TABLE[row]
    if not isinstance(recipe, str) and recipe.grad_input is None:
        recipe = Recipe(
            input=recipe.input, weight=recipe.weight, grad_input="psq4", grad_weight=recipe.grad_weight or "ptq8"
        )
    explained = fqt.explain(fqt.quantize_(LAYERS[layer](), recipe))
    (found,) = [p for p in explained.products if p.product == product]
    if word is INTEGER and machine_obstacle("cpu"):
        word = "no integer kernels"
    assert word in found.why
    assert found.arithmetic == ("integer" if word is INTEGER else "simulated")
    assert " × " in found.operands


def test_what_the_machine_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fqt.quantize_(nn.Linear(4, 4), "psq8")
    doubled = fqt.explain(fqt.quantize_(nn.Linear(4, 4).double(), "psq8"))
    assert {(p.arithmetic, p.why) for p in doubled.products} == {("simulated", "float64 is computed in float64")}
    monkeypatch.setattr(fused, "status", lambda: Status("reference", "no compiler"))
    assert {p.why for p in fqt.explain(layer).products} == {"no integer kernels: no compiler"}


def test_float_products_say_so() -> None:
    explained = {p.product: p for p in fqt.explain(fqt.quantize_(nn.Linear(2, 2), "qat")).products}
    assert explained["output"].arithmetic != "float"
    for product in ("grad_input", "grad_weight"):
        assert (explained[product].arithmetic, "grad_output" in explained[product].why) == ("float", True)


@pytest.mark.parametrize("forward", [{"input": None}, {"weight": None}, {"input": None, "weight": None}])
def test_a_quantized_gradient_times_a_float_operand_is_float_with_a_batch_too(forward: dict) -> None:
    layer = fqt.quantize_(nn.Linear(6, 5), Recipe(**forward, grad_input="psq4", grad_weight="psq4"))
    said = fqt.explain(layer).products
    ran = fqt.explain(layer, torch.randn(7, 6, requires_grad=True)).products
    assert [(row.arithmetic, row.why) for row in said] == [(row.arithmetic, row.why) for row in ran]
    assert any("float" in row.arithmetic for row in ran[1:])


def test_a_float_model_and_a_mixed_one() -> None:
    model = small_net()
    assert {p.arithmetic for p in fqt.explain(model).products} == {"float"}
    assert [p.layer for p in fqt.explain(model).products] == ["0", "3", "6"]
    fqt.quantize_(model, Recipe(grad_input="psq4", grad_weight="ptq8", rules=[fqt.Rule("3", "none")]))
    rows = [(p.layer, p.product) for p in fqt.explain(model).products]
    three = ("output", "grad_input", "grad_weight")
    assert rows == [*(("0", p) for p in three), ("3", "all"), *(("6", p) for p in three)]


def test_it_prints_as_a_table() -> None:
    lines = str(fqt.explain(fqt.quantize_(small_net(), "bhq4"))).splitlines()
    assert lines[0].split() == ["layer", "product", "arithmetic", "operands", "why"]
    assert len(lines) - 2 - 9 == (1 if machine_obstacle("cpu") else 2)
    assert lines[2 + 9].startswith("total: ")
    assert all("bhq4" in line for line in lines if "grad_input" in line)
    assert str(fqt.explain(nn.ReLU())).splitlines()[0].startswith("layer")
    assert "total" not in str(fqt.explain(nn.ReLU()))


def test_totals_are_shares_of_multiplied_weights() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "lstm": nn.LSTM(2, 3), "norm": nn.LayerNorm(9)})
    matrices = 4 * 3 * (2 + 3)
    fqt.quantize_(model, Recipe(grad_input="psq4", grad_weight=None))
    totals = fqt.explain(model).totals
    quantized = "simulated" if machine_obstacle("cpu") else "integer"
    assert totals[quantized] == pytest.approx(2 / 3 * 32 / (32 + matrices))
    assert totals["float"] == pytest.approx(1 - totals[quantized])
    layer = fqt.quantize_(nn.MultiheadAttention(4, 2), "psq4")
    assert sum(p.weights for p in fqt.explain(layer).products) == 3 * 4 * 16
    assert fqt.explain(nn.ReLU()).totals == {}


def test_a_forward_of_somebody_else_is_not_vouched_for() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "psq4")
    model[0].forward = lambda x: 2 * x
    rows = fqt.explain(model).products
    assert [(p.product, p.arithmetic) for p in rows if p.layer == "0"] == [("all", "unknown")]
    assert fqt.explain(model).totals["unknown"] == pytest.approx(0.5)


def test_what_multiplies_narrow_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said where it depends on the codes; the answer is the kernels' own, of each operand's least and greatest."""
    asked = []
    kernel = lambda left, right: asked.append((left, right)) or "so"
    monkeypatch.setitem(integer._MACHINES, "cpu", dataclasses.replace(integer._MACHINES["cpu"], kernel=kernel))
    rows = fqt.explain(fqt.quantize_(nn.Sequential(nn.Linear(8, 8)), "narrow")).products
    assert [row.why for row in rows] == [f"{INTEGER}; so"] * 3
    assert asked == [((0, 127), (-127, 127)), ((0, 15), (-127, 127)), ((0, 15), (0, 127))]
    del asked[:]
    fqt.explain(fqt.quantize_(nn.Sequential(nn.Linear(8, 8)), "shq4"))
    assert asked[2] == ((0, 255), (0, 255))  # mixed channels: formulas, on bytes of any code


def test_what_multiplies_on_this_machine() -> None:
    row = fqt.explain(fqt.quantize_(nn.Sequential(nn.Linear(8, 8)), "narrow")).products[1]
    if library.status().level == "avx2":
        assert row.why == f"{INTEGER}; 8-bit multiplications (AVX2), 32 terms in 16 bits"
    else:
        assert row.why == INTEGER


@pytest.mark.skipif(bool(machine_obstacle("cpu")), reason="no integer kernels")
def test_layers_that_are_slower_on_integers_are_named() -> None:
    """Few multiplications per number; not those of many, and none that is float or simulated."""
    model = nn.ModuleDict(
        {
            "pointwise": nn.Conv2d(96, 24, 1),
            "depthwise": nn.Conv2d(96, 96, 3, groups=96),
            "patches": nn.Conv2d(64, 64, 7, groups=64),
            "wide": nn.Conv2d(32, 32, 3),
            "up": nn.ConvTranspose2d(64, 32, 2, 2),
            "narrow": nn.Linear(256, 8),
            "linear": nn.Linear(256, 256),
            "exact": nn.Linear(8, 8).double(),
            "skipped": nn.Linear(8, 8),
        }
    )
    fqt.quantize_(model, "psq8", filter_fn=lambda layer, name: name != "skipped")
    explained = fqt.explain(model)
    assert explained.slower == ("pointwise", "depthwise", "up", "narrow")
    (note,) = [note for note in explained.notes if "slower on integers here" in note]
    assert note.endswith(": pointwise, depthwise, up, narrow")
    assert fqt.explain(model["linear"], torch.randn(3, 256)).slower == ()
    # Gradients are read more often there.
    fqt.quantize_(model, "default", filter_fn=lambda layer, name: name != "skipped")
    assert fqt.explain(model).slower == ("pointwise", "depthwise", "patches", "wide", "up", "narrow")


@pytest.mark.skipif(bool(machine_obstacle("cpu")), reason="no integer kernels")
def test_all_slower_layers_are_named_and_can_be_left_float_by_rules() -> None:
    model = fqt.quantize_(nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)), nn.Linear(4, 512)), "psq8")
    explained = fqt.explain(model, torch.randn(3, 4))
    assert explained.slower == fqt.explain(model).slower == tuple(map(str, range(12)))
    rules = [fqt.Rule(name, "none") for name in explained.slower[:-1]]
    fqt.quantize_(model, {"base": "psq8", "rules": rules})
    assert fqt.explain(model).slower == ("11",)
    assert [p.why for p in fqt.explain(model).products if p.layer == "3"] == ["rule '3' says 'none'"]


def test_why_a_layer_was_left_float_on_request() -> None:
    """As long as it is so: not after a second conversion, nor after the model was restored."""
    why = lambda *batch: {p.layer: p.why for p in fqt.explain(model, *batch).products if p.arithmetic == "float"}
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "psq8", filter_fn=lambda m, n: n != "0")
    assert why() == why(torch.randn(3, 4)) == {"0": "filter_fn left it out"}
    assert why() == {p.layer: p.why for p in fqt.explain(copy.deepcopy(model)).products if p.arithmetic == "float"}
    fqt.quantize_(model, {"base": "psq8", "rules": [fqt.Rule("1", "none")]})
    assert why() == {"1": "rule '1' says 'none'"}
    fqt.restore_(model)
    assert why() == dict.fromkeys("01", "not converted")
    assert all("fqt_reason" not in vars(m) for m in model)
