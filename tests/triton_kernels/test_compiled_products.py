"""The products' kernels compiled for GPUs that are not here: their instructions and the memory they ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_they_compile_to_integer_tensor_cores(tmp_path: Path) -> None:
    """In a process that does not interpret them."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.triton_kernels.compiled_products", "90", "--one-each"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
