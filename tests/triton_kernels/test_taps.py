"""Sums over the pixels of a convolution's taps, and noise in planes of bytes: the reference's bits."""

import pytest
import torch

from fqt.kernels import low_rank
from fqt.kernels.taps import Taps, tap_sums
from fqt.kernels.triton import planes, taps
from tests.triton_kernels.machine import DEVICE

AXES = {
    "plain": (3, 9, 9, 1, 1, 1),
    "one pixel": (1, 7, 7, 1, 0, 1),
    "stride": (3, 20, 10, 2, 1, 1),
    "dilation": (3, 11, 7, 1, 0, 2),
    "stride beyond the kernel": (1, 9, 3, 3, 0, 1),
    "wide": (5, 40, 21, 2, 3, 1),
    "all in padding": (7, 2, 2, 1, 3, 1),
}


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("down", AXES)
@pytest.mark.parametrize("across", ["plain", "stride", "wide"])
@pytest.mark.parametrize("channels", [1, 70])
def test_sums_by_tap(reads, down, across, channels):
    axes = (AXES[down], AXES[across])
    shape = (*Taps(axes, reads).size, channels)
    map = torch.randint(-(2**40), 2**40, shape, generator=torch.Generator().manual_seed(0))
    wanted = tap_sums.reference(map, axes, reads)
    there = (map.to(DEVICE), axes, reads)
    assert taps.takes_tap_sums(*there)
    assert torch.equal(taps.tap_sums(*there).cpu(), wanted)


@pytest.mark.parametrize("shape", [(5,), (3, 700), (2, 1025)])
def test_planes_of_bytes(shape):
    noise = torch.randint(0, 1 << 24, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert planes.takes_in_bytes(noise.to(DEVICE))
    found = planes.in_bytes(noise.to(DEVICE))
    assert torch.equal(found.cpu(), low_rank.in_bytes.reference(noise))
    sums = torch.randint(
        -(2**28), 2**28, (3, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.int32
    )
    for given in (sums, sums.long(), sums.transpose(0, -1).contiguous().transpose(0, -1)):
        assert planes.takes_from_bytes(given.to(DEVICE))
        assert torch.equal(planes.from_bytes(given.to(DEVICE)).cpu(), low_rank.from_bytes.reference(given))
