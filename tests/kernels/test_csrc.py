"""The rooms of the C++ sources: each includes by its path, and only what lies below it."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
MAY_INCLUDE = {
    "common": {"common"},
    "quantize": {"common", "quantize"},
    "transform": {"common", "quantize", "transform"},
    "products": {"common", "products"},
}


def test_the_order_of_rooms() -> None:
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} == set(MAY_INCLUDE)
    assert not [path for path in CSRC.iterdir() if path.suffix in (".h", ".cpp")]
    for path in CSRC.glob("*/*"):
        for included in re.findall(r'#include "(.+)"', path.read_text(encoding="utf-8")):
            assert (CSRC / included).is_file(), (path, included)
            assert included.partition("/")[0] in MAY_INCLUDE[path.parent.name], (path, included)
