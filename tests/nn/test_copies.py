"""A converted model is copied, pickled, saved and averaged like any other, and the copy computes the same bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fqt
from fqt import Recipe, Rule
from fqt.quant import BlockHouseholder, Integers, Quantizer, Scale

from .cases import loss_of, parameter_gradients, small_batch, small_net

RECIPE = Recipe(
    grad_input=Quantizer(transform=BlockHouseholder(guard="exact"), scale=Scale("row"), grid=Integers(4)),
    grad_weight="psq8d@channel",
    fold="auto",
    rules=[Rule("3", "none"), Rule("6", "shq4d")],
)


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": _saved,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", [RECIPE, "default"], ids=["rules", "default"])
def test_a_copy_computes_the_same(way: str, recipe: Recipe | str) -> None:
    model, batch = fqt.quantize_(small_net(), recipe), small_batch()
    twin = WAYS[way](model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert str(fqt.explain(twin)) == str(fqt.explain(model))
    found = []
    for m in (model, twin):
        torch.manual_seed(9)
        found.append(parameter_gradients(m, batch))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_is_independent(way: str) -> None:
    model = fqt.quantize_(small_net(), RECIPE)
    twin = WAYS[way](model)
    fqt.restore_(twin)
    assert type(twin[0]) is nn.Conv2d
    assert type(model[0]) is not nn.Conv2d
    assert twin[0].weight is not model[0].weight


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copied_encoder_restores(way: str) -> None:
    layer = fqt.quantize_(nn.TransformerEncoderLayer(4, 2, 8), "psq4")
    fresh = nn.TransformerEncoderLayer(4, 2, 8)
    twin = fqt.restore_(WAYS[way](layer))
    assert twin.activation_relu_or_gelu == fresh.activation_relu_or_gelu == 1
    assert set(vars(twin)) == set(vars(fresh))


def test_saved_state_dict_alone() -> None:
    buffer = io.BytesIO()
    torch.save(fqt.quantize_(small_net(), "psq4").state_dict(), buffer)
    buffer.seek(0)
    small_net().load_state_dict(torch.load(buffer, weights_only=True), strict=True)


@pytest.mark.parametrize("ema", [True, False])
def test_averaged_model(ema: bool) -> None:
    model, batch = fqt.quantize_(small_net(), "psq4"), small_batch()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if ema else None, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        average.update_parameters(model)
    assert type(average.module[0]) is type(model[0])
    assert not torch.equal(average.module[0].weight, model[0].weight)
    average.eval()
    before = torch.get_rng_state()
    assert average(batch[0]).isfinite().all()
    assert torch.equal(before, torch.get_rng_state())
    fqt.restore_(average)
    assert type(average.module[0]) is nn.Conv2d


def test_copy_of_float_then_convert_leaves_the_original() -> None:
    model = small_net()
    fqt.quantize_(copy.deepcopy(model), "psq4")
    assert type(model[0]) is nn.Conv2d


def test_functional_call_and_assign() -> None:
    model, (x, _) = fqt.quantize_(small_net(), "qat").eval(), small_batch()
    other = {n: p.detach() * 2 for n, p in model.named_parameters()}
    expected = functional_call(model, other, (x,))
    model.load_state_dict({**model.state_dict(), **other}, assign=True)
    assert torch.equal(model(x), expected)


def test_moved_to_another_dtype_and_to_meta() -> None:
    model, (x, _) = fqt.quantize_(small_net(), "psq4"), small_batch()
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert model.double()(x.double()).dtype == torch.float64
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}
