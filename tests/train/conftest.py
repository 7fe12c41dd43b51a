import json
import os
import signal

import pytest

from fqt.train import resolve
from fqt.train.run import Silent


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


class Interruption(Silent):
    """Sends this process a signal, by default that of Ctrl-C, after some steps."""

    def __init__(self, after, number=signal.SIGINT):
        self.left, self.number = after, number

    def step(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def interruption():
    return Interruption


@pytest.fixture
def small():
    """A run of 2 epochs of 5 steps on the digits, with noise in its gradients."""

    def make(**changes):
        given = {"epochs": 2, "batch_size": 256, "window": 2, "recipe": "bhq4", "device": "cpu"}
        return resolve("digits", None, {**given, **changes})

    return make


@pytest.fixture
def metrics():
    """The lines of a run's metrics without its clock."""

    def read(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    return read
