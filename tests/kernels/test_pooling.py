"""Taps of max pooling: the C++ kernels against the reference, and both against where torch finds the maxima."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels import pooling
from fqt.kernels.pooling import Windows

WINDOWS = [
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 2), (2, 2), (0, 0), (1, 1)),
    ((2, 5), (1, 3), (1, 2), (3, 2)),
    ((16, 16), (5, 5), (8, 8), (1, 1)),  # 256 taps
    ((1, 1), (2, 1), (0, 0), (1, 1)),
]
WIDER = [  # than the input: taps farther apart than a row is long
    ((2, 4), (1, 1), (0, 2), (1, 2), 3),
    ((2, 5), (1, 1), (0, 2), (1, 2), 5),
    ((1, 2), (1, 1), (0, 1), (1, 1), 1),
    ((4, 4), (1, 1), (2, 2), (1, 1), 3),
    ((3, 3), (2, 2), (1, 1), (1, 1), 2),
    ((2, 2), (1, 1), (1, 1), (1, 1), 1),
    ((16, 16), (3, 3), (8, 8), (1, 1), 10),
]


@pytest.mark.parametrize("channels", [1, 3, 16, 37])
@pytest.mark.parametrize("window", [*((*window, 23) for window in WINDOWS), *WIDER])
def test_taps_are_where_the_maxima_lie(window: tuple, channels: int) -> None:
    size, stride, padding, dilation, width = window
    x = torch.randn(2, channels, 19, width, generator=torch.Generator().manual_seed(channels))
    found = torch.nn.functional.max_pool2d(x, size, stride, padding, dilation, True, return_indices=True)[1]
    windows = Windows(size, stride, padding, dilation, width)
    for places in (found.permute(0, 2, 3, 1).contiguous(), found.flatten(0, 1)[..., None].contiguous()):
        taps = pooling.taps(places, windows)
        assert taps.dtype == torch.uint8
        assert torch.equal(taps, pooling.taps.reference(places, windows))
        assert int(taps.max()) < size[0] * size[1]
        assert torch.equal(pooling.places(taps, windows), places)
        assert torch.equal(pooling.places.reference(taps, windows), places)


def test_the_native_kernels_run() -> None:
    from fqt.kernels.cpu.library import status

    wanted = "reference" if status().level == "reference" else "cpu"
    windows, places = Windows((2, 2), (2, 2), (0, 0), (1, 1), 4), torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    assert pooling.taps.backend(places, windows) == wanted
    assert pooling.places.backend(places.to(torch.uint8), windows) == wanted
    far = Windows((3, 3), (1, 1), (0, 0), (1, 1), 1 << 30)  # taps more than 2³¹ apart
    assert pooling.taps.backend(places, far) == "reference"
