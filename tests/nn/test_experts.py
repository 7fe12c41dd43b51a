"""Experts that share one weight of three axes: what each multiplies, and what is drawn."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.kernels.linear_map import DenseMap
from fqt.nn.layers import products
from tests.hugging_face import MODELS

COUNT, HIDDEN = 4, 16
BLOCKS = {"mixtral": "model.layers.0.mlp.experts", "gpt_oss": "model.layers.0.mlp.experts"}


def experts(name: str = "mixtral", recipe: str | fqt.Recipe = "psq4") -> nn.Module:
    """Of a concatenated layout without bias, or (gpt_oss) a transposed, interleaved one with biases."""
    module = MODELS[name]()[0].get_submodule(BLOCKS[name])
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return fqt.quantize_(module, recipe).train()


def routed(tokens: int = 12, to: int = COUNT) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    index = torch.rand(tokens, to).argsort(1)[:, :2]
    return x, index, torch.rand(tokens, 2, requires_grad=True)


def by_hand(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, seeds: Tensor) -> Tensor:
    """Every expert by itself as a linear layer."""
    out = torch.zeros(len(x), HIDDEN)
    for e in range(COUNT):
        token, place = torch.where(index == e)
        if len(token):
            inner = products(module, x[token], module.gate_up_proj[e], None, DenseMap(), seeds[e])
            gate, up = inner.chunk(2, -1)
            inner = module.act_fn(gate) * up
            outer = products(module, inner, module.down_proj[e], None, DenseMap(), seeds[COUNT + e])
            out = out.index_add(0, token, outer * weights[token, place, None])
    return out


def test_each_expert_is_a_layer_of_its_own() -> None:
    module, (x, index, weights) = experts(), routed()
    torch.manual_seed(1)
    found = module(x, index, weights)
    found.square().sum().backward()
    inputs = (x, weights, *module.parameters())
    gradients = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    torch.manual_seed(1)
    seeds = torch.randint(-(2**63 - 1), 2**63 - 1, (2 * COUNT,))
    expected = by_hand(module, x, index, weights, seeds)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    for t, gradient in zip(inputs, gradients, strict=True):
        assert t.grad.norm() > 0
        torch.testing.assert_close(gradient, t.grad, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_has_no_gradient() -> None:
    module, (x, index, weights) = experts(), routed(to=COUNT - 1)
    module(x, index, weights).sum().backward()
    for p in module.parameters():
        assert not p.grad[COUNT - 1].any()
        assert p.grad[: COUNT - 1].abs().sum((1, 2)).all()


def test_an_expert_is_quantized_alone() -> None:
    """What the others get changes nothing in its output."""
    module, (x, index, weights) = experts(recipe="qat"), routed()
    only = (index == 1).any(1)
    x = torch.where(only[:, None], x, 100 * x)
    share = weights * (index == 1)
    together = module(x, index, share)[only]
    alone = module(x[only], index[only], share[only])
    torch.testing.assert_close(together, alone)


def test_what_is_drawn_does_not_depend_on_the_routing() -> None:
    module = experts()
    states = []
    for to in (2, COUNT):
        x, index, weights = routed(to=to)
        torch.manual_seed(2)
        module(x, index, weights)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(2)
    module.eval()(x, index, weights)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(2).get_state())


def test_experts_of_other_processes_are_left_out() -> None:
    """As transformers marks them under expert parallelism: a number that is no expert's."""
    module, (x, index, weights) = experts(recipe="qat"), routed()
    module._is_expert_parallel = True
    elsewhere = torch.where(index == 0, COUNT, index)
    kept = module(x, index, weights * (index != 0))
    torch.testing.assert_close(module(x, elsewhere, weights), kept)
    nothing = module(x, torch.full_like(index, COUNT), weights)
    assert nothing.shape == x.shape
    assert not nothing.any()
    nothing.sum().backward()
    assert not module(x[:0], index[:0], weights[:0]).numel()


def test_transposed_and_biased() -> None:
    """gpt_oss on operands of 8 bits is near its float self, and its biases get gradients."""
    module, (x, index, weights) = experts("gpt_oss", "qat"), routed()
    near = module(x, index, weights)
    near.sum().backward()
    float_ = fqt.restore_(copy.deepcopy(module))
    float_.config._experts_implementation = "eager"
    assert (near - float_(x, index, weights)).norm() < 0.05 * near.norm()
    assert all(p.grad.any() for p in module.parameters())


def test_copies_and_pickles() -> None:
    module, given = experts(), routed()
    kinds = {type(module)}
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        kinds.add(type(again))
        assert torch.equal(again.eval()(*given), module.eval()(*given))
    assert len(kinds) == 1


def test_explain_counts_weights_not_biases() -> None:
    module = experts("gpt_oss", "default")
    rows = fqt.explain(module).products
    assert {(row.arithmetic, row.weights) for row in rows} == {
        ("integer", module.gate_up_proj.numel() + module.down_proj.numel())
    }


def test_remembered_ranges_are_refused() -> None:
    model, _ = MODELS["mixtral"]()
    recipe = fqt.Recipe(grad_input="psq8", grad_weight="psq8")
    hindsight = replace(recipe, grad_input="hind8")
    with pytest.raises(fqt.ConversionError, match="is made of experts, which cannot share one remembered range"):
        fqt.quantize_(model, hindsight)
    rules = (fqt.Rule("*.experts", recipe), fqt.Rule("*.gate", "none"))
    fqt.quantize_(model, replace(hindsight, rules=rules))


def test_a_rule_leaves_experts_in_float() -> None:
    model, batch = MODELS["mixtral"]()
    fqt.quantize_(model, replace(fqt.Recipe(), rules=(fqt.Rule("*.experts", "none"),)))
    rows = [r for r in fqt.explain(model.train(), batch).products if r.layer.endswith("experts") and r.calls]
    assert {r.arithmetic for r in rows} == {"float"}
    per_token = model.get_submodule(BLOCKS["mixtral"]).num_experts  # of which each token meets two
    weights = sum(p.numel() for p in model.get_submodule(BLOCKS["mixtral"]).parameters()) // per_token
    assert sum(r.multiplications for r in rows) == 3 * 2 * batch["input_ids"].numel() * weights


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
def test_experts_compile_with_a_break() -> None:
    """They run eagerly inside a compiled model: the same numbers."""
    module, given = experts(), routed()
    compiled = torch.compile(lambda x, index, weights: module(x * 1.0, index, weights) * 2, backend="aot_eager")
    torch.manual_seed(3)
    found = compiled(*given)
    torch.manual_seed(3)
    torch.testing.assert_close(found, 2 * module(*given))


@pytest.mark.parametrize("name", ["llama4", "jetmoe"])
def test_experts_by_their_own_forward(name: str) -> None:
    """Batched products by a parameter, and a loop of linear maps: near float at 8 bits, one gradient per expert."""
    model, batch = MODELS[name]()
    before = model.eval()(**batch).logits
    fqt.quantize_(model, "qat")
    after = model(**batch)
    assert 0 < (after.logits - before).norm() < 0.1 * before.norm()
    after.loss.backward()
    stacked = [p for n, p in model.named_parameters() if p.ndim == 3 and "norm" not in n]
    assert len(stacked) > 1
    assert all(p.grad.any() for p in stacked)
