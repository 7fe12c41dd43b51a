"""What the two kinds of layer do differently with codes: their products, and the vectors that correct them.

`DenseCodes` multiplies matrices, with tokens as rows; `ConvCodes` convolves, with samples as rows, and its vectors
are maps of one sample, in which a tap that padding left out counts as the value 0. Both have the same methods, used
by `fqt.kernels.integer`; sums of codes and of codes times 24-bit dither are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqt.kernels import ops, products, volume
from fqt.kernels.codes import DITHER_LEVELS
from fqt.kernels.epilogue import Epilogue
from fqt.kernels.linear_map import ConvMap
from fqt.kernels.op import Op
from fqt.kernels.products import Spatial
from fqt.kernels.taps import Axis, Taps
from fqt.kernels.tensor import QuantizedTensor

Sizes = tuple[int, ...]


def row_offset(g: QuantizedTensor) -> Tensor:
    """(N,) or (1,): the value of code 0 in each row, without the columns' dither."""
    offset = g.group_offset.flatten()
    if g.noise is None:
        return offset
    return offset + g.matrix_step.flatten() * (g.noise.centre - g.noise.row.flatten())


def integers(fractions: Tensor) -> Tensor:
    """24-bit integers from multiples of 2⁻²⁴."""
    return (fractions.flatten() * DITHER_LEVELS).to(torch.int32)


@Op
def in_bytes(noise: Tensor) -> Tensor:
    """(3, …) uint8: the bytes of 24-bit integers, the highest first."""
    return torch.stack([noise >> 16, noise >> 8, noise]).to(torch.uint8)


@Op
def from_bytes(sums: Tensor) -> Tensor:
    """float64: what sums over the three bytes' planes (3, …) stand for, as fractions again."""
    high, middle, low = sums.double()
    return (high * 65536 + middle * 256 + low) / DITHER_LEVELS


@dataclass(frozen=True)
class Channels:
    """grad_output for the weight's gradient: one row per token, one column per output channel.

    Attributes:
        codes: (T, O).
        step, offset: (O,) or (1,), the offset with the channels' dither.
        token_noise: (T,) int32, 24-bit; None without dither.
        shape: of grad_output, laid out.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor
    token_noise: Tensor | None
    shape: torch.Size

    @staticmethod
    def of(g: QuantizedTensor) -> Channels:
        """From one whose rows are channels."""
        codes = g.matrix_codes if g.view.transposed else g.matrix_codes.T
        step, offset = g.matrix_step.flatten(), g.group_offset.flatten()
        if g.noise is None:
            return Channels(codes, step, offset, None, g.shape)
        token, channel = g.noise.row, g.noise.column
        if not g.view.transposed:
            token, channel = channel, token
        offset = offset + step * (g.noise.centre - channel.flatten())
        return Channels(codes, step, offset, integers(token), g.shape)

    def chunk(self, groups: int) -> list[Channels]:
        """The channels in as many equal groups."""
        parts = lambda v: v.chunk(groups) if v.numel() > 1 else [v] * groups
        shape = torch.Size((*self.shape[:-1], self.shape[-1] // groups))
        each = zip(self.codes.chunk(groups, 1), parts(self.step), parts(self.offset), strict=True)
        return [Channels(*values, self.token_noise, shape) for values in each]


class DenseCodes:
    """A Linear's products: tokens are rows."""

    def rows(self, x: QuantizedTensor) -> int:
        """T."""
        return x.shape[:-1].numel()

    def by_row(self, vector: Tensor, x: QuantizedTensor) -> Tensor:
        """(T,) from one number per token or sample."""
        return vector.repeat_interleave(self.rows(x) // max(vector.numel(), 1))

    def _codes(self, q: QuantizedTensor) -> Tensor:
        return q.matrix_codes.view(self.rows(q), q.shape[-1])

    def ones_times_weight(self, x: QuantizedTensor, w: QuantizedTensor) -> Tensor:
        """w·1: (O,)."""
        return ops.row_sums(w.matrix_codes).float()

    def output(self, x: QuantizedTensor, w: QuantizedTensor, epilogue: Epilogue) -> Tensor:
        """(…, O)."""
        product = products.matmul(self._codes(x), w.matrix_codes.T, epilogue)
        return product.view(*x.shape[:-1], w.matrix_codes.shape[0])

    def vectors_times_weight(
        self, g: QuantizedTensor, w: QuantizedTensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor | None]:
        """1·w and b·w: (I,)."""
        noise = None if g.noise is None else integers(g.noise.column)
        ones, dithered = ops.column_sums(w.matrix_codes, noise)
        return ones.float(), None if dithered is None else (dithered.double() / DITHER_LEVELS).float()

    def grad_input(self, g: QuantizedTensor, w: QuantizedTensor, shape: torch.Size, epilogue: Epilogue) -> Tensor:
        """(…, I)."""
        return products.matmul(self._codes(g), w.matrix_codes, epilogue).view(shape)

    def vectors_times_input(
        self,
        g: Channels,
        x: QuantizedTensor,
        step: Tensor,
        offset: Tensor,
        shape: torch.Size,
        centre: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """1·X and a·X: (I,), and 1·q: (I,) int64. X = step · q + offset, with a centre times its row's number."""
        codes = self._codes(x)
        plain, weighted = ops.column_sums(codes, g.token_noise)
        step, offset = step.double(), offset.double()
        met = codes.shape[0] if centre is None else self.by_row(centre, x).sum(dtype=torch.int64)
        ones, dithered = (step * plain + offset * met).float(), None
        if weighted is not None and g.token_noise is not None:
            noise = g.token_noise.long() if centre is None else g.token_noise.long() * self.by_row(centre, x)
            dithered = ((step * weighted + offset * noise.sum()) / DITHER_LEVELS).float()
        return ones, dithered, plain

    def sums_by_tap(
        self, g: Channels, x: QuantizedTensor, shape: torch.Size, zero: Tensor, centre: Tensor | None
    ) -> Tensor:
        """(c − zero)·1 (O, 1), or with a centre for 1."""
        if centre is None:
            sums = ops.column_sums(g.codes)[0] - zero.long() * g.codes.shape[0]
        else:
            weights = self.by_row(centre, x)
            weighted = ops.column_sums(g.codes, weights)[1]
            assert weighted is not None
            sums = weighted - zero.long() * weights.sum(dtype=torch.int64)
        return sums.float()[:, None]

    def tap_columns(self, shape: torch.Size, like: Tensor) -> Tensor:
        """The columns that belong to a tap (1, I): ones."""
        return like.new_ones(1, shape[1])

    def values_by_tap(self, sums: Tensor, g: torch.Size, x: torch.Size, shape: torch.Size) -> Tensor:
        """(1, O) float32, of sums of values over the rows of the input (…, O), float64."""
        return sums.view(sums.numel() // max(shape[0], 1), shape[0]).sum(0, keepdim=True).float()

    def grad_weight(self, g: Channels, x: QuantizedTensor, shape: torch.Size, epilogue: Epilogue) -> Tensor:
        """(O, I)."""
        return products.matmul(g.codes.T, self._codes(x), epilogue)


def at_least_two(values: Sequence[int], first: int) -> Sizes:
    """One number per spatial axis; `first` stands before that of a single axis."""
    return (first, values[0]) if len(values) == 1 else tuple(values)


def sums_over_samples(codes: Tensor, shape: torch.Size, weights: Tensor | None) -> Tensor:
    """(*, C) int64 of codes of the laid-out shape (N, *, C): their sum, of each sample times its weight."""
    plain, weighted = ops.column_sums(codes.reshape(shape[0], shape[1:].numel()), weights)
    found = (plain if weighted is None else weighted).view(shape[1:])
    return found.unsqueeze(0) if found.ndim == 2 else found


@dataclass(frozen=True)
class ConvCodes:
    """A convolution's products in two or three dimensions, one being an image of height 1. Samples are rows."""

    geometry: Spatial
    flat: bool

    @staticmethod
    def of(map: ConvMap) -> ConvCodes:
        """From a map that is not transposed; of one that is, those of the convolution whose gradient it is."""
        steps = at_least_two(map.stride, 1), at_least_two(map.padding, 0), at_least_two(map.dilation, 1)
        return ConvCodes(Spatial(*steps, map.groups), len(map.stride) == 1)

    def image(self, codes: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Codes (N, C, H, W) or (N, C, D, H, W), channels-last, from codes of the laid-out shape (N, *, C)."""
        n, *size, c = shape
        return codes.reshape(n, *([1] if self.flat else []), *size, c).movedim(-1, 1)

    def narrowed(self, image: Tensor) -> Tensor:
        """(N, C, *) from an image."""
        return image.squeeze(2) if self.flat else image

    def widened(self, x: Tensor) -> Tensor:
        """The inverse of `narrowed`."""
        return x.unsqueeze(2) if self.flat else x

    def in_groups(self, groups: int) -> ConvCodes:
        """The same in so many groups."""
        return replace(self, geometry=replace(self.geometry, groups=groups))

    def rows(self, x: QuantizedTensor) -> int:
        """N."""
        return x.shape[0]

    def by_row(self, vector: Tensor, x: QuantizedTensor) -> Tensor:
        """(N,)."""
        return vector

    def ones_times_weight(self, x: QuantizedTensor, w: QuantizedTensor) -> Tensor:
        """The weight on the mask of the taps that are there: (H', W', O)."""
        size = at_least_two(x.shape[1:-1], 1)
        return products.conv2d_mask(self.image(w.matrix_codes, w.shape), size, self.geometry, "output")

    def output(self, x: QuantizedTensor, w: QuantizedTensor, epilogue: Epilogue) -> Tensor:
        """(N, O, *)."""
        codes, weight = self.image(x.matrix_codes, x.shape), self.image(w.matrix_codes, w.shape)
        return self.narrowed(volume.convolve(codes, weight, self.geometry, epilogue))

    def vectors_times_weight(
        self, g: QuantizedTensor, w: QuantizedTensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor | None]:
        """A grad_output of ones, and the columns' dither as one, through the map: (H, W, C)."""
        weight, size = self.image(w.matrix_codes, w.shape), at_least_two(shape[2:], 1)
        ones = products.conv2d_mask(weight, size, self.geometry, "grad_input")
        if g.noise is None:
            return ones, None
        planes = self.image(in_bytes(integers(g.noise.column)), (3, *g.shape[1:]))
        sums = volume.grad_input(planes, weight, size, self.geometry)
        return ones, from_bytes(sums.movedim(1, -1)).float()

    def grad_input(self, g: QuantizedTensor, w: QuantizedTensor, shape: torch.Size, epilogue: Epilogue) -> Tensor:
        """(N, C, *)."""
        codes, weight = self.image(g.matrix_codes, g.shape), self.image(w.matrix_codes, w.shape)
        return self.narrowed(volume.grad_input(codes, weight, at_least_two(shape[2:], 1), self.geometry, epilogue))

    def vectors_times_input(
        self,
        g: Channels,
        x: QuantizedTensor,
        step: Tensor,
        offset: Tensor,
        shape: torch.Size,
        centre: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """1·X and a·X for every tap: (taps · C,), and 1·q: the same in int64.

        X = step · q + offset, with a centre times its sample's number.
        """
        image, kernel = self.image(x.matrix_codes, x.shape), at_least_two(shape[2:], 1)
        n = image.shape[0]
        reads, serves = self.taps(g.shape, x.shape, shape)
        windows = reads.sums(sums_over_samples(x.matrix_codes, x.shape, None))
        counts = (n if centre is None else centre.sum()) * serves.counts(g.codes.device)
        step, offset = step.double(), offset.double()
        ones, of_codes = (step * windows + offset * counts).flatten().float(), windows.flatten().to(torch.int64)
        if g.token_noise is None:
            return ones, None, of_codes
        planes = self.image(in_bytes(g.token_noise).T.contiguous(), (*g.shape[:-1], 3))
        sums = volume.grad_weight(planes, image, kernel, self.geometry)
        weighted = from_bytes(sums.movedim(1, -1).flatten(1, -2))
        noise = g.token_noise.view(n, *serves.size, 1).long()
        noise = noise if centre is None else noise * centre.view(n, *[1] * (noise.ndim - 1))
        totals = serves.sums(noise.sum(0)) / DITHER_LEVELS
        return ones, (step * weighted + offset * totals).flatten().float(), of_codes

    def taps(self, g: torch.Size, x: torch.Size, shape: torch.Size) -> tuple[Taps, Taps]:
        """The input's pixels that the taps read, and the output's that they serve; of laid-out shapes."""
        sizes = (at_least_two(shape[2:], 1), *(at_least_two(laid[1:-1], 1) for laid in (x, g)))
        how = (self.geometry.stride, self.geometry.padding, self.geometry.dilation)
        axes: tuple[Axis, ...] = tuple(zip(*sizes, *how, strict=True))
        return Taps(axes, True), Taps(axes, False)

    def sums_by_tap(
        self, g: Channels, x: QuantizedTensor, shape: torch.Size, zero: Tensor, centre: Tensor | None
    ) -> Tensor:
        """(c − zero)·1 for every tap (O, taps), or with a centre for 1."""
        _, serves = self.taps(g.shape, x.shape, shape)
        met = g.shape[0] if centre is None else centre.sum(dtype=torch.int64)
        sums = serves.sums(sums_over_samples(g.codes, g.shape, centre))
        return (sums - zero * (met * serves.counts(g.codes.device))).T.float()

    def tap_columns(self, shape: torch.Size, like: Tensor) -> Tensor:
        """The columns that belong to each tap (taps, taps · C): ones, and zeros elsewhere."""
        return torch.eye(shape[2:].numel(), device=like.device).repeat_interleave(shape[1], 1)

    def values_by_tap(self, sums: Tensor, g: torch.Size, x: torch.Size, shape: torch.Size) -> Tensor:
        """(taps, O) float32, of sums of values over samples (pixels · O,), float64."""
        _, serves = self.taps(g, x, shape)
        return serves.sums(sums.view(*serves.size, shape[0])).float()

    def grad_weight(self, g: Channels, x: QuantizedTensor, shape: torch.Size, epilogue: Epilogue) -> Tensor:
        """(O, C, *)."""
        codes, image = self.image(g.codes, g.shape), self.image(x.matrix_codes, x.shape)
        product = volume.grad_weight(codes, image, at_least_two(shape[2:], 1), self.geometry, epilogue)
        return self.narrowed(product)
