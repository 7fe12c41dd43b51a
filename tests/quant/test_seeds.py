"""Noise is a pure function of the seed and the place: Philox, its streams, and what counts as a seed."""

from __future__ import annotations

import pytest
import torch

from fqt.errors import FqtError
from fqt.kernels.philox import random_u24, random_words, rounding_noise

from . import oracles
from .cases import METHODS, build, gaussian, plain

NAMES = [f"{m}4{s}" for m in METHODS for s in ("", "d", "x")]


@pytest.mark.parametrize(
    ("counter", "key", "out"),
    [  # the known answers that Random123 publishes for philox4x32-10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_oracle_knows_the_published_answers(counter: list[int], key: list[int], out: list[int]) -> None:
    assert oracles.philox4x32(counter, key) == out


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
@pytest.mark.parametrize("stream", range(4))
def test_words_are_philox(seed: int, stream: int) -> None:
    found = random_words(torch.tensor(seed), stream, 11)
    assert found.tolist() == oracles.words(seed, stream, 11)
    assert random_u24(torch.tensor(seed), stream, 11).tolist() == [w >> 8 for w in oracles.words(seed, stream, 11)]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 50])
def test_noise_of_rounding(n: int) -> None:
    assert rounding_noise(torch.tensor(-7), n).tolist() == oracles.rounding_noise(-7, n)


def test_stochastic_codes_follow_the_noise_at_their_place() -> None:
    """⌊t⌋ + (u < frac t), u the entry's half word of stream 0 and below it its byte of stream 4."""
    x = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) * 15
    x[0, 0], x[2, 6] = 0, 15
    qx = plain("affine", "tensor", 4).quantize(x, 99)
    noise = torch.tensor(oracles.rounding_noise(99, 21)).view(3, 7) / 2.0**24
    assert torch.equal(qx.codes.float(), x.floor() + (noise < x - x.floor()))


def test_dithered_codes_follow_their_streams() -> None:
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) * 14
    x[0, 0], x[2, 4] = 0, 14
    qx = plain("affine", "tensor", 4, "dithered").quantize(x, 99)
    row = torch.tensor([w >> 8 for w in oracles.words(99, 1, 3)], dtype=torch.float64)[:, None]
    column = torch.tensor([w >> 8 for w in oracles.words(99, 2, 5)], dtype=torch.float64)
    shift = (row + column) / 2**24
    assert torch.equal(qx.codes.double(), (x.double() + shift).floor())
    value = qx.codes.double() - shift + 0.5 - 0.5 / 2**24
    assert torch.allclose(qx.dequantize(torch.float64), value, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_codes(name: str) -> None:
    x, q = gaussian(16, 20), build(name)
    a, b = q.quantize(x, 5), q.quantize(x, 5)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_different_seeds_differ(name: str) -> None:
    """All 64 bits count. 320 entries: equal codes by chance have probability below 1e-30."""
    x, q = gaussian(16, 20), build(name)
    seeds = [0, 1, 2, -1, 2**32, 2**32 + 1, 2**62, -(2**63), 1 << 31]
    results = [q.quantize(x, s).dequantize() for s in seeds]
    for i in range(len(seeds)):
        for j in range(i):
            assert not torch.equal(results[i], results[j]), (seeds[i], seeds[j])


@pytest.mark.parametrize("name", ["psq4", "shq4d"])
def test_ints_wrap_and_tensors_agree(name: str) -> None:
    x, q = gaussian(8, 9), build(name)
    for seed in (0, 7, -3, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 5, -(2**70) + 1):
        wrapped = (seed + 2**63) % 2**64 - 2**63
        a = q.quantize(x, seed).dequantize()
        assert torch.equal(a, q.quantize(x, torch.tensor(wrapped)).dequantize())
        assert torch.equal(a, q.quantize(x, torch.tensor([wrapped])).dequantize())
        assert torch.equal(q.variance(x, seed), q.variance(x, torch.tensor(wrapped)))


@pytest.mark.parametrize("name", NAMES)
def test_missing_seed_is_said_in_one_line(name: str) -> None:
    q = build(name)
    for call in (q.quantize, lambda x: q.variance(x, None), lambda x: q.variance_bound(x, seed=None)):
        with pytest.raises(FqtError, match="seed") as error:
            call(gaussian(4, 4))  # type: ignore[operator]
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [1.5, "3", torch.tensor(1.5), torch.tensor([1, 2]), [1]], ids=str)
def test_what_is_no_seed_is_refused(seed: object) -> None:
    """A float would be cut to an integer and two seeds silently become one."""
    with pytest.raises((FqtError, TypeError), match="seed"):
        build("psq4").quantize(gaussian(4, 4), seed)  # type: ignore[arg-type]


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name in NAMES:
        build(name).quantize(gaussian(4, 4), 1)
    assert torch.equal(torch.get_rng_state(), before)
