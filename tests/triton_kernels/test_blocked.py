"""Products in blocks on Triton's kernel: the reference's bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fqt.kernels import blocked as declared
from fqt.kernels.blocked import Stepped
from fqt.kernels.codes import Blocks
from tests.backends import moved
from tests.triton_kernels.machine import DEVICE, INTERPRETED, QUIET, SHORT, codes

from fqt.kernels.triton import blocked  # isort: skip
from fqt.kernels.triton.tune import Tiles  # isort: skip

pytestmark = QUIET


def matrix(shape: tuple[int, int], blocks: Blocks, seed: int) -> Stepped:
    """With steps of three magnitudes."""
    draw = torch.Generator().manual_seed(seed)
    count = blocks.count(shape)
    magnitude = torch.randint(-1, 2, count, generator=draw)
    return Stepped(
        codes(shape, torch.int8, seed), torch.rand(count, generator=draw) * 10 ** magnitude.float(), blocks
    )


def check(
    a: Stepped,
    b: Stepped,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
) -> None:
    wanted = declared.matmul.reference(a, b, bias, dtype)
    found = blocked.blocked_matmul(moved(a, DEVICE), moved(b, DEVICE), moved(bias, DEVICE), dtype, tiles)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), wanted)


def operands(m: int, n: int, k: int, a: Blocks, b: Blocks) -> tuple[Stepped, Stepped]:
    return matrix((m, k), a, 1), matrix((k, n), b, 2)


@pytest.mark.parametrize("length", [16, 32, 40, 128])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 33), (66, 5, 130)], ids=str)
def test_every_shape(shape: tuple[int, int, int], length: int) -> None:
    check(*operands(*shape, Blocks(1, length), Blocks(length, 1)))


@pytest.mark.parametrize(("left", "right"), [(32, 32), (64, 16), (0, 32), (32, 0), (0, 0)])
def test_whoever_shares_a_step(left: int, right: int) -> None:
    check(*operands(41, 50, 70, Blocks(5, left), Blocks(right, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, *SHORT])
def test_bias_and_layouts(dtype: torch.dtype) -> None:
    """Both operands as they lie in grad_weight, column by column; the result rounded once."""
    a, b = operands(9, 17, 70, Blocks(1, 32), Blocks(32, 32))
    turned = (replace(x, codes=x.codes.T.contiguous().T) for x in (a, b))
    check(*turned, torch.randn(17, generator=torch.Generator().manual_seed(3)), dtype)


def test_a_long_block_of_extreme_codes() -> None:
    """A sum of 2³⁰ in a block of many steps; −128 · −128 is the largest product."""
    k = 65536 + 40
    left = torch.tensor([-128, 127]).view(2, 1).expand(2, k).to(torch.int8)
    right = torch.tensor([[-128, 127]]).expand(k, 2).to(torch.int8)
    tiles = Tiles(64, 64, 4096, 4, 1) if INTERPRETED else None  # fewer steps, each of which takes it a while
    check(Stepped(left, torch.ones(1, 2), Blocks(0, 65536)), Stepped.plain(right), tiles=tiles)


def test_blocks_are_added_in_order() -> None:
    """2²⁴ + 1 − 2²⁴ is 0 from left to right in float32, and 1 in any other order."""
    x = torch.zeros(1, 96, dtype=torch.int8)
    x[0, ::32] = torch.tensor([1, 1, -1], dtype=torch.int8)
    a = Stepped(x, torch.tensor([[2.0**24, 1.0, 2.0**24]]), Blocks(1, 32))
    b = Stepped.plain(torch.ones(96, 1, dtype=torch.int8))
    assert blocked.blocked_matmul(moved(a, DEVICE), moved(b, DEVICE)).item() == 0


def test_empty_operands_are_the_references() -> None:
    a, b = operands(0, 3, 32, Blocks(1, 32), Blocks(32, 1))
    assert not blocked.takes_blocked_matmul(moved(a, DEVICE), moved(b, DEVICE))
