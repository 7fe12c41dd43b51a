"""The C++ kernels: importing this registers them with the operations that they make faster."""

from fqt.kernels.cpu import blocked as blocked
from fqt.kernels.cpu import fused as fused
from fqt.kernels.cpu import kept as kept
from fqt.kernels.cpu import mixing as mixing
from fqt.kernels.cpu import pooling as pooling
from fqt.kernels.cpu import products as products
from fqt.kernels.cpu import quantize as quantize
from fqt.kernels.cpu import results as results
