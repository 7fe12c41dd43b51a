"""The best of several codings: what the reference takes, with its codes."""

import pytest
import torch

from fqt.kernels import choice, ops
from fqt.kernels.codes import COLUMN, ROW, TENSOR, Blocks, Entries, Levels
from fqt.kernels.rounding import DITHERED, NEAREST, STOCHASTIC, Coding
from fqt.kernels.triton import best
from tests.backends import moved, same
from tests.triton_kernels.machine import DEVICE, QUIET

pytestmark = QUIET
SEED = torch.tensor(5)
UPPER, DITHER = Levels(0, 255), Levels(0, 254)
TWO = (Coding("affine", UPPER, STOCHASTIC), Coding("affine", DITHER, DITHERED))
THREE = (Coding("zero", UPPER, STOCHASTIC), *TWO)


def spread(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def few(shape):
    """Both ends of a range, which the affine coding leaves alone."""
    return (spread(shape).sign() * 3).clamp(0, 3)


def sparse(shape):
    """Mostly zeros, which the coding with zero on a code leaves alone."""
    x = spread(shape)
    return x * (x.abs() > 1.5)


@pytest.mark.parametrize("codings", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("blocks", [ROW, COLUMN, TENSOR, Blocks(4, 8)], ids=str)
@pytest.mark.parametrize("make", [spread, few, sparse])
@pytest.mark.parametrize("shape", [(5, 7), (40, 136)])
def test_codes_steps_and_dither_are_those_of_the_coding_taken(codings, blocks, make, shape):
    x = make(shape)
    cost = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).double()
    for given, transposed in ((None, False), (cost if blocks == ROW else None, True)):
        lies = Entries(x, transposed=transposed)
        wanted = choice.quantize_best.reference(lies, blocks, codings, SEED, given)
        place = choice.Choice.of(lies, *ops.value_range(lies, blocks), blocks, codings, given).place
        there = Entries(x.to(DEVICE), transposed=transposed)
        arguments = (there, blocks, codings, SEED.to(DEVICE), None if given is None else given.to(DEVICE))
        assert best.takes_quantize_best(*arguments)
        found = best.quantize_best(*arguments)
        assert same((found.codes.cpu(), moved(found.scales, "cpu")), wanted[:2])
        taken = codings[place].rounding == DITHERED
        assert float(found.dither.half) == 0.5 * taken
        dither = ops.dither(SEED, lies, torch.float32)
        assert torch.equal(found.dither.row.cpu(), dither.row * taken)
        assert torch.equal(found.dither.column.cpu(), dither.column * taken)


def test_what_a_row_costs_decides():
    """Zeros in one row, which a coding leaves alone, noise in the other: the coding of the one that counts."""
    x = torch.cat([sparse((1, 136)), spread((1, 136), seed=2)])
    taken = []
    for cost in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
        wanted = choice.quantize_best.reference(Entries(x), ROW, THREE, SEED, cost.double())
        arguments = (Entries(x.to(DEVICE)), ROW, THREE, SEED.to(DEVICE), cost.double().to(DEVICE))
        found = best.quantize_best(*arguments)
        assert torch.equal(found.codes.cpu(), wanted.codes)
        taken.append(float(found.dither.half) > 0)
    assert taken == [False, True]


def test_each_of_the_codings_is_taken_somewhere():
    """So that the test above compares all of them."""
    entries = [Entries(make((40, 136))) for make in (sparse, few, spread)]
    taken = [choice.Choice.of(x, *ops.value_range(x, ROW), ROW, THREE, None).place for x in entries]
    assert taken == [0, 1, 2]


def test_what_has_no_dither_or_another_grid_is_left_to_the_reference():
    x = Entries(spread((4, 8)).to(DEVICE))
    seed = SEED.to(DEVICE)
    nearest = Coding("affine", UPPER, NEAREST)
    for codings in (
        (TWO[0], THREE[0]),
        (*TWO, nearest),
        (Coding("affine", Levels(0, 15), STOCHASTIC), TWO[1], TWO[0]),
    ):
        assert not best.takes_quantize_best(x, ROW, codings, seed)
    assert not best.takes_quantize_best(x, ROW, TWO, None)
