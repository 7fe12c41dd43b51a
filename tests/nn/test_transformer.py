"""Converted attention inside torch's transformer modules, whose fused inference path must not bypass it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqt

from .cases import FLOAT_OPERANDS, equal, gradients

# torch's own remark on encoders whose layers have no fused form.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
TWO_BITS = fqt.Recipe(input="ptq2", weight="ptq2", grad_input="psq4", grad_weight="ptq4")
B, T, E = 3, 5, 8


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True} | options
    return nn.TransformerEncoderLayer(E, 2, 16, **settings)


def encoder(nested: bool = True, **options: Any) -> nn.TransformerEncoder:
    layer = encoder_layer(**options)
    even = layer.self_attn.batch_first and not layer.norm_first
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested and even)


def padding() -> Tensor:
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 3:] = True
    mask[2, 1:] = True
    return mask


FORMS: list[dict[str, Any]] = [
    {},
    {"activation": "gelu"},
    {"activation": torch.tanh},
    {"norm_first": True},
    {"batch_first": False},
    {"bias": False},
]


@pytest.mark.parametrize("options", FORMS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("make", [encoder_layer, encoder])
def test_eval_without_gradient_is_the_converted_model(make: Any, options: dict[str, Any]) -> None:
    """Three ways to run it give the same values, and not the float model's."""
    model, x = make(**options).eval(), torch.randn(B, T, E)
    with torch.no_grad():
        truth = model(x)
    fqt.quantize_(model, TWO_BITS)
    with torch.no_grad():
        fused = model(x)
    slow = model(x)
    torch.testing.assert_close(fused, slow.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused, model.train()(x).detach(), rtol=1e-5, atol=1e-6)
    assert (fused - truth).norm() > 0.05 * truth.norm()
    fqt.restore_(model.eval())
    with torch.no_grad():
        assert torch.equal(model(x), truth)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("make", [encoder_layer, encoder])
def test_padding_in_eval_without_gradient(make: Any, nested: bool) -> None:
    """torch's encoder turns a padded batch into a nested tensor on its fused path; what is not padding agrees."""
    model = (make() if make is encoder_layer else make(nested)).eval()
    x, mask = torch.randn(B, T, E), padding()
    slow_float = model(x, src_key_padding_mask=mask).detach()
    fqt.quantize_(model, FLOAT_OPERANDS)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(out[~mask], slow_float[~mask], rtol=1e-5, atol=1e-6)
    fqt.quantize_(model, "qat")
    with torch.no_grad():
        out = model(x, src_key_padding_mask=mask)
    assert (out[~mask] - slow_float[~mask]).norm() <= 0.1 * slow_float[~mask].norm()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_restored_encoder_takes_its_fast_path_again() -> None:
    model, x, mask = encoder().eval(), torch.randn(B, T, E), padding()
    with torch.no_grad():
        truth = model(x, src_key_padding_mask=mask)
    state = [(n, {k: v for k, v in vars(m).items() if not k.startswith("_")}) for n, m in model.named_modules()]
    fqt.restore_(fqt.quantize_(model, "psq4"))
    after = [(n, {k: v for k, v in vars(m).items() if not k.startswith("_")}) for n, m in model.named_modules()]
    assert state == after
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), truth)


def test_only_part_of_a_layer_converted() -> None:
    """One rule leaves all but a feed-forward layer in float; the fused path would still skip that one."""
    model, x = encoder_layer().eval(), torch.randn(B, T, E)
    rules = [fqt.Rule("linear1", TWO_BITS), fqt.Rule("*", "none")]
    fqt.quantize_(model, fqt.Recipe(rules=rules))
    assert type(model.self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x).detach(), rtol=1e-5, atol=1e-6)


def test_attention_left_in_float_inside_a_converted_model() -> None:
    """Float attention keeps torch's own out_proj; nothing inside it is converted."""
    model = fqt.quantize_(encoder_layer(), fqt.Recipe(rules=[fqt.Rule("self_attn", "none")]))
    assert type(model.self_attn) is nn.MultiheadAttention
    assert hasattr(model.linear1, "fqt_recipe")
    assert not hasattr(model.self_attn.out_proj, "fqt_recipe")


@pytest.mark.parametrize("name", ["encoder", "decoder", "transformer"])
def test_float_operands_give_torchs_gradients(name: str) -> None:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    model: nn.Module
    if name == "encoder":
        model = encoder_layer(dtype=torch.float64)
    elif name == "decoder":
        model = nn.TransformerDecoderLayer(E, 2, 16, **options)
    else:
        model = nn.Transformer(E, 2, 1, 1, 16, **options)
    inputs = [torch.randn(B, T, E).double()] + [torch.randn(B, T, E).double()] * (name != "encoder")
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    key = {"encoder": "src_mask", "decoder": "tgt_mask", "transformer": "tgt_mask"}[name]
    causal = {"tgt_is_causal": True} if name != "encoder" else {"is_causal": True}
    truth = gradients(model, *inputs, **{key: mask}, **causal)
    fqt.quantize_(model, fqt.Recipe(input=None, weight=None, grad_input="ptq8"))
    model.eval()
    mine = gradients(model, *inputs, **{key: mask}, **causal)
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_training_draws_fresh_noise() -> None:
    model, x = fqt.quantize_(encoder(), "psq4"), torch.randn(B, T, E)
    torch.manual_seed(1)
    first = gradients(model, x)
    torch.manual_seed(1)
    assert equal(gradients(model, x), first)
    assert not equal(gradients(model, x), first)
