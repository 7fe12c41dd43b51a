"""Batches as loaders give them."""

from collections.abc import Iterable

import torch
from torch import Tensor

Batches = Iterable[tuple[Tensor, Tensor]]


def same_batches(first: Batches, second: Batches) -> bool:
    """As many of them, at least one, and alike in inputs and labels."""
    one, other = list(first), list(second)
    pairs = zip(one, other, strict=False)
    return 0 < len(one) == len(other) and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
