"""The integer-product limit: the best rate at which `torch._int_mm` multiplies on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fqt.bench.device import clock
from fqt.errors import FqtError

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


class IntegerProduct:
    """(M, K) · (K, N) of int8 into int32.

    Args:
        shape: (M, N, K).
        transposed: whether the second operand is stored as (N, K).
        device: where.
    """

    def __init__(self, shape: Shape, transposed: bool, device: torch.device = CPU) -> None:
        m, n, k = shape
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
        return torch._int_mm(self.left, self.right)

    def is_right(self) -> bool:
        """Whether some rows equal the product in float64, which holds these sums exactly."""
        rows = slice(None, None, max(1, self.shape[0] // 8))
        return torch.equal(self()[rows].double(), self.left[rows].double() @ self.right.double())


def best_product(shapes: Sequence[Shape] = SHAPES, device: torch.device = CPU) -> tuple[IntegerProduct, list[dict]]:
    """The product with the highest rate, and what was measured of every shape and layout."""
    best, most, tried = None, 0.0, []
    for shape in shapes:
        for transposed in (True, False):
            product = IntegerProduct(shape, transposed, device)
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
