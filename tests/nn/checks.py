"""What must hold of a noisy gradient, and the defects that each check has to catch.

A sample holds M gradients of one batch, a dict of (M, P) float64 by parameter; `exact` holds the QAT gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import QuantizedTensor, Quantizer, Recipe
from fqt.kernels.codes import Findings

from .cases import parameter_gradients, simulate

Sample = dict[str, Tensor]
Gradients = dict[str, Tensor]


def qat_of(recipe: Recipe) -> Recipe:
    """The recipe without its gradient quantizers."""
    return replace(recipe, grad_input=None, grad_weight=None)


def draws(model: nn.Module, batch: tuple[Tensor, Tensor], count: int, seed: int = 0) -> Sample:
    """`count` gradients of one batch, seed by seed."""
    found: list[Gradients] = []
    for m in range(count):
        torch.manual_seed(1000 * seed + m)
        found.append(parameter_gradients(model, batch))
    return {name: torch.stack([g[name] for g in found]) for name in found[0]}


def slack(exact: Tensor) -> float:
    """What float32 arithmetic may add to an entry."""
    return 2e-6 * float(exact.abs().max())


def assert_mean_is(sample: Sample, exact: Gradients) -> None:
    """Student's t of every entry of every parameter, at |t| < 7, and room for noise too rare to be seen.

    False alarms: with M ≥ 96 and under 400 entries below 2e-7 for normal noise. An error of size J that comes with
    probability p and never showed in M draws hides a mean of p·J; p < 20/M but for a chance of 2e-9.
    """
    for name, values in sample.items():
        error = (values.mean(0) - exact[name]).abs()
        rare = 20 * float((values - exact[name]).abs().max()) / len(values)
        normal = 7 * values.std(0) / math.sqrt(len(values))
        allowed = normal.clamp(min=rare) + slack(exact[name])
        worst = int((error - allowed).argmax())
        assert bool((error <= allowed).all()), f"{name}[{worst}]: {error[worst]:.3g} > {allowed[worst]:.3g}"


def mean_errors(sample: Sample, exact: Gradients, name: str) -> list[tuple[int, float]]:
    """(m, ‖mean of m draws − exact‖² averaged over all choices of m of the M draws), m = 1, 2, 4, … M/16.

    All choices at once: V/m + (1 − 1/m) U, with V the mean of ‖error‖² and U that of ⟨error, another's error⟩.
    """
    error = sample[name] - exact[name]
    draws = len(error)
    squares = float(error.square().sum())
    v = squares / draws
    u = (float(error.sum(0).square().sum()) - squares) / (draws * (draws - 1))
    return [(1 << i, v / (1 << i) + (1 - 1 / (1 << i)) * u) for i in range((draws // 16).bit_length())]


def slope(points: list[tuple[int, float]]) -> float:
    """Of log error against log m, by least squares."""
    x = torch.tensor([math.log(m) for m, _ in points], dtype=torch.float64)
    y = torch.tensor([math.log(e) for _, e in points], dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def assert_error_falls_as_one_over_m(sample: Sample, exact: Gradients, names: list[str]) -> None:
    """Slope −1 ± 0.1 of the squared error of a mean of m draws, for every layer's weight.

    Measured over 32 seeds at M = 128 the slope's standard deviation is at most 0.019 about −1.001: five of them,
    so false alarms below 1e-6 per layer.
    """
    for name in names:
        points = mean_errors(sample, exact, name)
        assert points[0][1] > 0, f"{name} has no noise"
        found = slope(points)
        assert abs(found + 1) <= 0.1, f"{name}: slope {found:.3f}"


def z_of(values: Tensor) -> float:
    """Mean over standard error; infinite for a constant that is not zero."""
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    if error == 0:
        return 0.0 if mean == 0 else math.copysign(math.inf, mean)
    return mean / error


# Defects of the gradient quantizers. Each takes the real method and what it was called with.
Quantize = Callable[..., QuantizedTensor]


def _nearest(real: Quantize, q: Quantizer, x: Tensor, seed: Tensor, **kw: object) -> QuantizedTensor:
    return real(replace(q, rounding="nearest"), x, seed, **kw)


def _wrong_step(real: Quantize, q: Quantizer, x: Tensor, seed: Tensor, **kw: object) -> QuantizedTensor:
    found = real(q, x, seed, **kw)
    return replace(found, scales=replace(found.scales, step=found.scales.step * 1.05))


def _dropped_transform(real: Quantize, q: Quantizer, x: Tensor, seed: Tensor, **kw: object) -> QuantizedTensor:
    return replace(real(q, x, seed, **kw), mixing=None)


def _dropped_dither(real: Quantize, q: Quantizer, x: Tensor, seed: Tensor, **kw: object) -> QuantizedTensor:
    return replace(real(q, x, seed, **kw), noise=None)


def _clipped(real: Quantize, q: Quantizer, x: Tensor, seed: Tensor, **kw: object) -> QuantizedTensor:
    return real(q, x.clamp(0.7 * float(x.min()), 0.7 * float(x.max())), seed, **kw)


def _same_noise(real: Quantize, q: Quantizer, x: Tensor, seed: Tensor, **kw: object) -> QuantizedTensor:
    return real(q, x, torch.zeros_like(seed), **kw)


DEFECTS = {
    "nearest": _nearest,
    "wrong step": _wrong_step,
    "dropped transform": _dropped_transform,
    "dropped dither": _dropped_dither,
    "clipped": _clipped,
    "same noise": _same_noise,
}


class Unquantized:
    """Stands in for a quantized tensor whose quantizer is the identity."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.x if dtype is None else self.x.to(dtype)


def _identity(
    real: Quantize, q: Quantizer, x: Tensor, seed: Tensor, factor: Tensor | None = None, **kw: object
) -> object:
    return Unquantized(x if factor is None else x * factor)


def plant(monkeypatch: pytest.MonkeyPatch, defect: Callable = _identity) -> None:
    """Replaces what gradient quantizers do; those of the forward pass, which take no seed, stay as they are."""
    knowing = Quantizer.quantize_knowing

    def real(q: Quantizer, x: Tensor, seed: Tensor | None = None, **kw: object) -> QuantizedTensor:
        return knowing(q, x, Findings(), seed, **kw)[0]

    def quantize_knowing(
        self: Quantizer, x: Tensor, known: Findings, seed: Tensor | None = None, **kw: object
    ) -> tuple[object, Findings]:
        return knowing(self, x, known, seed, **kw) if seed is None else (defect(real, self, x, seed, **kw), known)

    monkeypatch.setattr(Quantizer, "quantize_knowing", quantize_knowing)
    if defect is _identity:  # it has no codes to multiply
        simulate(monkeypatch)


def record(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedTensor]:
    """Every quantized tensor made from now on, in order: input, weight, then the two of grad_output."""
    real, made = Quantizer.quantize_knowing, []

    def quantize_knowing(self: Quantizer, *args: object, **kw: object) -> tuple[QuantizedTensor, Findings]:
        found = real(self, *args, **kw)
        made.append(found[0])
        return found

    monkeypatch.setattr(Quantizer, "quantize_knowing", quantize_knowing)
    return made


def set_recipe(layer: nn.Module, **changes: object) -> None:
    """Changes one converted layer's recipe."""
    fqt.quantize_(layer, replace(layer.fqt_recipe, **changes))
