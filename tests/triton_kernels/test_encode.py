"""Codes, values and variances entry by entry: the reference's bits."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels import ops, reference
from fqt.kernels.codes import ROW, TENSOR, Blocks, Entries, Levels, Scales
from fqt.kernels.philox import rounding_noise
from fqt.kernels.rounding import CORRECTED, DITHERED, NEAREST, STOCHASTIC, Rounding
from fqt.kernels.triton import encode
from tests.backends import moved, same
from tests.triton_kernels.cases import BLOCKS, DEVICE, KINDS, SEED, check, matrix, scales_over

E2M1, POWERS = Levels(-12, 12, 1), Levels(-64, 64, table=(0, 1, 2, 4, 8, 16, 32, 64))
GRIDS = [
    (Levels(0, 255), NEAREST),
    (Levels(0, 255), STOCHASTIC),
    (Levels(0, 254), DITHERED),
    (Levels(-127, 127), STOCHASTIC),
    (Levels(-127, 126), DITHERED),
    (Levels(-1, 1), NEAREST),
    (E2M1, NEAREST),
    (E2M1, STOCHASTIC),
    (E2M1, CORRECTED),
    (Levels(-64, 64, 0), STOCHASTIC),
    (POWERS, NEAREST),
    (POWERS, STOCHASTIC),
]
by_rounding = pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC, DITHERED], ids=str)


def top(rounding: Rounding) -> Levels:
    return Levels(0, 255 - rounding.headroom)


@pytest.mark.parametrize(
    ("levels", "rounding", "blocks"),
    [(*grid, blocks) for grid in GRIDS for blocks in (ROW, BLOCKS["run"])]
    + [(*grid, BLOCKS[name]) for grid in GRIDS[1:3] for name in ("tensor", "column", "tile", "odd")],
    ids=lambda value: str(value)[:24],
)
def test_codes_and_transposed_codes(levels: Levels, rounding: Rounding, blocks: Blocks) -> None:
    """Of a matrix whose columns are a multiple of eight, and of one where every entry makes its own noise."""
    for shape in [(33, 136), (5, 71)]:
        x = Entries(matrix(shape))
        scales = scales_over(x, blocks, levels)
        wanted = ops.encode.reference(x, scales, levels, rounding, SEED)
        there = moved((x, scales, levels, rounding, SEED), DEVICE)
        assert encode.takes_encode(*there)
        noise = encode.noise_of(there[0], rounding, there[-1])
        codes, turned, _ = moved(encode.encoded(*there[:-1], noise, turn=True), "cpu")
        assert same(codes, wanted)
        assert turned.is_contiguous()
        assert torch.equal(turned, wanted.T)


@pytest.mark.parametrize("kind", KINDS)
@by_rounding
def test_kinds_of_values(rounding: Rounding, kind: str) -> None:
    x = Entries(matrix((17, 40), kind))
    blocks = TENSOR if kind == "wide" else ROW  # whose range is beyond the largest float
    check(encode, ops.encode, x, scales_over(x, blocks, top(rounding)), top(rounding), rounding, SEED)


@by_rounding
def test_shapes_dtypes_strides_and_factors(rounding: Rounding) -> None:
    """Views turned, strided, expanded, empty; factors that repeat; matrices on their side."""
    wide = matrix((40, 48))
    views = [wide.bfloat16(), wide.half(), wide.T, wide[::2, ::3], wide[3:4].expand(9, 48), wide[:0], wide[:, :0]]
    for view in [*views, wide[:1, :1], wide[:, :1]]:
        x = Entries(view, transposed=view.shape == (48, 40))
        scales = Scales(torch.tensor([[0.02]]), torch.tensor([[-2.5]]), TENSOR)
        check(encode, ops.encode, x, scales, top(rounding), rounding, SEED)
    x = Entries(wide, torch.linspace(-2, 2, 16), transposed=True, period=16)
    check(encode, ops.encode, x, scales_over(x, ROW, top(rounding)), top(rounding), rounding, SEED)


def test_steps_of_single_entries() -> None:
    x = Entries(matrix((9, 20)))
    step = torch.rand(9, 20, generator=torch.Generator().manual_seed(1)) / 50
    for blocks in (TENSOR, Blocks(1, 1)):
        check(encode, ops.encode, x, Scales(step, -20 * step, blocks), Levels(0, 255), STOCHASTIC, SEED)


def test_parameters_that_are_not_contiguous() -> None:
    x, parts = Entries(matrix((9, 20))), torch.linspace(0.01, 0.03, 36).view(9, 4)
    check(encode, ops.encode, x, Scales(parts[:, 1:2], -100 * parts[:, 2:3], ROW), Levels(0, 255), NEAREST, None)


def test_noise_whose_low_bits_decide() -> None:
    """One entry in 65,536 needs the second stream: here every one, in both ways of making it."""
    for columns in (64, 61):
        noise = rounding_noise(SEED, 5 * columns).view(5, columns)
        fraction = (noise + torch.tensor([[0], [1], [0], [1], [1]])) / 2**24  # below it by none or by one part
        scales = Scales(torch.ones(1, 1), torch.zeros(1, 1), TENSOR)
        codes = check(encode, ops.encode, Entries(fraction), scales, Levels(0, 3), STOCHASTIC, SEED)
        assert torch.equal(codes.bool().all(1), torch.tensor([False, True, False, True, True]))
        assert not codes[0].any()


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_values_of_codes(blocks: Blocks) -> None:
    x = Entries(matrix((33, 40)))
    levels = Levels(-127, 127) if blocks == ROW else Levels(0, 255)
    scales = scales_over(x, blocks, levels)
    codes = reference.encode(x, scales, levels, NEAREST, None)
    generator = torch.Generator().manual_seed(8)
    check(encode, ops.decode, codes, scales, None)
    check(encode, ops.decode, codes, scales, torch.rand(33, 1, generator=generator))
    check(encode, ops.decode, codes.T.contiguous().T, scales, torch.rand(1, 40, generator=generator))


def test_values_of_one_step_and_an_offset_per_row() -> None:
    codes = torch.arange(60, dtype=torch.uint8).view(5, 12)
    check(encode, ops.decode, codes, Scales(torch.tensor([[0.3]]), torch.linspace(-1, 1, 5)[:, None], TENSOR), None)


@pytest.mark.parametrize("kind", KINDS)
def test_values_stay_finite(kind: str) -> None:
    x = Entries(matrix((9, 20), kind))
    scales = scales_over(x, ROW, Levels(0, 255))
    check(
        encode,
        ops.decode,
        reference.encode(x, scales, Levels(0, 255), NEAREST, None),
        scales,
        torch.full((1, 20), 0.3),
    )


@pytest.mark.parametrize("levels", [Levels(0, 255), E2M1, POWERS], ids=["integers", "floats", "table"])
def test_variances(levels: Levels) -> None:
    for kind in KINDS:
        x = Entries(matrix((9, 33), kind))
        check(encode, ops.code_variance, x, scales_over(x, ROW, levels), levels)


def test_what_is_left_to_the_reference() -> None:
    x, levels = Entries(matrix((4, 8))), Levels(0, 255)
    scales = scales_over(x, ROW, levels)

    def taken(x: Entries, scales: Scales, levels: Levels) -> bool:
        return encode.takes_encode(*moved((x, scales, levels, STOCHASTIC, SEED), DEVICE))

    wide = Entries(x.matrix.double())
    assert taken(x, scales, levels)
    assert not taken(wide, scales_over(wide, ROW, levels), levels)
    assert not taken(x, scales, Levels(0, 300))
    assert not taken(Entries(x.matrix.to_sparse()), scales, levels)
