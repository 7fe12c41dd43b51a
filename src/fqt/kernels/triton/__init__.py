"""The Triton kernels: importing this registers them; Triton itself is imported when a tensor on a GPU turns up.

A module here may import Triton at its top, since `device.offer` names it by a string.
"""

from fqt.kernels.triton import serving as serving
