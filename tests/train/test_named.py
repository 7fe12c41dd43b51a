"""A recipe by its import path: what a user names is imported, in a run and when it goes on."""

import importlib
import sys

import pytest
import torch

import fqt
from fqt import FqtError, Recipe
from fqt.nn import dump_recipe, load_recipe
from fqt.train import Interrupted, TrainConfig, train
from fqt.train.compare import recipe_label
from fqt.train.named import named_recipe
from fqt.train.snapshot import Snapshot

MODULE = """
from dataclasses import dataclass

from fqt import Quantizer
from fqt.kernels.codes import Levels
from fqt.quant import Grid, Scale


@dataclass(frozen=True)
class Powers(Grid):
    base: int = 2

    @property
    def bits(self):
        return 4

    def levels(self, mode):
        return Levels(-64, 64, table=(0, 1, *(self.base**k for k in range(1, 7))))


quantizer = Quantizer(scale=Scale("row", "symmetric"), grid=Powers())
"""
QUANTIZER = fqt.quantizer("shq3d")
RECIPE = Recipe(grad_input="psq4", grad_weight="psq4")
MAPPING = {"base": "default", "grad_input": "psq3d"}


def function(x, seed):
    return x


@pytest.mark.parametrize("name", ["QUANTIZER", "RECIPE", "MAPPING"])
def test_what_stands_at_an_import_path(name):
    stands = {"QUANTIZER": load_recipe("shq3d"), "RECIPE": RECIPE, "MAPPING": load_recipe(MAPPING)}[name]
    assert named_recipe(f"{__name__}:{name}") == stands
    assert recipe_label("mine:logu") == "mine_logu"  # a name for a folder


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (f"{__name__}:function", "can only be certified"),
        (f"{__name__}:nobody", "cannot be imported"),
        ("nowhere.at.all:x", "cannot be imported"),
        (f"{__name__}:MODULE", "unknown recipe"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(path, says):
    with pytest.raises(FqtError, match=says) as error:
        named_recipe(path)
    assert "\n" not in str(error.value)
    assert path in str(error.value)


@pytest.mark.parametrize("use", [lambda f: Recipe(grad_input=f), fqt.quantizer, load_recipe], ids=range(3))
def test_a_function_is_no_quantizer_of_a_layer(use):
    with pytest.raises(FqtError) as error:
        use(function)
    assert "\n" not in str(error.value)
    assert ("filter_fn=" in str(error.value)) == (use is not fqt.quantizer)


def test_a_file_of_weights_imports_nothing():
    with pytest.raises(FqtError, match="unknown recipe"):
        fqt.quantize_(torch.nn.Linear(2, 2), {"rules": [{"pattern": "*", "recipe": f"{__name__}:QUANTIZER"}]})


def test_an_own_grid_trains_goes_on_and_is_measured(tmp_path, small, interruption, monkeypatch):
    (tmp_path / "mygrids.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    config = small(recipe="mygrids:quantizer")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", observer=interruption(3))
    del sys.modules["mygrids"]  # as in a new process
    importlib.invalidate_caches()
    assert train(config, tmp_path / "run", resume=True).steps == 10
    snapshot = Snapshot.of_run(tmp_path / "run")
    assert type(next(snapshot.model().parameters())) is torch.nn.Parameter
    words = dump_recipe(named_recipe(config.recipe))["grad_input"]
    assert words["grid"] == {"class": "mygrids:Powers", "base": 2}
    assert TrainConfig.from_dict(config.to_dict()) == config
