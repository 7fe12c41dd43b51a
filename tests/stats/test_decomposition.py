"""The table of Theorem 2: parts add up to the total, each where it belongs; a biased quantizer breaks the sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fqt
from fqt.errors import FqtError
from fqt.stats import Decomposition, quantization_variance
from fqt.stats.decomposition import decompose

from .nets import Attention, InARow, Twice, batches, loss, make, mlp


def table_of(model: nn.Module, data: list, draws: int, seed: int = 0) -> Decomposition:
    return decompose(model, loss, data, draws, seed)


def test_nothing_is_left_behind() -> None:
    model, data = make(), batches(2)
    loss(model, data[0]).backward()
    state, grads = {k: v.clone() for k, v in model.state_dict().items()}, [p.grad for p in model.parameters()]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    first = table_of(model, data, 1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert str(table_of(model, data, 1)) == str(first)
    loss(model, data[0])
    assert not torch.equal(model[1].running_mean, state["1.running_mean"])  # the check above can fail


RECIPES = {
    "psq3": fqt.Recipe(grad_input="psq3", grad_weight="ptq4"),
    "shq3d": fqt.Recipe(grad_input="shq3d", grad_weight="psq4d@channel"),
    "ptq2": fqt.Recipe(grad_input="ptq2", grad_weight="ptq8"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_parts_add_up_to_the_total(name: str) -> None:
    """Checked at three times the simultaneous 95 % intervals: false alarms below 1e-5."""
    found = table_of(make(recipe=RECIPES[name]), batches(2), 16)
    assert found.sources == ("5", "3", "0")
    assert found.targets == ("0", "1", "3", "5")
    for target, gap in found.gap.items():
        assert abs(gap.value) <= 3 * found.interval[target] + 1e-5 * found.total[target].value
        assert gap.value == pytest.approx(
            found.total[target].value
            - sum(
                row[target].value if target else sum(e.value for e in row.values()) for row in found.parts.values()
            ),
            abs=1e-9 * found.total[target].value,
        )
    # what a layer adds reaches itself and what lies below, nothing above
    assert found.parts["3"]["5"].value == found.parts["0"]["5"].value == found.parts["0"]["3"].value == 0
    assert all(found.parts[s][t].value > 0 for s, t in (("5", "0"), ("5", "1"), ("5", "5"), ("3", "3"), ("0", "0")))
    assert sum(e.value for effects in found.effect.values() for e in effects.values()) == pytest.approx(
        found.total[None].value - found.gap[None].value
    )


def test_the_total_is_the_quantization_variance() -> None:
    """Against unrelated draws about their own mean; |z| < 5 with errors from the draws on each batch."""
    model, data = make(recipe=RECIPES["psq3"]), batches(2)
    found = table_of(model, data, 16)
    other = [quantization_variance(model, loss, data, 8, seed=s).total.value for s in range(1, 6)]
    spread = torch.tensor(other).std().item()
    assert abs(found.total[None].value - sum(other) / 5) < 6 * spread * math.sqrt(1 / 5 + 1 / 2)


def test_a_biased_quantizer_breaks_the_sum() -> None:
    biased = fqt.Recipe(grad_input="psq2n", grad_weight="ptq2n")
    found = table_of(make(recipe=biased), batches(2), 12)
    assert not found.agrees


def test_simultaneous_intervals_cover() -> None:
    """Of 20 tables at 95 % at least 15 agree (false alarm 3e-4 if exactly 95 % did)."""
    model = make(recipe=RECIPES["psq3"])
    assert sum(table_of(model, batches(1), 5, seed).agrees for seed in range(20)) >= 15


@pytest.mark.parametrize("off", ["grad_input", "grad_weight"])
def test_bifurcation_is_told_apart(off: str) -> None:
    recipe = fqt.Recipe(**{"grad_input": "psq3", "grad_weight": "ptq4", off: None})
    found = table_of(make(recipe=recipe), batches(2), 2)
    for source, row in found.parts.items():
        assert found.effect[source][off].value == 0
        for target, part in row.items():
            if (target == source) == (off == "grad_input"):
                assert part.error == part.error  # the other kind may be anything
            else:
                assert part.value == 0


@pytest.mark.parametrize(("build", "shape"), [(Attention, (5, 6)), (InARow, (6,))])
def test_layers_with_several_products_in_a_row(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Their two quantizers are turned on one after the other: turning one off altogether gives the same effects."""
    whole = table_of(make(build, RECIPES["psq3"]), batches(1, shape=shape), 16)
    for target, gap in whole.gap.items():
        assert abs(gap.value) <= 3 * whole.interval[target] + 1e-5 * whole.total[target].value
    alone = table_of(make(build, fqt.Recipe(grad_weight="ptq4")), batches(1, shape=shape), 16)
    for layer in alone.sources:
        a, b = whole.effect[layer]["grad_weight"], alone.effect[layer]["grad_weight"]
        assert b.value > 0
        assert a.value == pytest.approx(b.value, rel=0.6)
        assert alone.effect[layer]["grad_input"].value == 0
    assert whole.effect["attention" if build is Attention else "shared"]["grad_input"].value > 0


def test_shared_weights_are_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    found = table_of(fqt.quantize_(model, fqt.Recipe(grad_weight="ptq3")), batches(1), 4)
    assert all(effect["grad_input"].value == 0 for effect in found.effect.values())
    assert all(effect["grad_weight"].value > 0 for effect in found.effect.values())


def test_one_draw_has_no_errors() -> None:
    found = table_of(make(), batches(1), 1)
    assert math.isnan(found.total[None].error)
    assert math.isnan(found.interval[None])
    assert found.total[None].value > 0
    assert found.weight == {"5": 16 * 3 * 8, "3": 16 * 8 * 8}


def test_uses_apart_are_refused() -> None:
    with pytest.raises(FqtError, match="'shared' is used again after others"):
        table_of(make(Twice), batches(1), 1)


def test_batches_through_other_layers_are_refused() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(), mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if x[0, 0] > 0 else self.b(x)

    data = batches(2)
    data[0][0][0, 0], data[1][0][0, 0] = 1, -1
    with pytest.raises(FqtError, match="do not use the same layers"):
        table_of(make(Either), data, 1)
