"""What a conversion leaves in float: one line to the log, an error if asked to be strict."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fqt
from fqt import ConversionError, Recipe, Rule
from fqt.nn.coverage import multiplied_weights, percent

from .cases import small_net


def mixed(hidden: int = 4) -> nn.ModuleDict:
    """Two layers to convert, 2 · 32 weights, and a recurrent one of 8 · hidden + 4 · hidden² weights."""
    return nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(8, 4), "lstm": nn.LSTM(2, hidden)})


def line(caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    (record,) = [r for r in caplog.records if r.name == "fqt"]
    caplog.clear()
    assert "\n" not in record.getMessage()
    return record.levelname, record.getMessage()


@pytest.fixture(autouse=True)
def _everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fqt")


def test_all_converted_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    fqt.quantize_(small_net(), "bhq4")
    level, text = line(caplog)
    assert level == "INFO"
    assert text == "fqt: 3 of 3 layers run quantized, 100 % of the weights that are multiplied"


def test_what_stays_float_is_named_with_its_share(caplog: pytest.LogCaptureFixture) -> None:
    fqt.quantize_(mixed(), "bhq4")
    level, text = line(caplog)
    assert level == "WARNING"
    assert "2 of 3 layers" in text
    assert f"{100 * 64 / (64 + 96):.0f} % of the weights" in text
    assert "lstm (LSTM is not a class" in text
    assert "fqt.explain(model)" in text


def test_what_was_asked_for_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rules = [Rule("lstm", "none"), Rule("a", "none")]
    fqt.quantize_(mixed(), Recipe(rules=rules), strict=True)
    level, text = line(caplog)
    assert level == "INFO"
    assert "1 of 3 layers" in text
    assert "2 left in float by request" in text
    fqt.quantize_(mixed(), "none")
    assert line(caplog)[0] == "INFO"
    fqt.quantize_(mixed(), Recipe(input=None, weight=None, rules=[Rule("a", "bhq4")]))
    assert line(caplog)[0] == "INFO"


def test_a_filter_that_leaves_nothing_out_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """As one does that takes the name first."""
    fqt.quantize_(small_net(), "bhq4", filter_fn=lambda name, module: name != "3")
    level, text = line(caplog)
    assert level == "WARNING"
    assert text.endswith("; filter_fn(module, name) left no layer out")
    fqt.quantize_(small_net(), "bhq4", filter_fn=lambda module, name: name != "3")
    level, text = line(caplog)
    assert level == "INFO"
    assert text.endswith("; 1 left in float by request")


def test_a_filter_turns_no_converted_layer_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = fqt.quantize_(small_net(), "psq8")
    line(caplog)
    fqt.quantize_(model, "bhq4", filter_fn=lambda module, name: name != "3")
    level, text = line(caplog)
    assert level == "WARNING"
    assert "3 of 3 layers run quantized, 100 %" in text
    assert "float by request" not in text
    assert "1 that filter_fn left out keep the recipe they had: fqt.restore_(model) first" in text


@pytest.mark.parametrize(("size", "level"), [(100, "INFO"), (4, "WARNING")])
def test_a_hundredth_may_stay_float_without_a_warning(
    caplog: pytest.LogCaptureFixture, size: int, level: str
) -> None:
    fqt.quantize_(nn.ModuleDict({"a": nn.Linear(size, size), "odd": nn.Bilinear(2, 2, 2)}), "bhq4")
    assert line(caplog)[0] == level


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_of_unknown_size_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    fqt.quantize_(nn.ModuleDict({"a": nn.Linear(100, 100), "later": nn.LazyLinear(2)}), "bhq4")
    level, text = line(caplog)
    assert level == "WARNING"
    assert "later" in text


def test_many_are_counted_not_listed(caplog: pytest.LogCaptureFixture) -> None:
    odd = {f"odd{i}": nn.Bilinear(2, 2, 2 + i) for i in range(9)}
    fqt.quantize_(nn.ModuleDict({"a": nn.Linear(2, 2), **odd}), "bhq4")
    text = line(caplog)[1]
    assert "odd8" in text  # the largest first
    assert "odd0" not in text
    assert "4 more" in text


class Positions(nn.Module):
    """Its own matrix is added, not multiplied; nobody can see that from outside."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.zeros(length, width)), nn.Linear(width, 10 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.table)


def test_a_small_matrix_of_unknown_use_is_no_layer_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    model = fqt.quantize_(Positions(2, 30), "bhq4", strict=True)
    assert line(caplog)[0] == "INFO"
    explained = fqt.explain(model, torch.randn(3, 2, 30))
    (row,) = [p for p in explained.products if p.layer == "(model)"]
    assert (row.arithmetic, explained.never_ran) == ("not run", ())
    assert row.why.endswith("no product used them")
    with pytest.raises(ConversionError, match="table"):
        fqt.quantize_(Positions(20, 30), "bhq4", strict=True)


def test_many_small_ones_of_one_class_are(caplog: pytest.LogCaptureFixture) -> None:
    """Each holds less than a hundredth, all together more."""
    blocks = nn.Sequential(*(Positions(1, 4) for _ in range(50)), nn.Linear(4, 4))
    fqt.quantize_(blocks, "bhq4")
    assert line(caplog)[0] == "WARNING"


def test_strict_names_every_layer_and_changes_nothing() -> None:
    model = mixed()
    model["own"] = nn.Bilinear(2, 2, 2)
    with pytest.raises(ConversionError) as error:
        fqt.quantize_(model, "bhq4", strict=True)
    assert all(f"'{name}' would stay float" in str(error.value) for name in ("lstm", "own"))
    assert type(model["a"]) is nn.Linear
    fqt.quantize_(small_net(), "bhq4", strict=True)


WEIGHTS = {
    "linear": (lambda: nn.Linear(3, 5), 15),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), 6 * 2 * 9),
    "attention": (lambda: nn.MultiheadAttention(4, 2), 4 * 16),
    "other dimensions": (lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2), 16 + 12 + 8 + 16),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 5)), 15),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(5, 5)), 25),
    "gru": (lambda: nn.GRU(3, 4), 3 * 4 * (3 + 4)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_multiplied_weights(name: str) -> None:
    make, count = WEIGHTS[name]
    assert multiplied_weights(make()) == count


@pytest.mark.parametrize(
    ("part", "text"),
    [(0, "0 %"), (0.0001, "under 0.1 %"), (0.005, "0.5 %"), (0.07, "7 %"), (0.9996, "over 99.9 %"), (1, "100 %")],
)
def test_shares_in_words(part: float, text: str) -> None:
    assert percent(part, 1) == text


def test_the_logger_has_no_handler_of_its_own() -> None:
    assert logging.getLogger("fqt").handlers == []
