"""Philox against its authors' known answers, and the streams' layout."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels import ops
from fqt.kernels.philox import as_seed, fork_seed, philox, random_u24, random_words, rounding_noise

# The known-answer vectors of Random123 for philox4x32, 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == output


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
def test_layout_of_a_stream(seed: int) -> None:
    """Word i of a stream is output i mod 4 of the block i ÷ 4; the key is the seed, low word first."""
    key = tuple(torch.tensor([w]) for w in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    blocks = [philox(tuple(torch.tensor([c]) for c in (b, 0, 7, 0)), key) for b in range(20)]
    wanted = torch.cat([w for block in blocks for w in block])[:78]
    assert torch.equal(random_words(as_seed(seed, torch.device("cpu")), 7, 78), wanted)
    assert torch.equal(ops.random_u24(torch.tensor(seed), 7, 78), (wanted >> 8).int())


def test_streams_and_seeds_differ() -> None:
    draws = [random_u24(torch.tensor(seed), stream, 64) for seed in (0, 1, 2**32) for stream in range(5)]
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)


def test_a_longer_stream_begins_with_the_shorter_one() -> None:
    seed = torch.tensor(5)
    long = random_u24(seed, 0, (1 << 17) + 9)  # beyond one chunk
    for n in (1, 6, 4097, 1 << 17):
        assert torch.equal(random_u24(seed, 0, n), long[:n])


@pytest.mark.parametrize("draw", [lambda seed, n: ops.random_u24(seed, 0, n), rounding_noise])
def test_uniform(draw) -> None:
    """Mean, variance and correlations of 2¹⁸ numbers: z-tests, false alarm below 1e-6 in all."""
    n = 1 << 18
    u = draw(torch.tensor(11), n).double() / 2**24 - 0.5 + 2.0**-25
    assert abs(u.mean()) * (12 * n) ** 0.5 < 5.5
    assert abs((u.square().mean() - 1 / 12) * (180 * n) ** 0.5) < 5.5
    for lag in (1, 2, 3, 4, 128):
        assert abs((u[lag:] * u[:-lag]).mean() * 12 * (n - lag) ** 0.5) < 5.5


def test_forked_seeds_are_splitmix() -> None:
    """The first outputs of SplitMix64 from state 1234567, as published with the generator."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = [int(fork_seed(torch.tensor(1234567), i)) % 2**64 for i in range(4)]
    assert got == wanted
