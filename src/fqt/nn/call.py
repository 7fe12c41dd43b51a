"""One call of a layer: what it adds to its operands, and the noise that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.kernels import integer, ops, results
from fqt.kernels.linear_map import LinearMap
from fqt.kernels.ranges import RangeState
from fqt.nn.arithmetic import on_integers, operands
from fqt.nn.ranges import Ranges
from fqt.nn.recipe import Recipe
from fqt.nn.witness import Witness
from fqt.quant.quantizer import Quantizer

_ROLES = {"grad_input": 0, "grad_weight": 1}
_RIGHT, _KEEP = 0, 1
"""Who draws from a product's seed beside the quantizer of grad_output: that of the right operand, the sampler."""


@dataclass(frozen=True)
class GradientOperand:
    """grad_output as it is about to be quantized for one product.

    Attributes:
        role: "grad_input" or "grad_weight": the product it is for.
        gradient: float, grad_output with its channels as last axis; what `quantizer` gets: folded steps are
            multiplied in already.
        folded: what was multiplied in, broadcasting against `gradient`; None if nothing was.
        quantizer: the recipe's for this role.
        rows: the axes of `gradient` that are its rows.
        seed: of the noise: `quantizer.quantize(gradient, seed, axis=rows, range=range)` gives the very codes of the
            product.
        weight: shape of the weight that the layer multiplied by in this call; None if the layer did not say.
        range: what the layer remembers, if the quantizer's range is not the tensor's own.
        kept: whether `gradient` is a sample of grad_output's rows, or a part of their spectrum (`Product.keep`).
    """

    role: str
    gradient: Tensor
    folded: Tensor | None
    quantizer: Quantizer
    rows: tuple[int, ...]
    seed: Tensor
    weight: torch.Size | None = None
    range: RangeState | None = None
    kept: bool = False


@dataclass(frozen=True)
class Call:
    """What one call of a layer adds to its operands.

    Attributes:
        map: the layer's linear map.
        recipe: its quantizers.
        seed: int64 scalar, on the CPU or on the GPU of the input: the source of this call's gradient noise; None
            in eval mode, whose gradient is exact.
        dtype: of the output.
        channels_last: whether the output and the input's gradient are laid out so, and the weight's in a compiled
            graph; else they are contiguous.
        observer: told of every gradient operand before it is quantized.
        witness: told of every product that has run.
        ranges: what the layer remembers; None where its recipe remembers nothing, or the gradient is exact.
    """

    map: LinearMap
    recipe: Recipe
    seed: Tensor | None
    dtype: torch.dtype
    channels_last: bool = False
    observer: Callable[[GradientOperand], None] | None = None
    witness: Witness | None = None
    ranges: Ranges | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the gradient is that of the forward-quantized network, without noise."""
        return self.seed is None or not (self.recipe.grad_input or self.recipe.grad_weight)

    def on_integers(self, product: str, values: Tensor) -> bool:
        """Whether a product of these values runs on integer codes."""
        found = on_integers(product, self.map, self.recipe, values)
        if self.witness is not None and None not in operands(product, self.map, self.recipe):
            self.witness.decided(found and not integer.machine_obstacle(values.device.type))
        return found

    def at_work(self) -> AbstractContextManager:
        """Lasts while the layer computes."""
        return nullcontext() if self.witness is None else self.witness

    def ran(self, product: str, output: torch.Size, input: torch.Size, weight: torch.Size) -> None:
        """A product has run, in a layer of these shapes; all three have as many multiplications."""
        if self.witness is not None:
            self.witness.ran(product, math.prod(input if self.map.transposed else output) * math.prod(weight[1:]))

    def as_laid_out(self, x: Tensor) -> Tensor:
        """x in the memory format of this call's results."""
        if not self.channels_last:
            return results.contiguous(x)
        return results.contiguous(x, torch.channels_last if x.ndim == 4 else torch.channels_last_3d)

    def noise(self, role: str, device: torch.device) -> Tensor:
        """The seed of one operand's quantizer.

        The distributed rank is mixed in, so that equal seeds on all ranks stay independent: the rank that draws,
        not the one where a graph was made.
        """
        return self._noise(role).to(device)

    def right_noise(self, role: str, device: torch.device) -> Tensor:
        """The seed of the quantizer of a product's right operand, where that is quantized again."""
        return ops.fork_seed(self._noise(role), _RIGHT).to(device)

    def keep_noise(self, role: str, device: torch.device) -> Tensor:
        """The seed of a product's sampler of rows."""
        return ops.fork_seed(self._noise(role), _KEEP).to(device)

    def _noise(self, role: str) -> Tensor:
        assert self.seed is not None
        return ops.fork_seed(self.seed, 2 * _rank() + _ROLES[role])


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0
