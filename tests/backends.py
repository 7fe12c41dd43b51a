"""Backends beside the reference: every operation without them, and each implementation against the reference."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fqt.kernels
from fqt.kernels.op import Op


@cache
def operations() -> dict[str, Op]:
    """Every operation that is declared under `fqt.kernels`, by its module and name."""
    names = [found.name for found in pkgutil.walk_packages(fqt.kernels.__path__, "fqt.kernels.")]
    # Modules of the Triton backend declare no operation, and need Triton, which not every machine has.
    declaring = [name for name in names if "._native" not in name and ".triton." not in name]
    modules = [importlib.import_module(name) for name in declaring]
    found = {id(o): (f"{m.__name__}.{n}", o) for m in modules for n, o in vars(m).items() if isinstance(o, Op)}
    return dict(found.values())


@contextmanager
def reference_only(*ops: Op) -> Iterator[None]:
    """No backend implements these operations while it lasts; without arguments, none implements any."""
    chosen = ops or tuple(operations().values())
    held = [op.implementations for op in chosen]
    for op in chosen:
        op.implementations = []
    try:
        yield
    finally:
        for op, implementations in zip(chosen, held, strict=True):
            op.implementations = implementations


def device_of(backend: str) -> str | None:
    """Where a backend's tensors lie; None if this machine has no such device."""
    if backend == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def moved(value: Any, device: str) -> Any:
    """The same with every tensor in it on that device; the CPU's are there already."""
    if device == "cpu" and not torch.cuda.is_available():
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: moved(getattr(value, f.name), device) for f in fields(value) if f.init}
        return replace(value, **changed)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(v, device) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(moved(v, device) for v in value)
    return value


def same(a: Any, b: Any) -> bool:
    """Equal dtype, shape and values, NaN equal to NaN, in everything that two results hold."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(a.nan_to_num(nan=7e37), b.nan_to_num(nan=7e37))
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def compare(
    op: Op,
    *args: Any,
    wanted: Any = None,
    equal: Callable[[Any, Any], bool] = same,
    by: str | None = "cpu",
) -> None:
    """Every implementation that takes these arguments gives what the reference gives.

    Args:
        op, args: the operation and its arguments, on the CPU; they are moved to where an implementation wants them.
        wanted: what they must give, where the caller knows it.
        equal: of a result and the reference's.
        by: the backend that must be among those that take them; None if none need do.
    """
    if wanted is None:
        with reference_only():
            wanted = op.reference(*args)
    taken = []
    for implementation in op.implementations:
        device = device_of(implementation.backend)
        if device is None:
            continue
        there = moved(args, device)
        if implementation.when(*there):
            found = moved(implementation.run(*there), "cpu")
            assert equal(found, wanted), (op.__name__, implementation.backend, args)
            taken.append(implementation.backend)
    assert by is None or by in taken, f"{by} does not take {op.__name__} of these arguments"
