"""Small numbers side by side in bytes: flags as bits, codes of 2 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PACKED = (1, 2, 4, 8)
"""Widths that fill a byte without a rest."""


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits side by side in bytes, the first one lowest.

    Args:
        numbers: (n,) uint8, or bool for one bit.
        bits: 1, 2, 4 or 8.

    Returns:
        (⌈n · bits / 8⌉,) uint8; what the last byte has no number for is 0.
    """
    each = 8 // bits
    rest = -numbers.numel() % each
    numbers = F.pad(numbers.view(torch.uint8), (0, rest)) if rest else numbers.view(torch.uint8)
    if each == 1:
        return numbers
    columns = numbers.view(-1, each)
    packed = columns[:, 0].clone()
    for place in range(1, each):
        packed |= columns[:, place] << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first n numbers of `pack`'s bytes; (n,) uint8."""
    if bits == 8:
        return packed[:n]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).view(-1)[:n]
