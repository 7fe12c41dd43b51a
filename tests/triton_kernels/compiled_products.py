"""Compiles the products' kernels for a GPU that need not be here, and looks at the instructions and the memory.

`python -m tests.triton_kernels.compiled_products 90` fails where one does not compile, leaves the integer tensor
cores, contracts a multiply and an add, spills registers to memory, or asks for more shared memory than such a
device has. With `--one-each` it takes one row of the table for each kernel; with `--report` it prints registers and
bytes of the stack.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fqt.kernels.triton import blocked, conv, epilogue, products, tune  # noqa: E402

SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a program may have, by compute capability."""
INTEGERS: dict[int, Any] = {
    80: "mma.sync",
    89: "mma.sync",
    90: "wgmma",
    100: ("tcgen05.mma", "mma.sync"),
    120: "mma.sync",
}
"""What instructions begin with; Triton 3.7 has no newer ones than mma.sync for integers on 100."""
POINTERS = {
    "row_shift": "*i64",
    "column_shift": "*i64",
    "row_scale": "*fp32",
    "column_scale": "*fp32",
    "left": "*fp32",
    "right": "*fp32",
    "bias": "*fp32",
    "zero": "*i32",
    "ones": "*i64",
    "out": "*bf16",
    "codes": "*i8",
    "weight": "*i8",
    "grad": "*u8",
    "image": "*u8",
    "a_step": "*fp32",
    "b_step": "*fp32",
    "totals": "*i64",
}
WHOLE = {"ROW_STEP": 1, "COLUMN_STEP": 1, "ZERO_STEP": 1, "FINISH": True, "GROUP": products.NEIGHBOURS}
ONES = "stride_height stride_width dilation_height dilation_width padding_height padding_width"
CONV = {**dict.fromkeys([*ONES.split(), "groups", "residue_height", "residue_width"], 1), "GROUP": 8}


def compiled(kernel: Any, number: int, warps: int, stages: int, constants: dict[str, Any], **types: str) -> Any:
    """A kernel for a compute capability; arguments that are no constants are pointers or multiples of 16."""
    signature, values, hints = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name) or POINTERS.get(name, "i32")
            if not signature[name].startswith("tensordesc"):
                hints[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages, **epilogue.ROUNDED}
    source = ASTSource(kernel, signature, values, hints)
    return triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)


def variants(number: int) -> list[tuple[str, Any, tune.Tiles, dict[str, Any], dict[str, str]]]:
    """What the table holds for a compute capability: name, kernel, tiles, constants, types."""
    found: list[tuple[str, Any, tune.Tiles, dict[str, Any], dict[str, str]]] = []
    capability = divmod(number, 10)
    plain = {**WHOLE, "PLACED": False, "places": 1, "a_term": 1, "b_term": 1}
    for schedule in {
        p for size in (64, 8192) for p in tune.schedules(capability, size, 4096) if p.tiles and p.turned
    }:
        # As in the output, grad_weight, and grad_input of symmetric codes.
        for shifted in ((True, False), (True, True), (False, False)):
            tiles = schedule.tiles
            assert tiles is not None
            signs = {"A_SHIFTED": shifted[0], "B_SHIFTED": shifted[1]}
            none = {} if shifted[1] else {"zero": None, "ones": None}
            none |= {} if shifted[0] else {"row_shift": None, "column_shift": None}
            constants = {**plain, **signs, **none, **tiles.blocks(), "PARTS": False, "EVEN": True}
            kinds = ["u8" if s else "i8" for s in shifted]
            if schedule.kind == "tiles":
                types = {"a": "*" + kinds[0], "b": "*" + kinds[1]}
                found.append((schedule.kind, products._tiles, tiles, constants, types))
            else:  # whatever the codes, copies of them
                constants = {name: value for name, value in constants.items() if name not in signs}
                descriptors = [f"tensordesc<i8[{lines}, {tiles.terms}]>" for lines in (tiles.rows, tiles.columns)]
                types = {"a": descriptors[0], "b": descriptors[1]}
                found.append((schedule.kind, products._persistent, tiles, constants, types))
    tiles = tune.in_parts(capability).tiles
    assert tiles is not None
    for sums in ("*i32", "*i64"):  # operands as they lie, with tails
        how = {"A_SHIFTED": True, "B_SHIFTED": True, "PARTS": True, "EVEN": False, "a_row": 1, "b_column": 1}
        nothing = dict.fromkeys(name for name in POINTERS if name in products._tiles.arg_names and name != "out")
        constants = {**WHOLE, "PLACED": False, "places": 1, **nothing, **how, **tiles.blocks()}
        found.append(("parts", products._tiles, tiles, constants, {"a": "*u8", "b": "*u8", "out": sums}))
    for tiles in dict.fromkeys(t for c in (64, 256) for t in tune.image_tiles(capability, c)):
        for backward, flat in ((False, False), (False, True), (True, False)):
            how = {"SHIFTED": True, "BACKWARD": backward, "FLAT": flat, "PLACED": True, "zero": None, "ones": None}
            found.append(("images", conv._images, tiles, {**WHOLE, **CONV, **how, **tiles.blocks()}, {}))
    for tiles in dict.fromkeys(t for c in (64, 256) for t in tune.filter_tiles(capability, c)):
        how = {"GRAD_SHIFTED": True, "IMAGE_SHIFTED": True, "FLAT": False}
        found.append(("filters", conv._filters, tiles, {**CONV, **how, **tiles.blocks()}, {"sums": "*i32"}))
    for terms, whole in ((32, True), (128, True), (128, False)):
        for tiles in blocked.tiles_of(terms):
            how = {"WHOLE": whole, "GROUP": products.NEIGHBOURS, "a_term": 1, "b_term": 1}
            found.append(("blocked", blocked._blocked, tiles, {**how, **tiles.blocks()}, {"a": "*i8", "b": "*i8"}))
    return found


def stack(binary: bytes) -> str:
    """Registers and bytes of the stack, as the vendor's tool says them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return " ".join(re.findall(r"REG:\d+|STACK:\d+", said))


def main(number: int, one_each: bool, report: bool) -> None:
    """Compiles all, or one of each kind; raises at the first that is wrong."""
    chosen = variants(number)
    if one_each:
        chosen = list({name: row for row in reversed(chosen) for name in row[:1]}.values())
    for name, kernel, tiles, constants, types in chosen:
        made = compiled(kernel, number, tiles.warps, tiles.stages, constants, **types)
        text, what = made.asm["ptx"], (name, tiles, {k: v for k, v in constants.items() if k.endswith("SHIFTED")})
        instructions = collections.Counter(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", text))
        assert instructions, what
        assert all(i.startswith(INTEGERS[number]) for i in instructions), (what, instructions)
        assert "fma.rn.f32" not in text, what
        assert made.metadata.shared <= SHARED[number] * 1024, (what, made.metadata.shared)
        if name == "persistent":
            assert "cp.async.bulk.tensor" in text, what
        used = stack(made.asm["cubin"])
        assert not used or used.endswith("STACK:0"), (what, used)
        if report:
            print(*what, f"shared {made.metadata.shared}", used)


if __name__ == "__main__":
    main(int(sys.argv[1]), "--one-each" in sys.argv, "--report" in sys.argv)
