"""Which axes are rows, and how the memory lies: neither may change a code."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from fqt.errors import FqtError

from .cases import METHODS, build, gaussian, gen, plain

NAMES = [f"{m}4{s}" for m in METHODS for s in ("", "d", "x")]


def block(*shape: int) -> Tensor:
    return torch.randn(shape, generator=gen(4)) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))


def axes_of(ndim: int) -> list[tuple[int, ...]]:
    return [p for k in range(ndim + 1) for c in combinations(range(ndim), k) for p in permutations(c)]


@pytest.mark.parametrize("axis", axes_of(3), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_axes_equal_moving_them_to_the_front(name: str, axis: tuple[int, ...]) -> None:
    x = block(4, 3, 5)
    q = build(name)
    rest = tuple(d for d in range(3) if d not in axis)
    order = axis + rest
    front = x.permute(order).contiguous()
    rows = 1
    for d in axis:
        rows *= x.shape[d]
    matrix = front.reshape(rows, -1)
    back = [order.index(d) for d in range(3)]

    here, there = q.quantize(x, 7, axis=axis), q.quantize(matrix, 7)
    assert torch.equal(
        here.step,
        there.view.restore(there.matrix_step).view(1, 1, 1)
        if there.step.numel() == 1
        else there.step[:, 0].view(*front.shape[: len(axis)], *[1] * len(rest)).permute(back),
    )
    if here.view.transposed:  # the noise is counted in the tensor's own order
        lying = q.quantize(matrix.T.contiguous(), 7, axis=1)
        codes, values = lying.codes.T, lying.dequantize().T
    else:
        codes, values = there.codes, there.dequantize()
    assert torch.equal(here.codes, codes.reshape(front.shape).permute(back))
    assert torch.equal(here.dequantize(), values.reshape(front.shape).permute(back))
    assert torch.allclose(q.variance(x, 7, axis=axis), q.variance(matrix, 7), rtol=1e-12)
    assert torch.allclose(q.variance_bound(x, 7, axis=axis), q.variance_bound(matrix, 7), rtol=1e-12)
    if here.mixing is None:  # the parameters broadcast over the codes as they stand
        dither = 0 if here.dither is None else here.dither
        value = here.step * (here.codes - dither) + here.offset
        assert torch.allclose(value, here.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_negative_and_single_axes(name: str) -> None:
    x, q = block(4, 3, 5), build(name)
    for axis, other in ((-1, 2), (-3, 0), ((-1, 0), (2, 0)), (1, (1,))):
        assert torch.equal(q.quantize(x, 1, axis=axis).codes, q.quantize(x, 1, axis=other).codes)


@pytest.mark.parametrize("axis", [3, -4, (0, 0), (0, -3), (1, 7), None, "0", 0.5, (0.5,)], ids=str)
def test_bad_axes_are_said_in_one_line(axis: object) -> None:
    with pytest.raises(FqtError, match="axis") as error:
        build("psq4").quantize(block(4, 3, 5), 0, axis=axis)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same (8, 6, 4, 2) values in other strides."""
    spread = torch.empty(8, 12, 4, 2).fill_(99.0)
    spread[:, ::2] = x
    return {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "reversed axes": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "every second": spread[:, ::2],
        "offset": torch.cat([torch.ones(1), x.flatten()])[1:].view(x.shape),
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(8, 6, 4, 2)))
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str, layout: str) -> None:
    x, q = block(8, 6, 4, 2), build(name)
    other = layouts(x)[layout]
    assert torch.equal(other, x)
    before = other.clone()
    for axis in (0, (0, 2)):
        a, b = q.quantize(x, 3, axis=axis), q.quantize(other, 3, axis=axis)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.dequantize(), b.dequantize())
    assert torch.equal(other, before), "the input was written to"


@pytest.mark.parametrize("name", NAMES)
def test_expanded_rows(name: str) -> None:
    x = gaussian(1, 7).expand(5, 7)
    assert torch.equal(build(name).quantize(x, 2).codes, build(name).quantize(x.clone(), 2).codes)


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x = gaussian(8, 6, dtype=dtype)
        kept = x.clone()
        build(name).quantize(x, 0).dequantize().add_(1)
        build(name).variance(x, 0)
        build(name).variance_bound(x, 0)
        assert torch.equal(x, kept)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_dequantize_is_the_same(name: str) -> None:
    qx = build(name).quantize(gaussian(8, 6), 0)
    first = qx.dequantize().clone()
    qx.dequantize().mul_(0)
    assert torch.equal(qx.dequantize(), first)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_wants_its_gradient(name: str) -> None:
    """A quantizer knows no autograd: same codes, and nothing that comes out hangs on the graph."""
    x, q = gaussian(8, 6), build(name)
    wanted = x.clone().requires_grad_()
    qx = q.quantize(wanted, 0)
    assert torch.equal(qx.codes, q.quantize(x, 0).codes)
    for out in (qx.dequantize(), qx.step, qx.offset, q.variance(wanted, 0), q.variance_bound(wanted, 0)):
        assert not out.requires_grad


def test_groups() -> None:
    """Row scales are column scales of the transpose; one row is one tensor."""
    x = block(6, 9)
    for mode in ("affine", "zero", "symmetric"):
        a = plain(mode, "row", rounding="nearest").quantize(x)
        b = plain(mode, "column", rounding="nearest").quantize(x.T)
        assert torch.equal(a.codes, b.codes.T)
        assert torch.equal(a.dequantize(), b.dequantize().T)
        c = plain(mode, "tensor").quantize(x.view(1, -1), 5)
        d = plain(mode, "row").quantize(x.view(1, -1), 5)
        assert torch.equal(c.dequantize(), d.dequantize())
