"""The Triton kernels: importing this registers them; Triton itself is imported when a tensor on a GPU turns up.

A module here may import Triton at its top, since `device.offer` names it by a string.
"""

from fqt.kernels import choice, low_rank, ops
from fqt.kernels.op import Op
from fqt.kernels.taps import tap_sums
from fqt.kernels.triton import serving as serving
from fqt.kernels.triton.device import offer

_OFFERED: dict[str, tuple[Op, ...]] = {
    "ranges": (ops.value_range, ops.parameters),
    "encode": (ops.encode, ops.decode, ops.code_variance),
    "sums": (ops.column_sums, ops.row_sums, ops.value_sums, ops.scaled_rows, ops.variance_sums),
    "transform": (ops.hadamard, ops.rotate, ops.reflect, ops.replace_rows_),
    "noise": (ops.random_u24, ops.fork_seed),
    "quantize": (ops.quantize,),
    "best": (choice.quantize_best,),
    "taps": (tap_sums,),
    "planes": (low_rank.in_bytes, low_rank.from_bytes),
}
for _module, _operations in _OFFERED.items():
    for _operation in _operations:
        offer(_operation, _module)
