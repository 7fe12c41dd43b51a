"""O(N·D) in memory and arithmetic, seen by the sizes of the tensors that torch makes, not by a clock."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cases import build, gaussian


class Ledger(TorchDispatchMode):
    """Remembers the largest tensor and the sum of all entries that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
                self.total += leaf.numel()
        return out


def ledger(name: str, n: int, d: int) -> Ledger:
    x = gaussian(n, d) * torch.logspace(-3, 0, n)[:, None]
    q = build(name)
    with Ledger() as book:
        q.quantize(x, 1).dequantize()
        q.variance(x, 1)
        q.variance_bound(x, 1)
    return book


@pytest.mark.parametrize("name", ["ptq4", "psq4x", "bhq4", "bhq4x", "shq4", "shq4d"])
def test_no_n_by_n_matrix(name: str) -> None:
    """20000 rows of 8: a dense transform would have 4·10⁸ entries; allowed 32 for each of x's."""
    n, d = 20000, 8
    assert ledger(name, n, d).largest <= 32 * n * d


@pytest.mark.parametrize("name", ["ptq4", "psq4d", "bhq4", "bhq4d", "shq4", "shq4x"])
def test_twice_the_rows_twice_the_work(name: str) -> None:
    """Entries written, over all operations: at most 2.3 times for twice the rows, and for twice the columns."""
    base = ledger(name, 1024, 64).total
    assert ledger(name, 2048, 64).total <= 2.3 * base
    assert ledger(name, 1024, 128).total <= 2.3 * base


def test_the_ledger_sees_a_dense_transform() -> None:
    x = gaussian(2000, 8)
    with Ledger() as book:
        torch.linalg.multi_dot([torch.eye(2000), x])
    assert book.largest >= 2000 * 2000
