"""The rooms of the C++ sources: each includes by its path, and only what lies below it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("asked", "libraries"), [("0", False), ("1", True), (None, True)])
def test_an_install_can_go_without_compiling(
    asked: str | None, libraries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setuptools, given = pytest.importorskip("setuptools"), {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(CSRC.parent)
    monkeypatch.delenv("FQT_COMPILE", raising=False)
    if asked is not None:
        monkeypatch.setenv("FQT_COMPILE", asked)
    runpy.run_path("setup.py")
    assert bool(given["ext_modules"]) == libraries
