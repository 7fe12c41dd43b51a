"""Whole layers with their products on Triton's kernels: the reference's bits, and no wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fqt
from fqt.kernels import blocked as declared_blocked
from fqt.kernels import integer
from fqt.kernels import products as declared
from fqt.kernels.op import Implementation, Op
from tests.backends import reference_only
from tests.triton_kernels.machine import DEVICE, INTERPRETED, QUIET

from fqt.kernels.triton import blocked, conv, products  # isort: skip

pytestmark = QUIET
OPS = {
    declared.matmul_of: (products.matmul_of, products.takes_matmul_of),
    declared.conv2d_of: (conv.conv2d_of, conv.takes_conv2d_of),
    declared.conv2d_grad_input_of: (conv.conv2d_grad_input_of, conv.takes_conv2d_grad_input_of),
    declared.conv2d_grad_weight_of: (conv.conv2d_grad_weight_of, conv.takes_conv2d_grad_weight_of),
    declared_blocked.matmul: (blocked.blocked_matmul, blocked.takes_blocked_matmul),
}
LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (30, 24)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (4, 3, 9, 9)),
}


@contextmanager
def products_only() -> Iterator[list[str]]:
    """Triton's products, and for everything else the reference; gives the names of what ran, which grows."""
    ran: list[str] = []

    def noted(op, run):
        def call(*args):
            ran.append(op.__name__)
            return run(*args)

        return call

    with reference_only():
        for op, (run, takes) in OPS.items():
            op.implementations = [Implementation("cuda", noted(op, run), takes)]
        yield ran


def outcome(make, shape: tuple[int, ...], recipe: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layer = fqt.quantize_(make(), recipe).to(device)
    x = torch.randn(shape).to(device).requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device))
    return {"output": y, "input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the layer's other parts would have to lie there")
@pytest.mark.parametrize("recipe", ["psq8", "psq8d", "mxint8"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_reference_s_bits(name: str, recipe: str) -> None:
    make, shape = LAYERS[name]
    if recipe == "mxint8" and name == "conv":
        pytest.skip("a convolution is not summed in blocks")
    with reference_only():
        wanted = outcome(make, shape, recipe)
    with products_only() as ran:
        found = outcome(make, shape, recipe)
    assert len(ran) >= 3
    for part, value in wanted.items():
        assert torch.equal(found[part], value), part


def calls_of(make, shape: tuple[int, ...], recipe: str) -> list[tuple[Op, tuple]]:
    """The products of a layer's pass on the GPU, with what they were called with."""
    noted: list[tuple[Op, tuple]] = []

    def note(op: Op) -> Implementation:
        def run(*args):
            noted.append((op, args))
            return op.reference(*args)

        return Implementation("note", run, lambda *args: True)

    ops = (integer.output, integer.grad_input, integer.grad_weight)
    held = [list(op.implementations) for op in ops]
    try:
        for op in ops:
            op.implementations.insert(0, note(op))
        outcome(make, shape, recipe, "cuda")
    finally:
        for op, implementations in zip(ops, held, strict=True):
            op.implementations = implementations
    return noted


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["psq8d", "shq8"])
@pytest.mark.parametrize("name", LAYERS)
def test_products_wait_for_nothing_and_can_be_captured(name: str, recipe: str) -> None:
    """After a first call, in which kernels are compiled and chosen."""
    for op, args in calls_of(*LAYERS[name], recipe):
        wanted = op(*args)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = op(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(*args)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(again, wanted)
        assert torch.equal(captured, wanted)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 8 << 30, reason="needs 8 GiB")
def test_beyond_int32() -> None:
    """A result and an operand of more than 2³¹ bytes; the last rows are right."""
    m, n, k = 40_000, 64, 60_000
    a = torch.ones(m, k, dtype=torch.int8, device=DEVICE)
    a[-1] = 2
    b = torch.ones(k, n, dtype=torch.int8, device=DEVICE)
    found = products.matmul_of(a, b, torch.int32, (None,) * 8)
    assert found[0].eq(k).all()
    assert found[-1].eq(2 * k).all()
