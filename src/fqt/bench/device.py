"""Where a bench runs: what the record says of a GPU, and the clock that belongs to a device."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from fqt.bench.timing import Clock, seconds
from fqt.errors import FqtError


def device_named(name: str) -> torch.device:
    """The device "cpu", "cuda" or "cuda:1".

    Raises:
        FqtError: another name, or no such device is there.
    """
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise FqtError(f"unknown device {name!r}; known: cpu, cuda, cuda:1 …")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no driver or GPU"
        raise FqtError(
            f"no CUDA device is there: torch {torch.__version__} {built}; leave --device out for the CPU"
        )
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        raise FqtError(f"no device {name}: the last one here is cuda:{count - 1}")
    return torch.device("cuda", int(index or 0))


def describe(device: torch.device) -> dict[str, Any] | None:
    """What a record says of a GPU; None for the CPU, which the environment's stamp describes."""
    if device.type == "cpu":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "bytes": found.total_memory,
        "driver": _driver(device.index),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformer_engine": _version("transformer_engine"),
    }


def _driver(index: int) -> str | None:
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def clock(device: torch.device) -> Clock:
    """Wall-clock time on the CPU; on a GPU the time between two events of its own."""
    return seconds if device.type == "cpu" else _between_events


def _between_events(call: Callable[[], object], calls: int = 1) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call allocates at most beside what was allocated before; None on the CPU, which does not count it."""
    if device.type == "cpu":
        return None
    call()  # what stays from the first one, an optimizer's state, is not its peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
