"""The fuzzers in short; `python tests/torture/quantizers.py` and `layers.py` are the long forms."""

from __future__ import annotations

from . import layers, quantizers


def test_quantizers() -> None:
    assert quantizers.main(300, seed=1_000_000)["failures"] == []


def test_layers() -> None:
    assert layers.main(100, seed=1_000_000)["failures"] == []
