"""Scale: who shares a step, where zero lies, how the step is stored, and where the range comes from.

From a block's range [lo, hi] and a number of steps n (B = 2^b − 1, one less with dither):

    affine      offset = lo, step = (hi − lo)/n                     codes 0 … B
    zero        the same with 0 exactly on a code: offset = −z·step, z an integer      codes 0 … B
    symmetric   offset = 0, step = max(|lo|, |hi|)/L                codes −L … L, L the grid's largest

A constant block gets step 0 and offset lo (symmetric: step |lo|, code ±1), so that it comes back bit for bit.
In its own range nothing is clipped, but by steps stored as "correctable"; in a remembered one
(`fqt.kernels.ranges`) what lies outside is. An absolute epsilon, the usual remedy against a zero range, was
rejected because it is a no-op for large values and swamps small ones.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from fqt.errors import FqtError
from fqt.kernels.codes import Blocks
from fqt.kernels.ranges import RANGES, RangeSource
from fqt.kernels.steps import STORES, Store

GROUPS = {"tensor": Blocks(0, 0), "row": Blocks(1, 0), "column": Blocks(0, 1)}
MODES = ("affine", "zero", "symmetric")
AXES = ("sample", "token", "channel")


@dataclass(frozen=True)
class Scale:
    """Who shares a step, where zero lies, how the step is stored, and where the range comes from.

    Attributes:
        group: "tensor", "row" or "column" of the matrix that is quantized, or the shape (rows, columns) of a block.
        mode: "affine", "zero" (affine with zero on a code) or "symmetric".
        axis: what a layer takes as rows: "sample", "token" (every position of a sequence or an image) or
            "channel" (the output channel); None for the operand's own habit. It says nothing for a matrix.
        store: the step as "float32"; as a "power" of two, rounded up; as an "e4m3" number under one float32 for the
            whole tensor, with head-room for its rounding ("correctable": with less, so that the largest values of a
            block may be clipped, for `Corrected` rounding); as a "shift" of
            one float32; or "fallback", with two codes for the blocks of large values. All but the first take
            symmetric scales; see `fqt.kernels.steps`.
        range: "own", the tensor's; "hindsight", the decayed mean of those of the tensors before; or "steered", a
            part of the largest magnitude, steered by the share that it clips. The last two take one step for the
            tensor, "steered" a symmetric scale, and what lies outside is clipped: see `fqt.kernels.ranges`.
    """

    group: str | tuple[int, int] = "row"
    mode: str = "affine"
    axis: str | None = None
    store: str = "float32"
    range: str = "own"

    def __post_init__(self) -> None:
        if isinstance(self.group, list):
            object.__setattr__(self, "group", tuple(self.group))
        block = isinstance(self.group, tuple) and len(self.group) == 2
        if block and not all(type(n) is int and n > 0 for n in self.group):
            raise FqtError(f"a block has two positive numbers of rows and columns, not {self.group!r}")
        for field, value, known in (("group", self.group, GROUPS), ("mode", self.mode, MODES)):
            if not _is_one(value, known) and not (block and field == "group"):
                more = " or the two sizes of a block" if field == "group" else ""
                raise FqtError(f"unknown scale {field} {value!r}; known: {', '.join(known)}{more}")
        if self.axis is not None and self.axis not in AXES:
            raise FqtError(f"unknown axis {self.axis!r}; known: {', '.join(AXES)}")
        if not _is_one(self.store, STORES):
            raise FqtError(f"unknown store of a step {self.store!r}; known: {', '.join(STORES)}")
        if self.store != "float32" and self.mode != "symmetric":
            raise FqtError(f"a step stored as {self.store!r} needs a symmetric scale, not {self.mode!r}")
        if not _is_one(self.range, RANGES):
            raise FqtError(f"unknown range of a scale {self.range!r}; known: {', '.join(RANGES)}")
        if self.remembers and self.group != "tensor":
            raise FqtError(f"a {self.range} range is one for the tensor, not one per {self.group}")
        if self.range == "steered" and self.mode != "symmetric":
            raise FqtError(f"a steered range is symmetric about 0: its scale cannot be {self.mode!r}")

    @property
    def row_axis(self) -> str | None:
        """The axis, where it counts: one step for the whole tensor has no rows.

        Its dither has, but these are always the operand's habit's, which the products rely on.
        """
        return None if self.group == "tensor" else self.axis

    @property
    def stored(self) -> Store:
        """How a step is stored."""
        return STORES[self.store]

    @property
    def source(self) -> RangeSource:
        """Where the range comes from."""
        return RANGES[self.range]

    @property
    def remembers(self) -> bool:
        """Whether the range comes from tensors before, and clips."""
        return self.source.remembers

    def bits_stored(self, shape: tuple[int, int]) -> int:
        """Of all steps and offsets of a matrix of this shape."""
        down, across = self.blocks().count(shape)
        return down * across * (self.stored.bits + (0 if self.mode == "symmetric" else 32)) + self.stored.common

    def blocks(self, transposed: bool = False) -> Blocks:
        """Who shares a step in a matrix; its columns are the rows if it lies on its side."""
        found = Blocks(*self.group) if isinstance(self.group, tuple) else GROUPS[self.group]
        return found.turned if transposed else found


def _is_one(word: object, known: Container[str]) -> bool:
    """Whether a word is known; a list or a table, which cannot be looked up, is none."""
    return isinstance(word, str) and word in known
