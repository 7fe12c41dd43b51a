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


def test_a_level_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 does not imply AVX-VNNI: asked for in vain, what runs is the level below, and that is said."""
    if library.status().level == "reference":
        pytest.skip("no native kernels")
    monkeypatch.setattr(library, "machine_levels", lambda: ("portable", "avx512"))
    monkeypatch.setenv("FQT_KERNELS", "avxvnni")
    found = library._loaded.__wrapped__()[1]
    assert found.level == "portable"
    assert found.reason == "FQT_KERNELS=avxvnni, which this machine does not run"
