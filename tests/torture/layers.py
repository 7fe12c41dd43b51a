"""Random layers under random recipes: the native kernels against plain torch, finite gradients, no crash."""

from __future__ import annotations

import random
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import fqt
from tests.backends import reference_only
from tests.torture.common import fuzz

GRADIENTS = ("ptq", "psq", "bhq", "shq")


def recipe(r: random.Random) -> str | dict:
    """A named recipe, or one of its own words."""
    if r.random() < 0.4:
        return r.choice(["default", "qat", "psq8", "bhq4", "shq4d", "psq4x", "ptq8d"])
    words: dict = {"input": r.choice(["ptq8", "ptq4", "psq8"]), "weight": r.choice(["ptq8n", "psq8n", "ptq4n"])}
    for name in ("grad_input", "grad_weight"):
        words[name] = f"{r.choice(GRADIENTS)}{r.choice([2, 4, 5, 8])}{r.choice(['', 'd', 'x'])}"
    return words


def layer(r: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer and the shape of an input of it."""
    n, groups = r.choice([1, 2, 3, 5]), r.choice([1, 1, 1, 2])
    inputs, outputs = (groups * r.choice([1, 2, 3, 8, 16, 17]) for _ in range(2))
    if r.random() < 0.4:
        return nn.Linear(inputs, outputs, bias=r.random() < 0.7), (n, *r.choice([(), (4,), (3, 5)]), inputs)
    dims, transposed = r.choice([1, 2, 2, 2, 3]), r.random() < 0.25
    draw = lambda values: [r.choice(values) for _ in range(dims)]
    kernel = [1] * dims if r.random() < 0.3 else draw([1, 2, 3])
    how = {"stride": draw([1, 1, 2, 3]), "padding": draw([0, 1]), "dilation": draw([1, 1, 2]), "groups": groups}
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    made = kind(inputs, outputs, kernel, bias=r.random() < 0.7, **how)
    return made, (n, inputs, *draw([4, 5, 6, 8]))


def run(module: nn.Module, x: Tensor, autocast: bool, seed: int) -> list[Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = module(x)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape).to(y.dtype))
    gradients = [x.grad, *(p.grad for p in module.parameters())]
    return [y.detach(), *(g for g in gradients if g is not None)]


def check(seed: int) -> str:
    """What is wrong in the case of that seed; empty if nothing is."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    made, shape = layer(r)
    words, autocast = recipe(r), r.random() < 0.3
    x = torch.randn(shape) * (torch.rand(shape) < r.choice([0.1, 1.0])) * r.choice([1e-3, 1.0, 1e3])
    if len(shape) == 4 and r.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    about = f"{made}, {words}, shape {shape}, strides {x.stride()}, autocast {autocast}"
    module = nn.Sequential(made)
    try:
        module(x)
    except RuntimeError:
        return ""  # a kernel that does not fit
    fqt.quantize_(module, words)
    fast = run(module, x, autocast, seed)
    with reference_only():
        slow = run(module, x, autocast, seed)
    if len(fast) != len(slow):
        return f"a gradient is missing ({about})"
    for name, one, other in zip(("output", "input.grad", "weight.grad", "bias.grad"), fast, slow, strict=False):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{name} has another shape or dtype ({about})"
        if not one.isfinite().all():
            return f"{name} is not finite ({about})"
        gap, size = (one - other).double().norm(), other.double().norm()
        if gap > (1e-2 if autocast else 1e-4) * size + 1e-12:
            return f"{name} is {float(gap / size):.1e} off ({about})"
    return ""


def main(cases: int, seed: int = 0) -> dict:
    """Runs so many cases; see `fuzz`."""
    return fuzz(check, cases, seed)
