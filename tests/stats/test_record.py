"""A diagnosis goes through JSON unchanged."""

import json
import math

import pytest
import torch
from torch import nn

import fqt
from fqt.errors import FqtError
from fqt.records import read_json, write_json
from fqt.stats import diagnosis_from, diagnosis_record

from .nets import batches, loss, make


@pytest.mark.parametrize("recipe", ["shq4d", "default"])
@pytest.mark.parametrize("table", [0, 2])
def test_round_trip(recipe, table, tmp_path):
    found = fqt.diagnose(make(recipe=recipe), loss, batches(3), table=table)
    write_json(tmp_path / "d.json", diagnosis_record(found))
    again = diagnosis_from(read_json(tmp_path / "d.json"))
    if table:
        assert again == found
        assert fqt.plan(again, mean_width=4) == fqt.plan(found, mean_width=4)
    else:
        assert again.operands == found.operands
        assert again.recipes == found.recipes


def test_errors_of_two_batches_are_nan_again(tmp_path):
    torch.manual_seed(0)
    model = fqt.quantize_(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), "psq4")
    write_json(tmp_path / "d.json", diagnosis_record(fqt.diagnose(model, loss, batches(2))))
    assert math.isnan(diagnosis_from(read_json(tmp_path / "d.json")).total.sampling.error)


@pytest.mark.parametrize("damage", [[], {"format": "x"}, {"format": "fqt diagnosis 1"}])
def test_what_is_no_record_is_refused(damage):
    with pytest.raises(FqtError, match=r"no record of fqt diagnose|is damaged"):
        diagnosis_from(json.loads(json.dumps(damage)))


def test_a_recipe_of_somebodys_own_class_is_not_called_damage():
    torch.manual_seed(0)
    model = fqt.quantize_(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), "psq4")
    record = json.loads(json.dumps(diagnosis_record(fqt.diagnose(model, loss, batches(2)))))
    record["recipes"]["0"]["grad_input"] = {
        "transform": "none",
        "group": "row",
        "mode": "zero",
        "class": "mine:Own",
    }
    with pytest.raises(FqtError, match=r"recipes .* cannot be made here: .*mine:Own.* import its module first"):
        diagnosis_from(record)
