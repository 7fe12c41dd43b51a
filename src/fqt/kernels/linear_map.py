"""The linear map of a layer: its three products, and which axes of an operand are its rows.

A convolution is linear per sample, so it has the same three products as a matrix product and the same row axis;
one autograd function serves both through this small interface. Operands are quantized *laid out*: with channels as
the last axis, which is how the integer kernels read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.kernels import ops


@dataclass(frozen=True)
class DenseMap:
    """`output = input · weightᵀ`: input (…, I), weight (O, I), output (…, O)."""

    aligned_tokens = True
    """Whether one input position meets one output position, so that a step per token can move across."""
    habit = "token"
    """The rows of an operand if the recipe does not say."""
    transposed = False
    groups = 1
    weight_contracted = -1
    """The axis of `weight_by_channel` with the input features."""

    def output(self, input: Tensor, weight: Tensor) -> Tensor:
        """(…, O)."""
        return F.linear(input, weight)

    def grad_input(self, grad_output: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        """(…, I)."""
        return grad_output @ weight

    def grad_weight(self, grad_output: Tensor, input: Tensor, weight_shape: torch.Size) -> Tensor:
        """(O, I)."""
        return grad_output.flatten(0, -2).T @ input.flatten(0, -2)

    def grad_bias(self, grad_output: Tensor) -> Tensor:
        """(O,) float64."""
        return ops.value_sums(grad_output.flatten(0, -2))

    def lay(self, x: Tensor) -> Tensor:
        """Channels last: x itself."""
        return x

    def unlay(self, x: Tensor) -> Tensor:
        """The inverse of `lay`."""
        return x

    def per_channel(self, vector: Tensor, ndim: int) -> Tensor:
        """A vector (O,) so that it broadcasts against the output."""
        return vector

    def weight_by_channel(self, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The weight as it is quantized, and its output-channel axes."""
        return weight, (0,)

    def weight_restored(self, weight: Tensor) -> Tensor:
        """The inverse of `weight_by_channel`."""
        return weight


@dataclass(frozen=True)
class ConvMap:
    """A convolution or transposed convolution: input (N, C, *), output (N, O, *).

    Attributes:
        stride, padding, dilation, output_padding: one number per spatial axis.
        groups: channel groups; a transposed convolution's weight is (C, O/groups, *), else (O, C/groups, *).
        transposed: whether it is the transposed form.
        extra: further zero padding of the input, as `torch.nn.functional.pad` takes it, for padding that
            differs from side to side ("same" with an even kernel).
        group_channels: of a group's input or output channels the fewer; 0 if it is not known.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    group_channels: int = 0

    aligned_tokens = False
    habit = "sample"

    def output(self, input: Tensor, weight: Tensor) -> Tensor:
        """(N, O, *)."""
        input, weight = _settled(self._pad(input)), _settled(weight)
        return torch.ops.aten.convolution(input, weight, None, *self._arguments())

    def grad_input(self, grad_output: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        """(N, C, *)."""
        if not grad_output.numel() or not math.prod(input_shape):  # which torch refuses
            return grad_output.new_zeros(input_shape)
        padded = self._pad(grad_output.new_empty(1).expand(input_shape), shape_only=True)
        grad, _, _ = torch.ops.aten.convolution_backward(
            _settled(grad_output), padded, _settled(weight), None, *self._arguments(), [True, False, False]
        )
        if self.extra:
            grad = F.pad(grad, [-p for p in self.extra])
        return grad

    def grad_weight(self, grad_output: Tensor, input: Tensor, weight_shape: torch.Size) -> Tensor:
        """The weight's shape."""
        if not grad_output.numel() or not input.numel():  # which torch refuses
            return grad_output.new_zeros(weight_shape)
        arguments = self._arguments()
        if self._skips_pixels(weight_shape):
            # oneDNN writes past its buffers on the way from channels-last images of few channels (float32, where
            # AVX2 is the best instruction set). The tap meets every stride-th pixel: it gets only those.
            spatial = input.shape[2:] if self.transposed else grad_output.shape[2:]
            steps = [slice(None, (n - 1) * s + 1, s) for n, s in zip(spatial, self.stride, strict=True)]
            met = (slice(None), slice(None), *steps)
            if self.transposed:
                grad_output = grad_output[met]
            else:
                input = input[met]
            ones, zeros = [1] * len(self.stride), [0] * len(self.stride)
            arguments = (ones, zeros, ones, self.transposed, zeros, self.groups)
        weight = grad_output.new_empty(1).expand(weight_shape)
        _, grad, _ = torch.ops.aten.convolution_backward(
            _settled(grad_output), _settled(self._pad(input)), weight, None, *arguments, [False, True, False]
        )
        return grad

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Of the spatial axes, for an input and a kernel of these sizes; below 1 where a kernel does not fit."""
        sizes = list(zip(size, kernel, self.stride, self.padding, self.dilation, strict=True))
        if self.transposed:
            more = list(self.output_padding) or [0] * len(sizes)
            return tuple(
                (n - 1) * s - 2 * p + d * (k - 1) + 1 + m for (n, k, s, p, d), m in zip(sizes, more, strict=True)
            )
        both = [left + right for left, right in zip(self.extra[::2], self.extra[1::2], strict=True)]
        more = both[::-1] or [0] * len(sizes)  # `extra` has the last axis first
        return tuple(
            (n + m + 2 * p - d * (k - 1) - 1) // s + 1 for (n, k, s, p, d), m in zip(sizes, more, strict=True)
        )

    def _skips_pixels(self, weight_shape: Sequence[int]) -> bool:
        """Whether strides pass over pixels that the kernel, of one tap and without padding, never meets."""
        one_tap = max(self.stride) > 1 and max(weight_shape[2:]) == 1
        return one_tap and not any(self.padding) and not self.extra

    def grad_bias(self, grad_output: Tensor) -> Tensor:
        """(O,) float64."""
        return ops.value_sums(self.lay(grad_output).flatten(0, -2))

    def lay(self, x: Tensor) -> Tensor:
        """(N, *, C) from (N, C, *), a view."""
        return x.movedim(1, -1)

    def unlay(self, x: Tensor) -> Tensor:
        """(N, C, *) from (N, *, C), a view."""
        return x.movedim(-1, 1)

    def per_channel(self, vector: Tensor, ndim: int) -> Tensor:
        """A vector (O,) so that it broadcasts against the output."""
        return vector.view(-1, *[1] * (ndim - 2))

    def weight_by_channel(self, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The weight as it is quantized, and its output-channel axes: (O, *, C/groups), axis 0.

        A transposed convolution's: (groups, C/groups, O/groups, *), axes 0 and 2.
        """
        if not self.transposed:
            return weight.movedim(1, -1), (0,)
        return weight.unflatten(0, (self.groups, -1)), (0, 2)

    @property
    def weight_contracted(self) -> int:
        """The axis of `weight_by_channel` with the input channels of a group."""
        return 1 if self.transposed else -1

    def weight_restored(self, weight: Tensor) -> Tensor:
        """The inverse of `weight_by_channel`."""
        return weight.flatten(0, 1) if self.transposed else weight.movedim(-1, 1)

    def _arguments(self) -> tuple:
        zeros = [0] * len(self.stride)
        output_padding = list(self.output_padding) or zeros
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            output_padding,
            self.groups,
        )

    def _pad(self, x: Tensor, shape_only: bool = False) -> Tensor:
        if not self.extra:
            return x
        if shape_only:
            shape = list(x.shape)
            for i in range(len(self.extra) // 2):
                shape[-1 - i] += self.extra[2 * i] + self.extra[2 * i + 1]
            return x.new_empty(1).expand(shape)
        return F.pad(x, list(self.extra))


LinearMap = DenseMap | ConvMap


def _settled(x: Tensor) -> Tensor:
    """x with the strides of channels first if it has one channel, which lies both ways.

    Taken for channels last it makes oneDNN's forward convolutions (AVX-512, float32) read past their rows.
    """
    return x.flatten().view(x.shape) if x.shape[1] == 1 else x


def rows(map: LinearMap, axis: str | None, ndim: int, habit: str | None = None) -> tuple[int, ...]:
    """The row axes of an input or a grad_output that is laid out: by `axis`; else by `habit`, or the layer's."""
    axis = axis or habit or map.habit
    if axis == "channel":
        return (ndim - 1,)
    return (0,) if axis == "sample" else tuple(range(ndim - 1))
