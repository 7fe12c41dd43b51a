"""Ranges of blocks, and steps and offsets: the reference's bits."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels import ops, reference
from fqt.kernels.codes import COLUMN, ROW, TENSOR, Blocks, Entries
from fqt.kernels.triton import ranges
from fqt.kernels.triton.tiling import Tiling
from tests.backends import same
from tests.triton_kernels.cases import BLOCKS, DEVICE, KINDS, check, matrix


@pytest.mark.parametrize("kind", KINDS)
def test_ranges(kind: str) -> None:
    for blocks in BLOCKS.values() if kind in ("plain", "nan") else (ROW, Blocks(1, 16)):
        check(ranges, ops.value_range, Entries(matrix((33, 70), kind)), blocks)


def test_ranges_of_parts_that_several_programs_share() -> None:
    """The greatest lies in the first, the least in the middle, a NaN in the last."""
    for blocks, shape in [(TENSOR, (70, 2100)), (COLUMN, (200, 3)), (ROW, (2, 4200)), (Blocks(0, 2), (200, 5))]:
        parts = Tiling.of(blocks, shape).splits
        assert max(parts) > 1, (blocks, parts)
        x = matrix(shape)
        for place, value in enumerate((10.0, -11.0, torch.nan)):
            x[place * (shape[0] - 1) // 2, place * (shape[1] - 1) // 2] = value
            lo, hi = check(ranges, ops.value_range, Entries(x), blocks)
            found = ranges.steps_of(Entries(x.to(DEVICE)), blocks, "zero", 254)
            wanted = reference.parameters(lo, hi, "zero", 254)
            assert all(same(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


def test_ranges_of_dtypes_strides_and_factors() -> None:
    wide = matrix((40, 48))
    for view in [wide.bfloat16(), wide.half(), wide.T, wide[::2, ::3], wide[3:4].expand(9, 48), wide[:1, :1]]:
        for blocks in (ROW, COLUMN, TENSOR, Blocks(4, 8)):
            check(ranges, ops.value_range, Entries(view), blocks)
    check(ranges, ops.value_range, Entries(wide, torch.linspace(-2, 2, 16)), ROW)


@pytest.mark.parametrize("parts", [1, 5000, ranges._MOST_SPLITS + 3])
def test_ranges_of_parts_put_together(parts: int) -> None:
    """The ends in the last parts; NaN in one is NaN in all."""
    hi = torch.rand(parts, generator=torch.Generator().manual_seed(2))
    lo = hi - 2
    hi[-1], lo[-1] = 7.0, -5.0
    for bad in (False, True):
        if bad:
            lo[parts // 2] = hi[parts // 2] = torch.nan  # as every pass leaves it
        wanted = reference.parameters(lo.amin()[None, None], hi.amax()[None, None], "affine", 255)
        found = ranges.merged(lo.to(DEVICE), hi.to(DEVICE), "affine", 255)
        assert all(same(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", ["affine", "zero", "symmetric"])
@pytest.mark.parametrize("steps", [1, 3, 12, 127, 254, 255])
def test_parameters(steps: int, mode: str) -> None:
    """Ranges on either side of zero, constant, as wide as floats go, subnormal, not finite."""
    ends = torch.tensor(
        [-torch.inf, -3.4e38, -5.0, -1.7, -1e-3, -1e-40, -0.0, 0.0, 1e-45, 0.1, 2.0, 3.3e38, torch.nan]
    )
    lo, hi = torch.meshgrid(ends, ends, indexing="ij")
    ordered = ~(lo > hi)
    if mode == "zero" and steps == 1:
        ordered &= (lo >= 0) | (hi <= 0)  # no code is left for one of two sides
    lo, hi = lo[ordered], hi[ordered]
    generator = torch.Generator().manual_seed(steps)
    drawn = torch.randn(2, 700, generator=generator) * torch.logspace(-3, 3, 700)
    if steps > 1:
        lo, hi = torch.cat([lo, drawn.amin(0)]), torch.cat([hi, drawn.amax(0)])
    check(ranges, ops.parameters, lo[:, None], hi[:, None], mode, steps)


def test_what_is_left_to_the_reference() -> None:
    assert not ranges.takes_value_range(Entries(torch.empty(0, 3)), ROW)
    assert not ranges.takes_parameters(torch.ones(2).double(), torch.ones(2).double(), "affine", 255)
    assert reference.value_range(Entries(torch.empty(0, 3)), TENSOR)[0].shape == (1, 1)
