"""A handful of operations on raw tensors; no layer, no recipe is known here."""

from fqt.kernels.native import Status as Status
from fqt.kernels.native import status as status
