"""What is timed is checked first, and the check can fail. No time is asserted."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import fqt
from fqt.errors import FqtError
from fqt.paper import overhead
from fqt.paper.overhead import Convolution, check_overhead, quantiles, time_convolution, time_quantizer
from fqt.quant.transform import ScaledHadamard

SMALL = Convolution(samples=8, channels=8, size=20)


def test_sound_quantizers_pass():
    check_overhead(SMALL, {name: fqt.quantizer(name) for name in ("ptq8", "psq4", "bhq8", "shq8d")})


@dataclasses.dataclass(frozen=True)
class Coarser(fqt.Quantizer):
    """Says it has the variance of one bit more than it has."""

    def variance(self, x, seed=0, *, axis=0):
        return super().variance(x, seed, axis=axis) / 4


def test_a_wrong_quantizer_is_refused():
    nearest = fqt.Quantizer(rounding="nearest")
    for q in (Coarser(), nearest):
        with pytest.raises(FqtError, match="wrong is wrong here"):
            check_overhead(SMALL, {"wrong": q})


def test_a_wrong_convolution_is_refused(monkeypatch):
    right = overhead.conv2d_grad_input

    def wrong(*arguments):
        sums = right(*arguments)
        sums[0, 0, 0, 0] += 1
        return sums

    monkeypatch.setattr(overhead, "conv2d_grad_input", wrong)
    with pytest.raises(FqtError, match="its sums differ"):
        check_overhead(SMALL, {})


def test_too_small_a_check_is_refused():
    with pytest.raises(FqtError, match="too small"):
        check_overhead(Convolution(samples=2, channels=2, size=4), {})


def test_the_convolutions_are_grad_input():
    shape = Convolution(samples=2, channels=3, size=5)
    codes = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight = shape.weight()
    input = torch.zeros(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    F.conv2d(input, weight.double(), padding=1).backward(codes.double())
    assert torch.equal(shape.of_codes(codes, weight).double(), input.grad)
    assert torch.equal(shape.of_floats(codes.double(), weight.double()), input.grad)


def test_times():
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    convolution = time_convolution(SMALL, 3)
    assert set(convolution) == {"integer", "float32"}
    plain = time_quantizer(SMALL, fqt.quantizer("psq8"), 3)
    assert set(plain) == {"range", "quantize", "integer", "total"}
    assert plain["total"] == plain["quantize"]
    mixed = time_quantizer(SMALL, fqt.Quantizer(transform=ScaledHadamard()), 3)
    assert set(mixed) == {"range", "transform", "quantize", "undo", "integer", "total"}
    assert mixed["total"]["q50"] == pytest.approx(mixed["quantize"]["q50"] + mixed["undo"]["q50"])
    for times in (*convolution.values(), *mixed.values()):
        assert 0 < times["q20"] <= times["q50"] <= times["q80"]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_quantiles():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"q20": 2.0, "q50": 3.5, "q80": 5.0}
    assert quantiles([2.0]) == {"q20": 2.0, "q50": 2.0, "q80": 2.0}
