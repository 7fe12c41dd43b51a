"""The quantizer alone, against the rate at which this machine copies memory: both from memory to memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from fqt.bench.verify import Verification
from fqt.bench.workloads import Quantize, draw
from fqt.errors import FqtError
from fqt.nn import load_recipe
from fqt.quant import QuantizedTensor, Quantizer

_ROUNDING = 2.0**-20  # float32 arithmetic on values of a few units, relative to a row's range


def draw_all(workload: Quantize, device: torch.device | str = "cpu") -> list[Tensor]:
    """The workload's matrices."""
    return [draw(workload.input, 1 + number, device) for number in range(workload.matrices)]


class Copy:
    """`Tensor.copy_` of each matrix in turn to another of its size.

    Args:
        sources: the matrices.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self.source = sources[0]
        self.targets = [torch.zeros_like(source) for source in sources]
        self._turns = cycle(zip(self.targets, sources, strict=True))

    def __call__(self) -> None:
        """What is timed."""
        target, source = next(self._turns)
        target.copy_(source)

    @property
    def bytes(self) -> int:
        """Read and written by a call."""
        return 2 * self.source.nbytes

    def verify(self) -> Verification:
        """Whether the copy is one."""
        self()
        right = torch.equal(self.source, self.targets[0])
        return Verification(0.0, problem="" if right else "the copy differs")


class Quantization:
    """A recipe's quantizer of gradients on each matrix in turn, range and codes, as the layers call it.

    Args:
        sources: the matrices. The last result of each is held, so that codes leave the caches as matrices do.
        recipe: names the quantizer.

    Raises:
        FqtError: the recipe quantizes no gradient.
    """

    def __init__(self, sources: Sequence[Tensor], recipe: str) -> None:
        q = load_recipe(recipe).operand("grad_input")
        if q is None:
            raise FqtError(f"recipe {recipe!r} quantizes no gradient: it has no place in this case")
        self.quantizer: Quantizer = q
        self.source = sources[0]
        self.bytes = self.source.nbytes + _nbytes(self.quantize(0))
        self._held: list[QuantizedTensor | None] = [None] * len(sources)
        self._turns = cycle(enumerate(sources))
        for _ in sources:  # memory for all results
            self()

    def __call__(self) -> None:
        """What is timed."""
        index, source = next(self._turns)
        self._held[index] = self.quantizer.quantize(source, 0, nonfinite="propagate")

    def quantize(self, seed: int) -> QuantizedTensor:
        """The first matrix's codes."""
        return self.quantizer.quantize(self.source, seed, nonfinite="propagate")

    def verify(self, seeds: int) -> Verification:
        """Whether the error has the exact variance, and its mean over seeds vanishes as fast as it should."""
        exact = float(self.quantizer.variance(self.source, 0))
        total, energy = torch.zeros_like(self.source), 0.0
        for seed in range(seeds):
            difference = self.quantize(seed).dequantize() - self.source
            energy += _energy(difference) / seeds
            total += difference
        error = math.sqrt(energy / _energy(self.source))
        bias = math.sqrt(_energy(total / seeds) / (exact / seeds + _ROUNDING**2 * _energy(self.source)))
        problem = ""
        # Millions of entries: both ratios are 1 to a per cent or so, if transforms do not spread them.
        if not energy <= 1.2 * exact:
            problem = f"the squared error is {energy / exact:.3g} of what it should be"
        elif not bias <= 1.2:
            problem = f"biased: the mean over seeds is {bias:.3g} standard errors off"
        return Verification(error, bias, problem)


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64).square())


def _nbytes(q: QuantizedTensor) -> int:
    parts = (q.matrix_codes, q.matrix_scales.step, q.matrix_scales.offset, q.matrix_dither)
    return sum(part.nbytes for part in parts if part is not None)
