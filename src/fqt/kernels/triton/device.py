"""Whether Triton kernels can run (a placeholder: the quantizers' branch brings the whole file)."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def usable(*tensors: Tensor) -> bool:
    """Whether Triton kernels can run on these: plain CUDA tensors that hold data, on sm_80 or later."""
    if torch._C._functorch.maybe_current_level() is not None or not tensors:
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cuda for x in tensors)
    return plain and find_spec("triton") is not None and torch.cuda.get_device_capability(tensors[0].device) >= (8, 0)
