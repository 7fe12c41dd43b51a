"""The library of C++ kernels, called through ctypes: which one is loaded, what it takes, and how it is called.

Shared libraries lie beside this file if a compiler was found at install time; those of the best instruction set
that the machine runs are loaded at first use. `FQT_KERNELS` may name a lower level: `amx`, `avx512`, `avxvnni`,
`avx2` on x86, `i8mm`, `neon` on Arm, `portable`, or `reference` for none. A level is a library of all kernels, or
one of products on top of another level's; AVX2 has a second one, of products of narrow codes.
ctypes rather than a torch extension: pointers and sizes only, so that one build serves every torch version; the
price is that this file repeats the C signatures (guarded by a version number).
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels.rounding import STOCHASTIC, Rounding

BACKEND = "cpu"
LEVELS = ("portable", "avx2", "avxvnni", "avx512", "amx", "neon", "i8mm")
_HIGHEST = ("amx", "i8mm")  # of x86 and of Arm
_NARROW = {"avx2": "avx2_narrow"}
_ABI = 17  # FQT_ABI of csrc/common/platform.h


class Range(ctypes.Structure):
    """`Range` of csrc/products/dot.h: the least and the greatest code of an operand."""

    _fields_ = [("low", ctypes.c_int32), ("high", ctypes.c_int32)]


_R, _P, _I, _L, _U = Range, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "fqt_random": (_P, _U, _I, _L, _P, _I),
    "fqt_range_rows": (_P, _L, _L, _P, _P, _I),
    "fqt_range_columns": (_P, _L, _L, _P, _P, _I),
    "fqt_range_tensor": (_P, _L, _P, _P, _I),
    "fqt_parameters": (_P, _P, _L, _I, _I, _P, _P, _I),
    "fqt_encode": (_P, _L, _L, _P, _P, _I, _I, _I, _I, _I, _P, _I, _P, _I),
    "fqt_quantize": (_P, _L, _L, _I, _I, _I, _I, _I, _I, _P, _I, *[_P] * 7, _I),
    "fqt_variance_sums": (_P, _L, _L, _P, _P, _I, _I, _I, _I, _P, _I),
    "fqt_code_variance": (_P, _L, _L, _P, _P, _I, _I, _I, _I, _P, _I),
    "fqt_decode": (_P, _I, _L, _L, _P, _P, _I, _I, _P, _I, _I, _P, _I),
    "fqt_hadamard": (_P, _L, _L, _P, _P, _L, *[_P] * 7, _I, _P, _I),
    "fqt_reflect": (_P, _L, _L, *[_P] * 9, _I, _P, _I),
    "fqt_rotate": (_P, _L, _L, _P, _L, _P, _P, _I),
    "fqt_replace_rows": (_P, _L, _L, _P, _P, _I),
    "fqt_hadamard_codes": (_P, _L, _L, _P, _P, _L, _P, _P, _I),
    "fqt_householder_codes": (_P, _L, _L, _I, _P, _P, _P, _P, _I),
    "fqt_positive": (_P, _L, _P, _I),
    "fqt_gate": (_P, _L, _P, _P, _I),
    "fqt_pack": (_P, _L, _I, _P, _I),
    "fqt_taps": (_P, _L, _L, _L, _L, _P, _P, _I),
    "fqt_places": (_P, _L, _L, _L, _L, _P, _P, _I),
    "fqt_kept_times": (_P, _L, _P, _I, _P, _P, _P, _P, _I),
    "fqt_kept_batch_norm": (_P, _L, _P, _I, _P, _P, _P, _L, _L, *[_P] * 6, _I),
    "fqt_kept_row_norm": (_P, _L, _L, _P, _I, *[_P] * 9, _I),
}
_PRODUCTS: dict[str, tuple[type, ...]] = {
    "fqt_column_sums": (_P, _I, _L, _L, _P, _P, _P, _I),
    "fqt_row_sums": (_P, _I, _L, _L, _P, _I),
    "fqt_scaled_rows": (_P, _L, _L, *[_P] * 5, _L, _I),
    "fqt_value_sums": (_P, _L, _L, _P, _I),
    "fqt_matmul": (_P, _R, _L, _L, _P, _R, _L, _L, _L, _L, _L, _P, _I),
    "fqt_conv2d": (_P, _R, _P, _R, _P, _I, _P, _I),
    "fqt_conv2d_grad_weight": (_P, _R, _P, _R, _P, _P, _I),
    "fqt_dense_output": (_P, _P, _P, _L, _L, _L, _L, _I, _P, _I),
    "fqt_dense_grad_input": (_P, _P, _L, _L, _L, _I, _P, _I, _P, _I),
    "fqt_dense_grad_weight": (_P, _P, _L, _L, _L, _P, _P, _I),
    "fqt_conv_output": (_P, _P, _P, _P, _I, _P, _I),
    "fqt_conv_grad_input": (_P, _P, _P, _I, _P, _I, _P, _I),
    "fqt_conv_grad_weight": (_P, _P, _P, _P, _P, _I),
    "fqt_steps": (_R, _R),
}
_BLOCKED: dict[str, tuple[type, ...]] = {
    "fqt_blocked_matmul": (_P, _L, _L, _P, _L, _P, _L, _L, _P, _L, _L, _L, _L, _L, _P, _I, _P, _I),
}
# Levels that are another one but for these functions.
_ON_TOP_OF: dict[str, tuple[str, dict[str, tuple[type, ...]]]] = {
    "avxvnni": ("avx2", _PRODUCTS | _BLOCKED),
    "amx": ("avx512", _PRODUCTS | _BLOCKED),
    "i8mm": ("neon", _PRODUCTS),
}


@dataclass(frozen=True)
class Status:
    """Which kernels run.

    Attributes:
        level: one of LEVELS, or "reference" for plain torch.
        reason: why not a better one; empty if there is none.
    """

    level: str
    reason: str

    def __str__(self) -> str:
        return f"{self.level} kernels" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class _Kernels:
    """The functions of a level, by name; and those that take narrow codes, if it has such."""

    functions: dict[str, Any]
    narrow: dict[str, Any]


@cache
def _loaded() -> tuple[_Kernels | None, Status]:
    asked = os.environ.get("FQT_KERNELS", "")
    if asked not in ("", "reference", *LEVELS):
        raise FqtError(f"FQT_KERNELS={asked!r}; known: reference, {', '.join(LEVELS)}")
    if asked == "reference":
        return None, Status("reference", "FQT_KERNELS=reference")
    runs = machine_levels()
    if not runs:
        problem = _open("portable", {})[1]
        logging.getLogger(__name__).warning("fqt runs on its plain-torch kernels: %s", problem)
        return None, Status("reference", problem)
    best = runs[-1]
    nothing_better = best in _HIGHEST and asked in ("", *runs)
    level, reason = best, "" if nothing_better else f"{best} is what this machine has"
    if asked and LEVELS.index(asked) < LEVELS.index(best):
        level, reason = asked, f"FQT_KERNELS={asked}"
        if asked not in runs:
            reason += ", which this machine does not run"
    for name in reversed([name for name in runs if LEVELS.index(name) <= LEVELS.index(level)]):
        kernels, problem = _kernels(name)
        if kernels is not None:
            return kernels, Status(name, reason)
        reason = problem
    raise AssertionError("the portable library was there a moment ago")


@cache
def machine_levels() -> tuple[str, ...]:
    """The levels whose instructions this machine has, the best last; none where no library can be used."""
    portable = _open("portable", {})[0]
    if portable is None:
        return ()
    bits = portable.fqt_cpu_levels()
    return tuple(level for i, level in enumerate(LEVELS) if bits >> i & 1)


def _kernels(level: str) -> tuple[_Kernels | None, str]:
    """The functions of a level, or why they cannot be used."""
    everything = _SIGNATURES | _PRODUCTS | _BLOCKED
    base, own = _ON_TOP_OF.get(level, (level, {}))
    library, problem = _open(base, everything)
    products, other_problem = (library, "") if base == level else _open(level, own)
    if library is None or products is None:
        return None, problem or other_problem
    functions = _functions(library, everything) | _functions(products, own)
    narrow = _open(_NARROW[level], _PRODUCTS)[0] if level in _NARROW else None
    return _Kernels(functions, {} if narrow is None else _functions(narrow, _PRODUCTS)), ""


def _functions(library: ctypes.CDLL, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(library, name) for name in names}


def _open(name: str, signatures: Mapping[str, tuple[type, ...]]) -> tuple[ctypes.CDLL | None, str]:
    """A library with these functions, or why it cannot be used."""
    paths = [Path(__file__).with_name(f"_native_{name}{suffix}") for suffix in (".so", ".pyd")]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        return None, f"the {name} kernels are not built (install again with a C++ compiler; pip -v tells more)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the {name} kernels do not load ({error})"
    if library.fqt_abi() != _ABI:
        return None, f"the {name} kernels are of another version than the Python sources: install again"
    for function, arguments in signatures.items():
        getattr(library, function).argtypes = arguments
    return library, ""


def status() -> Status:
    """Which kernels run, and why not better ones."""
    return _loaded()[1]


_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass: a fake or wrapped tensor has no data of its own
_INTEGERS = (torch.int64, torch.uint8, torch.int8)


def takes(*floats: Tensor, integers: Tensor | None = None) -> bool:
    """Whether the native kernels can run on these: plain CPU tensors, float32 (and integers) that hold data."""
    if _loaded()[0] is None or torch._C._functorch.maybe_current_level() is not None:
        return False
    if integers is not None and not (plain(integers) and integers.dtype in _INTEGERS):
        return False
    return all([plain(x) and x.dtype == torch.float32 for x in floats])  # a list: half a generator's time


def takes_codes(*codes: Tensor) -> bool:
    """The same for operands of products."""
    return takes() and all(plain(x) and x.dtype in _INTEGERS[1:] for x in codes)


def plain(x: Tensor) -> bool:
    """Whether a tensor has data of its own, dense and on the CPU."""
    return type(x) in _PLAIN and x.is_cpu and x.layout == torch.strided


def call(name: str, *arguments: object, narrow: bool = False) -> None:
    """Runs a kernel on torch's number of threads; with `narrow`, that of narrow codes."""
    kernels = _loaded()[0]
    assert kernels is not None
    code = (kernels.narrow if narrow else kernels.functions)[name](*arguments, torch.get_num_threads())
    if code == 1:
        raise MemoryError(f"{name}: no memory for the workspace")
    if code == 2:
        raise IndexError(f"{name}: an index lies outside the rows, or block sizes are not powers of two that fit")


@lru_cache(maxsize=1024)
def narrow_steps(left: tuple[int, int], right: tuple[int, int]) -> int:
    """Over how many groups of four terms the kernels of narrow codes add up products of two operands in 16 bits.

    Args:
        left, right: the least and the greatest code of each.

    Returns:
        0 where these codes are not narrow enough, or the level has no such kernels.
    """
    kernels = _loaded()[0]
    if kernels is None or not kernels.narrow:
        return 0
    return kernels.narrow["fqt_steps"](Range(*left), Range(*right))


def expect(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """The address of a tensor that is what a kernel will take it for: it sees no shapes, so none may be trusted."""
    if x.shape != shape or x.dtype != dtype or not x.is_contiguous() or not plain(x):
        raise ValueError(
            f"{name} is a {type(x).__name__}, {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on "
            f"{x.device}; the kernel takes contiguous {dtype} of shape {tuple(shape)} on the CPU"
        )
    return x.data_ptr()


def key_of(seed: Tensor | None, rounding: Rounding = STOCHASTIC) -> int | None:
    """The address of a seed; None where nothing is drawn."""
    if seed is None:
        if rounding.draws:
            raise ValueError(f"{rounding} rounding without a seed")
        return None
    if seed.numel() != 1:
        raise ValueError(f"a seed of shape {tuple(seed.shape)}; give a scalar")
    return expect("seed", seed, tuple(seed.shape), torch.int64)
