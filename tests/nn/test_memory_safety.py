"""No product of a convolution touches memory that is not its own, whatever instructions torch chooses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fqt.kernels.linear_map import ConvMap

# Every product of strided convolutions with one tap, as many times as corruption needs to show; torch's own results
# on contiguous float64 say what is right. Runs in a process of its own, because a fault kills it.
_SCRIPT = """
import fqt, itertools, torch
from torch import nn
from fqt.kernels.linear_map import ConvMap
torch.manual_seed(0)
checked = 0
for channels, outputs, strides, out, samples, transposed in itertools.product(
    (3, 17), (8,), ((2, 2), (1, 2), (2,), (2, 2, 2)), (4,), (3,), (False, True)
):
    dims = len(strides)
    map = ConvMap(strides, (0,) * dims, (1,) * dims, 1, transposed)
    small, large = (out,) * dims, tuple(out * s - (s - 1) * transposed for s in strides)
    x = torch.randn(samples, *(small if transposed else large), channels).movedim(-1, 1)
    g = torch.randn(samples, *(large if transposed else small), outputs).movedim(-1, 1)
    shape = (channels, outputs) if transposed else (outputs, channels)
    w = torch.randn(*shape, *(1,) * dims)
    exact = [t.double().contiguous() for t in (x, w, g)]
    for got, right in (
        (map.output(x, w), map.output(*exact[:2])),
        (map.grad_input(g, w, x.shape), map.grad_input(exact[2], exact[1], x.shape)),
        (map.grad_weight(g, x, w.shape), map.grad_weight(exact[2], exact[0], w.shape)),
    ):
        torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=1e-3)
        checked += 1

for channels, transposed in ((3, False), (5, False), (5, True)):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = nn.Sequential(kind(channels, 8, 1, stride=2))
    fqt.quantize_(layer, "qat")
    for _ in range(10):
        x = torch.randn(2, channels, 8, 8, requires_grad=True)
        layer(x).square().sum().backward()
        checked += 1
print("checked", checked)
"""


def test_strided_kernels_of_one_tap() -> None:
    # glibc's heap checks, and oneDNN's choice held down to that of machines where it went wrong.
    more = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env={**os.environ, **more}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-1000:]}"
    assert done.stdout.strip() == "checked 78"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 1, 3), (1, 1, 3)), ((2, 2, 3), (1, 1, 2)), ((3, 3), (1, 3))])
def test_images_of_one_channel_laid_out_last(
    kernel: tuple[int, ...], stride: tuple[int, ...], transposed: bool
) -> None:
    # On AVX-512 the float32 forward convolution read whatever memory held behind each row.
    dims = len(kernel)
    map = ConvMap(stride, (0,) * dims, (1,) * dims, 1, transposed)
    torch.manual_seed(0)
    large = (6, 6, 5)[-dims:]
    small = tuple((n - k) // s + 1 for n, k, s in zip(large, kernel, stride, strict=True))
    exactly = tuple((n - 1) * s + k for n, k, s in zip(small, kernel, stride, strict=True))
    x, g = (
        torch.randn(3, *size, 1).movedim(-1, 1) for size in ((small, exactly) if transposed else (large, small))
    )
    w = torch.randn(1, *kernel, 1).movedim(-1, 1)
    dirt = [torch.full((n,), 1e20) for n in (8, 32, 72, 100, 216, 256, 1000, 4000) * 6]
    del dirt
    got = map.output(x, w), map.grad_input(g, w, x.shape), map.grad_weight(g, x, w.shape)
    x, w, g = (t.double().contiguous() for t in (x, w, g))
    right = map.output(x, w), map.grad_input(g, w, x.shape), map.grad_weight(g, x, w.shape)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
