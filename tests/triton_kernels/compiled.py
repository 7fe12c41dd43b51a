"""Compiles the kernels for a GPU that need not be here, and looks at what came of it.

    python -m tests.triton_kernels.compiled sm_90 [PATTERN]

The interpreter takes what the compiler refuses, and rounds where a compiler may contract. Fails where a kernel does
not compile or warns, where a multiplication and an addition became one rounding or a division an approximation
(NVIDIA; on AMD's, exact division itself is made of such instructions), or where a kernel of whole tiles reads or
writes single bytes.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fqt
from fqt.kernels import reference
from fqt.kernels.codes import COLUMN, ROW, Blocks, Entries, Findings, Levels, Scales
from fqt.kernels.fold import Folded
from fqt.kernels.linear_map import DenseMap
from fqt.kernels.rounding import DITHERED, NEAREST, STOCHASTIC, Coding
from fqt.kernels.triton import best, encode, fused, noise, planes, quantize, ranges, sums, taps, transform
from fqt.nn import load_recipe

INEXACT = re.compile(r"\bfma\.|\bmad\.f|\bdiv\.(full|approx)|\brcp\.approx|\b(add|sub|mul)\.ftz")
WIDE = re.compile(r"global[\w.:]*\.v[24]|global_(load|store)_dwordx[24]|buffer_(load|store)_dwordx[24]")


class Absent:
    """A driver for a device that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_stream(self, device: int) -> int:
        return 0


def calls() -> Iterator[tuple[str, Any, tuple, bool]]:
    """Name, function, arguments, and whether wide accesses are due."""
    n, d = 4096, 256
    x, seed = torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int64)
    column, order = torch.ones(n, 1), torch.arange(n)
    whole, byte, codes = Entries(x), Levels(0, 255), torch.zeros(n, d, dtype=torch.uint8)
    row_scales = Scales(column, column, ROW)
    odd, factor = Entries(torch.zeros(9, 15), torch.ones(5)), torch.ones(d)
    block_scales = Scales(torch.ones(2, 4), torch.ones(2, 4), Blocks(8, 4))
    e2m1, powers = Levels(-12, 12, 1), Levels(-8, 8, table=(0, 1, 2, 4, 8))
    before, after = reference.Scaling(column, column, column), reference.Unscaling(column, column, factor, x.dtype)

    dither = torch.zeros(n + d)
    yield "codes, dithered", encode.encoded, (whole, row_scales, Levels(0, 254), DITHERED, dither, True, True), True
    yield "codes, of blocks", encode.encode, (odd, block_scales, e2m1, STOCHASTIC, seed), False
    yield "codes, of a table", encode.encode, (odd, block_scales, powers, NEAREST, None), False
    yield "values", encode.decode, (codes, row_scales, factor[None]), True
    yield "variances", encode.code_variance, (whole, row_scales, byte), True
    for blocks in (COLUMN, Blocks(1, 16)):
        yield "ranges", ranges.value_range, (whole, blocks), True
    yield "steps", ranges.steps_of, (Entries(torch.zeros(8192, 8192)), Blocks(0, 0), "zero", 254), False
    yield "parameters", ranges.parameters, (column, column, "affine", 255), False
    stochastic, dithered = (
        Coding("symmetric", Levels(-127, 127), STOCHASTIC),
        Coding("zero", Levels(0, 254), DITHERED),
    )
    yield "bands", quantize._quantized, (whole, ROW, stochastic, seed, None, True), True
    yield "bands, dithered", quantize._quantized, (whole, ROW, dithered, seed, None, False), True
    yield (
        "bands of long rows",
        quantize._quantized,
        (Entries(torch.zeros(512, 9000)), ROW, dithered, seed, None, False),
        True,
    )
    codings = fqt.quantizer("psq8x").codings
    yield "best", best.quantize_best, (whole, ROW, codings, seed, torch.ones(n).double()), True
    yield "best of columns", best.quantize_best, (whole, COLUMN, codings, seed), True
    input, weight = fqt.quantizer("ptq8").quantize(torch.ones(n, d), seed=1), torch.ones(64, d)
    of_weight = load_recipe("psq8d").operand("weight")
    assert of_weight is not None
    weight = of_weight.quantize(weight)
    grad = fqt.quantizer("psq8d").quantize(torch.ones(n, 64), seed=1)
    plain = fqt.quantizer("ptq8").quantize(torch.ones(n, 64), seed=1)
    dense = DenseMap()
    yield "output", fused.output, (dense, input, weight, None, torch.bfloat16), True
    yield "grad_input", fused.grad_input, (dense, grad, weight, False, torch.Size((n, d)), torch.bfloat16), True
    yield "grad_weight", fused.grad_weight, (dense, plain, input, None, torch.Size((64, d))), True
    rows = fqt.quantizer("psq8").quantize(torch.ones(n, d), seed=1)
    by_channel = fqt.quantizer("psq8d").quantize(torch.ones(n, 64), seed=1, axis=1)
    folded = Folded(torch.ones(n, dtype=torch.int32), torch.ones(1, 64))
    yield "grad_weight, folded", fused.grad_weight, (dense, by_channel, rows, folded, torch.Size((64, d))), True
    yield "sums of codes", sums.column_sums, (codes, order.int()), True
    yield "sums of rows", sums.row_sums, (codes,), True
    yield "sums of values", sums.value_sums, (x,), True
    yield "scaled rows", sums.scaled_rows, (x, column[:, 0], column[:, 0], Findings()), True
    yield "sums of variances", sums.variance_sums, (whole, row_scales, byte), True
    yield "Hadamard over rows", transform.hadamard, (x, order, (128,) * 32, before, None, after), True
    yield "Hadamard over rows, alone", transform.hadamard, (x, order, (128,) * 32), True
    yield "Hadamard over rows, first", transform.hadamard, (x, order, (128,) * 32, before), True
    yield "reflections, alone", transform.reflect, (x, order, column, column), True
    yield "Hadamard over columns", transform.rotate, (x, factor, factor, (128, 128)), True
    yield "reflections", transform.reflect, (x, order, column, column, before), True
    yield "reflections undone", transform.reflect, (x, order, column, column, None, after), True
    yield "rows replaced", transform.replace_rows_, (x.float(), column > 0, x), True
    axes = ((3, 28, 28, 1, 1, 1), (3, 28, 14, 2, 1, 1))
    yield "sums by tap", taps.tap_sums, (torch.zeros(28, 28, 64, dtype=torch.int64), axes, True), False
    yield "planes of bytes", planes.in_bytes, (torch.zeros(n, dtype=torch.int32),), False
    yield "planes together", planes.from_bytes, (torch.zeros(3, n, dtype=torch.int32),), False
    yield "random numbers", noise.random_u24, (seed, 1, n), False
    yield "forked seeds", noise.fork_seed, (seed, 3), False


def main(name: str, pattern: str = ".") -> None:
    """Compiles for sm_80, sm_90, … or gfx942, … all kernels whose label matches."""
    nvidia = name.startswith("sm_")
    language = "ptx" if nvidia else "amdgcn"
    target = GPUTarget("cuda", int(name[3:]), 32) if nvidia else GPUTarget("hip", name, 64)
    driver.set_active(Absent(target))
    warnings.simplefilter("error")  # of a shift beyond an integer's bits, whose result is undefined
    made: list[Any] = []
    compile_and_run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made.append(compile_and_run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    wrong = []
    for label, function, arguments, wide in filter(lambda call: re.search(pattern, call[0]), calls()):
        made.clear()
        try:
            function(*arguments)
        except (CompilationError, UserWarning) as error:
            wrong.append(f"{label}: {error}")
            continue
        for kernel in made:
            assembly = kernel.asm[language]
            inexact = INEXACT.search(assembly) if nvidia else None
            print(f"{label}: {kernel.metadata.shared} bytes shared, {len(assembly.splitlines())} lines")
            if inexact:
                wrong.append(f"{label}: {inexact[0]}")
        if not made or (wide and not any(WIDE.search(kernel.asm[language]) for kernel in made)):
            wrong.append(f"{label}: no wide access" if made else f"{label}: nothing compiled")
    print(f"Triton {triton.__version__}, {name}: {len(wrong)} wrong", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
