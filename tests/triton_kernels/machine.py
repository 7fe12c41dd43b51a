"""Where these tests run kernels: on a GPU, or interpreted on the CPU; else they are left out."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
SHORT = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
"""Results that are rounded once more; the interpreter does not round to bfloat16 as hardware does."""
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
"""NumPy warns of what IEEE arithmetic does in silence on a GPU."""
BYTES = (torch.uint8, torch.int8)


def codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Codes over the whole range of their dtype, with both ends among them."""
    low = 0 if dtype == torch.uint8 else -128
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(low, low + 256, shape, generator=generator, dtype=torch.int32)
    found.view(-1)[:2] = torch.tensor([low, low + 255])[: found.numel()]
    return found.to(dtype)
