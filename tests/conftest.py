import sys

import pytest
import torch

import fqt.cli
from tests import backends


@pytest.fixture
def one_thread():
    """Models this small are slower on two threads, far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reference_only():
    """Every operation on the plain-torch reference; `backends.reference_only` for a part of a test."""
    with backends.reference_only():
        yield


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder; gives status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            fqt.cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call
