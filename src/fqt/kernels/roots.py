"""Roots that every backend can repeat bit for bit, from operations that IEEE arithmetic rounds correctly.

torch's own are not such: on the CPU `sqrt` of float64 is a library's whose last bit depends on the length of the
tensor, and `pow` is off by up to 18 units of 2⁻⁵³. `rsqrt` is 1/√x, both rounded correctly.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_GUESS = 0x553EF0F600000000
_THIRD = 1.0 / 3.0


def square_root(x: Tensor) -> Tensor:
    """√x for float64 x > 0, to two units of 2⁻⁵³."""
    return x * x.rsqrt()


def inverse_cube_root(x: Tensor) -> Tensor:
    """x^(−1/3) for float64 x > 0, to two units of 2⁻⁵³; meaningless for others.

    The first guess divides the exponent by −3, off by 3.4 % at most; four Newton steps square that four times.
    """
    bits = _FIRST_GUESS - torch.div(x.view(torch.int64), 3, rounding_mode="trunc")
    y = bits.view(torch.float64)
    for _ in range(4):
        y = y + y * ((1 - x * y * y * y) * _THIRD)
    return y
