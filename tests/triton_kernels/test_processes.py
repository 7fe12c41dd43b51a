"""The tests of this folder under Triton's interpreter, and its kernels compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="this is the interpreter's process"),
]
HERE = Path(__file__).parent


def run(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="run on the GPU")
@pytest.mark.parametrize("part", range(3))
def test_interpreted(part: int) -> None:
    files = sorted(map(str, HERE.glob("test_*.py")))
    run("-m", "pytest", "-p", "no:cacheprovider", *files[part::3], TRITON_INTERPRET="1")


@pytest.mark.parametrize(("target", "which"), [("sm_90", "."), ("gfx942", "dithered|ranges|values|over rows")])
def test_compiled(target: str, which: str, tmp_path: Path) -> None:
    run("-m", "tests.triton_kernels.compiled", target, which, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
