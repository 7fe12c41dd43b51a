"""A model in a wrapper, compiled, distributed or averaged, is the model: names, rules, statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import fqt
from fqt import FqtError, Recipe, Rule
from fqt.nn.wrappers import named_modules, named_parameters, unwrapped
from fqt.stats import quantization_variance, sampling_variance

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo's own looking
]
HALF = Recipe(grad_input="psq4", grad_weight="ptq8", rules=[Rule("module", "none"), Rule("0", "bhq4")])


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def net() -> nn.Module:
    """One of its layers has the name that wrappers give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    model.add_module("module", nn.Linear(6, 3))
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> nn.Module:
    model[0] = compiled(model[0])
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    model[0] = checkpoint_wrapper(model[0])
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "compile inside": compiled_inside,
    "compile in place": compiled_in_place,
    "data parallel": DataParallel,
    "distributed": DistributedDataParallel,
    "compiled distributed": lambda m: compiled(DistributedDataParallel(m)),
    "averaged": AveragedModel,
    "checkpointed": checkpointed,
}
LAYERS = {"0", "module"}
BATCHES = [torch.randn(12, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.mark.parametrize("name", WRAPPERS)
def test_names_and_rules(name: str) -> None:
    plain, model = net(), WRAPPERS[name](net())
    assert [n for n, _ in named_modules(model)] == [n for n, _ in plain.named_modules()]
    assert {n for n, _ in named_parameters(model)} == {n for n, _ in plain.named_parameters()}
    fqt.quantize_(model, HALF)
    assert {p.layer for p in fqt.explain(model).products if p.arithmetic == "float"} == {"module"}
    assert {p.layer for p in fqt.explain(model).products if "bhq4" in p.operands} == {"0"}
    fqt.restore_(model)
    assert {p.arithmetic for p in fqt.explain(model).products} == {"float"}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_ran_and_the_recipe_are_those_of_the_model_inside(name: str) -> None:
    plain, model = (fqt.quantize_(wrap(net()), HALF) for wrap in (lambda m: m, WRAPPERS[name]))
    explained = fqt.explain(model, BATCHES[0])
    if name != "checkpointed":  # whose backward pass runs the forward pass again
        assert explained.products == fqt.explain(plain, BATCHES[0]).products
    assert {p.layer for p in explained.products} == LAYERS
    assert not explained.never_ran
    assert fqt.recipe_of(model) == fqt.recipe_of(plain)
    assert {p.layer for p in fqt.explain(fqt.quantize_(net(), fqt.recipe_of(model))).products} == LAYERS


@pytest.mark.parametrize("name", ["distributed", "compiled distributed", "data parallel"])
@pytest.mark.parametrize("loss_fn", [None, lambda model, batch: model(batch).square().mean()])
def test_one_process_explains_alone(name: str, loss_fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wrapper's forward, which waits for the other processes."""
    model = fqt.quantize_(WRAPPERS[name](net()), HALF)
    for wrapper in (DistributedDataParallel, DataParallel):
        monkeypatch.setattr(wrapper, "forward", lambda *_: pytest.fail("the wrapper's forward was called"))
    assert {p.layer for p in fqt.explain(model, BATCHES[0], loss_fn).products if p.calls} == LAYERS


def test_names_of_the_wrapped_model_will_do_too() -> None:
    model = compiled(net())
    fqt.quantize_(model, Recipe(grad_input="psq4", grad_weight="ptq8", rules=[Rule("_orig_mod.0", "none")]))
    assert {p.layer for p in fqt.explain(model).products if p.arithmetic == "float"} == {"0"}
    assert type(unwrapped(compiled(DataParallel(net())))) is nn.Sequential


@pytest.mark.parametrize("name", WRAPPERS)
def test_converted_before_or_after_it_computes_the_same(name: str) -> None:
    """And so does a model that had run in float before it was converted."""
    before, after = WRAPPERS[name](fqt.quantize_(net(), "psq4")), WRAPPERS[name](net())
    truth = after(BATCHES[0])
    fqt.quantize_(after, "psq4")
    found = []
    for model in (before, after):
        torch.manual_seed(7)
        model.zero_grad()
        out = model(BATCHES[0])
        out.sum().backward()
        found.append([out, *(p.grad for p in unwrapped(model).parameters())])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], truth)
    fqt.restore_(after)
    assert torch.equal(after(BATCHES[0]), truth)


MEASURED = [n for n in WRAPPERS if n != "averaged"]


def figures(found: fqt.stats.Diagnosis) -> tuple[Any, ...]:
    operands = [(o.layer, o.role, o.variance) for o in found.operands]
    return found.total, list(found.layers), operands, list(found.recipes), found.table.parts


@pytest.mark.parametrize("name", MEASURED)
def test_diagnose(name: str) -> None:
    wanted = figures(fqt.diagnose(fqt.quantize_(net(), "psq4"), loss_of, BATCHES))
    model = WRAPPERS[name](fqt.quantize_(net(), "psq4"))
    loss_of(model, BATCHES[0]).backward()  # compiled by now
    assert str(figures(fqt.diagnose(model, loss_of, BATCHES))) == str(wanted)


@pytest.mark.parametrize("name", MEASURED)
def test_variances_of_the_gradient(name: str) -> None:
    """Bit for bit those of the model inside, `.grad` and compiled graphs left alone."""
    plain, model = fqt.quantize_(net(), "psq4"), WRAPPERS[name](fqt.quantize_(net(), "psq4"))
    loss_of(model, BATCHES[0]).backward()  # compiled by now
    before = {n: p.grad.clone() for n, p in named_parameters(model)}
    for measure in (quantization_variance, sampling_variance):
        more = [2] if measure is quantization_variance else []
        wanted = measure(plain, loss_of, BATCHES, *more)
        assert wanted.total.value > 0
        assert str(measure(model, loss_of, BATCHES, *more)) == str(wanted)
    assert all(torch.equal(p.grad, before[n]) for n, p in named_parameters(model))


def test_a_monitor_cannot_reach_through_a_compiled_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make passes of one process; a diagnosis goes inside."""
    model = WRAPPERS["compiled distributed"](fqt.quantize_(net(), "psq4"))
    wanted = figures(fqt.diagnose(fqt.quantize_(net(), "psq4"), loss_of, BATCHES))
    fqt.Monitor(model, loss_of).close()  # one process: `.grad` is its own
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with pytest.raises(FqtError, match="put that outermost"):
        fqt.Monitor(model, loss_of)
    assert str(figures(fqt.diagnose(model, loss_of, BATCHES))) == str(wanted)


@pytest.mark.parametrize("name", MEASURED)
def test_monitor(name: str) -> None:
    readings = []
    for wrap in (lambda m: m, WRAPPERS[name]):
        model = wrap(fqt.quantize_(net(), "psq4"))
        monitor = fqt.Monitor(model, loss_of, every=1)
        torch.manual_seed(3)
        loss_of(model, BATCHES[0]).backward()
        readings.append(monitor.step(BATCHES[0]))
        monitor.close()
    assert readings[0]["layers"].keys() == readings[1]["layers"].keys() == LAYERS
    assert readings[1]["rho"] == pytest.approx(readings[0]["rho"], rel=1e-4)


def test_observe_under_compilation() -> None:
    model = compiled(fqt.quantize_(net(), "psq4"))
    seen: list[str] = []
    with fqt.nn.observe(model, lambda name, operand: seen.append(name)):
        loss_of(model, BATCHES[0]).backward()
    assert set(seen) == LAYERS
    assert torch._dynamo.eval_frame._stance.stance == "default"


SHARDED = ("before", "after", "subclass")


class Named(nn.Linear):
    """A subclass that keeps the forward."""


@pytest.mark.parametrize("when", SHARDED)
def test_fully_sharded(when: str) -> None:
    """Converted before it is sharded or after it: the same bits; and restored, all of it."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    results = []
    for sharded in (False, True):
        torch.manual_seed(0)
        kind = Named if when == "subclass" else nn.Linear
        model, x = nn.Sequential(kind(6, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 6)
        truth = model(x)
        if when == "before":
            fqt.quantize_(model, "psq4")
        if sharded:
            for module in (model[0], model):
                fully_shard(module)
        if when != "before":
            fqt.quantize_(model, "psq4")
        torch.manual_seed(7)
        out = model(x)
        out.sum().backward()
        grads = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
        results.append([out, *grads])
        assert not torch.equal(out, truth)
        assert "float" not in {p.arithmetic for p in fqt.explain(model).products}
        if sharded:
            assert isinstance(model[0], FSDPModule)
            with pytest.raises(FqtError, match="sharded"):
                fqt.diagnose(model, loss_of, BATCHES)
        fqt.restore_(model)
        assert torch.equal(model(x), truth)
        assert [isinstance(m, fqt.nn.layers.QuantizedLinear) for m in model] == [False] * 3
        assert isinstance(model[0], FSDPModule) == sharded
    assert all(map(torch.equal, *results))
