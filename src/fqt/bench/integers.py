"""The integer-product limit: the best rate at which `torch._int_mm` multiplies on this machine.

On CPUs for which torch has no integer product (no VNNI) that is a scalar loop, a hundred times slower than float,
or wrong (oneDNN held to AVX2): the limit is then the best rate of our own product, of 8-bit codes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fqt.bench.device import clock
from fqt.errors import FqtError
from fqt.kernels.products import matmul

Shape = tuple[int, int, int]
CPU = torch.device("cpu")
SHAPES: tuple[Shape, ...] = (
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 1024, 1024),
    (1024, 1024, 4096),
    (4096, 1024, 4096),
    (4096, 4096, 1024),
    (4096, 4096, 4096),
)
"""(M, N, K) that are tried."""
GPU_SHAPES: tuple[Shape, ...] = ((4096, 4096, 4096), (8192, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192))
"""The same on a GPU."""
READINGS = 3
SCALAR = 8
"""`torch._int_mm` counts as a scalar loop where it takes so many times as long as our own product of `PROBE`."""
PROBE: Shape = (256, 256, 256)
TORCH, OURS = "torch._int_mm", "fqt"


class IntegerProduct:
    """(M, K) · (K, N) of int8 into int32.

    Args:
        shape: (M, N, K).
        transposed: whether the second operand is stored as (N, K).
        device: where.
        by: whose product: `TORCH` or `OURS`.
    """

    def __init__(self, shape: Shape, transposed: bool, device: torch.device = CPU, by: str = TORCH) -> None:
        m, n, k = shape
        self.by = by
        drawn: dict[str, Any] = {
            "dtype": torch.int8,
            "generator": torch.Generator(device).manual_seed(0),
            "device": device,
        }
        self.shape, self.transposed = shape, transposed
        self.left = torch.randint(-127, 128, (m, k), **drawn)
        stored = torch.randint(-127, 128, (n, k) if transposed else (k, n), **drawn)
        self.right = stored.T if transposed else stored

    @property
    def macs(self) -> int:
        """Multiply–accumulates of one call."""
        m, n, k = self.shape
        return m * n * k

    def __call__(self) -> torch.Tensor:
        """(M, N) int32."""
        return torch._int_mm(self.left, self.right) if self.by == TORCH else matmul(self.left, self.right)

    def is_right(self) -> bool:
        """Whether some rows equal the product in float64, which holds these sums exactly."""
        rows = slice(None, None, max(1, self.shape[0] // 8))
        return torch.equal(self()[rows].double(), self.left[rows].double() @ self.right.double())


def whose(device: torch.device = CPU) -> str:
    """Whose product sets the limit on this machine."""
    if device.type != "cpu":
        return TORCH
    products = {by: IntegerProduct(PROBE, True, device, by) for by in (TORCH, OURS)}
    if not products[TORCH].is_right():  # oneDNN, held to AVX2, lets sums of 16 bits overflow
        return OURS
    spent = {by: min(clock(device)(product) for _ in range(READINGS)) for by, product in products.items()}
    return OURS if spent[TORCH] > SCALAR * spent[OURS] else TORCH


def best_product(shapes: Sequence[Shape] = SHAPES, device: torch.device = CPU) -> tuple[IntegerProduct, list[dict]]:
    """The product with the highest rate, and what was measured of every shape and layout."""
    best, most, tried, by = None, 0.0, [], whose(device)
    for shape in shapes:
        for transposed in (True, False):
            product = IntegerProduct(shape, transposed, device, by)
            try:
                product()
            except RuntimeError:
                continue  # a layout that the device's library does not take
            rate = product.macs / min(clock(device)(product) for _ in range(READINGS))
            tried.append({"shape": list(shape), "transposed": transposed, "macs_per_second": rate})
            if rate > most:
                best, most = product, rate
    if best is None:
        raise FqtError("torch._int_mm takes no product on this device: there is no limit to measure against")
    return best, tried
