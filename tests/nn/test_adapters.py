"""Adapters of PEFT on converted models, in both orders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fqt
from tests.hugging_face import MODELS

peft = pytest.importorskip("peft", reason="pip install peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # of Conv1D: PEFT sets it right
]
ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", ATTENTION),
    "dora": ("llama", {**ATTENTION, "use_dora": True}),
    "experts": ("mixtral", {**ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}


def adapted(name: str, order: str, recipe: str = "psq4") -> tuple[nn.Module, dict[str, Any]]:
    architecture, options = CASES[name]
    model, batch = MODELS[architecture]()
    torch.manual_seed(1)
    if order == "quantize, adapt":
        fqt.quantize_(model, recipe)
    # B is not zero at first, so that every product counts.
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config)
    return fqt.quantize_(model, recipe), batch


@pytest.mark.parametrize("name", CASES)
def test_both_orders_are_the_same_model(name: str) -> None:
    gradients = []
    for order in ("quantize, adapt", "adapt, quantize"):
        model, batch = adapted(name, order)
        model.train()
        torch.manual_seed(2)
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora" in key for key in gradients[0])
    for key, gradient in gradients[0].items():
        assert gradient.any(), key
        assert torch.equal(gradient, gradients[1][key]), key


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_products_of_adapters_run_on_integers(name: str) -> None:
    """A frozen layer has no product for its weight's gradient; adapters have all three."""
    model, batch = adapted(name, "adapt, quantize", "default")
    rows = [r for r in fqt.explain(model.train(), batch).products if r.calls]
    adapters = {(r.product, r.arithmetic) for r in rows if ".lora_" in r.layer}
    assert adapters == {(product, "integer") for product in ("output", "grad_input", "grad_weight")}
    assert not [r for r in rows if r.layer.endswith("base_layer") and r.product == "grad_weight"]


def test_adapters_that_came_later_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = MODELS["llama"]()
    fqt.quantize_(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **ATTENTION))
    rows = fqt.explain(model.train(), batch).products
    assert {r.arithmetic for r in rows if ".lora_" in r.layer and r.calls} == {"float"}
    with caplog.at_level(logging.INFO, "fqt"):
        fqt.quantize_(model)
    assert "12 of 12 layers run quantized" in caplog.text


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_adapters_are_saved_and_merged(name: str, tmp_path: Path) -> None:
    model, batch = adapted(name, "adapt, quantize")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(MODELS[CASES[name][0]]()[0], tmp_path)
    with pytest.raises(fqt.FqtError, match="a folder of adapters holds none"):
        fqt.recipe_of(again)
    fqt.quantize_(again, "psq4")
    assert torch.equal(again.eval()(**batch).loss, model.eval()(**batch).loss)
    merged = model.merge_and_unload()
    whole = fqt.quantize_(MODELS[CASES[name][0]]()[0], "psq4")
    assert [type(m) for m in merged.modules()] == [type(m) for m in whole.modules()]
    torch.testing.assert_close(merged(**batch).loss, again(**batch).loss, rtol=0.02, atol=0)


def test_a_merged_model_is_converted_once_more_before_it_is_saved(tmp_path: Path) -> None:
    """What a filter left out has a rule by name, and adapters change names: until then it matches nothing."""
    kind = type(MODELS["llama"]()[0])
    keep = lambda _, name: "lm_head" not in name
    model = peft.get_peft_model(MODELS["llama"]()[0], peft.LoraConfig(r=4, task_type="CAUSAL_LM", **ATTENTION))
    merged = fqt.quantize_(model, "psq4", filter_fn=keep).merge_and_unload()
    merged.save_pretrained(tmp_path / "as it is")
    again = kind.from_pretrained(tmp_path / "as it is")
    with pytest.raises(fqt.ConversionError, match=r"rule 'base_model.model.lm_head' selects no layer"):
        fqt.quantize_(again, fqt.recipe_of(again))
    fqt.quantize_(merged, "psq4", filter_fn=keep).save_pretrained(tmp_path / "once more")
    again = kind.from_pretrained(tmp_path / "once more")
    fqt.quantize_(again, fqt.recipe_of(again))
    assert type(again.lm_head) is nn.Linear
    assert [type(m) for m in again.modules()] == [type(m) for m in merged.modules()]
