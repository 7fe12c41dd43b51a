"""The law of the bits against measured steps, and the distance in bits against curves of known distance."""

import pytest
import torch

import fqt
from fqt.errors import FqtError
from fqt.paper.bits import extra_bits, variance_law


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("suffix", ["", "d"])
def test_the_law_is_the_bound_of_real_quantizers(bits, suffix):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    fine, coarse = (float(fqt.quantizer(f"psq{b}{suffix}").variance_bound(x)) for b in (bits, bits - 1))
    assert coarse / fine == pytest.approx(variance_law(bits, dithered=suffix == "d"), rel=1e-5)


def test_the_law_of_the_paper():
    assert [round(variance_law(b), 2) for b in (8, 7, 6, 5)] == [4.03, 4.06, 4.13, 4.27]
    assert variance_law(8) < variance_law(8, dithered=True)
    with pytest.raises(FqtError, match="no step"):
        variance_law(1)


def test_extra_bits_of_parallel_curves():
    worse = {b: 4.0**-b for b in range(2, 9)}
    for shift in (0.0, 0.5, 1.0, 2.75):
        better = {b: 4.0 ** -(b + shift) for b in range(2, 9)}
        found = extra_bits(worse, better)
        assert found == {b: pytest.approx(shift, abs=1e-9) for b in range(2, 9) if b + shift <= 8}


def test_nothing_is_extrapolated():
    assert extra_bits({4: 1.0}, {4: 1.0}) == {}
    assert extra_bits({4: 1.0, 5: 0.25}, {2: 2.0, 3: 0.1, 4: 0.0, 5: 0.25}) == {5: pytest.approx(0.0)}
    assert extra_bits({}, {4: 1.0}) == {}
    assert extra_bits({4: 1.0, 5: 1.0}, {4: 1.0}) == {}  # a flat curve has no place for it
