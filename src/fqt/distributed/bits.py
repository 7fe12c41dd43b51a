"""Codes packed to the bits they have: eight codes of b bits in b bytes, the first code in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.kernels import packing


def packed(codes: Tensor, bits: int) -> Tensor:
    """uint8: the bytes of integers 0 … 2^bits − 1 of any shape, for 1 to 16 bits; `length` says how many.

    Of codes of more than 8 bits the low bytes come first, then what is above them.
    """
    if bits > 8:
        return torch.cat([packed(codes & 255, 8), packed(codes >> 8, bits - 8)])
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.to(torch.uint8)
    eights = F.pad(flat, (0, -flat.numel() % 8))
    if bits in packing.PACKED:
        return packing.pack(eights.to(torch.uint8), bits)
    grouped = eights.to(torch.int64).view(-1, 8)
    words = (grouped << _places(grouped, bits)).sum(1, keepdim=True)
    return words.view(torch.uint8)[:, :bits].reshape(-1)


def unpacked(data: Tensor, bits: int, count: int) -> Tensor:
    """(count,) integers from `packed` bytes: uint8, int32 where they have more than 8 bits."""
    if bits > 8:
        low, high = unpacked(data[:count], 8, count), unpacked(data[count:], bits - 8, count)
        return low.to(torch.int32) | high.to(torch.int32) << 8
    if bits in packing.PACKED:
        return packing.unpack(data, bits, count)
    words = F.pad(data.view(-1, bits), (0, 8 - bits)).view(torch.int64).expand(-1, 8)
    return (words >> _places(words, bits) & (1 << bits) - 1).to(torch.uint8).view(-1)[:count]


def length(count: int, bits: int) -> int:
    """How many bytes `packed` makes of so many codes."""
    return count + length(count, bits - 8) if bits > 8 else count if bits == 8 else -(-count // 8) * bits


def _places(words: Tensor, bits: int) -> Tensor:
    """Where the eight codes of an int64 begin, from its lowest bit."""
    return torch.arange(8, device=words.device) * bits
