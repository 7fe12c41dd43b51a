"""Layers that remember ranges: what they learn, when, how often, and where they refuse."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fqt
from fqt import FqtError, Recipe
from fqt.kernels.ranges import RangeState
from fqt.nn import GradientOperand, observe, remembered
from fqt.stats.passes import undisturbed

from .cases import CONV, Case, converted, equal, gradients

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BOTH = Recipe(grad_input="hind8", grad_weight="kim4")
FOLDED = Recipe(input="psq8", weight="psq8@channel", grad_input="hind8", grad_weight="hind8d", fold="always")


def net(recipe: Recipe | str = BOTH) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    return fqt.quantize_(model, recipe)


def batch(number: int) -> Tensor:
    g = torch.Generator().manual_seed(number)
    return torch.randn(5, 2, 6, 6, generator=g) * 1.5**number


def step(model: nn.Module, number: int, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """One step of training: the gradients, with the learning rate small."""
    torch.manual_seed(100 + number)
    model.zero_grad()
    output = (forward or model)(batch(number))
    (output.square().sum() * 1.7**number).backward()
    found = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad / p.grad.norm()
    return found


def buffers(model: nn.Module) -> dict[str, list[int]]:
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


def test_three_steps_are_the_quantizers_own() -> None:
    """The ranges that operands met, the codes' counts and the state, from the gradients themselves."""
    for recipe in (BOTH, FOLDED):
        model, seen = net(recipe), []
        states: dict[tuple[str, str], RangeState] = {}

        def note(name: str, operand: GradientOperand) -> None:
            seen.append((name, operand))  # noqa: B023

        for number in range(3):
            seen.clear()
            with observe(model, note):
                step(model, number)
            assert len(seen) == 5  # the first layer's input needs no gradient
            for name, operand in seen:
                key, q = (name, operand.role), operand.quantizer
                before = states.get(key, RangeState.empty())
                assert operand.range is not None
                assert torch.equal(operand.range.packed, before.packed)
                taught = q.quantize_measuring(operand.gradient, before, operand.seed, axis=operand.rows)[1]
                states[key] = q.learned(before, taught)
            for key, state in remembered(model).items():
                if key in states:
                    assert torch.equal(state.packed, states[key].packed), (key, number)
        assert all(int(state.tensors) == 3 for state in states.values())
        assert sum(int(state.clipped) for state in states.values()) > 30
        assert int(remembered(model)["0", "grad_input"].tensors) == 0


def test_the_first_step_is_that_of_ranges_of_the_tensors_own() -> None:
    mine, theirs = net(Recipe(grad_input="hind8", grad_weight="hind8")), net(Recipe(grad_input="ptq8"))
    fqt.quantize_(theirs, Recipe(grad_input="ptq8", grad_weight="ptq8"))
    assert equal(step(mine, 0), step(theirs, 0))
    assert not equal(step(mine, 1), step(theirs, 1))


@pytest.mark.parametrize("case", CONV[:6], ids=lambda case: case.name)
def test_on_integers_as_simulated(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both take the same codes, clipped ones too."""
    found = []
    for integers in (True, False):
        layer = converted(case, FOLDED, torch.float32)
        with monkeypatch.context() as patch:
            if not integers:
                patch.setattr("fqt.nn.call.Call.on_integers", lambda self, product, values: False)
            for scale in (1.0, 2.0):
                torch.manual_seed(3)
                found.append(
                    gradients(layer, case.input(torch.float32) * scale, upstream=scale * _upstream(layer, case))
                )
        assert all(int(state.clipped) > 0 for state in remembered(layer).values())
    for mine, simulated in zip(found[:2], found[2:], strict=True):
        for a, b in zip(mine, simulated, strict=True):
            assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def _upstream(layer: nn.Module, case: Case) -> Tensor:
    shape = layer(case.input(torch.float32)).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


# ---- replay --------------------------------------------------------------------------------------------------


def test_a_second_backward_is_the_first_again_and_teaches_nothing() -> None:
    model = net()
    step(model, 0)
    torch.manual_seed(1)
    loss, parameters = model(batch(1)).square().sum(), list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    after = buffers(model)
    again = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert equal(list(again), list(first))
    assert buffers(model) == after
    model(batch(2)).square().sum().backward()  # what others have taught since does not count either
    moved = buffers(model)
    assert moved != after
    assert equal(list(torch.autograd.grad(loss, parameters)), list(first))
    assert buffers(model) == moved


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpoints_learn_once(use_reentrant: bool) -> None:
    plain, model = net(), net()

    def recomputed(x: Tensor) -> Tensor:
        x = x.requires_grad_() if use_reentrant else x
        for part in (model[:3], model[3:5], model[5:]):
            x = checkpoint(part, x, use_reentrant=use_reentrant)
        return x

    for number in range(3):
        if use_reentrant:  # the same products in both, with a gradient of the input
            assert equal(step(model, number, recomputed), step(plain, number, lambda x: plain(x.requires_grad_())))
        else:
            assert equal(step(model, number, recomputed), step(plain, number))
        assert buffers(model) == buffers(plain)
    assert {int(s.tensors) for s in remembered(model).values()} <= {0, 3}


def test_a_layer_called_twice_in_a_step_has_one_memory() -> None:
    torch.manual_seed(0)
    layer = fqt.quantize_(nn.Linear(6, 6), Recipe(grad_input="hind8", grad_weight="hind8"))
    x = torch.randn(4, 6)
    layer(layer(x)).square().sum().backward()
    counts = {role: s.counts.tolist() for (_, role), s in remembered(layer).items()}
    assert counts == {"grad_input": [1, 24, 0], "grad_weight": [2, 48, 0]}


def test_several_forwards_before_their_backwards_each_teach_once() -> None:
    model = net()
    losses = [model(batch(n)).square().sum() for n in range(3)]
    for loss in losses:
        loss.backward()
    assert {int(s.tensors) for s in remembered(model).values()} == {0, 3}
    assert all(int(s.clipped) == 0 for s in remembered(model).values())  # none knew of the others


# ---- what is saved, moved, measured --------------------------------------------------------------------------


def test_a_run_goes_on_from_its_state_dict() -> None:
    model = net()
    for number in range(2):
        step(model, number)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = net()
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved)
    copies = [resumed, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    wanted = step(model, 2)
    for other in copies:
        assert equal(step(other, 2), wanted)
        assert buffers(other) == buffers(model)
    fresh = net()
    fresh.load_state_dict({k: v for k, v in saved.items() if "fqt_" not in k})  # the same weights, no memory
    assert not equal(step(fresh, 2), wanted)


def test_weights_come_from_and_go_to_models_with_other_recipes() -> None:
    model = net()
    step(model, 0)
    saved = model.state_dict()
    assert {k.rpartition(".")[2] for k in saved if "fqt_" in k} == {
        "fqt_grad_input_hindsight",
        "fqt_grad_weight_steered",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fqt.RecipeWarning)
        for recipe in ("ptq8", Recipe(grad_input="kim4", grad_weight="kim8"), "none"):
            other = nn.Sequential(net("ptq8"))[0]
            fqt.quantize_(other, recipe)
            other.load_state_dict(saved)
            assert equal([p.data for p in other.parameters()], [p.data for p in model.parameters()])
        model.load_state_dict(net("ptq8").state_dict())  # starts anew
    assert all(int(s.tensors) == 0 for s in remembered(model).values())


def test_conversion_keeps_what_still_means_the_same_and_restoring_takes_all_away() -> None:
    model, keys = net(), set(net("ptq8").state_dict())
    for number in range(2):
        step(model, number)
    before = buffers(model)
    fqt.quantize_(model, Recipe(grad_input="hind6", grad_weight="ptq8"))
    after = buffers(model)
    assert after == {k: v for k, v in before.items() if "hindsight" in k}
    assert len(after) == 3
    step(model, 2)
    fqt.restore_(model)
    assert set(model.state_dict()) == keys
    assert all("fqt_ranges" not in module.__dict__ for module in model.modules())
    assert not remembered(model)


def test_no_conversion_of_dtypes_rounds_it() -> None:
    model = net()
    for number in range(2):
        step(model, number)
    before = buffers(model)
    model.bfloat16()
    assert buffers(model) == before
    model(batch(1).bfloat16()).square().sum().backward()
    assert all(
        int(s.tensors) == 3 for (name, role), s in remembered(model).items() if (name, role) != ("0", "grad_input")
    )


def test_eval_mode_and_measurements_teach_nothing() -> None:
    model = net()
    step(model, 0)
    before = buffers(model)
    model.eval()
    model(batch(3)).square().sum().backward()
    assert buffers(model) == before
    model.train()
    found = []
    with undisturbed(model):
        for _ in range(2):
            torch.manual_seed(4)
            model.zero_grad()
            model(batch(3)).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
            assert buffers(model) == before
    assert equal(*found)
    fqt.explain(model, batch(3))
    assert buffers(model) == before
    step(model, 1)
    assert buffers(model) != before


def test_the_monitor_makes_steps_again_with_the_ranges_that_they_had() -> None:
    """It compares: a gradient that does not come back is refused as another batch's."""
    torch.manual_seed(0)
    model = fqt.quantize_(
        nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)), Recipe(grad_input="hind4", grad_weight="hind4")
    )

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    monitor = fqt.Monitor(model, loss_fn, every=1)
    x = torch.randn(16, 9)
    for number in range(4):
        model.zero_grad()
        loss_fn(model, x * 4.0**number).backward()  # ever larger: most is clipped, and it looks suspect
        before = buffers(model)
        assert monitor.step(x * 4.0**number) is not None
        assert buffers(model) == before
    assert sum(int(s.clipped) for s in remembered(model).values()) > 20


def test_statistics_measure_the_range_that_is_in_force() -> None:
    model = net(Recipe(grad_input="hind8", grad_weight="hind8"))
    for number in range(2):
        step(model, number)
    before = buffers(model)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    found = fqt.diagnose(model, loss_fn, [batch(n) for n in range(3)])
    assert found is not None
    assert buffers(model) == before


def test_what_was_clipped_is_told() -> None:
    model = net()
    assert "clipped 0 of 0 entries" in str(fqt.explain(model))
    for number in range(3):
        step(model, number)
    found = remembered(model)
    clipped, entries = (sum(int(getattr(s, name)) for s in found.values()) for name in ("clipped", "entries"))
    assert clipped > 0
    for shown in (str(fqt.explain(model)), str(fqt.explain(model, batch(0)))):
        assert f"remembered ranges have clipped {clipped:,} of {entries:,} entries; most in " in shown
    assert "remembered" not in str(fqt.explain(net("ptq8")))


# ---- where it cannot be --------------------------------------------------------------------------------------


def test_overflowed_gradients_pass_through_and_teach_nothing() -> None:
    """As a gradient scaler's, which skips the step."""
    model = net()
    step(model, 0)
    before = buffers(model)
    (model(batch(0)).square().sum() * torch.inf).backward()
    assert bool(model[5].weight.grad.isnan().any())
    assert buffers(model) == before


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Recipe(input="hind8"), "only quantizers of gradients"),
        (lambda: Recipe(weight="kim8"), "only quantizers of gradients"),
        (lambda: Recipe(grad_input="hind8", fold="auto"), "grad_input's scale"),
        (lambda: Recipe(grad_weight="kim8", fold="auto"), "grad_weight's scale"),
        (lambda: fqt.quantize_(nn.MultiheadAttention(8, 2), BOTH), "attention"),
    ],
)
def test_what_a_recipe_refuses(build: Callable, says: str) -> None:
    with pytest.raises(FqtError, match=says):
        build()


def test_a_recipe_set_by_hand_has_no_memory() -> None:
    layer = fqt.quantize_(nn.Linear(4, 4), "ptq8")
    layer.fqt_recipe = BOTH
    with pytest.raises(FqtError, match=r"fqt\.quantize_"):
        layer(torch.randn(3, 4)).sum().backward()


def test_functional_transforms_are_refused_in_training() -> None:
    layer, x = fqt.quantize_(nn.Linear(4, 4), BOTH), torch.randn(3, 4)

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).square().sum()

    with pytest.raises(FqtError, match=r"torch\.func"):
        torch.func.grad(loss)(layer.weight.detach())
    with pytest.raises(FqtError, match=r"torch\.func"):
        torch.func.jvp(loss, (layer.weight.detach(),), (layer.weight.detach(),))
    layer.eval()
    assert torch.func.grad(loss)(layer.weight.detach()).shape == (4, 4)
    layer.train()
    y = layer(x.requires_grad_())
    with pytest.raises(FqtError, match="one by one"):
        torch.autograd.grad(y, x, torch.eye(12).view(12, 3, 4), is_grads_batched=True)


def test_what_sees_ops_alone_is_told_so() -> None:
    layer, x = fqt.quantize_(nn.Linear(4, 4), BOTH), torch.randn(3, 4)
    for mode in (FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(FqtError, match=r"remembers ranges.*as ops") as error:
            layer(x)
        assert "\n" not in str(error.value)
    with FlopCounterMode(display=False) as counter:
        layer.eval()(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_trains_it_eagerly_or_refuses() -> None:
    torch._dynamo.reset()
    plain, model = net(), net()
    compiled = torch.compile(model, backend="eager")
    for number in range(3):
        assert equal(step(compiled, number), step(plain, number))
        assert buffers(model) == buffers(plain)
    torch._dynamo.reset()
    whole = torch.compile(net(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="remembers ranges"):
        whole(batch(0))
    torch._dynamo.reset()
    asleep = net().eval()
    whole = torch.compile(asleep, backend="eager", fullgraph=True)
    assert torch.equal(whole(batch(0)), asleep(batch(0)))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_and_exported_graphs_are_refused_in_training() -> None:
    with pytest.raises(FqtError, match="traced or exported"):
        torch.jit.trace(net(), batch(0))
    with pytest.raises(Exception, match="traced or exported"):
        torch.export.export(net(), (batch(0),), strict=False)
    assert torch.export.export(net().eval(), (batch(0),), strict=False) is not None


def test_words_and_names() -> None:
    for recipe in (BOTH, FOLDED, fqt.nn.load_recipe("hind8")):
        assert fqt.nn.load_recipe(fqt.nn.dump_recipe(recipe)) == recipe
        assert Recipe.of_text(recipe.text) == recipe
    table = {"group": "tensor", "mode": "zero", "range": "hindsight", "bits": 6}
    made = fqt.nn.load_recipe({"grad_input": table})
    assert made.grad_input.scale.range == "hindsight"
    assert fqt.nn.load_recipe(fqt.nn.dump_recipe(made)) == made
    assert fqt.recipe_of(net().state_dict()) == BOTH
