"""The fuzzers in short; `make torture` is the long form."""

from __future__ import annotations

from . import layers, quantizers


def test_quantizers() -> None:
    assert quantizers.main(300, seed=1_000_000)["failures"] == []


def test_layers() -> None:
    assert layers.main(100, seed=1_000_000)["failures"] == []
