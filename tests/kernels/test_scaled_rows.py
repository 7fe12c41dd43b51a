"""Rows times their factors, with weighted sums on the way: the reference's products, its sums to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fqt.kernels import ops, reference
from fqt.kernels.codes import Findings
from fqt.kernels.cpu import library

SHAPES = [(1, 1), (5, 3), (300, 40), (7, 5000), (64, 1030), (0, 4), (4, 0)]


def operands(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    factor, weight = torch.randn(2, shape[0], generator=generator)
    return x, factor.abs(), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, factor, weight = operands(shape, dtype)
    truth, sums, known = reference.scaled_rows(x, factor, weight, Findings())
    assert known == Findings()
    found, mine, known = ops.scaled_rows(x, factor, weight, Findings())
    assert known == Findings()
    assert torch.equal(found, truth)
    assert sums is not None
    assert mine is not None
    torch.testing.assert_close(mine, sums, rtol=1e-12, atol=1e-12)
    found, none, _ = ops.scaled_rows(x, factor, None, Findings())
    assert torch.equal(found, truth)
    assert none is None


def test_sums_do_not_depend_on_threads() -> None:
    x, factor, weight = operands((700, 900))
    had, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.scaled_rows(x, factor, weight, Findings())[1])
    finally:
        torch.set_num_threads(had)
    assert all(torch.equal(sums, found[0]) for sums in found)


@pytest.mark.skipif(library.status().level == "reference", reason="the reference finds nothing on the way")
@pytest.mark.parametrize("period", [40, 8])
def test_sums_over_all_but_the_last_axis(period: int) -> None:
    x, factor, weight = operands((300, 40))
    findings = ops.scaled_rows(x, factor, weight, Findings(channels=period))[2]
    assert findings.sums is not None
    torch.testing.assert_close(findings.sums, x.double().view(-1, period).sum(0), rtol=1e-12, atol=1e-12)


def test_what_does_not_fit() -> None:
    x, factor, weight = operands((5, 3))
    for wrong in ((factor[:4], weight), (factor, weight[:4])):
        with pytest.raises((ValueError, RuntimeError)):
            ops.scaled_rows(x, *wrong, Findings())
