"""The products on a GPU: registered, and why the one at hand has no integer units for them."""

from __future__ import annotations

import torch

from fqt.kernels import blocked, integer, products
from fqt.kernels.triton.device import BACKEND, obstacle, offer

offer(products.matmul_of, "products")
for op in (products.conv2d_of, products.conv2d_grad_input_of, products.conv2d_grad_weight_of):
    offer(op, "conv")
for product in (integer.output, integer.grad_input, integer.grad_weight):
    offer(product, "fused", of=lambda map, operand, *_, **__: operand.matrix_codes)
offer(blocked.matmul, "blocked", of=lambda a, b, bias=None, dtype=None: a.codes)


def _obstacle() -> str:
    """Products of codes are exact where there is one too, through sums in float64."""
    found = obstacle()
    return f"no integer kernels: {found}" if found else ""


integer.serve(BACKEND, _obstacle, (torch.bfloat16, torch.float16))
