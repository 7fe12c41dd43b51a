"""The paper's three on equal terms: one grad_weight quantizer for all, and what the released code's own one does.

The released code quantizes the weight gradient per column (one step per feature, over the batch) in PSQ and BHQ
runs but per tensor in PTQ runs, so that its comparison changes two quantizers at once.
"""

from __future__ import annotations

import pytest
import torch

import fqt
from fqt import Recipe
from fqt.nn import dump_recipe, load_recipe
from fqt.quant import Integers, Quantizer, Scale

from . import checks
from .cases import parameter_gradients, small_batch, small_net

COLUMN = Quantizer(scale=Scale("column", axis="sample"), grid=Integers(8))
WEIGHTS = ("0.weight", "3.weight", "6.weight")
DRAWS = 60


def energies(recipe: Recipe) -> dict[str, torch.Tensor]:
    """(draws,) ‖noise‖² of each weight's gradient."""
    batch = small_batch()
    exact = parameter_gradients(fqt.quantize_(small_net(), checks.qat_of(recipe)), batch)
    sample = checks.draws(fqt.quantize_(small_net(), recipe), batch, DRAWS)
    return {n: (sample[n] - exact[n]).square().sum(1) for n in WEIGHTS}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    found = {m: energies(Recipe(grad_input=f"{m}4", grad_weight="ptq8")) for m in ("ptq", "psq", "bhq")}
    found["column"] = energies(Recipe(grad_input="psq4", grad_weight=COLUMN))
    found["alone"] = energies(Recipe(grad_weight="ptq8"))
    found["column alone"] = energies(Recipe(grad_weight=COLUMN))
    return found


def test_the_last_layer_is_the_same_for_all_three(measured: dict) -> None:
    """It sees its own grad_weight quantizer only: the same seeds give the same noise, bit for bit."""
    for method in ("ptq", "psq", "bhq"):
        assert torch.equal(measured[method]["6.weight"], measured["alone"]["6.weight"])


def test_the_order_of_the_three_on_equal_terms(measured: dict) -> None:
    """The first layer, where all of grad_input's noise arrives: PTQ is worse by far more than 6 standard errors."""
    ptq, psq, bhq = (measured[m]["0.weight"] for m in ("ptq", "psq", "bhq"))
    for better in (psq, bhq):
        assert checks.z_of(ptq - better) > 6
        assert ptq.mean() > 2 * better.mean()


def test_the_effect_of_the_released_rule_is_visible(measured: dict) -> None:
    """Per column the weight gradient's own noise changes in every layer, at every |z| > 6; in the last it drops."""
    for name in WEIGHTS:
        difference = measured["alone"][name] - measured["column alone"][name]
        assert abs(checks.z_of(difference)) > 6, name
    assert measured["column"]["6.weight"].mean() < measured["psq"]["6.weight"].mean()


def test_it_has_words_in_a_recipe() -> None:
    recipe = Recipe(grad_input="psq4", grad_weight=COLUMN)
    assert load_recipe(dump_recipe(recipe)) == recipe
    explained = {p.product: p for p in fqt.explain(fqt.quantize_(small_net(), recipe)).products if p.layer == "3"}
    assert "column" in explained["grad_weight"].why
    assert explained["grad_weight"].arithmetic == "simulated"
