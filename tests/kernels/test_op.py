"""One operation, many backends: who is asked first, who may refuse, and what stands in when all do."""

from __future__ import annotations

import pytest
import torch

from fqt.kernels import choice, mixing, ops
from fqt.kernels.codes import ROW, Entries
from fqt.kernels.op import Op
from tests.backends import compare, operations, reference_only


def double() -> Op:
    """An operation with two backends: "even" takes even numbers, "large" those above 10."""

    def positive(x: int, times: int = 2) -> None:
        if x < 0:
            raise ValueError(f"{x} is negative")

    def definition(x: int, times: int = 2) -> tuple[str, int]:
        """x, so many times."""
        return "definition", x * times

    op = Op(definition, positive)
    op.on("even", when=lambda x, times=2: x % 2 == 0)(lambda x, times=2: ("even", x * times))
    op.on("large", when=lambda x, times=2: x > 10)(lambda x, times=2: ("large", x * times))
    return op


@pytest.mark.parametrize(("x", "by"), [(3, "definition"), (4, "even"), (11, "large"), (12, "large")])
def test_the_last_that_can_is_asked_first(x: int, by: str) -> None:
    op = double()
    assert [each.backend for each in op.implementations] == ["large", "even"]
    assert op(x) == (by, 2 * x)
    assert op(x, times=5) == (by, 5 * x)
    assert op.backend(x, times=5) == ("reference" if by == "definition" else by)
    assert op.reference(x) == ("definition", 2 * x)


def test_the_check_comes_before_every_implementation() -> None:
    op = double()
    for x in (-1, -2):
        with pytest.raises(ValueError, match="is negative"):
            op(x)


def test_an_operation_looks_like_its_definition() -> None:
    op = double()
    assert (op.__name__, op.__doc__) == ("definition", "x, so many times.")
    assert op.__wrapped__ is op.reference  # type: ignore[attr-defined]


def test_registering_leaves_the_function_as_it_is() -> None:
    op = double()

    @op.on("odd", when=lambda x, times=2: x % 2 == 1)
    def run(x: int, times: int = 2) -> tuple[str, int]:
        return "odd", x * times

    assert run(4) == ("odd", 8)
    assert op(11) == ("odd", 22)
    assert op(12) == ("large", 24)


def test_the_table_holds_all_operations() -> None:
    found = operations().values()
    for op in (ops.encode, ops.quantize, choice.quantize_best, mixing.hadamard_codes, mixing.householder_codes):
        assert any(op is each for each in found)


def test_the_reference_alone() -> None:
    x = Entries(torch.randn(4, 5))
    here = ops.value_range.backend(x, ROW)
    with reference_only():
        assert not any(op.implementations for op in operations().values())
        assert ops.value_range.backend(x, ROW) == "reference"
    assert ops.value_range.backend(x, ROW) == here
    with reference_only(ops.encode):
        assert not ops.encode.implementations
        assert ops.value_range.backend(x, ROW) == here


def test_as_a_fixture(reference_only: None) -> None:
    assert ops.value_range.backend(Entries(torch.randn(4, 5)), ROW) == "reference"


def test_the_comparison_sees_a_wrong_implementation_and_a_missing_one() -> None:
    op = Op(lambda x: x.double())
    compare(op, torch.ones(2), by=None)
    with pytest.raises(AssertionError, match="cpu does not take"):
        compare(op, torch.ones(2))
    op.on("cpu", when=lambda x: True)(lambda x: x.double() + (x > 1))
    compare(op, torch.ones(2))
    with pytest.raises(AssertionError):
        compare(op, torch.full((2,), 3.0))
    op.on("cpu", when=lambda x: True)(lambda x: x)  # another dtype
    with pytest.raises(AssertionError):
        compare(op, torch.ones(2))
