"""What is said of a GPU's integer units, whatever machine this is."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels import integer
from fqt.kernels.triton import device


class OnGpu:
    """What `usable` asks of a tensor."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with Triton and a GPU of some compute capability."""
    monkeypatch.delenv("FQT_KERNELS", raising=False)
    monkeypatch.setattr(device, "_installed", lambda: True)
    monkeypatch.setattr(device, "_too_old", device._too_old.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(torch.version, "hip", None)
    return lambda capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_devices_with_integer_products(gpu, capability) -> None:
    gpu(capability)
    assert integer.serves("cuda")
    assert integer.machine_obstacle("cuda") == ""
    assert device.usable(OnGpu())


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_older_devices(gpu, capability, monkeypatch) -> None:
    gpu(capability)
    said = "Card has compute capability {}.{}, and Triton's kernels begin with 8.0".format(*capability)
    assert integer.machine_obstacle("cuda") == f"no integer kernels: {said}"
    assert not device.usable(OnGpu())
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD's devices count otherwise
    assert device.usable(OnGpu())


def test_what_else_is_missing(gpu, monkeypatch) -> None:
    gpu((9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert integer.machine_obstacle("cuda") == "no integer kernels: no CUDA device is there"
    monkeypatch.setattr(device, "_installed", lambda: False)
    assert integer.machine_obstacle("cuda") == "no integer kernels: Triton is not installed"
    assert not device.usable(OnGpu())
    monkeypatch.setenv("FQT_KERNELS", "reference")
    assert integer.machine_obstacle("cuda") == "no integer kernels: FQT_KERNELS=reference"
    assert not device.usable(OnGpu())


def test_what_products_write() -> None:
    for dtype in (torch.float32, torch.float64):
        assert integer.written(dtype, "cuda") == integer.written(dtype, "cpu") == torch.float32
    assert integer.written(torch.bfloat16, "cpu") == torch.bfloat16
    assert integer.written(torch.float16, "cpu") == torch.float32
    assert integer.written(torch.float16, "cuda") == torch.float16
    assert integer.written(torch.float16, "xpu") == torch.float32
