"""The products of a transposed convolution: those of the convolution whose gradient it is, in other roles.

Its output is that convolution's gradient for the input, its gradient for the input that convolution's output,
its gradient for the weight the same with input and grad_output exchanged:

    output       x through grad_input, by the weight (C, O/groups, *)
    grad_input   g through output
    grad_weight  Σ X·G over the pixels where a tap takes x to g

Offsets, steps and dither of a grad_weight lie on the columns of that product, and by tap, where an epilogue has no
place for them. It is made of exact sums instead (`weight_gradient`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels import products, volume
from fqt.kernels.codes import DITHER_LEVELS
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.fold import Folded
from fqt.kernels.linear_map import ConvMap
from fqt.kernels.low_rank import (
    Channels,
    ConvCodes,
    at_least_two,
    from_bytes,
    in_bytes,
    integers,
    sums_over_samples,
)
from fqt.kernels.tensor import QuantizedTensor


@dataclass(frozen=True)
class TransposedCodes:
    """The counterpart of `ConvCodes`, with the same methods but for `grad_weight`."""

    map: ConvMap
    conv: ConvCodes

    @staticmethod
    def of(map: ConvMap) -> TransposedCodes:
        """From a transposed map, whose output padding stays below its stride."""
        return TransposedCodes(map, ConvCodes.of(map))

    def _weight(self, w: QuantizedTensor) -> Tensor:
        """(C, O/groups, H, W), from one that is laid out as (groups, C/groups, O/groups, *)."""
        return self.conv.widened(w.codes.flatten(0, 1))

    def _size(self, x: QuantizedTensor, weight: Tensor) -> tuple[int, ...]:
        """The output's spatial axes."""
        spatial, kernel = x.shape[1:-1], weight.shape[2:][-len(self.map.stride) :]
        return at_least_two(self.map.output_size(spatial, kernel), 1)

    def rows(self, x: QuantizedTensor) -> int:
        """N."""
        return x.shape[0]

    def by_row(self, vector: Tensor, x: QuantizedTensor) -> Tensor:
        """(N,)."""
        return vector

    def ones_times_weight(self, x: QuantizedTensor, w: QuantizedTensor) -> Tensor:
        """The weight on the mask of the taps that are there: (*, O)."""
        weight = self._weight(w)
        return products.conv2d_mask(weight, self._size(x, weight), self.conv.geometry, "grad_input")

    def output(self, x: QuantizedTensor, w: QuantizedTensor, epilogue: Epilogue) -> Tensor:
        """(N, O, *)."""
        weight = self._weight(w)
        codes, size = self.conv.image(x.matrix_codes, x.shape), self._size(x, weight)
        return self.conv.narrowed(volume.grad_input(codes, weight, size, self.conv.geometry, epilogue))

    def vectors_times_weight(
        self, g: QuantizedTensor, w: QuantizedTensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor | None]:
        """A grad_output of ones, and the columns' dither as one, through the map: (*, C)."""
        weight, geometry = self._weight(w), self.conv.geometry
        ones = products.conv2d_mask(weight, at_least_two(g.shape[1:-1], 1), geometry, "output")
        if g.noise is None:
            return ones, None
        planes = self.conv.image(in_bytes(integers(g.noise.column)), (3, *g.shape[1:]))
        sums = volume.convolve(planes, weight, geometry)
        return ones, from_bytes(sums.movedim(1, -1)).float()

    def grad_input(self, g: QuantizedTensor, w: QuantizedTensor, shape: torch.Size, epilogue: Epilogue) -> Tensor:
        """(N, C, *)."""
        codes = self.conv.image(g.matrix_codes, g.shape)
        return self.conv.narrowed(volume.convolve(codes, self._weight(w), self.conv.geometry, epilogue))

    def values_by_tap(self, sums: Tensor, g: torch.Size, x: torch.Size, shape: torch.Size) -> Tensor:
        """(taps, O) float32, of sums of values over samples (pixels · O,), float64."""
        meets, _ = self.conv.taps(x, g, shape)
        return meets.sums(sums.view(*meets.size, g[-1])).float()


def serves(map: ConvMap, shape: torch.Size) -> bool:
    """Whether the gradient of a weight of this shape is made of exact sums: of a transposed convolution, and of one
    with a filter for every channel, where an epilogue per group would be as long as the sums."""
    return map.transposed or (map.groups > 1 and shape[1] == 1 and shape[0] == map.groups)


def weight_gradient(
    map: ConvMap, g: Channels, x: QuantizedTensor, folded: Folded | None, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """The weight's gradient from exact sums, as a matrix, before a transform over its rows is undone.

    With c the codes of grad_output and q of the input, a the dither of pixels, m the number of a sample (the centre
    of its codes, or 1), all summed over the pixels where a tap takes one to the other,

        Σ G X = s·(s_x Σcq + z_x Σcm − s_x Σaq − z_x Σam) + z'·(s_x Σq + z_x Σm),

    in float64, in which the sums are exact while they stay below 2⁵³, and rounded once.

    Args:
        map: one that `serves`.
        g: grad_output.
        x: the input.
        folded: as in `integer.grad_weight`; without its share.
        shape: the weight's.

    Returns:
        (O, taps · C/groups) and 1·X by column, float64; with groups the latter means nothing.
    """
    sums = _Sums.of(map, g, x, None if folded is None else folded.centre, shape)
    step, offset = x.matrix_step.double().flatten(), x.group_offset.double().flatten()
    if folded is not None:
        step, offset = step.new_ones(1), offset.new_full((1,), 0.0 if folded.centre is None else -1.0)
    of_codes = step * sums.product + offset * sums.codes
    if sums.noise is not None and sums.noise_product is not None:
        of_codes = of_codes - (step * sums.noise_product + offset * sums.noise)
    of_ones = step * sums.input + offset * sums.met
    by_channel = lambda v: v.double().expand(g.codes.shape[1]).view(map.groups, -1, 1, 1)
    found = by_channel(g.step) * of_codes + by_channel(g.offset) * of_ones
    return found.flatten(0, 1).flatten(1), of_ones[0].flatten()


def as_weight(map: ConvMap, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The weight's shape from a matrix (O, taps · C/groups)."""
    groups, inputs = map.groups, shape[0] // map.groups if map.transposed else shape[1]
    laid = matrix.view(groups, matrix.shape[0] // groups, *shape[2:], inputs).movedim(-1, 2)
    return (laid.transpose(1, 2) if map.transposed else laid).flatten(0, 1)


@dataclass(frozen=True)
class _Sums:
    """Sums over the pixels where a tap takes input to grad_output, float64; see `weight_gradient`.

    They broadcast to (groups, O/groups, taps, C/groups).
    """

    product: Tensor
    codes: Tensor
    input: Tensor
    met: Tensor
    noise_product: Tensor | None
    noise: Tensor | None

    @staticmethod
    def of(map: ConvMap, g: Channels, x: QuantizedTensor, centre: Tensor | None, shape: torch.Size) -> _Sums:
        conv, n, kernel = ConvCodes.of(map), x.shape[0], at_least_two(shape[2:], 1)
        image, grad = conv.image(x.matrix_codes, x.shape), conv.image(g.codes, g.shape)
        if map.transposed:
            of_g, of_x = conv.taps(x.shape, g.shape, shape)
        else:
            of_x, of_g = conv.taps(g.shape, x.shape, shape)

        def multiplied(of_grad: Tensor, groups: int) -> Tensor:
            """(groups, O/groups, taps, C/groups), or with one group for grad_output's channels and all of the
            input's."""
            how = conv.in_groups(groups).geometry
            if map.transposed:  # (C, O/groups, *)
                sums = volume.grad_weight(image, of_grad, kernel, how).double().flatten(2)
                return sums.unflatten(0, (groups, -1)).permute(0, 2, 3, 1)
            sums = volume.grad_weight(of_grad, image, kernel, how).double().flatten(2)
            return sums.unflatten(0, (groups, -1)).transpose(2, 3)

        def by_group(sums: Tensor) -> Tensor:
            """(taps, C) of the input by group: (groups, 1, taps, C/groups)."""
            return sums.unflatten(1, (map.groups, -1)).movedim(1, 0).unsqueeze(1)

        weights = torch.ones(n, device=image.device, dtype=torch.int64) if centre is None else centre.long()
        codes = of_g.sums(sums_over_samples(g.codes, g.shape, centre)).T
        met = weights.sum() * of_g.counts(weights.device).view(1, 1, -1, 1)
        read = by_group(of_x.sums(sums_over_samples(x.matrix_codes, x.shape, None)))
        found = (multiplied(grad, map.groups), codes.unflatten(0, (map.groups, -1)).unsqueeze(-1), read, met)
        if g.token_noise is None:
            return _Sums(*found, None, None)
        planes = conv.image(in_bytes(g.token_noise).T.contiguous(), (*g.shape[:-1], 3))
        noise_product = from_bytes(multiplied(planes, 1).squeeze(0))  # (taps, C)
        noise = g.token_noise.view(n, -1).long() * weights.view(n, 1)
        totals = of_g.sums(noise.sum(0).view(*of_g.size, 1)) / DITHER_LEVELS
        return _Sums(*found, by_group(noise_product), totals.view(1, 1, -1, 1))
