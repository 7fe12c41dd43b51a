"""What is said of a GPU's integer units, whatever machine this is."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fqt.kernels import integer
from fqt.kernels.triton import serving


@pytest.fixture
def gpu(monkeypatch):
    """A machine with Triton and a GPU of some compute capability."""
    monkeypatch.delenv("FQT_KERNELS", raising=False)
    monkeypatch.setattr(serving, "find_spec", lambda name: importlib.util.find_spec("torch"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.version, "hip", None)
    return lambda capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_devices_with_integer_products(gpu, capability) -> None:
    gpu(capability)
    assert integer.serves("cuda")
    assert integer.machine_obstacle("cuda") == ""


@pytest.mark.parametrize(("capability", "words"), [((7, 0), "begin with 7.5"), ((7, 5), "begin with 8.0")])
def test_older_devices(gpu, capability, words) -> None:
    gpu(capability)
    said = integer.machine_obstacle("cuda")
    assert said.startswith(f"Card has compute capability {capability[0]}.{capability[1]}: ")
    assert words in said


def test_what_else_is_missing(gpu, monkeypatch) -> None:
    gpu((9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert integer.machine_obstacle("cuda") == "no CUDA device is there"
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert integer.machine_obstacle("cuda") == "no integer kernels: Triton is not installed"
    monkeypatch.setenv("FQT_KERNELS", "reference")
    assert integer.machine_obstacle("cuda") == "no integer kernels: FQT_KERNELS=reference"
