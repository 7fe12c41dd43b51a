"""Integer products: every sum exact, every epilogue the reference's bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fqt.kernels import products
from fqt.kernels.cpu import library
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.products import Geometry

U8, S8 = torch.uint8, torch.int8
SIGNS = list(itertools.product((U8, S8), repeat=2))


def codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Codes over the whole range of their dtype."""
    low = 0 if dtype == U8 else -128
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, low + 256, shape, generator=generator, dtype=torch.int32).to(dtype)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same matrix, column-major."""
    return x.t().contiguous().t()


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same matrix in four layouts: rows, columns, rows at a distance, no stride of 1."""
    wide = x.new_zeros(x.shape[0], x.shape[1] + 3)
    wide[:, : x.shape[1]] = x
    sparse = x.new_zeros(x.shape[0], 2 * x.shape[1])
    sparse[:, ::2] = x
    return [x, transposed(x), wide[:, : x.shape[1]], sparse[:, ::2]]


def epilogue(rows: int, columns: int, place: tuple[int, ...], dtype: torch.dtype, whole: bool = True) -> Epilogue:
    """An epilogue with everything in it, or with numbers in place of vectors and nothing else."""
    draw = torch.Generator().manual_seed(7)
    if not whole:
        return Epilogue(row_scale=torch.tensor(0.3), column_scale=torch.tensor([0.7]), dtype=dtype)
    return Epilogue(
        row_scale=torch.rand(rows, generator=draw),
        column_scale=torch.rand(columns, generator=draw),
        left=torch.randn(rows, 2, generator=draw),
        right=torch.randn(2, *place, generator=draw),
        bias=torch.randn(columns, generator=draw),
        zero=torch.randint(0, 256, (rows,), generator=draw, dtype=torch.int32),
        ones=torch.randint(-(2**20), 2**20, place, generator=draw, dtype=torch.int64),
        dtype=dtype,
    )


def by_hand(sums: torch.Tensor, e: Epilogue) -> torch.Tensor:
    """The epilogue in float32, on int64 sums (rows, places, columns): the documented order, written out."""
    if e.zero is not None and e.ones is not None:
        sums = sums - e.zero.long().view(-1, 1, 1) * e.ones.reshape(1, *sums.shape[1:])
    value = sums.float()
    assert e.row_scale is not None
    assert e.column_scale is not None
    value = value * e.row_scale.view(-1, 1, 1)
    value = value * e.column_scale
    if e.left is not None and e.right is not None:
        for r in range(e.left.shape[1]):
            value = value + e.left[:, r].view(-1, 1, 1) * e.right[r].reshape(1, *sums.shape[1:])
    if e.bias is not None:
        value = value + e.bias
    return value.to(e.dtype)


MATRICES = [(0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (2, 3, 5), (6, 64, 8), (7, 65, 9), (97, 130, 70)]
MATRICES += [(5, 16, 1027), (32, 70, 640), (416, 64, 128)]


@pytest.mark.parametrize(("a_dtype", "b_dtype"), SIGNS)
def test_matmul_is_exact(a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    for m, n, k in MATRICES:
        a, b = codes((m, k), a_dtype, 1), codes((k, n), b_dtype, 2)
        wanted = a.long() @ b.long()
        for x, y in itertools.product(layouts(a), layouts(b)):
            got = products.matmul(x, y)
            assert got.dtype == torch.int32
            assert torch.equal(got.long(), wanted), (m, n, k, x.stride(), y.stride())


def test_matmul_tails() -> None:
    for size in range(1, 71):
        for m, n, k in ((size, 3, 4), (3, size, 5), (3, 2, size)):
            a, b = codes((m, k), U8, size), codes((k, n), S8, size + 1)
            assert torch.equal(products.matmul(a, b).long(), a.long() @ b.long()), (m, n, k)


@pytest.mark.parametrize(("a_dtype", "b_dtype"), SIGNS)
def test_the_longest_sums(a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    """Extreme codes at the last length that int32 holds, one beyond it, and far beyond."""
    limit = {(U8, S8): 65793, (S8, U8): 65793, (S8, S8): 131071, (U8, U8): 33025}[a_dtype, b_dtype]
    assert products.most_terms(a_dtype, b_dtype) == limit
    extremes = {U8: (0, 255), S8: (-128, 127)}
    for k, out in ((limit, torch.int32), (limit + 1, torch.int64), (2 * limit + 70, torch.int64)):
        a = torch.tensor(extremes[a_dtype]).repeat_interleave(2).view(4, 1).expand(4, k).to(a_dtype)
        b = torch.tensor(extremes[b_dtype]).view(1, 2).expand(k, 2).to(b_dtype)
        got = products.matmul(a, b)
        assert got.dtype == out
        assert torch.equal(got.long(), a[:, :1].long() * b[:1].long() * k), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_epilogue(dtype: torch.dtype) -> None:
    for (m, n, k), whole in itertools.product(MATRICES, (True, False)):
        for a_dtype, b_dtype in SIGNS:
            a, b = codes((m, k), a_dtype, 3), codes((k, n), b_dtype, 4)
            e = epilogue(m, n, (n,), dtype, whole)
            wanted = by_hand((a.long() @ b.long()).view(m, 1, n), e).view(m, n)
            got = products.matmul(a, b, e)
            assert got.dtype == dtype
            assert torch.equal(got, wanted), (m, n, k)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the sign of zero; any NaN equals any other."""
    zeros = torch.equal(torch.signbit(a) & (a == 0), torch.signbit(b) & (b == 0))
    return zeros and torch.allclose(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


EDGES = torch.tensor([1.0, -0.0, 1e-40, float("inf"), -3e38, float("nan"), 0.25])
"""Factors whose products are no ordinary numbers."""


@pytest.mark.parametrize("width", [64, 130, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_epilogues(width: int, dtype: torch.dtype) -> None:
    """Every selection of parts, for whole and partial panels of columns; with NaN, infinity, −0 and denormals."""
    n, g, draw = 7, Geometry(padding=(1, 1)), torch.Generator().manual_seed(3)
    x, w = codes((n, 8, 3, 5), U8, 1), codes((width, 8, 3, 3), S8, 2)
    a, b = codes((n, 16), U8, 3), codes((16, width), S8, 4)
    x[:, :, :2, :2], a[0] = 0, 0  # some sums are 0
    image = F.conv2d(x.double(), w.double(), padding=1).long().permute(0, 2, 3, 1).reshape(n, 15, width)
    matrix = (a.long() @ b.long()).view(n, 1, width)
    for rank, by_row, by_column, bias in itertools.product(range(4), (0, 1), (0, 1), (0, 1)):
        scale = EDGES[torch.arange(width) % len(EDGES)] if by_column else torch.tensor(-0.7)
        e = Epilogue(
            row_scale=EDGES if by_row else torch.tensor([0.3]),
            column_scale=scale,
            left=torch.randn(n, rank, generator=draw) if rank else None,
            bias=torch.randn(width, generator=draw) if bias else None,
            dtype=dtype,
        )
        of_matrix = replace(e, right=torch.randn(rank, width, generator=draw) if rank else None)
        of_image = replace(e, right=torch.randn(rank, 3, 5, width, generator=draw) if rank else None)
        got = products.matmul(a, b, of_matrix)
        assert same_bits(got, by_hand(matrix, of_matrix).view(n, width)), e
        got = products.conv2d(x, w, g, of_image).permute(0, 2, 3, 1).reshape(n, 15, width)
        assert same_bits(got, by_hand(image, of_image)), e


def test_matmul_epilogue_of_a_long_sum() -> None:
    a, b = codes((2, 40000), U8, 3), codes((40000, 3), U8, 4)
    e = epilogue(2, 3, (3,), torch.float32)
    assert torch.equal(products.matmul(a, b, e), by_hand((a.long() @ b.long()).view(2, 1, 3), e).view(2, 3))


def test_matmul_against_floats() -> None:
    """The second oracle: affine operands as floats, each entry within float rounding of the terms' sizes."""
    a, b = codes((50, 300), U8, 5), codes((300, 40), S8, 6)
    step, offset, weight_step = torch.rand(50) + 0.1, torch.randn(50), torch.rand(40) + 0.1
    sums = b.float().sum(0, keepdim=True) * weight_step
    e = Epilogue(row_scale=step, column_scale=weight_step, left=offset.view(50, 1), right=sums)
    x = step.double().view(-1, 1) * a.double() + offset.double().view(-1, 1)
    w = b.double() * weight_step.double()
    error = (products.matmul(a, b, e).double() - x @ w).abs()
    size = (step.view(-1, 1) * a).double() @ w.abs() + offset.abs().view(-1, 1) * sums.abs()
    assert (error <= 4 * 2.0**-24 * size).all()
    assert (error > 0).any()  # the check looks at floats, not at itself


GEOMETRIES = [
    # (N, C, H, W), (O, kh, kw), geometry
    ((2, 8, 6, 7), (5, 3, 3), Geometry(padding=(1, 1))),
    ((1, 1, 1, 1), (1, 1, 1), Geometry()),
    ((2, 3, 9, 8), (4, 3, 3), Geometry(stride=(2, 2), padding=(1, 1))),
    ((2, 64, 5, 5), (70, 1, 1), Geometry()),
    ((1, 65, 4, 6), (64, 2, 3), Geometry(padding=(2, 1))),
    ((1, 6, 11, 10), (9, 3, 2), Geometry(stride=(3, 2), padding=(0, 1), dilation=(2, 3))),
    ((2, 12, 7, 7), (8, 3, 3), Geometry(padding=(1, 1), groups=4)),
    ((2, 6, 8, 8), (6, 3, 3), Geometry(stride=(2, 1), padding=(1, 1), groups=6)),
    # A filter for every channel: by vectors, with channels left over, and with fewer than a vector has.
    ((2, 64, 9, 21), (64, 3, 3), Geometry(padding=(1, 1), groups=64)),
    ((2, 100, 8, 9), (100, 3, 3), Geometry(stride=(2, 1), padding=(1, 1), dilation=(1, 2), groups=100)),
    ((2, 23, 7, 30), (23, 3, 19), Geometry(padding=(1, 9), groups=23)),  # more taps than are summed at once
    ((1, 5, 6, 4), (5, 2, 7), Geometry(stride=(1, 3), padding=(2, 5), groups=5)),  # never all taps at once
    ((3, 33, 5, 5), (33, 1, 1), Geometry(stride=(2, 2), groups=33)),
    ((0, 18, 5, 5), (18, 3, 3), Geometry(padding=(1, 1), groups=18)),
    ((1, 4, 9, 9), (3, 1, 1), Geometry(stride=(3, 3))),  # whole phases of the gradient have no tap
    ((1, 5, 3, 40), (6, 3, 7), Geometry(padding=(1, 3))),
    ((3, 130, 3, 3), (66, 3, 3), Geometry(padding=(1, 1))),
    ((2, 64, 3, 37), (64, 3, 3), Geometry(padding=(1, 1))),  # runs of pixels longer than a tile
    ((1, 192, 4, 34), (32, 3, 3), Geometry(stride=(1, 2), padding=(1, 1))),
    ((2, 40, 9, 17), (70, 3, 2), Geometry(padding=(1, 0), dilation=(2, 3))),
    ((1, 36, 6, 20), (34, 3, 3), Geometry(padding=(1, 1), groups=2)),
    ((3, 16, 30, 24), (17, 3, 3), Geometry(padding=(2, 1))),  # several blocks of lines per sample
    ((0, 4, 5, 5), (4, 3, 3), Geometry(padding=(1, 1))),
    ((1, 3, 2, 2), (4, 3, 3), Geometry()),  # no output pixel
]


def in_layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous and channels-last."""
    return [x.contiguous(), x.contiguous(memory_format=torch.channels_last)]


def exact_products(case: tuple, a: torch.dtype) -> tuple:
    """Operands of a case and the three exact products, from torch in float64."""
    shape, (o, kh, kw), g = case
    x, w = codes(shape, a, 1), codes((o, shape[1] // g.groups, kh, kw), S8, 2)
    size = g.output_size(shape[2:], (kh, kw))
    grad = codes((shape[0], o, *size), a, 3)
    with torch.enable_grad():
        xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
        if grad.numel():
            out = F.conv2d(xd, wd, None, *g.arguments())
            out.backward(grad.double())
            out = out.detach()
        else:
            out = grad.double()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (xd, wd)]
    return x, w, grad, out.long(), grads[0].long(), grads[1].round().long()


@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
@pytest.mark.parametrize("signed", [U8, S8])
def test_convolutions_are_exact(case: tuple, signed: torch.dtype) -> None:
    (_, _, h, width), (_, kh, kw), g = case
    x, w, grad, out, grad_input, grad_weight = exact_products(case, signed)
    for weight in in_layouts(w):
        for input in in_layouts(x):
            got = products.conv2d(input, weight, g)
            assert got.dtype == torch.int32
            assert torch.equal(got.long(), out)
        for gradient in in_layouts(grad):
            assert torch.equal(products.conv2d_grad_input(gradient, weight, (h, width), g).long(), grad_input)
    for gradient, input in itertools.product(in_layouts(grad), in_layouts(x)):
        assert torch.equal(products.conv2d_grad_weight(gradient, input, (kh, kw), g).long(), grad_weight)


@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_epilogues(case: tuple, dtype: torch.dtype) -> None:
    (n, c, h, width), (o, kh, kw), g = case
    x, w, grad, out, grad_input, grad_weight = exact_products(case, U8)

    def flat(sums: torch.Tensor) -> torch.Tensor:
        return sums.permute(0, 2, 3, 1).reshape(sums.shape[0], sums.shape[2] * sums.shape[3], sums.shape[1])

    def image(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return value.reshape(like.shape[0], *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)

    e = epilogue(n, o, (*out.shape[2:], o), dtype)
    assert torch.equal(products.conv2d(x, w, g, e), image(by_hand(flat(out), e), out))
    e = epilogue(n, c, (h, width, c), dtype)
    got = products.conv2d_grad_input(grad, w, (h, width), g, e)
    assert torch.equal(got, image(by_hand(flat(grad_input), e), grad_input))
    columns = kh * kw * (c // g.groups)
    e = epilogue(o, columns, (columns,), dtype)
    got = products.conv2d_grad_weight(grad, x, (kh, kw), g, e)
    wanted = by_hand(flat(grad_weight).reshape(o, 1, columns), e)
    assert torch.equal(got, image(wanted, grad_weight))


@pytest.mark.parametrize("case", [case for case in GEOMETRIES[:-1] if case[0][0]], ids=str)
def test_offsets_under_padding(case: tuple) -> None:
    """step · code + offset, zero in the padding: the mask's correction gives the float convolution back."""
    (n, c, h, width), _, g = case
    x, w, grad, *_ = exact_products(case, U8)
    step, offset = torch.rand(n) + 0.1, torch.randn(n)
    view = (-1, 1, 1, 1)
    for codes_of, of in ((x, "output"), (grad, "grad_input")):
        mask = products.conv2d_mask(w, (h, width), g, of)
        e = Epilogue(row_scale=step, left=offset.view(n, 1), right=mask[None])
        value = step.double().view(view) * codes_of.double() + offset.double().view(view)
        if of == "output":
            got, wanted = products.conv2d(x, w, g, e), F.conv2d(value, w.double(), None, *g.arguments())
        else:
            got = products.conv2d_grad_input(grad, w, (h, width), g, e)
            wanted = torch.nn.grad.conv2d_input((n, c, h, width), w.double(), value, *g.arguments())
        assert torch.allclose(got.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_no_channels() -> None:
    """Nothing to sum gives zeros, as torch has it."""
    none = torch.zeros(1, 0, 4, 4, dtype=U8)
    out = products.conv2d(none, torch.zeros(2, 0, 3, 3, dtype=S8), Geometry())
    assert (out == 0).all()
    assert out.shape == (1, 2, 2, 2)
    assert products.conv2d_grad_input(none, torch.zeros(0, 2, 3, 3, dtype=S8), (6, 6), Geometry()).shape == (
        1,
        2,
        6,
        6,
    )


def test_a_large_zero_point() -> None:
    """zero · ones beyond 32 bits, where only the difference fits."""
    a, b = codes((70000, 5), U8, 1).T, codes((70000, 66), U8, 2)
    ones = b.long().sum(0) * 1000
    e = Epilogue(
        row_scale=torch.ones(5), column_scale=torch.ones(66), zero=torch.full((5,), 3, dtype=torch.int32), ones=ones
    )
    wanted = ((a.long() @ b.long()) - 3 * ones).float()
    assert ones.min() > 2**32
    assert torch.equal(products.matmul(a, b, e), wanted)


def test_a_long_convolution_sum() -> None:
    """More terms than int32 holds: extreme codes, int64 sums."""
    x, w = torch.full((1, 7400, 3, 3), 255, dtype=U8), torch.full((2, 7400, 3, 3), -128, dtype=S8)
    g = Geometry(padding=(1, 1))
    got = products.conv2d(x, w, g)
    assert got.dtype == torch.int64
    assert got[0, 0].tolist() == [[-255 * 128 * 7400 * v for v in row] for row in ([4, 6, 4], [6, 9, 6], [4, 6, 4])]
    grad = torch.full((1, 7400, 3, 3), 255, dtype=U8)
    back = products.conv2d_grad_input(grad, w[:1, :1].expand(7400, 1, 3, 3), (3, 3), g)
    assert back[0, 0].tolist() == got[0, 0].tolist()


def test_a_long_weight_gradient() -> None:
    """33,026 and more pixels of 255 · 255, more than one thread's share of them included."""
    grad, x = torch.full((80, 2, 30, 30), 255, dtype=U8), torch.full((80, 16, 30, 30), 255, dtype=U8)
    got = products.conv2d_grad_weight(grad, x, (1, 1), Geometry())
    assert got.dtype == torch.int64
    assert (got == 255 * 255 * 72000).all()
    got = products.conv2d_grad_weight(grad, x, (3, 3), Geometry(padding=(1, 1)))
    pixels = 80 * torch.tensor([29, 30, 29])[:, None] * torch.tensor([29, 30, 29])
    assert got.dtype == torch.int64
    assert (got == 255 * 255 * pixels).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        a, b = codes((400, 300), U8, 1), codes((300, 200), U8, 2)
        assert torch.equal(products.matmul(a, b).double(), a.double() @ b.double())
        x, w, grad, out, grad_input, grad_weight = exact_products(((4, 16, 32, 32), (24, 3, 3), Geometry()), U8)
        assert torch.equal(products.conv2d(x, w, Geometry()).long(), out)
        assert torch.equal(products.conv2d_grad_input(grad, w, (32, 32), Geometry()).long(), grad_input)
        assert torch.equal(products.conv2d_grad_weight(grad, x, (3, 3), Geometry()).long(), grad_weight)
    finally:
        torch.set_num_threads(before)


def test_two_operands_on_one_native_kernel() -> None:
    """The comparisons above are of native kernels, where there are any."""
    a, b = codes((3, 4), U8), codes((4, 5), S8)
    assert library.takes_codes(a, b) == (library.status().level != "reference")


X, W = codes((2, 4, 5, 5), U8), codes((6, 4, 3, 3), S8)
GRAD = codes((2, 6, 3, 3), U8)
A, B = codes((3, 4), U8), codes((4, 5), S8)
ONE = torch.ones(1)
WRONG = [
    (lambda: products.matmul(A.float(), B), TypeError, "a holds torch.float32: give uint8 or int8"),
    (lambda: products.matmul(A, B.int()), TypeError, "b holds torch.int32"),
    (lambda: products.matmul(A[0], B), ValueError, "a has shape"),
    (lambda: products.matmul(A, B.t()), ValueError, r"cannot multiply \(3, 4\) by \(5, 4\)"),
    (lambda: products.matmul(A, B, Epilogue(row_scale=torch.ones(4))), ValueError, r"row_scale .* not \(\) or"),
    (lambda: products.matmul(A, B, Epilogue(column_scale=ONE.double())), TypeError, "column_scale holds"),
    (lambda: products.matmul(A, B, Epilogue(bias=torch.ones(3))), ValueError, r"bias has shape \(3,\), not \(5,\)"),
    (lambda: products.matmul(A, B, Epilogue(left=torch.ones(3, 1))), ValueError, "both"),
    (lambda: products.matmul(A, B, Epilogue(left=torch.ones(3, 2), right=torch.ones(1, 5))), ValueError, "right"),
    (lambda: products.matmul(A, B, Epilogue(zero=ONE.int())), ValueError, "both its factors"),
    (lambda: products.matmul(A, B, Epilogue(zero=ONE, ones=torch.ones(5))), TypeError, "zero holds .* give int32"),
    (lambda: products.matmul(A, B, Epilogue(dtype=torch.float64)), TypeError, "float64"),
    (lambda: torch.ops.fqt.matmul(A, B, ONE, *(None,) * 7), ValueError, "dtype"),
    (lambda: products.conv2d(X, W.to(U8), Geometry()), TypeError, "weight holds torch.uint8: give int8"),
    (lambda: products.conv2d(X[:, :3], W, Geometry()), ValueError, "does not fit 3 input channels"),
    (lambda: products.conv2d(X, W, Geometry(groups=0)), ValueError, "0 groups"),
    (lambda: products.conv2d(X, W, Geometry(stride=(0, 1))), ValueError, "stride"),
    (lambda: products.conv2d(X, W, Geometry(padding=(-1, 1))), ValueError, "padding"),
    (lambda: products.conv2d_grad_input(GRAD, W, (6, 5), Geometry()), ValueError, "grad_output has shape"),
    (lambda: products.conv2d_grad_weight(GRAD, X, (2, 3), Geometry()), ValueError, "grad_output has shape"),
    (lambda: products.conv2d_grad_weight(GRAD, X, (3, 3), Geometry(groups=3)), ValueError, "groups"),
    (lambda: products.conv2d_mask(W, (5, 5), Geometry(), "input"), ValueError, "known: output, grad_input"),
]


@pytest.mark.parametrize(("call", "error", "names"), WRONG)
def test_wrong_arguments_are_named(call, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        call()


def _opcheck_arguments() -> list[tuple]:
    full = epilogue(3, 5, (5,), torch.bfloat16).arguments()
    none = (None,) * 8
    g = Geometry(stride=(2, 1), padding=(1, 0)).arguments()
    plain = Geometry().arguments()
    return [
        ("matmul", (A, B, *none)),
        ("matmul", (A, B, *full)),
        ("conv2d", (X, W, *g, *none)),
        ("conv2d", (X, W, *plain, *epilogue(2, 6, (3, 3, 6), torch.float32).arguments())),
        ("conv2d_grad_input", (GRAD, W, [5, 5], *plain, *none)),
        ("conv2d_grad_weight", (GRAD, X, [3, 3], *plain, *none)),
        ("conv2d_grad_weight", (GRAD, X, [3, 3], *plain, *epilogue(6, 36, (36,), torch.float32).arguments())),
    ]


@pytest.mark.parametrize(("name", "arguments"), _opcheck_arguments())
def test_opcheck(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.fqt, name).default, arguments)
