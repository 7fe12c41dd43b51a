"""`fqt info`: what is installed and what runs, in one block to paste into a report of a problem."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import metadata

import click
import torch

import fqt
from fqt.cli.common import say
from fqt.kernels.cpu.library import machine_levels, status
from fqt.kernels.triton.device import obstacle
from fqt.records import environment

__all__ = ["info_command"]

# What changes numbers or speed, and is set from outside.
VARIABLES = ("FQT_KERNELS", "OMP_NUM_THREADS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "PYTORCH_JIT")
# Of pyproject.toml (an installation's own list may be older than the sources), and what fqt uses where it is there.
EXTRAS = {
    "hf": ("transformers", "accelerate"),
    "lightning": ("lightning",),
    "translation": ("tokenizers", "sacrebleu"),
}
BESIDE = ("triton", "torchao", "peft")


@click.command("info", short_help="Say what is installed here, for a report of a problem.")
def info_command() -> None:
    """Say what is installed and what runs here, in one block to paste into a report of a problem.

    Nothing is sent anywhere, and no path or name of yours is in it.
    """
    lines = {"fqt": _version(), "kernels": _kernels(), "machine": _machine(), "torch": _torch(), **_devices()}
    lines |= {f"extra {name}": _versions(packages) for name, packages in EXTRAS.items()}
    lines["beside"] = _versions(BESIDE)
    lines["variables"] = _settings()
    width = max(map(len, lines))
    for name, text in lines.items():
        say(f"{name:{width}}  {text}")


def _version() -> str:
    """Of the sources that run; of the installation too, where that is another one."""
    here = environment()
    source = f", commit {here['commit'][:12]}{' with changes' if here['dirty'] else ''}" if here["commit"] else ""
    stale = f" (installed: {here['fqt'] or 'not'})" if here["fqt"] != fqt.__version__ else ""
    return f"{fqt.__version__}{stale}{source}, Python {here['python']}"


def _kernels() -> str:
    """The level, why no better one, and what else this machine could run."""
    found = status()
    levels = ", ".join(("reference", *machine_levels()))
    return found.level + (f": {found.reason}" if found.reason else "") + f"; it runs {levels}"


def _machine() -> str:
    here = environment()
    return f"{here['processor']}, {here['cores']} cores; {here['system']}"


def _torch() -> str:
    return f"{torch.__version__}, {torch.get_num_threads()} threads; numpy {metadata.version('numpy')}"


def _devices() -> dict[str, str]:
    """A line for each GPU, with what keeps our kernels from it; one line that says so if there is none."""
    if not torch.cuda.is_available():
        return {"gpu": "none that torch sees"}
    found = {}
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        why = obstacle(index)
        runs = f"codes are multiplied in float: {why}" if why else f"Triton {metadata.version('triton')}"
        found[f"cuda:{index}"] = f"{of.name}, {of.major}.{of.minor}, {of.total_memory / 2**30:.0f} GiB; {runs}"
    return found


def _versions(packages: Iterable[str]) -> str:
    return ", ".join(f"{package} {_installed(package)}" for package in packages)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "–"


def _settings() -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none"
