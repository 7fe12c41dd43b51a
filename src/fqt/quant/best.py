"""A choice between quantizers, by their exact variance on the tensor at hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels.choice import quantize_best
from fqt.kernels.codes import Entries, Findings, Quantized
from fqt.kernels.rounding import Coding, Rounding
from fqt.kernels.tensor import RowView
from fqt.quant.grid import Grid
from fqt.quant.quantizer import Quantizer
from fqt.quant.scale import Scale
from fqt.quant.transform import Transform, Undo


@dataclass(frozen=True, kw_only=True)
class Best(Quantizer):
    """Of several quantizers the one that has the least exact variance on a tensor; the first where two are equal.

    The choice looks at the data, not at the rounding noise: unbiased as each of them is.

    Attributes:
        candidates: quantizers of one transform, one group of entries that share a step and codes of one dtype; they
            differ in where zero lies and in the rounding.
        transform, scale, grid, rounding: the first candidate's.
    """

    candidates: tuple[Quantizer, ...]
    transform: Transform = field(init=False, repr=False, compare=False)
    scale: Scale = field(init=False, repr=False, compare=False)
    grid: Grid = field(init=False, repr=False, compare=False)
    rounding: Rounding | str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if len(self.candidates) < 2 or not all(type(q) is Quantizer for q in self.candidates):
            raise FqtError(f"Best chooses between two quantizers or more, not {self.candidates!r}")
        if any(q.scale.remembers for q in self.candidates):
            raise FqtError("the quantizers that Best chooses between must have the tensor's own range")
        first = self.candidates[0]
        for name in ("transform", "scale", "grid", "rounding"):
            object.__setattr__(self, name, getattr(first, name))
        if any((q.transform, q.scale.group, q.scale.axis, q.grid) != self._common for q in self.candidates):
            raise FqtError("the quantizers that Best chooses between must have one transform, group, axis and grid")
        if self.transform.sees_levels("affine"):
            # The guard decides block by block, the choice is of the whole: neither is exact without the other.
            raise FqtError("guard='exact' compares one rounding's variances: choose 'stochastic' or 'dithered'")
        if any(q.code_dtype != first.code_dtype for q in self.candidates):
            raise FqtError("the quantizers that Best chooses between must have codes of one dtype")

    @property
    def _common(self) -> tuple:
        return self.transform, self.scale.group, self.scale.axis, self.grid

    @property
    def codings(self) -> tuple[Coding, ...]:
        """The candidates'."""
        return tuple(q.coding for q in self.candidates)

    @property
    def rounding_name(self) -> str:
        """ "best"."""
        return "best"

    def with_bits(self, bits: int) -> Best:
        """The same choice at another width."""
        return Best(candidates=tuple(q.with_bits(bits) for q in self.candidates))

    def with_transform(self, transform: Transform) -> Best:
        """The same choice after another transform."""
        return Best(candidates=tuple(q.with_transform(transform) for q in self.candidates))

    def _codes(
        self, x: Entries, view: RowView, key: Tensor | None, known: Findings | None
    ) -> tuple[Quantized, Undo]:
        y, undo = self.transform.apply(x, self.coding, key)
        return self._rounded(y, view, key, undo, known if undo == Undo() else None), undo

    def _rounded(
        self, y: Entries, view: RowView, key: Tensor | None, undo: Undo, known: Findings | None
    ) -> Quantized:
        cost = None if undo.mixing is None else undo.mixing.cost
        return quantize_best(y, self._blocks(view), self.codings, key, cost, known)


def rounded(transform: Transform, scale: Scale, grid: Grid, rounding: Rounding | str) -> Quantizer:
    """The quantizer of these choices.

    Args:
        transform, scale, grid: as `Quantizer` takes them.
        rounding: as `Quantizer` takes it; or "best": of stochastic rounding on this scale and on the affine one,
            and dithered rounding on that, whichever has the least exact variance.
    """
    if rounding != "best":
        return Quantizer(transform=transform, scale=scale, grid=grid, rounding=rounding)
    if scale.mode == "symmetric":
        raise FqtError("the best rounding is one of affine scales, not of a symmetric one")
    own = Quantizer(transform=transform, scale=scale, grid=grid, rounding="stochastic")
    affine = replace(own, scale=replace(scale, mode="affine"))
    return Best(candidates=tuple(dict.fromkeys((own, affine, replace(affine, rounding="dithered")))))
