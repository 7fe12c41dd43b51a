"""Random quantizers on random tensors: the native kernels against plain torch, code ranges, variance and bound."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

import fqt
from fqt.quant import BlockHouseholder, Identity, Integers, QuantizedTensor, Quantizer, Scale, ScaledHadamard
from fqt.quant.best import rounded
from tests.backends import reference_only
from tests.torture.common import fuzz

KINDS = ("zeros", "constant", "denormal", "huge", "one_hot", "sparse", "lognormal", "gaussian", "mixed", "nan")


def data(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """A float64 tensor of that kind."""
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    coin = torch.rand(shape, generator=g, dtype=torch.float64)
    by_row = noise[(slice(None), *[slice(0, 1)] * (len(shape) - 1))] if noise.numel() else noise
    return {
        "zeros": lambda: torch.zeros_like(noise),
        "constant": lambda: torch.full_like(noise, 0.3),
        "denormal": lambda: noise * 1e-41,
        "huge": lambda: noise * 1e37,
        "one_hot": lambda: (coin == coin.max()).double() - 0.1 if coin.numel() else coin,
        "sparse": lambda: noise * (coin < 0.05),
        "lognormal": lambda: noise * (3 * by_row).exp(),
        "gaussian": lambda: noise,
        "mixed": lambda: noise * (coin < 0.5) + 1e3 * (coin > 0.98) - 0.0,
        "nan": lambda: torch.where(coin < 0.02, torch.where(noise < 0, torch.nan, torch.inf), noise),
    }[kind]()


def member(r: random.Random) -> Quantizer:
    """A random point of the product; combinations that are refused are drawn again."""
    while True:
        try:
            guard = r.choice([True, False, "exact"])
            block = r.choice([2, 8, 128])
            transform = r.choice([Identity(), Identity(), BlockHouseholder(guard), ScaledHadamard(guard, block)])
            scale = Scale(r.choice(["tensor", "row", "row", "column"]), r.choice(["affine", "zero", "symmetric"]))
            rounding = r.choice(["nearest", "stochastic", "dithered", "best"])
            return rounded(transform, scale, Integers(r.randint(2, 8)), rounding)
        except fqt.FqtError:
            continue


def tensor(r: random.Random, g: torch.Generator) -> tuple[str, Tensor]:
    """Its kind, and a tensor of random shape, dtype and strides."""
    kind = r.choice(KINDS)
    sizes = [0, 1, 1, 2, 3, 5, 7, 8, 16, 17, 33] if r.random() < 0.1 else [1, 2, 3, 5, 7, 8, 16, 17, 33, 65]
    shape = tuple(r.choice(sizes) for _ in range(r.choice([1, 2, 2, 2, 3, 4])))
    while math.prod(shape) > 20_000:
        shape = shape[:-1]
    dtype = r.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64])
    x = data(kind, shape, g)
    if dtype == torch.float16:
        x = x.clamp(-6e4, 6e4)
    x = x.to(dtype)
    layout = r.choice(["contiguous", "contiguous", "transposed", "sliced"])
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    return kind, x


def _differs(a: QuantizedTensor, b: QuantizedTensor) -> str:
    for name in ("matrix_codes", "matrix_step", "group_offset"):
        one, other = getattr(a, name), getattr(b, name)
        if one.dtype != other.dtype or not torch.equal(one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0)):
            return f"{name} of the kernels and of plain torch differ"
    return ""


def check(seed: int) -> str:
    """What is wrong in the case of that seed; empty if nothing is."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    q, (kind, x) = member(r), tensor(r, g)
    axes = list(range(x.ndim))
    axis = r.choice([0, -1, tuple(r.sample(axes, r.randint(1, x.ndim)))])
    factor = torch.rand(x.shape[-1], generator=g) + 0.5 if r.random() < 0.2 and x.dtype != torch.float64 else None
    about = f"{q}, {kind}, {x.dtype}, shape {tuple(x.shape)}, strides {x.stride()}, axis {axis}"

    def quantized() -> QuantizedTensor:
        return q.quantize(x, seed, axis=axis, nonfinite="propagate", factor=factor)

    fast = quantized()
    with reference_only():
        slow = quantized()
    wrong = _differs(fast, slow)
    last = q.grid.symmetric_steps if q.scale.mode == "symmetric" else q.grid.affine_steps
    codes = fast.codes.int()
    if codes.numel() and (codes.max() > last or codes.min() < (-last if q.scale.mode == "symmetric" else 0)):
        wrong = wrong or f"codes {int(codes.min())} … {int(codes.max())}"
    out = fast.dequantize()
    if out.shape != x.shape or out.dtype != x.dtype:
        wrong = wrong or f"the result has shape {tuple(out.shape)} and dtype {out.dtype}"
    if kind != "nan" and factor is None:
        if not out.isfinite().all():
            wrong = wrong or "an infinite result of finite values"
        variance, bound = q.variance(x, seed, axis=axis), q.variance_bound(x, seed, axis=axis)
        with reference_only():
            other = q.variance(x, seed, axis=axis)
        if not variance <= bound * (1 + 1e-6):
            wrong = wrong or f"variance {float(variance)} above its bound {float(bound)}"
        if not torch.isclose(variance, other, rtol=1e-6, atol=0):
            wrong = wrong or f"variance {float(variance)} of the kernels, {float(other)} of plain torch"
        if not torch.isclose(q.variances(x, (2, q.grid.bits), seed, axis=axis)[0][1], variance, rtol=1e-6, atol=0):
            wrong = wrong or "variances() and variance() differ"
    return f"{wrong} ({about})" if wrong else ""


def main(cases: int, seed: int = 0) -> dict:
    """Runs so many cases; see `fuzz`."""
    return fuzz(check, cases, seed)
