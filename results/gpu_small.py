"""One small call of every Triton product, compared with the reference; for `compute-sanitizer` (see gpu.sh)."""

from __future__ import annotations

import torch

from fqt.kernels import blocked, products
from fqt.kernels.blocked import Stepped
from fqt.kernels.codes import Blocks
from fqt.kernels.products import Epilogue, Geometry


def main() -> None:
    """Raises at the first result that is not the reference's."""
    draw = torch.Generator().manual_seed(0)
    codes = lambda *shape: torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    signed = lambda *shape: codes(*shape).view(torch.int8)
    a, b = codes(150, 200), signed(200, 136)
    image, filters, above = codes(2, 40, 9, 8), signed(24, 40, 3, 3), codes(2, 24, 5, 4)
    geometry = Geometry((2, 2), (1, 1))
    scaled = Epilogue(row_scale=torch.rand(150, generator=draw), bias=torch.randn(136, generator=draw))
    left = Stepped(signed(70, 96), torch.rand(70, 3, generator=draw), Blocks(1, 32))
    right = Stepped(signed(96, 80), torch.rand(3, 80, generator=draw), Blocks(32, 1))
    there = lambda x: Stepped(x.codes.cuda(), x.step.cuda(), x.blocks)
    on_gpu = Epilogue(row_scale=scaled.row_scale.cuda(), bias=scaled.bias.cuda())
    pairs = {
        "matmul": (products.matmul(a, b, scaled), products.matmul(a.cuda(), b.cuda(), on_gpu)),
        "conv2d": (
            products.conv2d(image, filters, geometry),
            products.conv2d(image.cuda(), filters.cuda(), geometry),
        ),
        "conv2d_grad_input": (
            products.conv2d_grad_input(above, filters, (9, 8), geometry),
            products.conv2d_grad_input(above.cuda(), filters.cuda(), (9, 8), geometry),
        ),
        "conv2d_grad_weight": (
            products.conv2d_grad_weight(above, image, (3, 3), geometry),
            products.conv2d_grad_weight(above.cuda(), image.cuda(), (3, 3), geometry),
        ),
        "blocked": (blocked.matmul(left, right), blocked.matmul(there(left), there(right))),
    }
    for name, (wanted, found) in pairs.items():
        if not torch.equal(wanted, found.cpu()):
            raise SystemExit(f"{name} differs from the CPU")
        print(name, "equal")


if __name__ == "__main__":
    main()
