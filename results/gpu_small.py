"""Small calls of Triton's quantizers and products, compared with the CPU's, and a step of two layers.

For `compute-sanitizer` (see gpu.sh): `python results/gpu_small.py [DEVICE]`, "cuda" by default.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

import fqt
from fqt.kernels import blocked, products
from fqt.kernels.blocked import Stepped
from fqt.kernels.codes import Blocks
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.products import Geometry

# Each of another transform, scale, grid or rounding; not reflections, whose sums are rounded otherwise.
QUANTIZERS = ("ptq8", "psq8", "psq8d", "psq4x", "shq8d", "thq4", "mxfp4", "luq4", "nvfp4")


def main(device: str = "cuda") -> None:
    """Each part by itself: one that fails is told, and the others are still tried."""
    failed = 0
    for name, part in _parts(device):
        try:
            part()
            print(name, "passed", flush=True)
        except Exception as error:  # whatever a compiler, a driver or a wrong result brings
            failed += 1
            print(f"{name} FAILED: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    raise SystemExit(failed > 0)


def _parts(device: str) -> list[tuple[str, Callable[[], None]]]:
    quantizing = [(name, partial(_quantize, name, device)) for name in QUANTIZERS]
    layers = {"Linear": (torch.nn.Linear(64, 48), (32, 64)), "Conv2d": (torch.nn.Conv2d(16, 32, 3), (2, 16, 9, 9))}
    steps = [(f"a step of {name}", partial(_step, *each, device)) for name, each in layers.items()]
    products = [(name, partial(_equal, name, *each)) for name, each in _products(device).items()]
    return [*quantizing, *steps, *products]


def _quantize(name: str, device: str) -> None:
    x = torch.randn(150, 256, generator=torch.Generator().manual_seed(1))
    wanted, found = (fqt.quantizer(name).quantize(each, seed=7) for each in (x, x.to(device)))
    for part in ("matrix_codes", "matrix_step", "group_offset"):
        _expect(part, getattr(wanted, part), getattr(found, part))


def _step(layer: torch.nn.Module, shape: tuple[int, ...], device: str) -> None:
    layer = fqt.quantize_(layer, "default").to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    layer(x).square().sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    if not all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients):
        raise ArithmeticError("no gradient, or one that is not finite")


def _equal(name: str, wanted: Callable[[], torch.Tensor], found: Callable[[], torch.Tensor]) -> None:
    _expect(name, wanted(), found())


def _expect(name: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    if not torch.equal(wanted, found.cpu()):
        differing = int((wanted != found.cpu()).sum())
        raise ArithmeticError(f"{name}: differs from the CPU's in {differing} of {wanted.numel()}")


def _products(device: str) -> dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """By name: on the CPU, and on the device."""
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
    return {
        "matmul": (
            lambda: products.matmul(a, b, scaled),
            lambda: products.matmul(a.to(device), b.to(device), on_gpu),
        ),
        "conv2d": (
            lambda: products.conv2d(image, filters, geometry),
            lambda: products.conv2d(image.to(device), filters.to(device), geometry),
        ),
        "conv2d_grad_input": (
            lambda: products.conv2d_grad_input(above, filters, (9, 8), geometry),
            lambda: products.conv2d_grad_input(above.to(device), filters.to(device), (9, 8), geometry),
        ),
        "conv2d_grad_weight": (
            lambda: products.conv2d_grad_weight(above, image, (3, 3), geometry),
            lambda: products.conv2d_grad_weight(above.to(device), image.to(device), (3, 3), geometry),
        ),
        "blocked": (lambda: blocked.matmul(left, right), lambda: blocked.matmul(there(left), there(right))),
    }


if __name__ == "__main__":
    main(*sys.argv[1:2])
