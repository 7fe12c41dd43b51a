"""Messages say all that a receiver needs, in the bits there are."""

from __future__ import annotations

import pytest
import torch

from fqt.distributed import bits, message
from fqt.quant import METHODS, QuantizedTensor, Quantizer, quantizer

SENT = [name for method in METHODS.values() for name in method.shown] + ["psq3", "psq4x", "shq4x", "psq4n"]
FULL_STEPS = {"eden4": 1.5, "shift": 0.75, "fallback8": 6.5}
"""Bits an entry beyond `bits_stored`: steps sent as float32 (columns' here: of 40 rows), and all second codes."""


def write(q: Quantizer, x: torch.Tensor, seed: int) -> tuple[torch.Tensor, QuantizedTensor]:
    key = torch.tensor(seed)
    found = q.quantize(x, key, nonfinite="propagate")
    return message.write(found, q, key, torch.tensor(seed / 8, dtype=torch.float64)), found


@pytest.mark.parametrize("count", [0, 1, 8, 77])
@pytest.mark.parametrize("width", range(1, 17))
def test_bits_come_back(width: int, count: int) -> None:
    codes = torch.randint(0, 2**width, (count,), generator=torch.Generator().manual_seed(width))
    data = bits.packed(codes, width)
    assert data.dtype == torch.uint8
    assert data.numel() == bits.length(count, width) <= -(-count // 8) * 8 * width / 8 + count % 8
    assert torch.equal(bits.unpacked(data, width, count).long(), codes)


def matrices(n: int, d: int) -> list[torch.Tensor]:
    """Rows of many sizes, one of them zero; the least numbers; nothing at all; constant."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=g) * torch.exp(2 * torch.randn(n, 1, generator=g))
    x[n // 2] = 0
    return [x, x * 1e-37, torch.zeros(n, d), torch.full((n, d), 3.1)]


@pytest.mark.parametrize("name", SENT)
def test_a_message_is_what_was_quantized(name: str) -> None:
    """Bit for bit, read beside another matrix of the shape; E4M3 steps to two roundings of float32."""
    q = quantizer(name)
    for shape in ((1, 5), (33, 70)):
        _, like = write(q, torch.randn(shape, generator=torch.Generator().manual_seed(9)), 7)
        for seed, x in enumerate(matrices(*shape)):
            data, found = write(q, x, seed)
            got, variance = message.read(data, q, like)
            assert variance == seed / 8
            assert torch.equal(got.codes, found.codes)
            wanted = found.dequantize()
            slack = 2.0**-22 if name == "nvfp4" else 0.0
            torch.testing.assert_close(got.dequantize(), wanted, rtol=slack, atol=float(wanted.abs().max()) * slack)


@pytest.mark.parametrize("name", ["psq4", "bhq4", "shq4d", "mxfp4", "nvfp4", "shift4", "ptq4x"])
def test_what_is_not_finite_arrives(name: str) -> None:
    """Where a tensor that was never sent has NaN, a message has."""
    q, x = quantizer(name), matrices(33, 70)[0]
    x[4, 5] = torch.inf
    data, found = write(q, x, 1)
    got, _ = message.read(data, q, write(q, matrices(33, 70)[0], 1)[1])
    nan = found.dequantize().isnan()
    assert nan[4, 5]
    assert torch.equal(got.dequantize().isnan(), nan)


@pytest.mark.parametrize("name", SENT)
def test_messages_are_as_long_as_what_is_stored(name: str) -> None:
    """Within a twelfth of a bit an entry, and of one length whatever the data."""
    q = quantizer(name)
    lengths = {write(q, x, 0)[0].numel() for x in matrices(40, 1024)}
    assert len(lengths) == 1
    entry, stored = lengths.pop() * 8 / (40 * 1024), q.bits_stored((40, 1024)) / (40 * 1024)
    more = next((bits for stem, bits in FULL_STEPS.items() if name.startswith(stem)), 0.0)
    assert stored <= entry <= stored + more + 1 / 12
