"""Plans: optimal against brute force, faithful to the recipe, and right about the variance."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import fqt
from fqt.errors import FqtError
from fqt.nn import load_recipe
from fqt.stats import quantization_variance
from fqt.stats.plan import Costs, allocate

from .nets import Attention, batches, loss, make

WIDTHS = range(2, 9)


def random_costs(seed: int, layers: int = 4) -> Costs:
    rng = random.Random(seed)
    variance = {
        str(i): {b: 10 ** rng.uniform(-2, 1) * 4.0**-b * rng.uniform(0.7, 1.3) for b in WIDTHS}
        for i in range(layers)
    }
    return Costs(variance=variance, weight={k: rng.choice([1, 2, 7, 40]) for k in variance}, fixed=0.01)


def everything(costs: Costs) -> list[dict[str, int]]:
    return [dict(zip(costs.variance, bits, strict=True)) for bits in itertools.product(WIDTHS, repeat=4)]


@pytest.mark.parametrize("seed", range(3))
def test_allocations_are_optimal(seed: int) -> None:
    costs = random_costs(seed)
    choices = everything(costs)
    for mean in (2, 2.7, 3, 4.5, 8, 11):
        best = min(costs.total(c) for c in choices if costs.mean_width(c) <= mean + 1e-9)
        found = allocate(costs, mean_width=mean)
        assert costs.mean_width(found) <= mean + 1e-9
        assert costs.total(found) == pytest.approx(best, rel=1e-9)
    for share in (0.01, 0.1, 0.5):
        limit = 0.01 + share * (costs.total(dict.fromkeys(costs.variance, 2)) - 0.01)
        best = min(costs.mean_width(c) for c in choices if costs.total(c) <= limit)
        found = allocate(costs, limit=limit)
        assert costs.total(found) <= limit * (1 + 1e-9)
        assert costs.mean_width(found) == pytest.approx(best, rel=1e-9)


def test_other_widths_and_targets_out_of_reach() -> None:
    costs = random_costs(1)
    assert set(allocate(costs, mean_width=5, widths=(4, 8)).values()) <= {4, 8}
    with pytest.raises(FqtError, match=r"1.5 bits is below the 2"):
        allocate(costs, mean_width=1.5)
    with pytest.raises(FqtError, match="mean width of nan"):
        allocate(costs, mean_width=float("nan"))
    with pytest.raises(FqtError, match=r"0.01 comes from the grad_weight quantizers"):
        allocate(costs, limit=0.009)
    with pytest.raises(FqtError, match="bits from 2 to 8"):
        allocate(costs, mean_width=4, widths=(1, 4))
    with pytest.raises(FqtError, match="no widths to plan"):
        allocate(Costs(variance={}, weight={}, fixed=0.0), mean_width=4)


def test_many_layers_are_planned_and_never_worse_than_uniform() -> None:
    rng = random.Random(5)
    variance = {str(i): {b: 10 ** rng.uniform(-2, 1) * 4.0**-b for b in WIDTHS} for i in range(60)}
    costs = Costs(variance=variance, weight={k: rng.randint(1, 10**9) for k in variance}, fixed=0.0)
    for bits in (2, 3, 5, 8):
        found = allocate(costs, mean_width=bits)
        assert costs.mean_width(found) <= bits * (1 + 1e-9)
        assert costs.total(found) <= costs.total(dict.fromkeys(variance, bits))


def diagnosis(recipe: str | fqt.Recipe = "psq4", count: int = 8) -> fqt.stats.Diagnosis:
    return fqt.diagnose(make(recipe=recipe), loss, batches(count), table=2)


def test_a_plan_changes_widths_and_nothing_else(tmp_path) -> None:
    base = fqt.Recipe(
        grad_input="shq5d",
        grad_weight="psq8x@channel",
        input="psq8@sample",
        rules=(fqt.Rule("3", "bhq4"), fqt.Rule("5", "none")),
    )
    torch.manual_seed(0)
    model = fqt.quantize_(nn.Sequential(*(nn.Linear(6, 6) for _ in range(6))), base)
    found = fqt.plan(fqt.diagnose(model, loss, batches(3)), mean_width=3)
    assert set(found.widths) == {"1", "2", "3", "4"}  # 0 has no grad_input, 5 is float
    found.save(tmp_path / "plan.toml")
    assert load_recipe(tmp_path / "plan.toml") == found.recipe
    plain = fqt.quantize_(nn.Sequential(*(nn.Linear(6, 6) for _ in range(6))), found.recipe)
    for name, bits in found.widths.items():
        new, old = plain.get_submodule(name).fqt_recipe, model.get_submodule(name).fqt_recipe
        assert new.grad_input == fqt.quantizer(f"bhq{bits}" if name == "3" else f"shq{bits}d")
        assert (new.grad_weight, new.input, new.weight) == (old.grad_weight, old.input, old.weight)
    assert plain[0].fqt_recipe == replace(model[0].fqt_recipe, rules=())
    assert type(plain[5]) is nn.Linear


def test_the_prediction_is_what_is_measured() -> None:
    """On fresh batches, within 30 %: errors of both measurements and of the two approximations."""
    found = fqt.plan(diagnosis("shq4", count=12), mean_width=4)
    fresh = batches(20, seed=9)
    planned = quantization_variance(make(recipe=found.recipe), loss, fresh, 3).total.value
    uniform = quantization_variance(make(recipe="shq4"), loss, fresh, 3).total.value
    assert planned == pytest.approx(found.variance, rel=0.3)
    assert uniform == pytest.approx(found.uniform[4], rel=0.3)
    assert found.variance <= found.uniform[4]
    assert found.mean_width <= 4


def test_a_target_for_rho() -> None:
    found = diagnosis("psq8")
    for rho in (0.02, 0.1):
        planned = fqt.plan(found, rho=rho)
        assert planned.rho <= rho
        assert planned.rho == pytest.approx(planned.variance / found.total.sampling.value)
        fewer = [{**planned.widths, layer: bits - 1} for layer, bits in planned.widths.items() if bits > 2]
        assert all(planned.costs.total(w) > rho * found.total.sampling.value for w in fewer)
    assert fqt.plan(found).widths == fqt.plan(found, rho=0.1).widths


def test_attention_and_a_model_that_is_one_layer() -> None:
    found = fqt.diagnose(make(Attention), loss, batches(2, shape=(5, 6)))
    planned = fqt.plan(found, mean_width=3)
    assert set(planned.widths) == {"attention", "head"}
    converted = make(Attention, planned.recipe)
    assert converted.attention.fqt_recipe.grad_input.grid.bits == planned.widths["attention"]
    torch.manual_seed(0)
    layer = fqt.quantize_(nn.Linear(6, 3), "psq4")
    data = [(x.requires_grad_(), y) for x, y in batches(2)]
    alone = fqt.plan(fqt.diagnose(layer, loss, data), mean_width=3)
    assert set(alone.widths) == {""}
    assert fqt.quantize_(nn.Linear(6, 3), alone.recipe).fqt_recipe == alone.recipe


def test_errors() -> None:
    without = fqt.diagnose(make(), loss, batches(2), table=0)
    with pytest.raises(FqtError, match="no table"):
        fqt.plan(without)
    found = diagnosis(count=2)
    with pytest.raises(FqtError, match="not both"):
        fqt.plan(found, rho=0.1, mean_width=3)
    with pytest.raises(FqtError, match="99 bits is more than the 8"):
        fqt.plan(found, mean_width=99)
    with pytest.raises(FqtError, match="is asked for"):
        fqt.plan(found, rho=1e-12)
    for rho in (0.0, -1.0, math.nan):
        with pytest.raises(FqtError, match="positive number"):
            fqt.plan(found, rho=rho)
    with pytest.raises(FqtError, match="not NoneType"):
        fqt.plan(None)


def test_batches_all_alike() -> None:
    """A mean width needs no sampling variance, ρ does; batches may come from a generator."""
    batch = batches(1)[0]
    found = fqt.diagnose(make(), loss, (batch for _ in range(3)))
    assert math.isnan(fqt.plan(found, mean_width=3).rho)
    with pytest.raises(FqtError, match="all alike"):
        fqt.plan(found)
