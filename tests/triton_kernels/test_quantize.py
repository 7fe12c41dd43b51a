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
    """Codes, parameters and dither, alone and with the transposed codes; what is known is of the same entries."""
    known = Findings(channels=x.shape[1])
    wanted = ops.quantize.reference(x, blocks, how, SEED, known)
    there = moved((x, blocks, how, SEED, known), DEVICE)
    assert quantize.takes_quantize(*there)
    with no_waiting():
        alone = quantize.quantize(*there)
        found, turned = quantize.codes_and_transposed(*there)
    for each in (moved(alone, "cpu"), moved(found, "cpu")):
        assert same(each._replace(findings=None), wanted._replace(findings=None))
        _check_findings(x, each.findings)
    assert turned.is_contiguous()
    assert torch.equal(turned.cpu(), wanted.codes.T)


def _check_findings(x: Entries, found: Findings) -> None:
    if found.parts is not None:
        assert same([found.parts[0].amin(), found.parts[1].amax()], [v[0, 0] for v in ops.value_range(x, TENSOR)])
    if found.sums is not None:
        value, wanted = x.values(), x.values().double().sum(0)
        bound = 2.0**-19 * value.double().abs().sum(0)
        close = (found.sums - wanted).abs() <= bound
        assert bool((close | ~wanted.isfinite()).all())


def test_the_range_of_rows_is_the_whole_s() -> None:
    """What a pass over rows found makes the second quantizer's step, and its pass the sums."""
    x = Entries(matrix((40, 48)).to(DEVICE))
    seed = SEED.to(DEVICE)
    rows = quantize.quantize(x, ROW, coding("affine", DITHERED), seed, Findings(channels=48))
    assert rows.findings.parts is not None
    assert rows.findings.sums is None
    whole = quantize.quantize(x, TENSOR, coding("affine", STOCHASTIC), seed, rows.findings)
    assert same(whole[:3], quantize.quantize(x, TENSOR, coding("affine", STOCHASTIC), seed)[:3])
    assert whole.findings.sums is not None


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
