"""What the tests of this folder share: where kernels run, matrices, and one comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from fqt.kernels import reference
from fqt.kernels.codes import COLUMN, ROW, TENSOR, Blocks, Entries, Levels, Scales
from fqt.kernels.op import Op
from fqt.kernels.triton.device import interpreted
from tests.backends import moved, reference_only, same

DEVICE = "cpu" if interpreted() else "cuda"
SEED = torch.tensor(-0x123456789ABCDEF)
BLOCKS = {
    "tensor": TENSOR,
    "row": ROW,
    "column": COLUMN,
    "run": Blocks(1, 16),
    "tile": Blocks(32, 32),
    "odd": Blocks(7, 0),
}
KINDS = ("plain", "wide", "tiny", "zeros", "nan", "ties", "constant")


def matrix(shape: tuple[int, int], kind: str = "plain") -> torch.Tensor:
    """Values that reach the edge cases of the arithmetic."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator)
    pick = torch.rand(shape, generator=generator)
    if kind == "wide":
        return x / x.abs().amax() * 3e38
    if kind == "tiny":
        return x * 1e-40
    if kind == "zeros":
        return torch.where(pick < 0.5, 0.0, x).masked_fill(pick < 0.25, -0.0)
    if kind == "nan":
        return x.masked_fill(pick < 0.02, torch.nan).masked_fill(pick > 0.99, torch.inf)
    if kind == "ties":
        return (x * 4).round() / 2
    return torch.full(shape, 0.1) if kind == "constant" else x


def scales_over(x: Entries, blocks: Blocks, levels: Levels) -> Scales:
    """Parameters that spread each block over the levels and a little beyond, so that some entries are clamped."""
    lo, hi = reference.value_range(x, blocks)
    mode = "symmetric" if levels.low < 0 else "affine"
    step, offset = reference.parameters(lo, hi, mode, levels.high)
    return Scales(step * 0.95, offset, blocks)


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a GPU it is an error while this lasts to make the host wait for it."""
    if DEVICE == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check(module: ModuleType, op: Op, *args: Any, equal: Callable[[Any, Any], bool] = same) -> Any:
    """A module's kernel takes these arguments and gives what the operation's reference gives; returned on the CPU.

    Args:
        module: of `fqt.kernels.triton`.
        op: the operation, whose name the module's function bears.
        args: on the CPU.
        equal: of the result and the reference's.
    """
    with reference_only():
        wanted = op.reference(*args)
    there = moved(args, DEVICE)
    assert getattr(module, f"takes_{op.__name__}")(*there)
    with no_waiting():
        found = getattr(module, op.__name__)(*there)
    found = moved(found, "cpu")
    assert equal(found, wanted), f"{op.__name__}{args}"[:800]
    return found
