"""Ranges, parameters, codes and their transpose in one: the reference's bits."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels import ops
from fqt.kernels.codes import COLUMN, ROW, TENSOR, Blocks, Entries, Findings, Levels
from fqt.kernels.rounding import CORRECTED, DITHERED, NEAREST, STOCHASTIC, Coding, Rounding
from fqt.kernels.triton import quantize
from tests.backends import moved, same
from tests.triton_kernels.cases import DEVICE, KINDS, SEED, matrix, no_waiting


def coding(mode: str, rounding: Rounding) -> Coding:
    low = -127 if mode == "symmetric" else 0
    return Coding(mode, Levels(low, (127 if low else 255) - rounding.headroom), rounding)


def check(x: Entries, blocks: Blocks, how: Coding) -> None:
    """Codes, parameters, dither and what was known, alone and with the transposed codes."""
    known = Findings(channels=3)
    wanted = ops.quantize.reference(x, blocks, how, SEED, known)
    there = moved((x, blocks, how, SEED, known), DEVICE)
    assert quantize.takes_quantize(*there)
    with no_waiting():
        alone = quantize.quantize(*there)
        found, turned = quantize.codes_and_transposed(*there)
    assert same(moved(alone, "cpu"), wanted)
    assert same(moved(found, "cpu"), wanted)
    assert turned.is_contiguous()
    assert torch.equal(turned.cpu(), wanted.codes.T)


@pytest.mark.parametrize("mode", ["affine", "zero", "symmetric"])
@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC, DITHERED], ids=str)
def test_modes_and_roundings(rounding: Rounding, mode: str) -> None:
    """Rows in bands and other blocks in two passes."""
    for shape, blocks in [((9, 520), ROW), ((9, 40), Blocks(4, 8))]:
        check(Entries(matrix(shape)), blocks, coding(mode, rounding))


@pytest.mark.parametrize("blocks", [ROW, TENSOR, COLUMN], ids=["row", "tensor", "column"])
def test_several_programs(blocks: Blocks) -> None:
    """Two bands, two tiles down, and columns that are no multiple of eight."""
    check(Entries(matrix((35, 15))), blocks, coding("affine", STOCHASTIC))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind: str) -> None:
    for how in (coding("affine", DITHERED), coding("symmetric", STOCHASTIC)):
        check(Entries(matrix((9, 40), kind)), ROW, how)


def test_a_long_row_is_read_by_tiles() -> None:
    x = Entries(matrix((1, 2056)))
    assert not quantize._worth_bands(x.shape, turn=True)
    check(x, ROW, coding("affine", DITHERED))


def test_entries_of_all_kinds() -> None:
    x = matrix((40, 48))
    for entries in (Entries(x.bfloat16()), Entries(x.T, transposed=True), Entries(x, torch.linspace(-2, 2, 16))):
        check(entries, ROW, coding("affine", DITHERED))


@pytest.mark.parametrize(
    ("store", "blocks", "rounding"),
    [
        ("power", Blocks(1, 32), STOCHASTIC),
        ("e4m3", Blocks(1, 16), NEAREST),
        ("correctable", Blocks(1, 16), CORRECTED),
    ],
)
def test_stored_steps(store: str, blocks: Blocks, rounding: Rounding) -> None:
    check(Entries(matrix((9, 64))), blocks, Coding("symmetric", Levels(-12, 12, 1), rounding, store))


def test_nothing_and_what_does_not_fit_a_byte_have_transposed_codes_too() -> None:
    for x, levels in [(torch.empty(0, 4), Levels(0, 255)), (matrix((4, 3)), Levels(-1000, 1000))]:
        how = Coding("symmetric" if levels.low else "affine", levels, NEAREST)
        there = moved((Entries(x), ROW, how, None), DEVICE)
        assert not quantize.takes_quantize(*there)
        found, turned = quantize.codes_and_transposed(*there)
        assert torch.equal(turned, found.codes.T)
        assert turned.is_contiguous()


def test_what_no_kernel_may_take_is_left_to_the_reference_to_refuse() -> None:
    x = moved(Entries(matrix((4, 3))), DEVICE)
    assert not quantize.takes_quantize(x, ROW, coding("affine", STOCHASTIC), None)
    assert not quantize.takes_quantize(x, ROW, Coding("affine", Levels(0, 255), DITHERED), SEED.to(DEVICE))
    assert not quantize.takes_quantize(x, ROW, Coding("symmetric", Levels(-12, 12, 1), DITHERED), SEED.to(DEVICE))
