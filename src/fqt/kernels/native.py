"""The C++ kernels, called through ctypes: float32 matrices on the CPU, codes equal to the reference bit for bit.

One shared library per instruction set lies beside this file if a compiler was found at install time; the best
one that the machine runs is loaded at first use. `FQT_KERNELS` may name a lower one: `amx`,
`avx512`, `avx2`, `portable`, or `reference` for none. ctypes rather than a torch extension: pointers and sizes
only, so that one build serves every torch version; the price is that this file repeats the C signatures (guarded
by a version number).
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels.memory import empty
from fqt.kernels.reference import Quantized, Scaling, Unscaling

LEVELS = ("portable", "avx2", "avx512", "amx")
_ABI = 11  # FQT_ABI of csrc/platform.h
ROUNDINGS = {"nearest": 0, "stochastic": 1, "dithered": 2, "best": 3}

_P, _I, _L, _U = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "fqt_random": (_P, _U, _I, _L, _P, _I),
    "fqt_range_rows": (_P, _L, _L, _P, _P, _I),
    "fqt_range_columns": (_P, _L, _L, _P, _P, _I),
    "fqt_range_tensor": (_P, _L, _P, _P, _I),
    "fqt_parameters": (_P, _P, _L, _I, _I, _P, _P, _I),
    "fqt_value_sums": (_P, _L, _L, _P, _I),
    "fqt_encode": (_P, _L, _L, _P, _P, _I, _I, _I, _I, _I, _P, _I, _P, _I),
    "fqt_quantize": (_P, _L, _L, _I, _I, _I, _I, _I, _I, _P, _I, *[_P] * 7, _I),
    "fqt_variance_sums": (_P, _L, _L, _P, _P, _I, _I, _I, _I, _P, _I),
    "fqt_column_sums": (_P, _I, _L, _L, _P, _P, _P, _I),
    "fqt_row_sums": (_P, _I, _L, _L, _P, _I),
    "fqt_code_variance": (_P, _L, _L, _P, _P, _I, _I, _I, _I, _P, _I),
    "fqt_decode": (_P, _I, _L, _L, _P, _P, _I, _I, _P, _I, _I, _P, _I),
    "fqt_hadamard": (_P, _L, _L, _P, _P, _L, *[_P] * 7, _I, _P, _I),
    "fqt_reflect": (_P, _L, _L, *[_P] * 9, _I, _P, _I),
    "fqt_matmul": (_P, _I, _L, _L, _P, _I, _L, _L, _L, _L, _L, _P, _I),
    "fqt_conv2d": (_P, _I, _P, _P, _I, _P, _I),
    "fqt_conv2d_grad_weight": (_P, _I, _P, _I, _P, _P, _I),
    "fqt_dense_output": (_P, _P, _P, _L, _L, _L, _L, _I, _P, _I),
    "fqt_dense_grad_input": (_P, _P, _L, _L, _L, _I, _P, _I, _P, _I),
    "fqt_dense_grad_weight": (_P, _P, _L, _L, _L, _I, _P, _I),
    "fqt_conv_output": (_P, _P, _P, _P, _I, _P, _I),
    "fqt_conv_grad_input": (_P, _P, _P, _I, _P, _I, _P, _I),
    "fqt_conv_grad_weight": (_P, _P, _P, _I, _P, _I),
    "fqt_replace_rows": (_P, _L, _L, _P, _P, _I),
    "fqt_hadamard_codes": (_P, _L, _L, _P, _P, _L, _P, _P, _I),
    "fqt_householder_codes": (_P, _L, _L, _I, _P, _P, _P, _P, _I),
}


@dataclass(frozen=True)
class Status:
    """Which kernels run.

    Attributes:
        level: "amx", "avx512", "avx2", "portable", or "reference" for plain torch.
        reason: why not a better one; empty if there is none.
    """

    level: str
    reason: str

    def __str__(self) -> str:
        return f"{self.level} kernels" + (f": {self.reason}" if self.reason else "")


@cache
def _loaded() -> tuple[ctypes.CDLL | None, Status]:
    asked = os.environ.get("FQT_KERNELS", "")
    if asked not in ("", "reference", *LEVELS):
        raise FqtError(f"FQT_KERNELS={asked!r}; known: reference, {', '.join(LEVELS)}")
    if asked == "reference":
        return None, Status("reference", "FQT_KERNELS=reference")
    library, problem = _open("portable")
    if library is None:
        logging.getLogger(__name__).warning("fqt runs on its plain-torch kernels: %s", problem)
        return None, Status("reference", problem)
    best = LEVELS[library.fqt_cpu_level()]
    level, reason = best, "" if best == LEVELS[-1] else f"{best} is what this machine has"
    if asked and LEVELS.index(asked) < LEVELS.index(best):
        level, reason = asked, f"FQT_KERNELS={asked}"
    for name in reversed(LEVELS[: LEVELS.index(level) + 1]):
        library, problem = _open(name)
        if library is not None:
            return library, Status(name, reason)
        reason = problem
    raise AssertionError("the portable library was there a moment ago")


def _open(level: str) -> tuple[ctypes.CDLL | None, str]:
    """The library of a level, or why it cannot be used."""
    stem = f"_native_{level}"
    paths = [Path(__file__).with_name(stem + suffix) for suffix in EXTENSION_SUFFIXES]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        return None, f"the {level} kernels are not built (install again with a C++ compiler; pip -v tells more)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the {level} kernels do not load ({error})"
    if library.fqt_abi() != _ABI:
        return None, f"the {level} kernels are of another version than the Python sources: install again"
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
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
    if integers is not None and not (_plain(integers) and integers.dtype in _INTEGERS):
        return False
    return all([_plain(x) and x.dtype == torch.float32 for x in floats])  # a list: half a generator's time


def takes_codes(*codes: Tensor) -> bool:
    """The same for operands of products."""
    return takes() and all(_plain(x) and x.dtype in _INTEGERS[1:] for x in codes)


def _plain(x: Tensor) -> bool:
    return type(x) in _PLAIN and x.is_cpu and x.layout == torch.strided


def call(name: str, *arguments: object) -> None:
    """Runs a kernel on torch's number of threads."""
    library = _loaded()[0]
    assert library is not None
    code = getattr(library, name)(*arguments, torch.get_num_threads())
    if code == 1:
        raise MemoryError(f"{name}: no memory for the workspace")
    if code == 2:
        raise IndexError(f"{name}: an index lies outside the rows, or block sizes are not powers of two that fit")


def expect(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """The address of a tensor that is what a kernel will take it for: it sees no shapes, so none may be trusted."""
    if x.shape != shape or x.dtype != dtype or not x.is_contiguous() or not x.is_cpu:
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}; "
            f"the kernel takes contiguous {dtype} of shape {tuple(shape)} on the CPU"
        )
    return x.data_ptr()


def _matrix_codes(codes: Tensor) -> tuple[int, int, int, int]:
    """The address of codes (N, D), whether they are signed, and the shape."""
    if codes.ndim != 2 or codes.dtype not in _INTEGERS[1:]:
        raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; give a matrix of uint8 or int8")
    rows, columns = codes.shape
    return expect("codes", codes, (rows, columns), codes.dtype), int(codes.dtype == torch.int8), rows, columns


def key_of(seed: Tensor | None, rounding: str) -> int | None:
    """The address of a seed; None where nothing is drawn."""
    if seed is None:
        if rounding != "nearest":
            raise ValueError(f"{rounding} rounding without a seed")
        return None
    if seed.numel() != 1:
        raise ValueError(f"a seed of shape {tuple(seed.shape)}; give a scalar")
    return expect("seed", seed, tuple(seed.shape), torch.int64)


def _check_codes(low: int, high: int, rounding: str) -> None:
    last = high + (rounding == "dithered")
    if not (low == 0 < last <= 255 or -128 <= low < last <= 127):
        raise ValueError(f"codes {low} … {last} do not fit a byte")


def _group(parameter: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """Whether a parameter (1, 1), (N, 1) or (1, D) varies by row, and by column."""
    by_row, by_column = int(parameter.shape[0] != 1), int(parameter.shape[1] != 1)
    wanted = (rows if by_row else 1, columns if by_column else 1)
    if parameter.shape != wanted or (by_row and by_column):
        raise ValueError(f"parameters of shape {tuple(parameter.shape)} for a matrix of {rows} × {columns}")
    return by_row, by_column


def random_words(seed: Tensor, stream: int, n: int, shift: int) -> Tensor:
    """(n,) int32: the bits of a stream's words, shifted right by `shift`."""
    out = torch.empty(n, dtype=torch.int32, device="cpu")
    call("fqt_random", key_of(seed, "stochastic"), stream, shift, n, out.data_ptr())
    return out


class _Source(ctypes.Structure):
    """`Source` of csrc/source.h."""

    _fields_ = [("x", _P), ("factor", _P), ("period", _L), ("type", ctypes.c_int32)]


_IN_TYPES = {torch.float32: 0, torch.bfloat16: 1}
OUT_TYPES = {torch.int32: 0, torch.int64: 1, torch.float32: 2, torch.bfloat16: 3}
_PERIOD = 1024  # shorter factors are repeated to about this length, so that the kernel's inner loops are long


def takes_source(x: Tensor, factor: Tensor | None) -> bool:
    """Whether the kernels can read x (float32 or bfloat16) times `factor` (float32)."""
    return takes(*(() if factor is None else (factor,))) and _plain(x) and x.dtype in _IN_TYPES


def source_of(x: Tensor, factor: Tensor | None) -> tuple[_Source, tuple[Tensor | None, ...]]:
    """The C form of x (N, D) times a factor (P,) that repeats along its rows, and what must outlive it."""
    x = x.contiguous()
    if x.ndim != 2 or x.dtype not in _IN_TYPES:
        raise ValueError(f"values are {x.dtype} of shape {tuple(x.shape)}; give a matrix of float32 or bfloat16")
    if factor is None or (factor.ndim == 1 and not factor.numel() and not x.shape[1]):
        return _Source(x.data_ptr(), None, 1, _IN_TYPES[x.dtype]), (x,)
    if factor.ndim != 1 or not factor.numel() or x.shape[1] % factor.numel() or factor.dtype != torch.float32:
        raise ValueError(f"factors {factor.dtype} of shape {tuple(factor.shape)} for rows of {x.shape[1]}")
    times = x.shape[1] // factor.numel()
    repeats = max(1, min(times, _PERIOD // factor.numel()))
    while times % repeats:
        repeats -= 1
    factor = factor.contiguous().repeat(repeats)
    return _Source(x.data_ptr(), factor.data_ptr(), factor.numel(), _IN_TYPES[x.dtype]), (x, factor)


def value_range(x: Tensor, group: str, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As the reference; no axis that is reduced may be empty."""
    source, _alive = source_of(x, factor)
    rows, columns = x.shape
    if not x.numel():
        raise ValueError(f"no range of nothing: values of shape {tuple(x.shape)}")
    shape = {"tensor": (1, 1), "row": (rows, 1), "column": (1, columns)}[group]
    lo, hi = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2))
    address = ctypes.addressof(source)
    if group == "tensor":
        call("fqt_range_tensor", address, x.numel(), lo.data_ptr(), hi.data_ptr())
    else:
        call(f"fqt_range_{group}s", address, rows, columns, lo.data_ptr(), hi.data_ptr())
    return lo, hi


def parameters(lo: Tensor, hi: Tensor, mode: str, steps: int) -> tuple[Tensor, Tensor]:
    """As the reference."""
    lo, hi = lo.contiguous(), hi.contiguous()
    if steps < 1:
        raise ValueError(f"a range in {steps} steps; give at least 1")
    ranges = (expect("lo", lo, tuple(lo.shape)), expect("hi", hi, tuple(lo.shape)))
    step, offset = torch.empty_like(lo), torch.empty_like(lo)
    call("fqt_parameters", *ranges, lo.numel(), _MODES[mode], steps, step.data_ptr(), offset.data_ptr())
    return step, offset


def value_sums(x: Tensor) -> Tensor:
    """As the reference."""
    source, _alive = source_of(x, None)
    sums = torch.empty(x.shape[1], dtype=torch.float64, device="cpu")
    call("fqt_value_sums", ctypes.addressof(source), *x.shape, sums.data_ptr())
    return sums


def encode(
    x: Tensor,
    step: Tensor,
    offset: Tensor,
    low: int,
    high: int,
    rounding: str,
    seed: Tensor | None,
    factor: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """As the reference."""
    source, _alive = source_of(x, factor)
    _check_codes(low, high, rounding)
    pointers, groups, _held = _grouped(ctypes.addressof(source), x, step, offset)
    codes = empty(x.shape, torch.uint8 if low == 0 else torch.int8)
    rest = (ROUNDINGS[rounding], key_of(seed, rounding), int(transposed), codes.data_ptr())
    call("fqt_encode", *pointers, *groups, low, high, *rest)
    return codes


_GROUPS = {"tensor": 0, "row": 1, "column": 2}
_MODES = {"affine": 0, "symmetric": 1, "zero": 2}


class Findings(ctypes.Structure):
    """What one quantizer's pass over a tensor finds out for others that read the same tensor.

    The range of all its entries, and the sums of its values over all but the last axis. Each is there once a
    native pass over whole rows came by it; whoever needs it earlier takes a pass of their own.
    """

    _fields_ = [
        ("lo", ctypes.c_float),
        ("hi", ctypes.c_float),
        ("known", ctypes.c_int32),
        ("has_sums", ctypes.c_int32),
        ("pointer", _P),
        ("period", _L),
    ]

    def __init__(self, channels: int = 0) -> None:
        """channels: length of the last axis if sums are wanted, else 0."""
        super().__init__()
        self._sums = torch.empty(channels, dtype=torch.float64, device="cpu")
        if channels:
            self.pointer, self.period = self._sums.data_ptr(), channels

    def found(self, range: tuple[float, float]) -> None:
        """Takes down the range of all entries."""
        self.lo, self.hi = range
        self.known = 1

    @property
    def sums(self) -> Tensor | None:
        """(channels,) float64, as `ops.value_sums`; None if no pass found them."""
        return self._sums if self.has_sums else None


def quantize(
    x: Tensor,
    group: str,
    mode: str,
    low: int,
    high: int,
    rounding: str,
    seed: Tensor | None,
    factor: Tensor | None = None,
    transposed: bool = False,
    findings: Findings | None = None,
) -> Quantized:
    """As `ops.quantize`, and for rounding "best", which `Quantizer` defines; at least one entry."""
    source, _alive = source_of(x, factor)
    rows, columns = x.shape
    if not x.numel():
        raise ValueError(f"nothing to quantize in values of shape {tuple(x.shape)}")
    _check_codes(low, high, rounding)
    if rounding == "best" and (low or mode == "symmetric"):
        raise ValueError("the best rounding is one of affine scales, whose codes begin at 0")
    shape = (rows if group == "row" else 1, columns if group == "column" else 1)
    step, offset = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2))
    codes = empty(x.shape, torch.uint8 if low == 0 else torch.int8)
    key = key_of(seed, rounding)
    noise: tuple[Tensor, Tensor] | None = None
    pointers: tuple[int | None, int | None] = (None, None)
    if rounding in ("dithered", "best"):
        both = torch.empty(rows + columns, dtype=torch.float32, device="cpu")
        noise = both[:rows].view(rows, 1), both[rows:].view(1, columns)
        pointers = noise[0].data_ptr(), noise[1].data_ptr()
    dithered = ctypes.c_int32()
    how = (_GROUPS[group], _MODES[mode], high, low, high, ROUNDINGS[rounding], key, int(transposed))
    found = None if findings is None or factor is not None else ctypes.addressof(findings)
    results = (step.data_ptr(), offset.data_ptr(), codes.data_ptr(), *pointers, ctypes.addressof(dithered), found)
    call("fqt_quantize", ctypes.addressof(source), rows, columns, *how, *results)
    return codes, step, offset, noise if dithered.value else None


def variance_sums(
    x: Tensor, step: Tensor, offset: Tensor, low: int, high: int, factor: Tensor | None = None
) -> Tensor:
    """As the reference."""
    source, _alive = source_of(x, factor)
    pointers, groups, _held = _grouped(ctypes.addressof(source), x, step, offset)
    sums = torch.empty(step.shape, dtype=torch.int64, device="cpu")
    call("fqt_variance_sums", *pointers, *groups, low, high, sums.data_ptr())
    return sums


def column_sums(codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """As the reference."""
    codes = codes.contiguous()
    matrix = _matrix_codes(codes)
    plain, weighted = torch.empty((2, codes.shape[1]), dtype=torch.int64, device="cpu")
    pointers: tuple[int | None, ...] = (None, plain.data_ptr(), None)
    if weights is not None:
        weights = weights.contiguous()
        pointers = (expect("weights", weights, codes.shape[:1], torch.int32), plain.data_ptr(), weighted.data_ptr())
    call("fqt_column_sums", *matrix, *pointers)
    return plain, None if weights is None else weighted


def row_sums(codes: Tensor) -> Tensor:
    """As the reference."""
    codes = codes.contiguous()
    matrix = _matrix_codes(codes)
    sums = torch.empty(codes.shape[0], dtype=torch.int64, device="cpu")
    call("fqt_row_sums", *matrix, sums.data_ptr())
    return sums


def decode(codes: Tensor, step: Tensor, offset: Tensor, dither: Tensor | None) -> Tensor:
    """As the reference."""
    codes, step, offset = codes.contiguous(), step.contiguous(), offset.contiguous()
    matrix, groups = _matrix_codes(codes), _group(step, *codes.shape)
    pointers = (expect("step", step, tuple(step.shape)), expect("offset", offset, tuple(step.shape)))
    out = empty(codes.shape, step.dtype)
    noise: tuple[int | None, int, int] = (None, 0, 0)
    if dither is not None:
        dither = dither.contiguous()
        noise = (expect("dither", dither, tuple(dither.shape)), *_group(dither, *codes.shape))
    call("fqt_decode", *matrix, *pointers, *groups, *noise, out.data_ptr())
    return out


def code_variance(x: Tensor, step: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """As the reference."""
    x = x.contiguous()
    pointers, groups, _held = _grouped(expect("x", x, tuple(x.shape)), x, step, offset)
    out = torch.empty_like(x)
    call("fqt_code_variance", *pointers, *groups, low, high, out.data_ptr())
    return out


@lru_cache(maxsize=64)
def block_sizes(blocks: tuple[int, ...]) -> ctypes.Array:
    """In C's form; keep a reference during the call."""
    return (ctypes.c_int64 * len(blocks))(*blocks)


def hadamard(
    x: Tensor,
    order: Tensor,
    blocks: tuple[int, ...],
    before: Scaling | None = None,
    keep: Tensor | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """As the reference."""
    order = order.contiguous()
    expect("order", order, x.shape[:1], torch.int64)
    held = block_sizes(blocks)
    sizes = (ctypes.addressof(held), len(blocks))
    work = _RowWork(x, before, after)
    kept = None if keep is None else keep.contiguous()
    arguments = (
        order.data_ptr(),
        *sizes,
        *work.before,
        None if kept is None else _per_row(kept, x, torch.bool),
        *work.after,
    )
    call("fqt_hadamard", work.source, *x.shape, *arguments)
    return work.out


def reflect(
    x: Tensor,
    group: Tensor,
    normal: Tensor,
    factor: Tensor,
    before: Scaling | None = None,
    after: Unscaling | None = None,
) -> Tensor:
    """As the reference."""
    group, normal, factor = group.contiguous(), normal.contiguous(), factor.contiguous()
    work = _RowWork(x, before, after)
    pointers = (expect("group", group, x.shape[:1], torch.int64), _per_row(normal, x), _per_row(factor, x))
    call("fqt_reflect", work.source, *x.shape, *pointers, *work.before, *work.after)
    return work.out


class _RowWork:
    """The arguments of a transform of rows that are scaled on the way in or out."""

    def __init__(self, x: Tensor, before: Scaling | None, after: Unscaling | None) -> None:
        self._source, held = source_of(x, None)
        alive: list[Tensor | None] = [*held]
        self.source = ctypes.addressof(self._source)
        self.before: tuple[int | None, ...] = (None,) * 3
        if before is not None:
            parts = [p.contiguous() for p in (before.half, before.offset, before.scale)]
            self.before = tuple(_per_row(p, x) for p in parts)
            alive += parts
        dtype = torch.float32 if after is None else after.dtype
        self.out = empty(x.shape, dtype)
        pointers: tuple[int | None, ...] = (None,) * 3
        if after is not None:
            parts = [after.scale.contiguous(), after.offset.contiguous()]
            right = None if after.right is None else after.right.contiguous()
            if right is not None and right.shape != x.shape[1:]:
                raise ValueError(f"a right factor of shape {tuple(right.shape)} for rows of {x.shape[1]}")
            end = None if right is None else expect("right", right, x.shape[1:])
            pointers = (*(_per_row(p, x) for p in parts), end)
            alive += [*parts, right]
        self.after = (*pointers, OUT_TYPES[dtype], self.out.data_ptr())
        self._alive = alive


def _per_row(parameter: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """The address of a contiguous parameter (N, 1) for the rows of x."""
    return expect("a parameter by row", parameter, (x.shape[0], 1), dtype)


def _grouped(
    values: int, x: Tensor, step: Tensor, offset: Tensor
) -> tuple[tuple[int, ...], tuple[int, int], tuple[Tensor, Tensor]]:
    """Values like x (N, D) with their shape and parameters' addresses, who shares these, what must outlive them."""
    step, offset = step.contiguous(), offset.contiguous()
    rows, columns = x.shape
    groups = _group(step, rows, columns)
    pointers = (expect("step", step, tuple(step.shape)), expect("offset", offset, tuple(step.shape)))
    return (values, rows, columns, *pointers), groups, (step, offset)


def replace_rows_(y: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """As the reference; y contiguous."""
    source, _alive = source_of(x, None)
    keep = keep.contiguous()
    pointer, (rows, columns) = expect("y", y, tuple(x.shape)), y.shape
    call("fqt_replace_rows", pointer, rows, columns, _per_row(keep, y, torch.bool), ctypes.addressof(source))
    return y
