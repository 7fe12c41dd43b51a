"""The quantizer alone, against the rate at which this machine copies memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.bench.verify import Verification
from fqt.bench.workloads import Quantize, draw
from fqt.errors import FqtError
from fqt.nn import load_recipe
from fqt.quant import QuantizedTensor, Quantizer

_ROUNDING = 2.0**-20  # float32 arithmetic on values of a few units, relative to a row's range


class Copy:
    """`Tensor.copy_` of the matrix to another of its size."""

    def __init__(self, workload: Quantize) -> None:
        self.source = draw(workload.input, 1)
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> None:
        """What is timed."""
        self.target.copy_(self.source)

    @property
    def bytes(self) -> int:
        """Read and written by a call."""
        return self.source.nbytes + self.target.nbytes

    def verify(self) -> Verification:
        """Whether the copy is one."""
        self()
        right = torch.equal(self.source, self.target)
        return Verification(0.0, problem="" if right else "the copy differs")


@dataclass
class Quantization:
    """A recipe's quantizer of gradients on the matrix, range and codes, as the layers call it.

    Attributes:
        workload: on what.
        quantizer: which.
    """

    workload: Quantize
    quantizer: Quantizer

    def __post_init__(self) -> None:
        self.source = draw(self.workload.input, 1)
        self.bytes = self.source.nbytes + _nbytes(self.quantize(0))

    @classmethod
    def of(cls, workload: Quantize, recipe: str) -> Quantization:
        """Raises FqtError: the recipe quantizes no gradient."""
        q = load_recipe(recipe).operand("grad_input")
        if q is None:
            raise FqtError(f"recipe {recipe!r} quantizes no gradient: it has no place in this case")
        return cls(workload, q)

    def __call__(self) -> None:
        """What is timed."""
        self.quantize(0)

    def quantize(self, seed: int) -> QuantizedTensor:
        """The codes."""
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
    parts = (q.matrix_codes, q.matrix_step, q.matrix_offset, q.matrix_dither)
    return sum(part.nbytes for part in parts if part is not None)
