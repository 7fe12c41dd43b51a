"""QAT gradients against plain torch autograd, for every layer kind and every axis of the forward quantizers."""

from __future__ import annotations

import pytest
import torch

import fqt
from fqt import Recipe

from . import oracles
from .cases import FEW, FLOAT_OPERANDS, FORWARD, LAYERS, Case, converted, gradients, ids

# torch's own float layer says so of padding="same" with an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def check(case: Case, recipe: Recipe) -> None:
    """float64 throughout, so that what remains is summation order: 1e-11 of the largest entry."""
    mine = gradients(converted(case, recipe).eval(), case.input())
    truth = oracles.qat(case.layer(), recipe, case.input())
    assert len(mine) == len(truth)
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(b.abs().max()))


@pytest.mark.parametrize("case", LAYERS, ids=ids)
@pytest.mark.parametrize("recipe", ["tensor", "rows"])
def test_every_layer(case: Case, recipe: str) -> None:
    check(case, FORWARD[recipe])


@pytest.mark.parametrize("case", FEW, ids=ids)
@pytest.mark.parametrize("recipe", [r for r in FORWARD if r not in ("tensor", "rows")])
def test_every_axis(case: Case, recipe: str) -> None:
    check(case, FORWARD[recipe])


def test_columns_of_a_grouped_transposed_weight() -> None:
    case = next(c for c in LAYERS if c.name == "transposed1d_groups")
    for recipe in ("column", "rows"):
        check(case, FORWARD[recipe])


def test_the_check_sees_a_wrong_axis() -> None:
    case = next(c for c in LAYERS if c.name == "linear_tokens")
    mine = gradients(converted(case, FORWARD["sample"]).eval(), case.input())
    truth = oracles.qat(case.layer(), FORWARD["token"], case.input())
    assert not torch.allclose(mine[0], truth[0], atol=1e-6)


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_float_operands_give_the_float_layer(case: Case) -> None:
    layer, x = case.layer(), case.input()
    for a, b in zip(gradients(converted(case, FLOAT_OPERANDS).eval(), x), gradients(layer, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_eight_bits_are_close_to_float(case: Case) -> None:
    """Two 8-bit operands: an error of a few steps, so a wrong layout cannot hide behind the oracle."""
    x = case.input(torch.float32)
    mine, truth = gradients(converted(case, "qat", torch.float32), x), gradients(case.layer(torch.float32), x)
    for a, b in zip(mine, truth, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


def test_training_and_restored_layers() -> None:
    for case in FEW:
        x, layer = case.input(), converted(case, "qat")
        training = gradients(layer.train(), x)
        assert all(map(torch.equal, training, gradients(layer.eval(), x)))
        assert all(map(torch.equal, gradients(fqt.restore_(layer), x), gradients(case.layer(), x)))
