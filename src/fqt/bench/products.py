"""Products of codes summed in blocks, against the plain product of the same codes."""

from __future__ import annotations

import torch

from fqt.bench.verify import Verification
from fqt.bench.workloads import SEED, Product
from fqt.kernels import blocked, products
from fqt.kernels.blocked import Stepped
from fqt.kernels.codes import TENSOR, Blocks
from fqt.kernels.epilogue import Epilogue

OPERANDS = ("rows × one step", "tiles", "rows × columns")
"""Who shares a step: a row's block, against one for all; tiles on both sides; a row's block and a column's."""


class BlockedProduct:
    """(M, K) · (K, N) of int8 codes into float32.

    Args:
        workload: the sizes.
        operands: one of `OPERANDS`; None for the plain product, a step per row and one for the second operand.
        device: where.
    """

    def __init__(self, workload: Product, operands: str | None, device: torch.device | str = "cpu") -> None:
        draw, (m, k), n, size = (
            torch.Generator().manual_seed(SEED),
            workload.input,
            workload.columns,
            workload.block,
        )
        left, right = (
            torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8) for shape in ((m, k), (k, n))
        )
        self.plain = operands is None
        self.epilogue = Epilogue(
            row_scale=torch.rand(m, generator=draw).to(device),
            column_scale=torch.rand(1, generator=draw).to(device),
        )
        tiles = Blocks(size, size)
        blocks = {
            None: (TENSOR, TENSOR),
            "rows × one step": (Blocks(1, size), TENSOR),
            "tiles": (tiles, tiles),
            "rows × columns": (Blocks(1, size), Blocks(size, 1)),
        }[operands]
        self.left, self.right = (
            Stepped(
                codes.to(device),
                torch.rand(who.count((codes.shape[0], codes.shape[1])), generator=draw).to(device),
                who,
            )
            for codes, who in zip((left, right), blocks, strict=True)
        )

    def __call__(self) -> torch.Tensor:
        """What is timed: (M, N)."""
        if self.plain:
            return products.matmul(self.left.codes, self.right.codes, self.epilogue)
        return blocked.matmul(self.left, self.right)

    def verify(self) -> Verification:
        """Whether the first rows are the reference's bit for bit."""
        rows = 64
        if self.plain:
            wanted = self.left.codes[:rows].double() @ self.right.codes.double()
            found = products.matmul(self.left.codes[:rows], self.right.codes).double()
        else:
            who = self.left.blocks
            part = Stepped(self.left.codes[:rows], self.left.step[: -(-rows // who.rows)], who)
            wanted, found = blocked.matmul.reference(part, self.right), self()[:rows]
        return Verification(0.0, problem="" if torch.equal(wanted, found) else "it differs from the reference")
