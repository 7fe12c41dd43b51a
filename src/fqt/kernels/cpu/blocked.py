"""The C++ kernel of products of codes whose steps vary by blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.kernels import blocked
from fqt.kernels.blocked import Stepped, block_length, steps_by_block
from fqt.kernels.cpu.library import call, expect, takes, takes_codes
from fqt.kernels.cpu.memory import empty
from fqt.kernels.cpu.products import as_matrix
from fqt.kernels.cpu.source import OUT_TYPES

GROUP = 4
"""Blocks are whole groups of so many terms."""


def _takes(a: Stepped, b: Stepped, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> bool:
    floats = (a.step, b.step, *(() if bias is None else (bias.detach(),)))
    return (
        dtype in OUT_TYPES and takes_codes(a.codes, b.codes) and takes(*floats) and block_length(a, b) % GROUP == 0
    )


@blocked.matmul.on("cpu", when=_takes)
def _matmul(a: Stepped, b: Stepped, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    (m, k), n, length = a.codes.shape, b.codes.shape[1], block_length(a, b)
    out = empty((m, n), dtype)
    if out.numel() == 0:
        return out
    # One block of fewer terms than it might have is as good.
    length = min(length, -(-k // GROUP) * GROUP or GROUP)
    (a_codes, a_strides), (b_codes, b_strides) = as_matrix(a.codes), as_matrix(b.codes)
    rows, columns = a.blocks.rows or m, b.blocks.columns or n
    a_step, b_step = steps_by_block(a, length), steps_by_block(b.T, length).T.contiguous()
    blocks = -(-k // length)
    left = (a_codes.data_ptr(), *a_strides, expect("a's steps", a_step, (-(-m // rows), blocks)), rows)
    right = (b_codes.data_ptr(), *b_strides, expect("b's steps", b_step, (blocks, -(-n // columns))), columns)
    bias = None if bias is None else bias.detach().contiguous()
    pointer = None if bias is None else expect("bias", bias, (n,))
    call("fqt_blocked_matmul", *left, *right, m, n, k, length, pointer, OUT_TYPES[dtype], out.data_ptr())
    return out
