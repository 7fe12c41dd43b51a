"""Names build quantizers, quantizers give their names back, and what is wrong is said in one line."""

from __future__ import annotations

import pytest

import fqt
from fqt import Quantizer
from fqt.errors import FqtError
from fqt.quant import (
    Best,
    BlockHouseholder,
    Floats,
    Identity,
    Integers,
    Scale,
    ScaledHadamard,
    Stochastic,
    quantizer,
    quantizer_name,
)
from fqt.quant.best import rounded

from .cases import BITS, METHODS

EVERY = [
    f"{m}{b}{s}{a}" for m in METHODS for b in BITS for s in ("", "d", "x", "n") for a in ("", "@channel", "@token")
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_bits_in_the_name_or_beside_it(method: str, bits: int) -> None:
    assert quantizer(f"{method}{bits}") == quantizer(method, bits=bits) == quantizer(f"{method}{bits}", bits=bits)
    assert quantizer(f"{method}d", bits=bits) == quantizer(f"{method}{bits}d")
    assert hash(quantizer(f"{method}{bits}")) == hash(quantizer(method, bits=bits))


def test_what_the_names_mean() -> None:
    kinds = {"ptq": Identity, "psq": Identity, "bhq": BlockHouseholder, "shq": ScaledHadamard}
    for method, transform in kinds.items():
        q = fqt.quantizer(f"{method}5")
        assert isinstance(q.transform, transform)
        assert (q.scale.group, q.scale.mode) == ("tensor" if method == "ptq" else "row", "affine")
        assert (q.grid, q.rounding) == (Integers(5), Stochastic())
    assert quantizer("psq8d@channel").scale.axis == "channel"
    assert [quantizer(f"psq4{s}").rounding_name for s in "dxn"] == ["dithered", "best", "nearest"]


@pytest.mark.parametrize("name", EVERY)
def test_round_trip(name: str) -> None:
    assert quantizer_name(quantizer(name)) == name


def test_all_names_differ() -> None:
    assert len({quantizer(n) for n in EVERY}) == len(EVERY)


def test_what_has_no_name() -> None:
    assert quantizer_name(Quantizer(transform=BlockHouseholder(guard=False))) is None
    assert quantizer_name(Quantizer(scale=Scale("column"))) is None


UNKNOWN: dict[object, str | None] = {
    **dict.fromkeys(("", "foo4", "topk4", "default", None, 4), None),
    **dict.fromkeys(("PSQ4", "psq4 ", " psq4", "psq4q", "psq4@", "psq4@@token", "psq-4", "psq4\n"), "psq4"),
    **dict.fromkeys(("int4", "4-bit", "4"), "psq4"),
    "psq4dd": "psq4d",
    "bqh5": "bhq5",
    "fp8": "psq8",
    "mxfp_4": "mxfp4",
}
"""What is no name, and the one that was meant."""


@pytest.mark.parametrize(("name", "meant"), UNKNOWN.items(), ids=repr)
def test_unknown_names_say_what_was_meant_or_what_there_is(name: object, meant: str | None) -> None:
    with pytest.raises(FqtError) as error:
        quantizer(name)  # type: ignore[arg-type]
    text = str(error.value)
    assert "\n" not in text.replace(repr(name), "")
    if meant:
        assert text == f"unknown quantizer {name!r}; did you mean {meant!r}?"
    else:
        assert len(text) < 400
        assert all(method in text for method in METHODS)


@pytest.mark.parametrize("name", ["psq4@pixel", "psq99", "psq1", "psq9d", "psq0", "psq"])
def test_wrong_parts_are_named(name: str) -> None:
    with pytest.raises(FqtError) as error:
        quantizer(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.5, "4", 4.0, True], ids=repr)
def test_bits_are_an_integer_from_two_to_eight(bits: object) -> None:
    """4.0 would make a quantizer that equals quantizer("psq4") and has no name."""
    with pytest.raises(FqtError, match="bits"):
        quantizer("psq", bits=bits)  # type: ignore[arg-type]


def test_bits_said_twice_differently() -> None:
    with pytest.raises(FqtError, match="say one"):
        quantizer("psq4", bits=5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Quantizer(rounding="up"),
        lambda: Quantizer(rounding="dithered", scale=Scale("row", "symmetric")),
        lambda: Quantizer(rounding="best"),
        lambda: rounded(Identity(), Scale("row", "symmetric"), Integers(4), "best"),
        lambda: rounded(BlockHouseholder(guard="exact"), Scale("row"), Integers(4), "best"),
        lambda: Best(candidates=(quantizer("psq4"),)),
        lambda: Best(candidates=(quantizer("psq4"), "psq4d")),
        lambda: Best(candidates=(quantizer("psq4"), quantizer("ptq4d"))),
        lambda: Best(candidates=(quantizer("psq4"), quantizer("psq5d"))),
        lambda: Best(candidates=(quantizer("psq4"), quantizer("shq4d"))),
        lambda: Best(candidates=(quantizer("psq4"), quantizer("psq4d@token"))),
        lambda: Best(candidates=(quantizer("psq4"), Quantizer(scale=Scale("row", "symmetric"), grid=Integers(4)))),
        lambda: Quantizer(scale=Scale("row", "affine"), grid=Floats(2, 1)),
        lambda: Quantizer(scale=Scale("row", "zero"), grid=Floats(3, 0)),
        lambda: Quantizer(transform=BlockHouseholder(), scale=Scale((1, 32))),
        lambda: Floats(0, 3),
        lambda: Floats(6, 1),
        lambda: Floats(2, 4),
        lambda: Floats(2, 1, reserved=-1),
        lambda: Scale((0, 32)),
        lambda: Scale((1, 2, 3)),
        lambda: Scale((1, 2.0)),
        lambda: Scale("row", "affine", store="power"),
        lambda: Scale("row", "zero", store="e4m3"),
        lambda: Scale("row", "symmetric", store="bfloat16"),
        lambda: Quantizer(scale=Scale("row", "symmetric"), grid=Floats(2, 1)).with_bits(8),
        lambda: Quantizer(transform=BlockHouseholder(), scale=Scale("tensor")),
        lambda: Quantizer(transform=ScaledHadamard(), scale=Scale("column")),
        lambda: Scale("diagonal"),
        lambda: Scale("row", "log"),
        lambda: Scale("row", "affine", "pixel"),
        lambda: BlockHouseholder(guard="maybe"),
        lambda: BlockHouseholder(small_rows="huge"),
        lambda: ScaledHadamard(block=12),
        lambda: ScaledHadamard(block=0),
    ],
)
def test_impossible_choices_raise(build: object) -> None:
    with pytest.raises(FqtError) as error:
        build()  # type: ignore[operator]
    assert "\n" not in str(error.value)


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(AttributeError):
        quantizer("psq4").rounding = "nearest"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Quantizer(Identity())  # type: ignore[misc]


@pytest.mark.parametrize("name", ["psq0", "bhq1", "shq9d", "ptq64"])
def test_a_width_that_there_is_not_is_refused_by_the_name(name):
    with pytest.raises(FqtError, match=f"'{name}' has .* bits: there are 2 to 8"):
        quantizer(name)
