"""Tests of the Triton kernels: on a GPU where there is one, else interpreted, in a process of their own.

`TRITON_INTERPRET` must be set before Triton is imported, which other tests may have done. So without a GPU
`test_processes.py` alone is collected, and runs the others with it set.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

collect_ignore = ["compiled.py"]  # a program, not to be looked through for doctests
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0":
    names = [path.name for path in Path(__file__).parent.glob("test_*.py")]
    collect_ignore += [name for name in names if name != "test_processes.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """NumPy warns of what IEEE arithmetic does in silence on a GPU."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))
