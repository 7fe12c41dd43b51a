"""Convolutions that are made of others: three dimensions of two, narrow groups of wide ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fqt
from fqt.kernels import products, volume
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.linear_map import ConvMap
from fqt.kernels.narrow_groups import GROUP_CHANNELS, Wide
from fqt.kernels.products import Spatial
from fqt.quant import Scale

VOLUMES = [
    # (N, C, D, H, W), (O, kd, kh, kw), geometry
    ((2, 3, 4, 5, 6), (4, 3, 2, 3), Spatial((1, 1, 1), (1, 0, 1), (1, 1, 1))),
    ((1, 2, 7, 6, 5), (3, 2, 3, 1), Spatial((3, 2, 1), (2, 1, 0), (2, 1, 1))),  # slices that no tap meets
    ((2, 4, 3, 4, 4), (6, 3, 3, 3), Spatial((2, 1, 1), (1, 1, 1), (1, 1, 1), 2)),
    ((2, 6, 3, 3, 3), (6, 2, 2, 2), Spatial((1, 1, 1), (1, 1, 1), (1, 1, 1), 6)),
]


def codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("case", VOLUMES, ids=str)
def test_three_dimensions_of_two(case: tuple) -> None:
    """Exact sums, and every part of an epilogue where it belongs."""
    shape, (o, *kernel), g = case
    x, w = codes(shape, torch.uint8, 1), codes((o, shape[1] // g.groups, *kernel), torch.int8, 2)
    how = (list(g.stride), list(g.padding), list(g.dilation))
    xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
    out = F.conv3d(xd, wd, None, *how, g.groups)
    grad = codes(tuple(out.shape), torch.uint8, 3)
    out.backward(grad.double())
    wanted = (out.detach(), xd.grad, wd.grad.round())
    got = (
        volume.convolve(x, w, g),
        volume.grad_input(grad, w, shape[2:], g),
        volume.grad_weight(grad, x, tuple(kernel), g),
    )
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.double(), b)

    def scaled(sums: torch.Tensor) -> tuple[Epilogue, torch.Tensor]:
        laid = sums.movedim(1, -1).float()
        left, right = torch.randn(laid.shape[0], 1), torch.randn(1, *laid.shape[1:])
        scale = torch.rand(laid.shape[0])
        each = scale.view(-1, 1, 1, 1, 1) * laid + left.view(-1, 1, 1, 1, 1) * right
        return Epilogue(row_scale=scale, left=left, right=right), each.movedim(-1, 1)

    e, result = scaled(wanted[0])
    assert torch.equal(volume.convolve(x, w, g, e), result)
    e, result = scaled(wanted[1])
    assert torch.equal(volume.grad_input(grad, w, shape[2:], g, e), result)
    e, result = scaled(wanted[2])
    flat = Epilogue(row_scale=e.row_scale, left=e.left, right=e.right.flatten(1))
    assert torch.equal(volume.grad_weight(grad, x, tuple(kernel), g, flat), result)
    for of, codes_of in (("output", torch.ones_like(x)), ("grad_input", torch.ones_like(grad))):
        mask = products.conv2d_mask(w, shape[2:], g, of)
        sums = volume.convolve(codes_of, w, g) if of == "output" else volume.grad_input(codes_of, w, shape[2:], g)
        assert torch.equal(mask, sums[0].movedim(0, -1).float())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(8, 3, 4), (6, 2, 5), (7, 1, 2), (40, 4, 1)], ids=str)
def test_wider_groups_are_the_same_map(sizes: tuple[int, int, int], transposed: bool) -> None:
    """By the float map of the codes; and a gradient of the wide weight holds that of the narrow one."""
    groups, inputs, outputs = sizes
    shape = (groups * outputs, inputs, 3) if not transposed else (groups * inputs, outputs, 3)
    map = ConvMap((2,), (1,), (1,), groups, transposed)
    wide = Wide.of(map, shape)
    assert wide is not None
    assert wide.map.groups * wide.merged == groups
    assert wide.map.group_channels >= GROUP_CHANNELS or wide.map.groups == 1
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    laid, axis = map.weight_by_channel(weight)
    w = fqt.Quantizer(scale=Scale("row", "symmetric"), rounding="nearest").quantize(laid, axis=axis)
    widened = wide.weight(w)
    x = torch.randn(2, groups * inputs, 9)
    narrow_value, wide_value = (m.weight_restored(q.dequantize()) for m, q in ((map, w), (wide.map, widened)))
    assert wide_value.shape == wide.weight_shape(weight.shape)
    torch.testing.assert_close(wide.map.output(x, wide_value), map.output(x, narrow_value))
    assert torch.equal(wide.gradient(wide_value), narrow_value)


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (5, 1, 3, 3)])
def test_groups_that_stay(shape: tuple[int, ...]) -> None:
    """Wide ones, and a filter for every channel."""
    assert Wide.of(ConvMap((1, 1), (0, 0), (1, 1), 2 if shape[1] > 1 else 5), shape) is None
