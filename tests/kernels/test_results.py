"""torch's own functions with results in memory that is used again: the same bits, the same layout, no views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fqt.kernels import results
from fqt.kernels.cpu.library import status

native = pytest.mark.skipif(status().level == "reference", reason=str(status()))
SHAPE = (6, 40, 40, 40)  # 1.5 MB in float32: past the least size, with a quarter less in bfloat16


def image(dtype: torch.dtype, format: torch.memory_format) -> Tensor:
    drawn = torch.randn((2 * SHAPE[0], *SHAPE[1:]), generator=torch.Generator().manual_seed(0))
    drawn.view(-1)[:4] = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf])
    return drawn.to(dtype).to(memory_format=format)


formats = pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def check(found: Tensor, truth: Tensor) -> None:
    """Equal to the bit, -0.0 and NaN among them, and laid out alike."""
    assert (found.dtype, found.shape, found.stride()) == (truth.dtype, truth.shape, truth.stride())
    assert torch.equal(found.contiguous().view(torch.uint8), truth.contiguous().view(torch.uint8))
    assert not found._is_view()


@native
@formats
@dtypes
def test_relu_and_copies(dtype: torch.dtype, format: torch.memory_format) -> None:
    x = image(dtype, format)
    assert results.relu.backend(x) == "cpu"
    check(results.relu(x), torch.relu(x))
    check(results.cat(x.split(5)), torch.cat(x.split(5)))
    assert results.empty_like(x).stride() == x.stride()
    for other in (torch.contiguous_format, torch.channels_last):
        check(results.contiguous(x, other), x.contiguous(memory_format=other))
    assert results.contiguous(x, format) is x
    for order in ((0, 2, 3, 1), (1, 0, 2, 3), (0, 1, 2, 3)):
        laid, flat = x.permute(order), (x.shape[order[0]], -1)
        found = results.reshape(laid, flat)
        assert torch.equal(found.nan_to_num(), laid.reshape(flat).nan_to_num())
        assert (found.data_ptr() == x.data_ptr()) == (laid.reshape(flat).data_ptr() == x.data_ptr())


@native
@formats
@dtypes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_batch_norm(dtype: torch.dtype, format: torch.memory_format, training: bool, wide: bool) -> None:
    """Parameters in float32 beside a bfloat16 input, as under autocast, or in its dtype."""
    if wide and dtype == torch.float64:
        return
    x = image(dtype, format).nan_to_num(0, 1, -1)
    kind, channels = torch.float32 if wide else dtype, x.shape[1]
    weight, bias, mean, var = torch.rand((4, channels), generator=torch.Generator().manual_seed(1)).to(kind)
    seen = [(mean.clone(), var.clone()) for _ in range(2)]
    rest = (training, 0.1, 1e-5)
    assert results.batch_norm.backend(x, weight, bias, *seen[0], *rest) == "cpu"
    found = results.batch_norm(x, weight, bias, *seen[0], *rest)
    truth = results.batch_norm.reference(x, weight, bias, *seen[1], *rest)
    for mine, reference in zip(found, truth, strict=True):
        check(mine, reference)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_what_is_small_or_odd_is_torchs() -> None:
    for x in (torch.ones(3, 4), torch.ones(3, 4).to_sparse(), torch.ones(2000, 2000)[::2]):
        assert results.empty_like.backend(x) == "reference"
    assert results.empty_like.backend(torch.ones(2000, 2000, device="meta")) == "reference"
