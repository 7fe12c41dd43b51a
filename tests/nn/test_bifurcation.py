"""Two quantizers of one gradient: who sees the noise of which. And: without both, FQT is QAT bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fqt
from fqt import Recipe
from fqt.kernels.codes import Findings

from . import checks
from .cases import FEW, LAYERS, Case, converted, equal, gradients, ids, loss_of, simulate, small_batch, small_net

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
LAYER_NAMES = ("0", "3", "6")
BASE = Recipe(grad_input="psq4", grad_weight="ptq8")


def run(changes: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    """Gradients of all parameters and of the input, with one seed, after changes of single layers' recipes."""
    model, (x, y) = fqt.quantize_(small_net(), BASE), small_batch()
    for name, change in changes.items():
        checks.set_recipe(model.get_submodule(name), **change)
    x.requires_grad_()
    torch.manual_seed(4)
    loss_of(model, (x, y)).backward()
    return {"input": x.grad, **{n: p.grad for n, p in model.named_parameters()}}


def changed(changes: dict[str, dict[str, str]]) -> set[str]:
    before, after = run({}), run(changes)
    return {n for n in before if not torch.equal(before[n], after[n])}


BELOW = {
    "0": {"input"},
    "3": {"input", "0.weight", "1.weight", "1.bias"},
    "6": {"input", "0.weight", "1.weight", "1.bias", "3.weight", "3.bias"},
}


def check() -> None:
    for name in LAYER_NAMES:
        assert changed({name: {"grad_weight": "ptq4"}}) == {f"{name}.weight"}
        assert changed({name: {"grad_weight": "bhq8d@channel"}}) == {f"{name}.weight"}
        assert changed({name: {"grad_input": "psq5"}}) == BELOW[name]
        assert changed({name: {"grad_input": "shq4d"}}) == BELOW[name]


def test_who_depends_on_which_quantizer() -> None:
    assert changed({}) == set()
    check()


def test_the_check_sees_one_quantizer_used_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from fqt.nn import function

    real = function._grad_weight

    def crossed(grad: Tensor, *args: object) -> Tensor:
        call, unused = args[1], Findings()
        return real(function._Gradient.of(grad, "grad_input", call, unused).value(None)[0], *args)

    monkeypatch.setattr(function, "_grad_weight", crossed)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("recipe", ["ptq4", "psq4", "bhq4d", "shq4x", "psq8d@token"])
@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_identity_quantizers_give_qat(case: Case, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)
    x, qat = case.input(torch.float32), converted(case, "qat", torch.float32)
    truth = gradients(qat, x)
    layer = converted(case, recipe, torch.float32)
    assert torch.equal(layer(x), truth[0])
    if case in FEW:
        assert not equal(gradients(layer, x), truth)
    checks.plant(monkeypatch)
    assert equal(gradients(layer, x), truth)


def test_identity_quantizers_give_qat_in_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)
    truth = run({name: {"grad_input": None, "grad_weight": None} for name in LAYER_NAMES})
    checks.plant(monkeypatch)
    found = run({})
    assert all(torch.equal(found[n], truth[n]) for n in truth)


def test_forward_does_not_depend_on_gradient_quantizers() -> None:
    x, _ = small_batch()
    outputs = []
    for recipe in ("qat", "ptq2", "psq4", "bhq8", "shq4d"):
        torch.manual_seed(1)
        outputs.append(fqt.quantize_(small_net(), recipe)(x))
    assert all(torch.equal(out, outputs[0]) for out in outputs)
