"""Words of Philox on the device, far out in a stream too."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fqt.kernels import ops, philox
from fqt.kernels.rounding import dither_noise
from fqt.kernels.triton import noise
from fqt.kernels.triton.device import launch
from tests.triton_kernels.cases import DEVICE, SEED, check


@pytest.mark.parametrize("n", [0, 1, 5, 1024, 2500])
def test_a_stream(n: int) -> None:
    for stream in (philox.STREAM_DITHER_ROW, philox.STREAM_ROTATION):
        check(noise, ops.random_u24, SEED, stream, n)


@pytest.mark.parametrize("index", [0, 1, 7, 2**31, 2**40 + 3])
def test_forked_seeds(index: int) -> None:
    for seed in (SEED, torch.tensor(1234567), torch.tensor(-(2**63)), torch.tensor(2**63 - 1)):
        check(noise, ops.fork_seed, seed, index)


@pytest.mark.parametrize("transposed", [False, True])
def test_dither_of_rows_and_columns(transposed: bool) -> None:
    for shape in [(5, 3), (300, 7), (0, 4), (4, 0)]:
        found = noise.dither_of(SEED.to(DEVICE), shape, transposed)
        wanted = [k.flatten() / 2**24 for k in dither_noise(SEED, *shape, transposed)]
        assert torch.equal(found.cpu(), torch.cat(wanted))


@triton.jit
def _noise(out, seed, first, ALIGNED: tl.constexpr):
    first = tl.load(first) + tl.zeros((1, 1), tl.int64)
    key = tl.load(seed)
    code = noise.high_bits(key, first, 16, ALIGNED) << 8 | noise.low_bits(key, first, 16, ALIGNED)
    tl.store(out + tl.arange(0, 16)[None, :], code)


@pytest.mark.parametrize("first", [0, 8, 2**31 - 8, 2**33 + 8, 2**37 + 24])
def test_noise_of_entries_past_all_counters_of_32_bits(first: int) -> None:
    """Entry i: half word i of one stream over byte i of another, with 64-bit block numbers."""

    def part(stream: int, bits: int) -> torch.Tensor:
        index = torch.arange(first, first + 16)
        word = index * bits // 32
        block = word // 4
        counter = (block & 0xFFFFFFFF, block >> 32, torch.full_like(block, stream), torch.zeros_like(block))
        words = torch.stack(philox.philox(counter, (SEED & 0xFFFFFFFF, (SEED >> 32) & 0xFFFFFFFF)), 1)
        return (words.gather(1, (word % 4)[:, None])[:, 0] >> (index * bits % 32)) & ((1 << bits) - 1)

    wanted = part(philox.STREAM_ROUNDING, 16) << 8 | part(philox.STREAM_ROUNDING_LOW, 8)
    for aligned in (True, False):
        out = torch.empty(16, dtype=torch.int32, device=DEVICE)
        launch(_noise, 1, out, SEED.to(DEVICE), torch.tensor(first, device=DEVICE), on=out, ALIGNED=aligned)
        assert torch.equal(out.cpu().long(), wanted), aligned
    if first == 0:
        assert torch.equal(wanted, philox.rounding_noise(SEED, 16).long())
