import pytest
import torch

from fqt.errors import FqtError
from fqt.stats import Moments

SHAPES = [(), (0,), (1,), (3, 5), (2, 1, 7)]


def _stream(count, seed=0, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=g, dtype=torch.float64) + offset for s in SHAPES] for _ in range(count)]


def _filled(stream):
    moments = Moments()
    for observation in stream:
        moments.update(observation)
    return moments


# 1e8 is where E[x²] − E[x]² in float64 has lost every digit of a variance of 1
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e8])
def test_equals_two_passes(offset):
    stream = _stream(9, offset=offset)
    moments = _filled(stream)
    for i in range(len(SHAPES)):
        column = torch.stack([observation[i] for observation in stream])
        torch.testing.assert_close(moments.mean[i], column.mean(0), rtol=1e-14, atol=1e-14)
        two_pass = (column - column.mean(0)).square().sum(0) / 8
        torch.testing.assert_close(moments.variance()[i], two_pass, rtol=2e-7, atol=0)


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_merge_equals_the_whole_stream(cut):
    stream = _stream(9, offset=1e4)
    first, second, whole = _filled(stream[:cut]), _filled(stream[cut:]), _filled(stream)
    merged = first.merge(second)
    assert merged.count == 9
    for a, b in zip(merged.variance(), whole.variance(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    merged.update(stream[0])  # must not write into its operands
    assert (first.count, second.count) == (cut, 9 - cut)
    if cut:
        torch.testing.assert_close(first.mean[3], torch.stack([o[3] for o in stream[:cut]]).mean(0))


def test_low_precision_observations_accumulate_in_float64():
    moments = Moments()
    for k in range(4):
        moments.update([torch.tensor([1.0 + k / 128], dtype=torch.bfloat16)])
    assert moments.mean[0].dtype == torch.float64
    assert moments.mean[0].item() == 1.0 + 1.5 / 128


def test_sums_are_per_tensor():
    moments = _filled(_stream(5))
    expected = [v.sum() for v in moments.variance()]
    torch.testing.assert_close(moments.variance_sums(), torch.stack(expected))


def test_errors():
    moments = Moments()
    moments.update([torch.zeros(2)])
    with pytest.raises(FqtError, match="at least 2"):
        moments.variance()
    with pytest.raises(FqtError, match="keep their shapes"):
        moments.update([torch.zeros(3)])
    with pytest.raises(FqtError, match="keep their shapes"):
        moments.update([torch.zeros(2), torch.zeros(2)])
