"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011) in plain torch.

A random number is a pure function of (seed, stream, index): no state, no order, so that the same seed gives
the same codes in any chunking, on any thread count and on any backend. A torch generator was rejected because
its numbers depend on the device and on what was drawn before.

Layout: the 64-bit seed is the key (low word first). The counter is (block, block >> 32, stream, 0). Word `i`
of a stream is output `i mod 4` of block `i ÷ 4`. Words are held in int64, since torch has no uint32 arithmetic;
int64 products wrap around, which leaves the 64-bit product of two 32-bit words exact in its bits.
"""

from __future__ import annotations

import ctypes
import operator

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels.codes import at_hand

# Streams of one seed. Their numbers are part of the format: changing one changes every code.
STREAM_ROUNDING = 0
STREAM_DITHER_ROW = 1
STREAM_DITHER_COLUMN = 2
STREAM_SIGN = 3
STREAM_ROUNDING_LOW = 4
STREAM_ROTATION = 5
STREAM_STEP = 6
STREAM_KEEP = 7

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_WORD = 2**64 - 1
SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""The step and the two factors of SplitMix64."""
_CHUNK = 1 << 15  # blocks per chunk: four int64 planes of this length stay in a 2 MiB cache


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape, each holding 32-bit words (0 … 2³² − 1).
        key: two int64 tensors that broadcast against them, 32-bit words.

    Returns:
        Four int64 tensors of the counter's shape, 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: Tensor, stream: int, n: int) -> Tensor:
    """The first `n` 32-bit words of a stream.

    Args:
        seed: int64 scalar tensor; all 64 bits count.
        stream: which stream of this seed.
        n: how many words.

    Returns:
        (n,) int64 on the seed's device, independent and uniform on 0 … 2³² − 1.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    blocks = -(-n // 4)
    out = torch.empty((blocks, 4), dtype=torch.int64, device=seed.device)
    for start in range(0, blocks, _CHUNK):
        block = torch.arange(start, min(start + _CHUNK, blocks), device=seed.device)
        high = block >> 32
        words = philox((block & _MASK, high, torch.full_like(block, stream), torch.zeros_like(block)), key)
        out[start : start + _CHUNK] = torch.stack(words, dim=1)
    return out.view(-1)[:n]


def random_u24(seed: Tensor, stream: int, n: int) -> Tensor:
    """The first `n` 24-bit integers of a stream: the top 24 bits of its words.

    Returns:
        (n,) int32, independent and uniform on 0 … 2²⁴ − 1. As a fraction of 2²⁴ each is exact in float32.
    """
    return (random_words(seed, stream, n) >> 8).to(torch.int32)


def rounding_noise(seed: Tensor, n: int) -> Tensor:
    """The noise of stochastic rounding for the first `n` entries of a matrix, row-major.

    Its high 16 bits are the entry's half word of `STREAM_ROUNDING` (the low half of a word comes first), its low 8
    the entry's byte of `STREAM_ROUNDING_LOW` (the lowest first). The low bits matter to one entry in 65,536: fast
    backends make the second stream only there, and half the random words.

    Returns:
        (n,) int32, independent and uniform on 0 … 2²⁴ − 1.
    """
    high, low = _parts(seed, STREAM_ROUNDING, n, 16), _parts(seed, STREAM_ROUNDING_LOW, n, 8)
    return (high << 8 | low).to(torch.int32)


def few_random_bits(seed: Tensor, n: int, bits: int) -> Tensor:
    """The first `n` integers of `bits` random bits each, 1 to 16, from `STREAM_ROUNDING`.

    A word is taken apart into 32, 16, 8, 4 or 2 of them, as many as it has room for at a power of two of bits each,
    and the highest bits are taken: at 4 bits a quarter of the words of `rounding_noise`'s first stream.

    Returns:
        (n,) int32, independent and uniform on 0 … 2^bits − 1.
    """
    room = 1 << (bits - 1).bit_length()
    return (_parts(seed, STREAM_ROUNDING, n, room) >> (room - bits)).to(torch.int32)


def _parts(seed: Tensor, stream: int, n: int, bits: int) -> Tensor:
    """The first `n` integers of `bits` bits each, the words of a stream taken apart from their low ends."""
    words = random_words(seed, stream, -(-n * bits // 32))
    shifts = torch.arange(0, 32, bits, device=seed.device)
    return ((words[:, None] >> shifts) & ((1 << bits) - 1)).view(-1)[:n]


def as_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as an int64 scalar tensor on `device`; a Python int of any size is taken modulo 2⁶⁴."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise FqtError(f"a seed tensor must hold one int64, not {tuple(seed.shape)} {seed.dtype}")
        return seed.reshape(()).to(device)
    try:
        number = operator.index(seed)
    except TypeError:
        raise FqtError(f"a seed must be an int or an int64 tensor with one number, not {seed!r}") from None
    return torch.full((), _signed(number & _WORD), dtype=torch.int64, device=device)  # not copied from the host


def fork_seed(seed: Tensor, index: int) -> Tensor:
    """A new seed for the `index`-th user of `seed` (SplitMix64, Steele et al. 2014).

    For one seed, distinct indices below 2⁶⁴ give distinct results: the mixing function is a bijection.

    Args:
        seed: int64 scalar tensor.
        index: which user: an operand's role, a rank.

    Returns:
        int64 scalar tensor on the same device.
    """
    golden, mix1, mix2 = SPLITMIX
    step = golden * (index + 1) & _WORD
    if at_hand(seed):
        # The same in Python's integers: a dozen small tensor operations between large kernels cost far more.
        n = (ctypes.c_int64.from_address(seed.data_ptr()).value + step) & _WORD
        n = (n ^ (n >> 30)) * mix1 & _WORD
        n = (n ^ (n >> 27)) * mix2 & _WORD
        return torch.tensor(_signed(n ^ (n >> 31)), dtype=torch.int64, device="cpu")
    z = seed + _signed(step)
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _signed(mix1)
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _signed(mix2)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return word - 2**64 if word >= 2**63 else word
