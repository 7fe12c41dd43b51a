"""The choice by measurement, with a GPU's clock and stream played by the test."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fqt.kernels.triton import tune

MUCH = 1 << 40
SPENT = {"slow": 3.0, "fast": 1.0, "broken": None, "middling": 2.0}


class Machine:
    """A GPU on which a choice takes as long as `SPENT` says, or does not run."""

    def __init__(self) -> None:
        self.now, self.ran, self.capturing = 0.0, [], False
        self.at = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))

    def run(self, choice: str) -> None:
        self.ran.append(choice)
        if SPENT[choice] is None:
            raise RuntimeError("out of shared memory")
        self.now += SPENT[choice]

    def event(self, enable_timing: bool) -> SimpleNamespace:
        found = SimpleNamespace(at=0.0, synchronize=lambda: None)
        found.record = lambda: setattr(found, "at", self.now)
        found.elapsed_time = lambda other: other.at - found.at
        return found


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.delenv("FQT_TUNE", raising=False)
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    return made


def test_the_fastest_is_kept_for_its_key(machine) -> None:
    choose = lambda key: tune.fastest((key,), machine.at, list(SPENT), machine.run, MUCH)
    assert choose("a") == "fast"
    assert machine.ran.count("broken") == 1
    before = len(machine.ran)
    assert choose("a") == "fast"
    assert len(machine.ran) == before  # measured once
    assert choose("b") == "fast"
    assert len(machine.ran) == 2 * before


def test_nothing_is_measured_in_a_capture(machine) -> None:
    machine.capturing = True
    assert tune.fastest(("a",), machine.at, list(SPENT), machine.run, MUCH) == "slow"
    assert not machine.ran
    machine.capturing = False
    assert tune.fastest(("a",), machine.at, list(SPENT), machine.run, MUCH) == "fast"
    machine.capturing = True
    assert tune.fastest(("a",), machine.at, list(SPENT), machine.run, MUCH) == "fast"


def test_what_needs_no_measurement(machine, monkeypatch) -> None:
    assert tune.fastest(("small",), machine.at, list(SPENT), machine.run, 1 << 20) == "slow"
    assert not machine.ran
    assert tune.fastest(("a",), machine.at, ["slow"], machine.run, MUCH) == "slow"
    monkeypatch.setenv("FQT_TUNE", "off")
    assert tune.fastest(("a",), machine.at, list(SPENT), machine.run, MUCH) == "slow"
    assert not machine.ran


def test_where_nothing_runs_the_error_is_the_caller_s(machine) -> None:
    assert tune.fastest(("a",), machine.at, ["broken", "broken too"], lambda each: 1 / 0, MUCH) == "broken"
