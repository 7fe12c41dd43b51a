"""The products as a machine with integers would form them: codes in int64, then steps, offsets, dither, transform.

    input X = s_x·c_x + z_x,  weight W = s_w·c_w,  gradient G = s·(c − a) + z, row by row, before its transform
    is undone (a is a dither per column). A missing tap under padding is the value 0, not a code: the offset's
    product is with the validity mask.

    output       s_x s_w (c_x ∗ c_w) + z_x s_w (mask ∗ c_w), and the bias
    grad_input   s s_w (cᵀ-map of c_w) − s s_w (map of a) + z s_w (map of ones), then the transform over rows
    grad_weight  s s_x (c·c_x) + s z_x (c·mask) − s (a·X) + z (1·X), then the transform over rows

Both layers are one map here: patches of the input, by an index found by unfolding 1 … C·H·W (0 is a missing tap).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fqt import QuantizedTensor, Recipe

from . import checks
from .cases import LAYERS, Case, converted, gradients

MAPS = [c for c in LAYERS if c.make is nn.Linear or (c.make is nn.Conv2d and "padding_mode" not in c.kwargs)]
MAPS = [c for c in MAPS if c.kwargs.get("padding") not in ("same", "valid")]
PADDED = next(c for c in MAPS if c.name == "conv2d")
RECIPES = {
    "ptq8": Recipe(grad_input="ptq8", grad_weight="ptq8"),
    "psq4": Recipe(grad_input="psq4", grad_weight="psq4@channel"),
    "dithered": Recipe(grad_input="psq4d", grad_weight="psq8d@channel"),
    "tensor_dither": Recipe(grad_input="ptq4d", grad_weight="ptq8d"),
    "best": Recipe(grad_input="shq8x", grad_weight="psq8x@channel"),
    "bhq": Recipe(grad_input="bhq4", grad_weight="bhq8d@channel"),
    "shq": Recipe(grad_input="shq4d", grad_weight="shq4@channel"),
}


@dataclass
class Map:
    """Patches of an input (R, C, …) seen as (R, K, L), and back."""

    index: Tensor  # (K, L): 1 + position in the sample, 0 for a missing tap
    groups: int
    size: int

    @staticmethod
    def of(layer: nn.Module, shape: tuple[int, ...]) -> Map:
        if isinstance(layer, nn.Linear):
            return Map(torch.arange(1, shape[-1] + 1)[:, None], 1, shape[-1])
        size = shape[1] * shape[2] * shape[3]
        image = torch.arange(1.0, size + 1, dtype=torch.float64).view(1, *shape[1:])
        index = F.unfold(image, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return Map(index[0].round().long(), layer.groups, size)

    @property
    def mask(self) -> Tensor:
        return (self.index > 0).long()

    def patches(self, x: Tensor) -> Tensor:
        """(R, K, L) of (R, size); missing taps are 0."""
        return torch.cat([x.new_zeros(len(x), 1), x], 1)[:, self.index]

    def output(self, patches: Tensor, w: Tensor) -> Tensor:
        """(R, O, L) from (R, K, L) and (O, K/groups)."""
        parts = zip(w.chunk(self.groups), patches.chunk(self.groups, 1), strict=True)
        return torch.cat([torch.einsum("ok,rkl->rol", wg, p) for wg, p in parts], 1)

    def grad_input(self, g: Tensor, w: Tensor) -> Tensor:
        """(R, size) from (R, O, L): the transposed map, scattered back."""
        parts = zip(w.chunk(self.groups), g.chunk(self.groups, 1), strict=True)
        taps = torch.cat([torch.einsum("ok,rol->rkl", wg, part) for wg, part in parts], 1)
        out = taps.new_zeros(len(g), self.size + 1)
        return out.index_add_(1, self.index.flatten(), taps.flatten(1))[:, 1:]

    def grad_weight(self, g: Tensor, patches: Tensor) -> Tensor:
        """(O, K/groups) from (R, O, L) and (R, K, L)."""
        parts = zip(g.chunk(self.groups, 1), patches.chunk(self.groups, 1), strict=True)
        return torch.cat([torch.einsum("rol,rkl->ok", part, p) for part, p in parts])


def undo(q: QuantizedTensor, product: Tensor, of_ones: Tensor) -> Tensor:
    """S⁻¹ on the product's rows, and the rows' own offsets times the product of ones."""
    if q.mixing is None:
        return product
    m = q.mixing.matrix.transposed(torch.eye(len(product))).double()
    return (m @ product) * q.mixing.inverse_scale.double() + q.mixing.offset.double() * of_ones


class Machine:
    """What one forward and backward left behind, multiplied as integers."""

    def __init__(self, case: Case, made: list[QuantizedTensor]) -> None:
        layer = case.layer()
        x, w, self.gi, self.gw = made
        assert all(q.matrix_codes.dtype in (torch.uint8, torch.int8) for q in made)
        self.map = Map.of(layer, case.shape)
        self.x = x.codes.long().reshape(-1, self.map.size)  # (R, size); tokens are samples
        self.w = w.codes.long().flatten(1)  # (O, K/groups)
        self.sx, self.zx, self.sw = (t.double().squeeze() for t in (x.matrix_step, x.matrix_offset, w.matrix_step))
        assert not w.matrix_offset.any()
        self.bias = 0.0 if layer.bias is None else layer.bias.detach().view(-1, 1)
        self.dense = isinstance(layer, nn.Linear)
        self.mask, self.dither = self.map.mask, True

    def codes(self, q: QuantizedTensor, values: Tensor) -> Tensor:
        """(R, O, L) from a tensor that broadcasts over grad_output."""
        values = values.expand(q.shape)
        return values.reshape(-1, q.shape[-1], 1) if self.dense else values.reshape(*q.shape[:2], -1)

    def output(self) -> Tensor:
        integer = self.map.output(self.map.patches(self.x), self.w)
        border = self.map.output(self.mask[None], self.w)
        return self.sx * self.sw * integer + self.zx * self.sw * border + self.bias

    def grad_input(self) -> Tensor:
        q, w = self.gi, self.w
        s, z = q.matrix_step.double(), q.matrix_offset.double()  # one per row, or one
        integer = self.map.grad_input(self.codes(q, q.codes.long()), w)
        ones = self.map.grad_input(torch.ones(1, len(w), self.index_width, dtype=torch.long), w)
        product = s * self.sw * integer + z * self.sw * ones
        if q.matrix_dither is not None and self.dither:
            columns = q.matrix_dither.double().expand(1, len(w) * self.index_width).view(1, len(w), -1)
            product = product - s * self.sw * self.map.grad_input(columns, w.double())
        return undo(q, product, self.sw * ones)

    @property
    def index_width(self) -> int:
        return self.map.index.shape[1]

    def grad_weight(self) -> Tensor:
        q = self.gw
        codes, patches = self.codes(q, q.codes.long()), self.map.patches(self.x)
        mask = self.mask.expand_as(patches)
        integer, border = self.map.grad_weight(codes, patches), self.map.grad_weight(codes, mask)
        x = self.sx * patches + self.zx * mask
        s, of_ones = q.matrix_step.double(), self.map.grad_weight(torch.ones_like(codes).double(), x)
        product = s * (self.sx * integer + self.zx * border)
        if q.view.axis == ((len(q.shape) - 1,) if self.dense else (1,)):  # rows are channels
            product = product + q.matrix_offset.double() * of_ones
        else:  # one step; a dithered offset differs from sample to sample
            product = product + self.map.grad_weight(self.codes(q, q.offset.double()), x)
        if q.matrix_dither is not None and self.dither:
            product = product - s * self.map.grad_weight(self.codes(q, q.dither.double()), x)
        return undo(q, product, of_ones)


def check(case: Case, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **broken: object) -> None:
    """To float32 rounding: 2e-5 of the largest entry."""
    with monkeypatch.context() as patch:
        made = checks.record(patch)
        out, grad_x, grad_w, *_ = gradients(converted(case, recipe, torch.float32), case.input(torch.float32))
    machine = Machine(case, made)
    for name, value in broken.items():
        setattr(machine, name, value)
    for mine, truth in ((machine.output(), out), (machine.grad_input(), grad_x), (machine.grad_weight(), grad_w)):
        error = (mine.reshape(truth.shape) - truth.double()).abs().max()
        assert error <= 2e-5 * truth.abs().max(), f"{error:.3g} of {truth.abs().max():.3g}"


# A transform over channels mixes the groups of a grouped convolution, whose patches differ: it does not pull out.
PAIRS = [(c, n) for n in RECIPES for c in MAPS if n not in ("bhq", "shq") or c.kwargs.get("groups", 1) == 1]


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=lambda p: getattr(p, "name", p))
def test_integer_products_are_the_simulated_ones(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, RECIPES[name], monkeypatch)


def test_a_border_without_mask_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Map.of(PADDED.layer(), PADDED.shape).index
    with pytest.raises(AssertionError, match="of"):
        check(PADDED, RECIPES["psq4"], monkeypatch, mask=torch.ones_like(index))


@pytest.mark.parametrize("name", ["dithered", "tensor_dither", "shq"])
def test_a_forgotten_dither_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="of"):
        check(PADDED, RECIPES[name], monkeypatch, dither=False)
