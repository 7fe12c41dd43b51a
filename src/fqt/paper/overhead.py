"""What quantizing a gradient costs in time, against the convolution that it makes an integer one.

A layer's grad_input in integers is: quantize grad_output, convolve the codes, and, with a transform, undo it on
the result. The first and the last are the overhead; it is given as a share of the convolution of the codes and of
the float convolution that both replace, on one thread.

Each works on the layout it likes best; a change of layout between them is not counted.

Nothing is timed before it is checked: the squared error of the quantizer's estimate against its exact variance,
and the convolution of the codes, sample by sample, against the same sums in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.errors import FqtError
from fqt.kernels import ops
from fqt.kernels.codes import Entries
from fqt.kernels.products import Geometry, conv2d_grad_input
from fqt.quant import Quantizer
from fqt.quant.transform import OverRows

__all__ = ["Convolution", "check_overhead", "quantiles", "time_convolution", "time_quantizer"]

Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution that keeps the size of its input: stride 1, padding kernel // 2, float32.

    Attributes:
        samples, channels, size, kernel: (N, C, H = W, k); C channels in and out.
    """

    samples: int = 128
    channels: int = 64
    size: int = 56
    kernel: int = 3

    def gradient(self, seed: int = 0) -> Tensor:
        """A grad_output (N, C, H, W) of Gaussian entries whose rows' sizes are lognormal, σ = 2: few large rows."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.samples, self.channels, self.size, self.size, generator=generator)
        return x.mul_((2 * torch.randn(self.samples, 1, 1, 1, generator=generator)).exp())

    def weight(self, seed: int = 0) -> Tensor:
        """(C, C, k, k) int8 codes of a weight."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.channels, self.channels, self.kernel, self.kernel)
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return codes.contiguous(memory_format=torch.channels_last)

    def of_codes(self, codes: Tensor, weight: Tensor) -> Tensor:
        """grad_input of integer codes: their exact sums."""
        padding = self.kernel // 2
        return conv2d_grad_input(codes, weight, (self.size, self.size), Geometry(padding=(padding, padding)))

    def of_floats(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """grad_input of floats."""
        return F.conv_transpose2d(gradient, weight, padding=self.kernel // 2)


def check_overhead(shape: Convolution, quantizers: Mapping[str, Quantizer], seed: int = 0) -> None:
    """Checks what `time_quantizer` and `time_convolution` time.

    ‖estimate − x‖² must lie within 10 % of the exact variance (over N·D entries it is an average over at least
    thousands, and four standard errors at 20,000 of them are about 3 %); the integer convolution must be exact.

    Raises:
        FqtError: one of them is wrong, or the matrix has fewer than 20,000 entries.
    """
    x = shape.gradient(seed)
    if x.numel() < 20_000:
        raise FqtError(f"a gradient of {x.numel()} entries is too small to check a quantizer on")
    for name, q in quantizers.items():
        error = float((q.quantize(x, seed).dequantize() - x).double().square().sum())
        variance = float(q.variance(x, seed))
        if not 0.9 * variance < error < 1.1 * variance:
            raise FqtError(f"{name} is wrong here: its squared error is {error:.3g}, its variance {variance:.3g}")
    codes = _codes(x, seed)[:2]
    weight = shape.weight(seed)
    sums, exact = shape.of_codes(codes, weight), shape.of_floats(codes.double(), weight.double())
    if not torch.equal(sums.double(), exact):
        raise FqtError("the convolution of codes is wrong here: its sums differ from those in float64")


def time_convolution(shape: Convolution, repeats: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Seconds of grad_input on codes ("integer") and on floats ("float32", channels-last and not: the faster)."""
    x, weight = shape.gradient(seed), shape.weight(seed)
    codes, floats = _codes(x, seed), weight.float()
    last = x.contiguous(memory_format=torch.channels_last)
    times = _times(
        {
            "integer": lambda: shape.of_codes(codes, weight),
            "float32": lambda: shape.of_floats(x, floats.contiguous()),
            "float32, channels last": lambda: shape.of_floats(last, floats),
        },
        repeats,
    )
    other = times.pop("float32, channels last")
    times["float32"] = min(times["float32"], other, key=lambda t: t["q50"])
    return times


def time_quantizer(shape: Convolution, q: Quantizer, repeats: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Seconds of a quantizer's parts, of all it adds to a layer, and of the convolution of codes beside it.

    They take turns, so that a machine that slows down slows all of them and their ratio stays.

    Returns:
        "range" (of the scale's groups), "transform" and "undo" (absent without one; the transform without its
        guard), "quantize" (everything up to the codes), "total" (quantize and undo) and "integer" (the
        convolution), each as quantiles.
    """
    gradient, weight = shape.gradient(seed), shape.weight(seed)
    codes, x = _codes(gradient, seed), gradient.flatten(1)
    quantized = q.quantize(x, seed, nonfinite="propagate")
    work: dict[str, Work] = {
        "range": lambda: ops.value_range(Entries(x), q.scale.blocks()),
        "quantize": lambda: q.quantize(x, seed, nonfinite="propagate"),
        "integer": lambda: shape.of_codes(codes, weight),
    }
    mixing = quantized.mixing
    if mixing is not None and isinstance(q.transform, OverRows):
        plain, key = replace(q.transform, guard=False), torch.tensor(seed)
        work["transform"] = lambda: plain.apply(Entries(x), q.coding, key)
        work["undo"] = lambda: mixing.undo(x)
    times = _times(work, repeats)
    undo = times.get("undo", dict.fromkeys(times["quantize"], 0.0))
    times["total"] = {name: value + undo[name] for name, value in times["quantize"].items()}
    return times


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 20 %, 50 % and 80 % quantiles."""
    levels = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return dict(zip(("q20", "q50", "q80"), levels.tolist(), strict=True))


def _codes(x: Tensor, seed: int) -> Tensor:
    """uint8 codes of a gradient, one step per sample, channels-last as the convolution likes them."""
    codes = Quantizer().quantize(x, seed).codes
    return codes.contiguous(memory_format=torch.channels_last)


def _times(work: Mapping[str, Work], repeats: int) -> dict[str, Any]:
    """Quantiles of the seconds each piece of work takes on one thread; they take turns, after a warm-up each."""
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            for run in work.values():
                run()
            for _ in range(repeats):
                for name, run in work.items():
                    start = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: quantiles(values) for name, values in seconds.items()}
