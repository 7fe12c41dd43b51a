"""How the variance of a quantized gradient depends on the bits: the law, and the distance between two quantizers.

A step is the range over the number of steps n: B = 2^b − 1, one less where dither needs head-room. The variance is
proportional to the squared step, so that one bit fewer multiplies it by

    law(b) = (n(b) / n(b − 1))²,

4.03 from 8 to 7 bits, 4.27 from 5 to 4, 5.44 from 3 to 2: "a factor of 4 per bit". Two quantizers whose curves over
the bits are parallel in the logarithm are a horizontal distance apart: the bits that the worse one must add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from fqt.errors import FqtError

__all__ = ["extra_bits", "variance_law"]


def variance_law(bits: int, *, dithered: bool = False) -> float:
    """By what the variance grows from `bits` to one bit fewer, if all else stays.

    Raises:
        FqtError: one bit fewer leaves no step.

    >>> round(variance_law(5), 2), round(variance_law(8), 2)
    (4.27, 4.03)
    """
    fine, coarse = (2**b - 1 - dithered for b in (bits, bits - 1))
    if coarse < 1:
        raise FqtError(f"{bits} bits: one bit fewer has no step")
    return (fine / coarse) ** 2


def extra_bits(worse: Mapping[int, float], better: Mapping[int, float]) -> dict[int, float]:
    """How many bits `worse` must add to reach the variance that `better` has at each of its bits.

    Between two measured widths log variance is taken as linear in the bits. Widths of `better` whose variance lies
    outside what was measured of `worse` are left out: nothing is extrapolated.

    Args:
        worse, better: variance by bits; positive.

    >>> extra_bits({4: 16.0, 5: 4.0, 6: 1.0}, {4: 4.0, 5: 2.0, 6: 0.1})
    {4: 1.0, 5: 0.5}
    """
    known = sorted((bits, math.log(value)) for bits, value in worse.items() if value > 0)
    found = {}
    for bits, value in sorted(better.items()):
        if value <= 0:
            continue
        target = math.log(value)
        for (left, high), (right, low) in pairwise(known):
            if min(low, high) <= target <= max(low, high) and low != high:
                found[bits] = left + (right - left) * (high - target) / (high - low) - bits
                break
    return found
