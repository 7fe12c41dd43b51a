"""A Linear's weight gradient from its codes in few launches: the formulas' bits."""

from dataclasses import replace

import pytest
import torch

import fqt
from fqt.kernels import integer
from fqt.kernels.fold import Folded
from fqt.kernels.linear_map import DenseMap
from fqt.kernels.triton import fused
from fqt.nn import load_recipe
from tests.backends import moved, reference_only
from tests.triton_kernels.machine import DEVICE, QUIET

pytestmark = QUIET
TOKENS, OUTPUTS, FEATURES = 300, 40, 72
SHAPE = torch.Size((OUTPUTS, FEATURES))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signed(q):
    """The same values by int8 codes."""
    codes = (q.matrix_codes.int() - 128).to(torch.int8)
    scales = replace(q.scales, offset=q.scales.offset + 128 * q.scales.step)
    return replace(q, matrix_codes=codes, scales=scales)


def grad(name):
    """One whose rows are channels; one whose dither is known on the device alone; one that has one step."""
    g = normal(TOKENS, OUTPUTS, seed=1) * normal(1, OUTPUTS, seed=2).exp()
    if name == "one step":
        return fqt.quantizer("ptq8").quantize(g, seed=3, axis=1)
    found = fqt.quantizer("psq8d" if name != "plain" else "psq8").quantize(g, seed=3, axis=1)
    half = {"on the device": torch.tensor(0.5), "none taken": torch.tensor(0.0)}.get(name)
    if half is None:
        return found
    noise = replace(found.noise, half=half)
    return replace(found, noise=noise if half > 0 else replace(noise, row=noise.row * 0, column=noise.column * 0))


def input(how):
    x = normal(TOKENS, FEATURES, seed=4).abs()
    if how == "one step":
        return fqt.quantizer("ptq8").quantize(x, seed=5), None
    codes = fqt.quantizer("psq8").quantize(x, seed=5)
    centre = torch.randint(0, 256, (TOKENS,), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    share = normal(1, OUTPUTS, seed=7)
    return codes, Folded(*{"folded": (None, None), "centred": (centre, None), "shared": (centre, share)}[how])


@pytest.mark.parametrize("given", ["plain", "one step", "dithered", "on the device", "none taken"])
@pytest.mark.parametrize("how", ["one step", "folded", "centred", "shared"])
@pytest.mark.parametrize("in_int8", ["neither", "grad_output", "input", "both"])
def test_the_weight_s_gradient_has_the_formulas_bits(given, how, in_int8, monkeypatch):
    monkeypatch.setattr(fused, "_worth", lambda *_: True)
    g, (x, folded) = grad(given), input(how)
    g, x = signed(g) if in_int8 in ("grad_output", "both") else g, signed(x) if in_int8 in ("input", "both") else x
    with reference_only():
        wanted = integer.grad_weight(DenseMap(), g, x, folded, SHAPE)
    arguments = (DenseMap(), moved(g, DEVICE), moved(x, DEVICE), moved(folded, DEVICE), SHAPE)
    assert fused.takes_grad_weight(*arguments)
    assert torch.equal(fused.grad_weight(*arguments).cpu(), wanted)


@pytest.mark.parametrize("given", ["psq8", "psq8d", "psq8x"])
@pytest.mark.parametrize("folded", [False, True])
def test_the_input_s_gradient_has_the_formulas_bits(given, folded, monkeypatch):
    monkeypatch.setattr(fused, "_worth", lambda *_: True)
    g = fqt.quantizer(given).quantize(normal(TOKENS, OUTPUTS), seed=3)
    if given == "psq8x":
        assert g.noise is not None
        g = replace(g, noise=replace(g.noise, half=torch.tensor(0.5)))
    w = load_recipe("psq8").operand("weight").quantize(normal(OUTPUTS, FEATURES))
    shape = torch.Size((TOKENS, FEATURES))
    with reference_only():
        wanted = integer.grad_input(DenseMap(), g, w, folded, shape, torch.float32)
    arguments = (DenseMap(), moved(g, DEVICE), moved(w, DEVICE), folded, shape, torch.float32)
    assert fused.takes_grad_input(*arguments)
    assert torch.equal(fused.grad_input(*arguments).cpu(), wanted)
