"""The kernels in several threads and processes, and at every CPU level: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fqt.kernels import ops, reference
from fqt.kernels.codes import ROW, Entries, Levels
from fqt.kernels.cpu import library
from fqt.kernels.rounding import DITHERED, STOCHASTIC, Rounding
from tests.backends import same

from .test_backends import LEVELS, SEED, spread_over

pytestmark = pytest.mark.skipif(library.status().level == "reference", reason=str(library.status()))


def test_two_python_threads_at_once() -> None:
    x, levels = Entries(torch.randn(200, 300)), Levels(0, 254)
    scales = spread_over(x, ROW, levels)
    wanted = {r: reference.encode(x, scales, levels, r, SEED) for r in LEVELS}
    failures: list[Rounding] = []

    def work(rounding: Rounding) -> None:
        for _ in range(50):
            if not same(ops.encode(x, scales, levels, rounding, SEED), wanted[rounding]):
                failures.append(rounding)

    threads = [threading.Thread(target=work, args=(r,)) for r in (STOCHASTIC, DITHERED)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


_FORK = """
import os, torch
from fqt.kernels import ops, products
from fqt.kernels.codes import TENSOR, Entries, Levels, Scales
from fqt.kernels.rounding import NEAREST
torch.set_num_threads(2)
x, one = torch.randn(512, 512), torch.ones(1, 1)
arguments = Entries(x), Scales(one, one, TENSOR), Levels(-127, 127), NEAREST, None
wanted = ops.encode(*arguments)
product = products.matmul(wanted, wanted)
child = os.fork()
if child == 0:
    codes = ops.encode(*arguments)
    again = products.matmul(codes, codes)
    same = (codes.numpy() == wanted.numpy()).all() and (again.numpy() == product.numpy()).all()
    os._exit(0 if same else 1)  # torch's own parallel loops would hang here
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run(code: str, level: str = "", timeout: float = 120) -> str:
    """Standard output of a fresh interpreter."""
    environment = {**os.environ, "FQT_KERNELS": level} if level else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=timeout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fork_after_use() -> None:
    run(_FORK, timeout=60)


@pytest.mark.parametrize("level", library.LEVELS)
def test_every_level_gives_the_same_bits(level: str) -> None:
    """The tests of operations, of products and of those with corrections again, at a lower level."""
    if "FQT_KERNELS" in os.environ:
        pytest.skip("a level is chosen already")
    have = library.status().level
    if library.LEVELS.index(level) >= library.LEVELS.index(have):
        pytest.skip(f"this machine runs {have} anyway")
    if level not in library.machine_levels():
        pytest.skip(f"this machine has no {level}")
    here = Path(__file__)
    files = [str(here.with_name(f"test_{name}.py")) for name in ("backends", "products")]
    files.append(str(here.parents[1] / "nn" / "test_fused.py"))
    if level.startswith("avx"):
        files.append(str(here.with_name("test_narrow.py")))
    chosen = "plain or sums or steps or parameters or nan or noise or large or matmul or exact or epilogues"
    chosen += " or longest or long_weight or findings or (formulas and dithered) or test_narrow"
    arguments = [*files, "-q", "-p", "no:cacheprovider", "-k", f"({chosen}) and not opcheck"]
    code = f"""
import sys, pytest
from fqt.kernels import status
print(status().level)
sys.exit(pytest.main({arguments!r}))
"""
    out = run(code, level, timeout=400)
    assert out.splitlines()[0] == level


def test_the_reference_can_be_asked_for() -> None:
    code = "from fqt.kernels import status; s = status(); print(s.level, s.reason)"
    assert run(code, "reference").split() == ["reference", "FQT_KERNELS=reference"]


def test_an_unknown_level_is_an_error() -> None:
    code = """
from fqt.errors import FqtError
from fqt.kernels import status
try:
    status()
except FqtError as error:
    print(error)
"""
    assert "known: reference, portable" in run(code, "sse")


@pytest.mark.parametrize(
    ("runs", "asked", "reason"),
    [
        (("portable", "avx512"), "avxvnni", "FQT_KERNELS=avxvnni, which this machine does not run"),
        (("portable", "neon", "i8mm"), "avx2", "FQT_KERNELS=avx2, which this machine does not run"),
        (("portable",), "neon", "portable is what this machine has"),
    ],
    ids=("AVX-512 does not imply AVX-VNNI", "Arm", "x86"),
)
def test_a_level_that_the_machine_lacks(
    runs: tuple[str, ...], asked: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for in vain, what runs is the level below, and that is said."""
    if library.status().level == "reference":
        pytest.skip("no native kernels")
    monkeypatch.setattr(library, "machine_levels", lambda: runs)
    monkeypatch.setenv("FQT_KERNELS", asked)
    found = library._loaded.__wrapped__()[1]
    assert (found.level, found.reason) == ("portable", reason)


@pytest.mark.parametrize(
    ("runs", "asked", "reason"),
    [
        (("portable", "avx2", "avx512", "amx"), "", ""),
        (("portable", "avx2", "avx512", "amx"), "i8mm", "amx is what this machine has"),
        (("portable", "neon", "i8mm"), "", ""),
        (("portable", "neon", "i8mm"), "i8mm", ""),
    ],
)
def test_the_highest_level_needs_no_reason(
    runs: tuple[str, ...], asked: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where another architecture's was asked for."""
    monkeypatch.setattr(library, "machine_levels", lambda: runs)
    monkeypatch.setattr(library, "_kernels", lambda level: (library._Kernels({}, {}), ""))
    monkeypatch.setenv("FQT_KERNELS", asked)
    found = library._loaded.__wrapped__()[1]
    assert (found.level, found.reason) == (runs[-1], reason)


@pytest.mark.parametrize(
    ("platform", "libraries"),
    [
        ("linux-x86_64", ["portable", "avx2", "avx2_narrow", "avxvnni", "avx512", "amx"]),
        ("linux-aarch64", ["portable", "neon", "i8mm"]),
        ("macosx-14.0-arm64", ["portable"]),
    ],
)
def test_what_is_built(platform: str, libraries: list[str]) -> None:
    """Each architecture's levels and no other's, also by a cross compiler."""
    pytest.importorskip("setuptools")
    code = """
import setuptools
from distutils.core import run_setup
print(*[extension.name for extension in run_setup("setup.py", stop_after="init").ext_modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "_PYTHON_HOST_PLATFORM": platform},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [f"fqt.kernels.cpu._native_{name}" for name in libraries]
    assert set(libraries) <= {*library.LEVELS, *library._NARROW.values()}
