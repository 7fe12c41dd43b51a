"""The operations the other rooms call; each runs on the fastest backend that can take its input.

The plain-torch reference takes everything. Arguments and results are as in `fqt.kernels.reference`.
"""

from __future__ import annotations

from fqt.kernels import reference

value_range = reference.value_range
encode = reference.encode
decode = reference.decode
code_variance = reference.code_variance
hadamard = reference.hadamard
reflect = reference.reflect
dither_noise = reference.dither_noise
