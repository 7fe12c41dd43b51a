"""The code of the documents runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["add-a-quantizer.md"])
def test_the_code_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    room: dict = {"__name__": name}
    for block in blocks:
        exec(compile(block, name, "exec"), room)
    assert "grad_input" in capsys.readouterr().out
