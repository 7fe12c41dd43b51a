"""What the Triton backend offers: asked of tensors on a GPU alone, imported only then; Triton need not be here."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from fqt.kernels import ops
from fqt.kernels.codes import ROW, Entries
from fqt.kernels.op import Op
from fqt.kernels.triton import device


class OnGpu:
    """What `offer` asks of a tensor."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An operation that a module offers for even numbers, as on a machine with Triton and a new GPU."""
    module = ModuleType("fqt.kernels.triton.even")
    module.double = lambda x, n: ("offered", 2 * n)
    module.takes_double = lambda x, n: n % 2 == 0
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(device, "_installed", lambda: True)
    monkeypatch.setattr(device, "_too_old", lambda index: "")

    def double(x: object, n: int) -> tuple[str, int]:
        return "definition", 2 * n

    op = Op(double)
    device.offer(op, "even")
    return op


def test_a_module_is_asked_about_tensors_on_a_gpu(double: Op) -> None:
    assert double(OnGpu(), 4) == ("offered", 8)
    assert double(x=OnGpu(), n=4) == ("offered", 8)
    assert double(OnGpu(), 3) == ("definition", 6)
    assert double.backend(OnGpu(), 4) == "cuda"


def test_a_tensor_on_the_cpu_imports_nothing(double: Op) -> None:
    del sys.modules["fqt.kernels.triton.even"]
    assert double(torch.ones(2), 4) == ("definition", 8)
    assert double(Entries(torch.ones(2, 2)), 4) == ("definition", 8)
    with pytest.raises(ModuleNotFoundError):
        double(OnGpu(), 4)


def test_another_argument_may_say_where(double: Op) -> None:
    other = Op(double.reference)
    device.offer(other, "even", of=lambda x, n: n)
    assert other(torch.ones(2), torch.tensor(4))[0] == "definition"


@pytest.mark.parametrize("why", ["no Triton", "an old GPU", "turned off"])
def test_where_kernels_cannot_run(double: Op, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "turned off":
        monkeypatch.setenv("FQT_KERNELS", "reference")
    else:
        name, answer = ("_installed", False) if why == "no Triton" else ("_too_old", "too old")
        monkeypatch.setattr(device, name, lambda *_: answer)
    assert double(OnGpu(), 4) == ("definition", 8)


def test_the_operations_have_an_offer() -> None:
    for op in (ops.value_range, ops.encode, ops.decode, ops.quantize, ops.hadamard, ops.rotate, ops.reflect):
        assert "cuda" in [each.backend for each in op.implementations]
    assert ops.value_range.backend(Entries(torch.ones(2, 2)), ROW) != "cuda"


def test_importing_fqt_and_quantizing_on_the_cpu_imports_no_kernels() -> None:
    """Nor Triton, where it is installed. torch's FLOP counter brings it: its formulas wait for a conversion."""
    code = """
import sys, torch, fqt
from fqt.quant import quantizer
quantizer("psq8d").quantize(torch.ones(3, 4), seed=1)
print(sorted(n for n in sys.modules if "fqt.kernels.triton." in n or n.partition(".")[0] == "triton"))
layer = fqt.quantize_(torch.nn.Linear(3, 5), "default")
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counted:
    layer(torch.ones(7, 3)).sum().backward()
print(counted.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, flops = done.stdout.splitlines()
    assert imported == "['fqt.kernels.triton.device', 'fqt.kernels.triton.serving']"  # these import no Triton
    assert int(flops) == 2 * 2 * 7 * 3 * 5  # of output and weight gradient
