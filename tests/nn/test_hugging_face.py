"""Models of transformers: what converts, the gradient's mean, saving, generating, checkpoints of activations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqt
from tests.hugging_face import FUSED, MODELS, VOCABULARY, Batch

DRAWS, LIMIT = 16, 10
WRITES = [name for name in MODELS if name not in ("bert", "vit")]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def projections(found: dict[str, Tensor]) -> dict[str, float]:
    """Of each parameter's gradient on a direction of its own."""
    generator = torch.Generator().manual_seed(4)
    return {
        name: float((g.double() * torch.randn(g.shape, generator=generator, dtype=torch.float64)).sum())
        for name, g in found.items()
    }


def largest_t(model: nn.Module, batch: Batch) -> float:
    """Of the mean over `DRAWS` gradients against the exact one, over all parameters.

    Student's t with 15 degrees of freedom is over `LIMIT` once in 2e7: for 15 models of 30 parameters, 3e-5 in all.
    """
    exact = projections(gradients(model.eval(), batch))
    model.train()
    sample = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        sample.append(projections(gradients(model, batch)))
    worst = 0.0
    for name, value in exact.items():
        drawn = torch.tensor([projected[name] for projected in sample], dtype=torch.float64)
        room = 2e-6 * (abs(value) + float(drawn.abs().max()))  # of float32
        error = max(abs(float(drawn.mean()) - value) - room, 0.0)
        worst = max(worst, error / max(float(drawn.std()) / math.sqrt(DRAWS), 1e-30))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_unbiased(name: str) -> None:
    model, batch = MODELS[name]()
    assert largest_t(fqt.quantize_(model, "psq4"), batch) < LIMIT


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_biased_gradient_is_seen(name: str) -> None:
    model, batch = MODELS[name]()
    assert largest_t(fqt.quantize_(model, fqt.Recipe(grad_input="psq8", grad_weight="psq4n")), batch) > LIMIT


@pytest.mark.parametrize("name", MODELS)
def test_all_products_with_weights_run_on_integers(name: str) -> None:
    """But for routers; other matrices are added, not multiplied."""
    model, batch = MODELS[name]()
    keys = list(model.state_dict())
    fqt.quantize_(model)
    assert list(model.state_dict()) == keys
    found = fqt.explain(model.train(), batch)
    weighed = {row for row in found.products if row.calls and "activations" not in row.why}
    rest = {r.layer for r in weighed if r.arithmetic != "integer" and "neither operand is a parameter" not in r.why}
    routers = {n for n, m in model.named_modules() if "Router" in type(m).__name__}
    assert rest <= routers, rest
    experts = {n for n, m in model.named_modules() if "Experts" in type(m).__name__}
    ran = {r.layer for r in found.products if r.arithmetic == "integer" and r.product == "grad_weight"}
    assert experts <= ran
    assert bool(experts) == (name in FUSED)


@pytest.mark.parametrize("name", MODELS)
def test_converting_and_restoring_changes_nothing_else(name: str) -> None:
    model, batch = MODELS[name]()
    kinds = [type(m) for m in model.modules()]
    model.eval()
    before, values = model(**batch).loss, {k: v.clone() for k, v in model.state_dict().items()}
    fqt.quantize_(model, "qat")
    assert model(**batch).loss != before
    fqt.restore_(copy.deepcopy(fqt.quantize_(model)))
    fqt.restore_(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**batch).loss, before)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back(name: str, tmp_path: Path) -> None:
    """With its keys as the float model's, tied embeddings, and the recipe in its configuration."""
    model, batch = MODELS[name]()
    model.save_pretrained(tmp_path / "float")
    fqt.quantize_(model, "psq4").save_pretrained(tmp_path / "quantized")
    names = [sorted((tmp_path / kind).glob("*.safetensors")) for kind in ("float", "quantized")]
    assert names[0][0].read_bytes() == names[1][0].read_bytes()
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert fqt.recipe_of(again).grad_input == fqt.quantizer("psq4")
    fqt.quantize_(again, fqt.recipe_of(again))
    assert torch.equal(again.eval()(**batch).loss, model.eval()(**batch).loss)
    if getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_head_that_was_left_out_comes_back_float(tmp_path: Path) -> None:
    model, batch = MODELS["llama"]()
    fqt.quantize_(model, "shq4", filter_fn=lambda _, name: name != "lm_head")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    fqt.quantize_(again, fqt.recipe_of(again))
    assert type(again.lm_head) is nn.Linear
    assert type(again.model.layers[0].mlp.up_proj) is not nn.Linear
    assert torch.equal(again.eval()(**batch).loss, model.eval()(**batch).loss)


@pytest.mark.parametrize("name", WRITES)
def test_a_converted_model_generates(name: str) -> None:
    """With a cache and without it: the same tokens, since no token's codes depend on another's."""
    model, batch = MODELS[name]()
    fqt.quantize_(model).eval()
    given = batch.get("input_features", batch["input_ids"]) if "input_ids" in batch else batch["input_features"]
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = [model.generate(given, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*found)
    assert int(found[0].max()) < VOCABULARY


@pytest.mark.parametrize("name", [name for name in MODELS if name != "jetmoe"])  # which knows no such checkpoints
def test_checkpoints_of_activations_draw_the_same_noise(name: str) -> None:
    """The same gradients, up to the order of sums, which T5 changes in float as well."""
    model, batch = MODELS[name]()
    fqt.quantize_(model, "psq4").train()
    torch.manual_seed(5)
    plain = {key: g.clone() for key, g in gradients(model, batch).items()}
    model.activation_checkpointing_enable()
    torch.manual_seed(5)
    again = gradients(model, batch)
    assert plain.keys() == again.keys()
    assert all((plain[key] - again[key]).norm() <= 1e-5 * plain[key].norm() for key in plain)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "gpt_oss"])
def test_autocast(name: str) -> None:
    """Products come out in bfloat16, and gradients stay near those of float32."""
    model, batch = MODELS[name]()
    fqt.quantize_(model, "qat").train()
    reference = {key: g.clone() for key, g in gradients(model, batch).items()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.logits.dtype in (torch.bfloat16, torch.float32)
    output.loss.backward()
    for key, p in model.named_parameters():
        if key.endswith("weight") and reference[key].norm() > 1e-3:
            assert (p.grad - reference[key]).norm() < 0.2 * reference[key].norm(), key
