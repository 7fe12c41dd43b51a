"""Products of codes whose steps vary by blocks along the contraction.

A step that varies along the contraction does not pull out of the sum; one that is constant over blocks of it does,
out of the sum of a block:

    out[m, n] = Σ_kb float(Σ_{k in kb} a[m, k] · b[k, n]) · (step_a[m, kb] · step_b[kb, n]) + bias[n]

Sums of a block are exact, in integers; blocks are added in float32, in ascending order, each operation rounded on
its own. So a result does not depend on the backend, the number of threads, or on how the work is cut.

A step per term that takes few values, as ShiftQuant's, one step shifted by 0 to 15 bits, leaves no blocks as the
terms lie; `gathered` puts terms of one step side by side. Shifting the codes instead was rejected: 4-bit codes
shifted by up to 15 bits take 19, which no product of bytes does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels.codes import COLUMN, TENSOR, Blocks, at_hand
from fqt.kernels.op import Op

MOST_TERMS = 1 << 16
"""Of a block, so that int32 holds its sum whatever the codes."""
GATHERED = 32
"""Of the blocks in which terms of one step are gathered."""
_KINDS = 17
"""Of steps that are gathered: shifts by 0 to 15, and 0 of columns of zeros."""
_DEFAULT = 1024
_RESULTS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stepped:
    """A matrix in codes: value = step · code.

    Attributes:
        codes: (N, D) int8, any strides.
        step: float32, one per block, of the shape that `blocks.count` says.
        blocks: who shares a step.
    """

    codes: Tensor
    step: Tensor
    blocks: Blocks

    @staticmethod
    def plain(codes: Tensor) -> Stepped:
        """Codes that are their own values."""
        return Stepped(codes, torch.ones(1, 1, dtype=torch.float32, device=codes.device), TENSOR)

    @property
    def T(self) -> Stepped:
        """The transposed matrix."""
        return Stepped(self.codes.T, self.step.T, self.blocks.turned)


def common_block(a: int, b: int) -> int:
    """The length of the blocks in which two operands can be summed; 0 if there is none.

    Args:
        a, b: over how many terms of the contraction each operand's steps are constant; 0 is all of them.
    """
    short, long = sorted((a, b))
    if short == 0:
        return long or _DEFAULT
    return short if long % short == 0 else 0


def block_length(a: Stepped, b: Stepped) -> int:
    """Over how many terms of a · b both operands' steps are constant."""
    return common_block(a.blocks.columns, b.blocks.rows)


def gathered(a: Stepped, b: Stepped) -> tuple[Stepped, Stepped]:
    """The operands of the same product with its terms in order of a's steps, the greatest first.

    The terms of each step are filled up with zeros to whole blocks of `GATHERED`. Where a has no step per column,
    the operands as they are.

    Args:
        a: (M, K); its steps per column take at most 16 values that are not 0, or are all NaN.
        b: (K, N) with blocks of all rows.

    Returns:
        (M, K') and (K', N), K' a multiple of `GATHERED`; where asking for the steps would wait for a device, the
        most that they can take.
    """
    if a.blocks != COLUMN or b.blocks.rows != 0:
        return a, b
    k = a.codes.shape[1]
    step, order = a.step[0].sort(descending=True, stable=True)
    known = step.nan_to_num(nan=-1.0)
    kind = torch.cat([torch.zeros_like(order[:1]), (known[1:] != known[:-1]).long()]).cumsum(0)
    sizes = torch.zeros(_KINDS, dtype=torch.int64, device=step.device).index_add_(0, kind, torch.ones_like(kind))
    blocks = -(-sizes // GATHERED)
    within = torch.arange(k, device=step.device) - (sizes.cumsum(0) - sizes)[kind]
    place = (blocks.cumsum(0) - blocks)[kind] * GATHERED + within
    count = int(blocks.sum()) if at_hand(step) else -(-k // GATHERED) + _KINDS - 1
    left = a.codes.new_zeros(a.codes.shape[0], count * GATHERED).index_copy_(1, place, a.codes[:, order])
    right = b.codes.new_zeros(count * GATHERED, b.codes.shape[1]).index_copy_(0, place, b.codes[order])
    steps = step.new_zeros(1, count)
    steps[0, place // GATHERED] = step
    return Stepped(left, steps, Blocks(0, GATHERED)), Stepped(right, b.step, b.blocks)


def steps_by_block(a: Stepped, length: int) -> Tensor:
    """(row blocks of a, ceil(D / length)), contiguous: a's steps, one per block of `length` columns."""
    count = -(-a.codes.shape[1] // length)
    step = a.step.detach()
    if a.blocks.columns == 0:
        return step.expand(step.shape[0], count).contiguous()
    return step.repeat_interleave(a.blocks.columns // length, 1)[:, :count].contiguous()


def _check(a: Stepped, b: Stepped, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.codes.dtype != torch.int8 or x.step.dtype != torch.float32:
            raise TypeError(f"{name} holds {x.codes.dtype} codes and {x.step.dtype} steps: give int8 and float32")
        if x.codes.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(x.codes.shape)}: give 2 axes")
        count = x.blocks.count((x.codes.shape[0], x.codes.shape[1]))
        if tuple(x.step.shape) != count:
            raise ValueError(f"{name} has steps of shape {tuple(x.step.shape)}; its blocks ask for {count}")
    if a.codes.shape[1] != b.codes.shape[0]:
        raise ValueError(f"cannot multiply {tuple(a.codes.shape)} by {tuple(b.codes.shape)}")
    if len({x.device for x in (a.codes, a.step, b.codes, b.step)}) > 1:
        raise ValueError("codes and steps lie on several devices")
    length = block_length(a, b)
    if not length:
        raise ValueError(f"blocks of {a.blocks.columns} and {b.blocks.rows} terms have no common length")
    if min(length, a.codes.shape[1]) > MOST_TERMS:
        raise ValueError(f"a block of {length} terms: give at most {MOST_TERMS}, whose sum fits int32")
    if dtype not in _RESULTS:
        raise TypeError(f"a result of {dtype}: give float32, bfloat16 or float16")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != b.codes.shape[1:]):
        wanted = f"float32 of shape ({b.codes.shape[1]},)"
        raise ValueError(f"bias is {bias.dtype} of shape {tuple(bias.shape)}: give {wanted}")


def blocked_matmul(
    a: Stepped, b: Stepped, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """a · b, of codes whose steps vary by blocks; see the module.

    Args:
        a: (M, K) with blocks of any rows × L columns, L = 0 for all.
        b: (K, N) with blocks of L' rows × any columns. Where neither L nor L' is 0, one divides the other; the
            shorter is at most `MOST_TERMS`.
        bias: (N,) float32, added last; None is none.
        dtype: of the result, float32, bfloat16 or float16, rounded once.

    Returns:
        (M, N), contiguous.

    Raises:
        TypeError, ValueError: a dtype or a shape is wrong, or the blocks do not fit.
    """
    (m, k), n, length = a.codes.shape, b.codes.shape[1], block_length(a, b)
    left = Blocks(a.blocks.rows, 1).spread(steps_by_block(a, length), (m, -(-k // length)))
    right = Blocks(b.blocks.columns, 1).spread(steps_by_block(b.T, length), (n, -(-k // length))).T
    out = torch.zeros(m, n, dtype=torch.float32, device=a.codes.device)
    for block in range(-(-k // length)):
        terms = slice(block * length, (block + 1) * length)
        sums = (a.codes[:, terms].double() @ b.codes[terms].double()).float()  # float64 holds them exactly
        out = out + sums * (left[:, block : block + 1] * right[block])
    return (out if bias is None else out + bias).to(dtype)


matmul = Op(blocked_matmul, _check)
