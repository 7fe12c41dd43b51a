"""Small calls of Triton's quantizers and products, compared with the CPU's, and a step of two layers.

For `compute-sanitizer` (see gpu.sh): `python results/gpu_small.py [DEVICE]`, "cuda" by default.
"""

from __future__ import annotations

import sys

import torch

import fqt
from fqt.kernels import blocked, products
from fqt.kernels.blocked import Stepped
from fqt.kernels.codes import Blocks
from fqt.kernels.products import Epilogue, Geometry

# Each of another transform, scale, grid or rounding; not reflections, whose sums are rounded otherwise.
QUANTIZERS = ("ptq8", "psq8", "psq8d", "psq4x", "shq8d", "thq4", "mxfp4", "luq4", "nvfp4")


def main(device: str = "cuda") -> None:
    """Raises at the first result that is not the CPU's."""
    _quantize(device)
    _step(device)
    _multiply(device)


def _quantize(device: str) -> None:
    x = torch.randn(150, 256, generator=torch.Generator().manual_seed(1))
    for name in QUANTIZERS:
        wanted, found = (fqt.quantizer(name).quantize(each, seed=7) for each in (x, x.to(device)))
        for part in ("matrix_codes", "matrix_step", "group_offset"):
            _expect(f"{name}, {part}", getattr(wanted, part), getattr(found, part))
        print(name, "equal")


def _step(device: str) -> None:
    layers = {"Linear": (torch.nn.Linear(64, 48), (32, 64)), "Conv2d": (torch.nn.Conv2d(16, 32, 3), (2, 16, 9, 9))}
    for name, (layer, shape) in layers.items():
        layer = fqt.quantize_(layer, "default").to(device)
        x = torch.randn(shape, device=device, requires_grad=True)
        layer(x).square().sum().backward()
        gradients = [x.grad, *(p.grad for p in layer.parameters())]
        if not all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients):
            raise SystemExit(f"a step of {name} has no gradient, or one that is not finite")
        print(name, "trained a step")


def _expect(name: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    if not torch.equal(wanted, found.cpu()):
        raise SystemExit(
            f"{name}: differs from the CPU's in {int((wanted != found.cpu()).sum())} of {wanted.numel()}"
        )


def _multiply(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = lambda *shape: torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    signed = lambda *shape: codes(*shape).view(torch.int8)
    a, b = codes(150, 200), signed(200, 136)
    image, filters, above = codes(2, 40, 9, 8), signed(24, 40, 3, 3), codes(2, 24, 5, 4)
    geometry = Geometry((2, 2), (1, 1))
    scaled = Epilogue(row_scale=torch.rand(150, generator=draw), bias=torch.randn(136, generator=draw))
    left = Stepped(signed(70, 96), torch.rand(70, 3, generator=draw), Blocks(1, 32))
    right = Stepped(signed(96, 80), torch.rand(3, 80, generator=draw), Blocks(32, 1))
    there = lambda x: Stepped(x.codes.to(device), x.step.to(device), x.blocks)
    on_gpu = Epilogue(row_scale=scaled.row_scale.to(device), bias=scaled.bias.to(device))
    pairs = {
        "matmul": (products.matmul(a, b, scaled), products.matmul(a.to(device), b.to(device), on_gpu)),
        "conv2d": (
            products.conv2d(image, filters, geometry),
            products.conv2d(image.to(device), filters.to(device), geometry),
        ),
        "conv2d_grad_input": (
            products.conv2d_grad_input(above, filters, (9, 8), geometry),
            products.conv2d_grad_input(above.to(device), filters.to(device), (9, 8), geometry),
        ),
        "conv2d_grad_weight": (
            products.conv2d_grad_weight(above, image, (3, 3), geometry),
            products.conv2d_grad_weight(above.to(device), image.to(device), (3, 3), geometry),
        ),
        "blocked": (blocked.matmul(left, right), blocked.matmul(there(left), there(right))),
    }
    for name, (wanted, found) in pairs.items():
        _expect(name, wanted, found)
        print(name, "equal")


if __name__ == "__main__":
    main(*sys.argv[1:2])
