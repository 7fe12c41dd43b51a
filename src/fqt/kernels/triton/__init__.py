"""The Triton kernels: importing this registers them; Triton itself is imported when a tensor on a GPU turns up.

A module here may import Triton at its top, since `device.offer` names it by a string.
"""

from fqt.kernels import ops
from fqt.kernels.triton.device import offer

for op in (ops.value_range, ops.parameters):
    offer(op, "ranges")
for op in (ops.encode, ops.decode, ops.code_variance):
    offer(op, "encode")
for op in (ops.column_sums, ops.row_sums, ops.value_sums, ops.scaled_rows, ops.variance_sums):
    offer(op, "sums")
for op in (ops.hadamard, ops.rotate, ops.reflect, ops.replace_rows_):
    offer(op, "transform")
offer(ops.random_u24, "noise")
offer(ops.quantize, "quantize")
