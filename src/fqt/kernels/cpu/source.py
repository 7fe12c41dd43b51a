"""What the C++ kernels read: a matrix times factors, and the parameters of its blocks."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fqt.kernels.codes import Entries, Scales
from fqt.kernels.cpu.library import expect, plain, takes

_IN_TYPES = {torch.float32: 0, torch.bfloat16: 1}
OUT_TYPES = {torch.int32: 0, torch.int64: 1, torch.float32: 2, torch.bfloat16: 3}
_PERIOD = 1024  # shorter factors are repeated to about this length, so that the kernel's inner loops are long


class Source(ctypes.Structure):
    """`Source` of csrc/common/source.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("period", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


def takes_source(x: Tensor, factor: Tensor | None = None) -> bool:
    """Whether the kernels can read x (float32 or bfloat16) times `factor` (float32)."""
    return takes(*(() if factor is None else (factor,))) and plain(x) and x.dtype in _IN_TYPES


def takes_entries(x: Entries) -> bool:
    """The same of entries."""
    return takes_source(x.matrix, x.factor)


def source_of(x: Tensor, factor: Tensor | None = None) -> tuple[Source, tuple[Tensor | None, ...]]:
    """The C form of x (N, D) times a factor (P,) that repeats along its rows, and what must outlive it."""
    x = x.detach().contiguous()
    if x.ndim != 2 or x.dtype not in _IN_TYPES:
        raise ValueError(f"values are {x.dtype} of shape {tuple(x.shape)}; give a matrix of float32 or bfloat16")
    if factor is None or (factor.ndim == 1 and not factor.numel() and not x.shape[1]):
        return Source(x.data_ptr(), None, 1, _IN_TYPES[x.dtype]), (x,)
    if factor.ndim != 1 or not factor.numel() or x.shape[1] % factor.numel() or factor.dtype != torch.float32:
        raise ValueError(f"factors {factor.dtype} of shape {tuple(factor.shape)} for rows of {x.shape[1]}")
    times = x.shape[1] // factor.numel()
    repeats = max(1, min(times, _PERIOD // factor.numel()))
    while times % repeats:
        repeats -= 1
    factor = factor.contiguous().repeat(repeats)
    return Source(x.data_ptr(), factor.data_ptr(), factor.numel(), _IN_TYPES[x.dtype]), (x, factor)


def takes_scales(scales: Scales) -> bool:
    """Whether the kernels can read these parameters: one for all, per row or per column, in float32."""
    return scales.blocks.plain and takes(scales.step, scales.offset) and scales.step.shape == scales.offset.shape


def varies(parameter: Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    """Whether a parameter (1, 1), (N, 1) or (1, D) of a matrix varies by row, and by column."""
    by_row, by_column = int(parameter.shape[0] != 1), int(parameter.shape[1] != 1)
    wanted = (shape[0] if by_row else 1, shape[1] if by_column else 1)
    if tuple(parameter.shape) != wanted or (by_row and by_column):
        raise ValueError(f"parameters of shape {tuple(parameter.shape)} for a matrix of {shape[0]} × {shape[1]}")
    return by_row, by_column


def per_row(parameter: Tensor, rows: int, dtype: torch.dtype = torch.float32) -> int:
    """The address of a contiguous parameter (N, 1)."""
    return expect("a parameter by row", parameter, (rows, 1), dtype)


def matrix_codes(codes: Tensor) -> tuple[int, int, int, int]:
    """The address of contiguous codes (N, D), whether they are signed, and the shape."""
    if codes.ndim != 2 or codes.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; give a matrix of uint8 or int8")
    rows, columns = codes.shape
    return expect("codes", codes, (rows, columns), codes.dtype), int(codes.dtype == torch.int8), rows, columns


def grouped(
    values: int, shape: tuple[int, int], scales: Scales
) -> tuple[tuple[int, ...], tuple[int, int], tuple[Tensor, Tensor]]:
    """Values (N, D) with their shape and parameters' addresses, who shares these, and what must outlive them."""
    step, offset = scales.step.contiguous(), scales.offset.contiguous()
    by_row_and_column = varies(step, shape)
    pointers = (expect("step", step, tuple(step.shape)), expect("offset", offset, tuple(step.shape)))
    return (values, *shape, *pointers), by_row_and_column, (step, offset)
