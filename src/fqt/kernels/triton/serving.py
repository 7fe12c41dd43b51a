"""The products on a GPU: registered, and why the one at hand has no integer units for them."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from fqt.kernels import blocked, integer, products
from fqt.kernels.triton.device import BACKEND, offer

offer(products.matmul_of, "products")
for op in (products.conv2d_of, products.conv2d_grad_input_of, products.conv2d_grad_weight_of):
    offer(op, "conv")
offer(blocked.matmul, "blocked", of=lambda a, b, bias=None, dtype=None: a.codes)


def obstacle() -> str:
    """Why products of codes on the current CUDA device do not run on integer units; empty if they do.

    They are exact then too, through sums in float64.
    """
    if os.environ.get("FQT_KERNELS") == "reference":
        return "no integer kernels: FQT_KERNELS=reference"
    if find_spec("triton") is None:
        return "no integer kernels: Triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device is there"
    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"
    if (major, minor) < (7, 5):
        return f"{name}: tensor cores for integers begin with 7.5"
    return f"{name}: Triton's products of integers begin with 8.0" if major < 8 else ""


integer.serve(BACKEND, obstacle)
