"""A layer's step with every operation on Triton's kernels: the reference's bits, nothing that a GPU would make the
host wait for, and a step that a CUDA graph holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fqt
from fqt.kernels import blocked, codes, integer, ops, philox, products
from fqt.kernels import triton as backend
from fqt.kernels.op import Implementation, Op
from fqt.nn import compiled, layers
from tests.backends import reference_only
from tests.triton_kernels.machine import DEVICE, INTERPRETED, QUIET

pytestmark = QUIET
CONVOLUTIONS = (products.conv2d_of, products.conv2d_grad_input_of, products.conv2d_grad_weight_of)
OFFERED: list[tuple[str, Op]] = [
    *((module, op) for module, offered in backend._OFFERED.items() for op in offered),
    ("products", products.matmul_of),
    ("blocked", blocked.matmul),
    *(("conv", op) for op in CONVOLUTIONS),
    *(("fused", op) for op in (integer.output, integer.grad_input, integer.grad_weight)),
]
CASES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "default": ("default", lambda: nn.Linear(24, 20), (30, 24)),
    "default conv": ("default", lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 3, 7, 7)),
    "plain": ("psq8", lambda: nn.Linear(24, 20), (30, 24)),
    "dithered": ("psq8d", lambda: nn.Linear(24, 20), (3, 10, 24)),
    "transform": ("shq8", lambda: nn.Linear(24, 20, bias=False), (30, 24)),
}


@contextmanager
def on_kernels() -> Iterator[None]:
    """Interpreted, every operation on Triton's kernels, and what they leave on the reference; on a GPU as it is."""
    if not INTERPRETED:
        yield
        return
    with reference_only():
        for module, op in OFFERED:
            held, name = import_module(f"fqt.kernels.triton.{module}"), op.reference.__name__
            op.implementations = [Implementation("cuda", getattr(held, name), getattr(held, f"takes_{name}"))]
        yield


def step(case: str, device: str, seed: int = 5) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """A converted layer, and its forward and backward pass, which gives output and gradients."""
    recipe, make, shape = CASES[case]
    torch.manual_seed(0)
    layer = fqt.quantize_(make(), recipe).to(device)
    x = torch.randn(shape).to(device).requires_grad_()
    above = torch.randn(layer(x).shape).to(device)

    def run() -> dict[str, Tensor]:
        x.grad = None
        layer.zero_grad()
        y = layer(x)
        y.backward(above)
        assert x.grad is not None
        return {"output": y.detach(), "input": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}

    return layer, run


@pytest.mark.parametrize("case", CASES)
def test_the_reference_s_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one seed; on a GPU layers draw another than on the CPU. A bias's gradient is a sum of floats."""
    monkeypatch.setattr(layers, "drawn_seeds", lambda input: torch.tensor(-77, device=input.device))
    with reference_only():
        wanted = step(case, "cpu")[1]()
    with on_kernels():
        found = step(case, DEVICE)[1]()
    for name, value in wanted.items():
        rounding = 2.0**-20 * value.abs().max() if name == "bias" else 0
        assert (found[name].cpu() - value).abs().max() <= rounding, name


class _Waits(TorchDispatchMode):
    """Notes what a GPU would make the host wait for: questions for values, and copies of what Python holds."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "randperm")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        inside = {"layer": compiled._layer, "layer_backward": compiled._layer_backward}
        inside |= {k: getattr(products, f"_{k}") for k in ("matmul", *(op.__name__[:-3] for op in CONVOLUTIONS))}
        if func.namespace == "fqt" and name in inside:
            with self:
                return inside[name](*args)
        if name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU torch says so itself")
@pytest.mark.parametrize("case", ["default", "default conv"])
def test_nothing_would_make_the_host_wait(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, told that no value is at hand."""
    for module in (codes, ops, philox):
        monkeypatch.setattr(module, "at_hand", lambda x: False)
    with on_kernels():
        _, run = step(case, "cpu")
        with _Waits() as waits:
            run()
    assert waits.found == []


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing_and_can_be_captured(case: str) -> None:
    """After first steps, in which kernels are compiled and chosen. Replays draw anew, from torch's generator."""
    _, run = step(case, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        held = run()
    drawn = []
    for seed in (1, 2, 1):
        torch.cuda.manual_seed(seed)
        graph.replay()
        torch.cuda.synchronize()
        drawn.append({name: value.clone() for name, value in held.items()})
    first, other, again = drawn
    assert torch.equal(first["output"], other["output"])
    assert not torch.equal(first["weight"], other["weight"])
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
