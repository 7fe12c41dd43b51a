"""Blocks, small floats and stored steps as quantizers: unbiased, with the variance that they state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fqt import Quantizer
from fqt.kernels import ops, rounding
from fqt.kernels.philox import STREAM_DITHER_ROW
from fqt.quant import Floats, Integers, Logarithmic, Pairs, Scale, quantizer
from tests.backends import reference_only

from .cases import FAMILIES, gaussian

FORMATS = {
    "mxfp4": Quantizer(scale=Scale((1, 32), "symmetric", store="power"), grid=Floats(2, 1)),
    "mxint4": Quantizer(scale=Scale((1, 32), "symmetric", store="power"), grid=Integers(4)),
    "nvfp4": Quantizer(scale=Scale((1, 16), "symmetric", store="e4m3"), grid=Floats(2, 1)),
    "int8 tiles": Quantizer(scale=Scale((32, 32), "symmetric"), grid=Integers(8)),
    "powers per tensor": Quantizer(scale=Scale("tensor", "symmetric"), grid=Floats(3, 0)),
    "powers per row": Quantizer(scale=Scale("row", "symmetric"), grid=Floats(3, 0)),
    "affine blocks": Quantizer(scale=Scale((1, 32)), grid=Integers(4)),
    "zero blocks": Quantizer(scale=Scale((1, 32), "zero"), grid=Integers(4)),
    "dithered blocks": Quantizer(scale=Scale((1, 32)), grid=Integers(4), rounding="dithered"),
    "dithered tiles": Quantizer(scale=Scale((4, 8)), grid=Integers(4), rounding="dithered"),
    "e4m3": Quantizer(scale=Scale("row", "symmetric"), grid=Floats(4, 3, reserved=1)),
    "power rows": Quantizer(scale=Scale("row", "symmetric", store="power"), grid=Integers(4)),
    "e5m2": quantizer("e5m2"),
    "lns8": quantizer("lns8"),
    "split4": quantizer("split4"),
    "shift4": quantizer("shift4"),
    "fallback": Quantizer(scale=Scale((16, 16), "symmetric", store="fallback"), grid=Pairs(4)),
}
CHANCES = 128
by_format = pytest.mark.parametrize("name", FORMATS)


def numbers(q: Quantizer) -> np.ndarray:
    """The levels of a symmetric grid of floats or of integers, from their definition."""
    levels = q.coding.levels
    if isinstance(q.grid, Logarithmic):
        powers = (2.0 ** (np.arange(-126, 1) / 8 + 16)).astype(np.float32).astype(float)
        return np.concatenate([-powers[::-1], [0.0], powers])
    if isinstance(q.grid, Floats):
        m = q.grid.mantissa
        up = [0, *(f << e for e in range(40) for f in range(1 << m if e else 1, 2 << m))]
        return np.array(sorted({s * n for n in up for s in (1, -1) if n <= levels.high}), dtype=float)
    return np.arange(levels.low, levels.high + 1, dtype=float)


def steps_of(q: Quantizer, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Step and offset of every entry, as its codes have them."""
    qx = q.quantize(x, 0)
    step, offset = qx.scales.spread((x.shape[0], x.shape[1]))
    return tuple(np.broadcast_to(p.double().numpy(), x.shape) for p in (step, offset))  # type: ignore[return-value]


def neighbours(q: Quantizer, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each entry's position and the levels on either side of it."""
    step, offset = steps_of(q, x)
    levels = numbers(q)
    t = np.clip((x.double().numpy() - offset) / np.where(step == 0, 1, step), levels[0], levels[-1])
    # At a level the neighbours further from zero, as far as there are any.
    above = np.where(t >= 0, np.searchsorted(levels, t, side="right"), np.searchsorted(levels, t, side="left"))
    above = np.clip(above, 1, len(levels) - 1)
    return t, levels[above - 1], levels[above]


@by_format
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(33, 70), (4, 32), (1, 5)], ids=str)
def test_variance_is_that_of_the_two_neighbours_and_below_its_bound(
    shape: tuple[int, int], family: str, name: str
) -> None:
    q, x = FORMATS[name], FAMILIES[family](*shape, 0)
    step, _ = steps_of(q, x)
    if q.rounding_name == "dithered":
        wanted = bound = float((step**2).sum()) / 12
    else:
        t, below, above = neighbours(q, x)
        wanted = float((step**2 * (t - below) * (above - t)).sum())
        bound = float((step**2 * (above - below) ** 2).sum()) / 4
    slack = 3e-5 * bound  # a position beside a level, in float32, of up to 105 steps
    assert float(q.variance(x)) == pytest.approx(wanted, rel=1e-5, abs=slack)
    assert float(q.variance_bound(x)) == pytest.approx(bound, rel=1e-3)
    assert float(q.variance(x)) <= float(q.variance_bound(x)) * (1 + 1e-12)


def estimates(q: Quantizer, x: Tensor, patch: pytest.MonkeyPatch) -> Tensor:
    """(CHANCES, N, D): with every value of a coarse noise once, the same for all entries."""
    found = []
    with reference_only(), patch.context() as context:
        for k in range(CHANCES):
            u = (2 * k + 1) * (1 << 23) // CHANCES
            context.setattr(rounding, "rounding_noise", lambda seed, n, u=u: torch.full((n,), u, dtype=torch.int32))

            def dither(seed: Tensor, stream: int, n: int, u: int = u) -> Tensor:
                return torch.full((n,), u if stream == STREAM_DITHER_ROW else 0, dtype=torch.int32)

            context.setattr(rounding, "random_u24", dither)
            context.setattr(ops, "random_u24", dither)
            found.append(q.quantize(x, 0).dequantize(torch.float32).double())
    return torch.stack(found)


@by_format
def test_mean_and_variance_by_all_values_of_the_noise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means to half a chance of a gap; variances sum to those stated, up to what so few chances leave."""
    q, x = FORMATS[name], FAMILIES["heavy_rows"](9, 70, 2)
    step, _ = steps_of(q, x)
    gap = np.ones_like(step)
    if q.rounding_name != "dithered":
        _, below, above = neighbours(q, x)
        gap = above - below
    draws = estimates(q, x, monkeypatch)
    error = (draws.mean(0) - x.double()).abs().numpy()
    assert (error <= step * gap * (0.51 / CHANCES) + 1e-6 * x.abs().amax(1, keepdim=True).numpy()).all()
    variance = float((draws - draws.mean(0)).square().mean(0).sum())
    # A chance of k/CHANCES is off by half of one at most, and p(1 − p) with it.
    left = float(((step * gap) ** 2).sum()) / (2 * CHANCES)
    assert variance == pytest.approx(float(q.variance(x)), rel=1e-5, abs=left)


@by_format
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_clipped(family: str, name: str) -> None:
    """No error is larger than a gap; a constant or empty block comes back."""
    q, x = FORMATS[name], FAMILIES[family](33, 70, 1)
    step, _ = steps_of(q, x)
    error = (q.quantize(x, 3).dequantize().double() - x.double()).abs().numpy()
    gap: np.ndarray | float = 1.0
    if q.rounding_name != "dithered":
        _, below, above = neighbours(q, x)
        gap = above - below
    assert (error <= step * gap * (1 + 1e-4) + 1e-6 * float(x.abs().max())).all()
    assert not q.quantize(torch.zeros(5, 40), 3).dequantize().any()


@by_format
def test_rows_along_another_axis(name: str) -> None:
    """Blocks lie in rows and columns of the quantizer's matrix, however that lies in memory."""
    q, x = FORMATS[name], gaussian(33, 70)
    upright, turned = q.quantize(x, 4), q.quantize(x.T, 4, axis=-1)
    assert torch.equal(upright.step.expand(33, 70), turned.step.T.expand(33, 70))
    assert float(q.variance(x)) == pytest.approx(float(q.variance(x.T, axis=-1)), rel=1e-12)
    nearest = replace(q, rounding="nearest")
    assert torch.equal(nearest.quantize(x).codes, nearest.quantize(x.T, axis=-1).codes.T)
    if q.rounding_name == "dithered":
        assert torch.equal(upright.codes, turned.codes.T)
        assert torch.allclose(upright.dequantize(), turned.dequantize().T, atol=1e-6)
    four = x.view(3, 11, 7, 10)
    split = q.quantize(four, 4, axis=(0, 1))
    assert torch.equal(split.dequantize().view(33, 70), upright.dequantize())
