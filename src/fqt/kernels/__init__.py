"""A handful of operations on raw tensors; no layer, no recipe is known here."""

from fqt.kernels import cpu as cpu
from fqt.kernels import triton as triton
from fqt.kernels.cpu.library import Status as Status
from fqt.kernels.cpu.library import status as status
