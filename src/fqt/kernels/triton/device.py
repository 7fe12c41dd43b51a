"""Where Triton's kernels can run, how an operation learns of them, and how they are launched.

Neither Triton nor a GPU is asked for before an operation meets a tensor on a GPU: what is registered is a module's
name, and the module, with its kernels, is imported then. ROCm's devices call themselves "cuda" in torch; nothing
here tells them apart but the question whether they are new enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fqt.kernels.codes import Entries
from fqt.kernels.op import Op

BACKEND = "cuda"
_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass: a fake or wrapped tensor has no data of its own


def offer(op: Op, module: str, of: Callable[..., Tensor] | None = None) -> None:
    """Registers what a module of this folder has for an operation: its function of the definition's name.

    The module's function `takes_` + name, of the same signature, is the condition.

    Args:
        op: the operation.
        module: the module's name; it is imported at the first call with a tensor on a GPU.
        of: of the operation's signature: the tensor that says where it runs. By default its first argument.
    """

    name = op.reference.__name__

    def the(name: str) -> Callable:
        return getattr(import_module(f"{__package__}.{module}"), name)

    def when(*args: Any, **kwargs: Any) -> bool:
        tensor = of(*args, **kwargs) if of is not None else _first(*args, **kwargs)
        return tensor.is_cuda and usable(tensor) and the(f"takes_{name}")(*args, **kwargs)

    @op.on(BACKEND, when=when)
    def run(*args: Any, **kwargs: Any) -> Any:
        return the(name)(*args, **kwargs)


def _first(*args: Any, **kwargs: Any) -> Tensor:
    first = args[0] if args else next(iter(kwargs.values()))
    return first.matrix if isinstance(first, Entries) else first


def obstacle(index: int | None = None) -> str:
    """Why these kernels do not run on a CUDA device, by default the current one; empty if they do.

    `FQT_KERNELS=reference` turns them off, as it does the CPU's.
    """
    if missing := _missing():
        return missing
    if index is None:
        if not torch.cuda.is_available():
            return "no CUDA device is there"
        index = torch.cuda.current_device()
    return _too_old(index)


def usable(x: Tensor) -> bool:
    """Whether these kernels run where x lies; under Triton's interpreter that is the CPU."""
    return not obstacle(x.device.index) if x.is_cuda else x.is_cpu and interpreted() and not _missing()


def _missing() -> str:
    if os.environ.get("FQT_KERNELS") == "reference":
        return "FQT_KERNELS=reference"
    return "" if _installed() else "Triton is not installed"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _too_old(index: int) -> str:
    """Triton compiles for NVIDIA's GPUs from compute capability 8.0 (Ampere), and for AMD's that ROCm runs on.

    (Tensor cores multiply integers from 7.5 on, but Triton has no such products for 7.5.)
    """
    found = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None or found >= (8, 0):
        return ""
    name = torch.cuda.get_device_name(index)
    return f"{name} has compute capability {found[0]}.{found[1]}, and Triton's kernels begin with 8.0"


@cache
def interpreted() -> bool:
    """Whether Triton interprets kernels in numpy instead of compiling them, as `TRITON_INTERPRET` had it first."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def written(dtype: torch.dtype) -> torch.dtype:
    """What kernels write for a float dtype: the interpreter does not round to bfloat16, so float32 there."""
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


def takes(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether kernels can run on these: plain, strided, of these dtypes, on one usable device; None is none."""
    there = [x for x in tensors if x is not None]
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    plain = all(type(x) in _PLAIN and x.layout == torch.strided and x.dtype in dtypes for x in there)
    return plain and all(x.device == there[0].device and usable(x) for x in there)


def launch(kernel: Any, programs: int, *arguments: Any, on: Tensor, warps: int = 4, **constants: Any) -> None:
    """Runs a kernel on so many programs, on the device and the current stream of `on`; nothing for none.

    Multiply and add are never contracted to one rounding: that would move codes.
    """
    if programs:
        with _current(on):
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def _current(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)
