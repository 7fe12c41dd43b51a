"""Gradients averaged in quantized messages, in two processes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fqt
from fqt import FqtError
from fqt.distributed import Messages, quantized_messages

from .worker import AVERAGED, DRAWS

UNBIASED = [case for case in AVERAGED if case[0] != "psq4n"]


def offness(errors: torch.Tensor) -> float:
    """‖mean error‖² over what it is on average without bias, from independent draws (rows)."""
    errors = errors.double()
    return float(len(errors) * errors.mean(0).square().sum() / errors.square().sum(1).mean())


@pytest.mark.parametrize("case", AVERAGED, ids="-".join)
def test_all_processes_have_the_same_bits(ranks: list[dict[str, Any]], case: tuple[str, str]) -> None:
    assert torch.equal(*(rank["averages"][case]["errors"] for rank in ranks))


@pytest.mark.parametrize("case", UNBIASED, ids="-".join)
def test_averages_are_unbiased(ranks: list[dict[str, Any]], case: tuple[str, str]) -> None:
    """The statistic has mean 1 and, with d entries that matter, deviation √(2/d): 0.6 is 6 of these for d = 200.

    A bias of a ninth of the noise's deviation doubles it; nearest rounding, all bias, has `DRAWS`.
    """
    assert abs(offness(ranks[0]["averages"][case]["errors"]) - 1) < 0.6
    assert offness(ranks[0]["averages"]["psq4n", "gather"]["errors"]) == pytest.approx(DRAWS)


@pytest.mark.parametrize("case", UNBIASED, ids="-".join)
def test_the_variance_is_what_is_said(ranks: list[dict[str, Any]], case: tuple[str, str]) -> None:
    """Within 6 %: with d entries that matter the mean of 32 draws has deviation √(2/32d), 0.012 for d = 400.

    So noise is independent over processes (it would be up to twice that if it were shared), and over stages.
    """
    found = ranks[0]["averages"][case]
    assert float(found["errors"].double().square().sum(1).mean() / found["said"].mean()) == pytest.approx(
        1, abs=0.06
    )


def test_draws_differ(ranks: list[dict[str, Any]]) -> None:
    first, second, third, again = ranks[0]["resumed"]
    assert not torch.equal(first, second)
    assert torch.equal(third, again)
    assert not torch.equal(second, third)


def test_bytes_are_counted(ranks: list[dict[str, Any]]) -> None:
    """3,001 entries in 12 rows of 251; two stages of a half have the same codes, and each a header."""
    head, steps, codes = 17, 12 * 8, -(-12 * 251 // 8) * 4
    sent, as_floats = ranks[0]["averages"]["psq4", "gather"]["bytes"].tolist()
    assert (sent, as_floats) == (head + steps + codes, 3001 * 4)
    assert ranks[0]["averages"]["psq4", "scatter"]["bytes"].tolist()[0] == 2 * (head + 6 * 8 + -(-6 * 251 // 8) * 4)


def test_what_is_not_finite_comes_back_everywhere(ranks: list[dict[str, Any]]) -> None:
    """A row without mixing, else all: on both processes."""
    for rank in ranks:
        row = torch.zeros(400, dtype=torch.bool)
        row[200:300] = True
        assert torch.equal(rank["nan"]["psq8"].isnan(), row)
        assert all(rank["nan"][name].isnan().all() for name in ("ptq8", "shq8"))


def test_processes_must_agree(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["differ"]) == 2
        assert all("same quantizer, block and exchange" in error for error in rank["differ"])


def test_short_tensors(ranks: list[dict[str, Any]]) -> None:
    few, one, none, bfloat = ranks[1]["short"]
    torch.testing.assert_close(few, torch.arange(7.0), atol=2 * 6 / 255, rtol=0)
    assert one == 1
    assert none.shape == (0, 3)
    assert torch.equal(bfloat, torch.ones(2, 3, dtype=torch.bfloat16))


def test_the_hook(ranks: list[dict[str, Any]]) -> None:
    """In several buckets under DDP: unbiased, of the variance that it says (as above), the same everywhere."""
    found = ranks[0]["hook"]
    errors = torch.stack(
        [torch.cat([(draw[n] - found["plain"][n]).flatten() for n in draw]) for draw in found["draws"]]
    )
    assert abs(offness(errors) - 1) < 0.6
    said = torch.tensor(found["said"]).mean()
    assert float(errors.double().square().sum(1).mean() / said) == pytest.approx(1, abs=0.1)
    assert all(map(torch.equal, found["weights"], ranks[1]["hook"]["weights"]))
    assert found["sent"] < 0.35


@pytest.mark.parametrize("how", ["floats", "messages"])
def test_a_monitor_reads_the_average(ranks: list[dict[str, Any]], how: str) -> None:
    """‖ĝ − g‖² and ‖g₁ − g‖² of gradients averaged over processes, the same on all of them."""
    reading, wanted = ranks[0]["monitor"][how], ranks[0]["monitor"][how, "wanted"]
    assert reading == ranks[1]["monitor"][how]
    for key, value in wanted.items():
        assert reading[key] == pytest.approx(value, rel=1e-4)
    assert "those of this batch" in ranks[0]["monitor"][how, "refused"]


def test_a_monitor_counts_messages(ranks: list[dict[str, Any]]) -> None:
    """Their variance, given the gradients, adds to that of the layers (one draw of both, so roughly)."""
    plain, with_messages = ranks[0]["monitor"]["floats"], ranks[0]["monitor"]["messages"]
    assert "messages" not in plain
    assert with_messages["messages"] > 0
    together = plain["quantization"] + with_messages["messages"]
    assert with_messages["quantization"] == pytest.approx(together, rel=0.5)


def test_the_documentation(ranks: list[dict[str, Any]]) -> None:
    """Both processes print the same, and have the same weights after it; a seventh of the bytes or less."""
    assert ranks[0]["documented"] == ranks[1]["documented"]
    share = re.search(r"(0\.\d+) of the bytes", ranks[0]["documented"][0])
    assert share is not None
    assert float(share[1]) < 1 / 7


def test_another_state_is_refused() -> None:
    with pytest.raises(FqtError, match="not 'psq8'"):
        quantized_messages("psq8", None)  # type: ignore[arg-type]
    model = fqt.quantize_(torch.nn.Linear(3, 2), "psq8")
    with pytest.raises(FqtError, match="not 'psq8'"):
        fqt.Monitor(model, lambda m, x: m(x).mean(), messages="psq8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quantizer": "psq8n"}, "'psq8n' are biased, and"),
        ({"quantizer": "eden4"}, "biased, if only a little"),
        ({"quantizer": "sruc8"}, "biased, if only a little"),
        ({"quantizer": "hind8", "biased": True}, "its own range"),
        ({"quantizer": "psq"}, "needs its bits"),
        ({"quantizer": 8}, "a quantizer or its name"),
        ({"quantizer": "psq8", "exchange": "ring"}, "gather, scatter"),
        ({"quantizer": "psq8", "block": 0}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(FqtError, match=words) as caught:
        Messages(**{"seed": 0, **arguments})
    assert "\n" not in str(caught.value)
