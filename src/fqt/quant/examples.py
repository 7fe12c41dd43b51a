"""Gradient matrices that ship with the package, to compare quantizers on: real ones, and small.

`results/matrices.py` made them, and says of what.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
from torch import Tensor

from fqt.errors import FqtError

FAMILIES = ("convolution", "transformer")


def gradients(family: str) -> dict[str, Tensor]:
    """The matrices of a family, float32, by what they are the gradient of.

    Args:
        family: "convolution", rows are samples; or "transformer", rows are tokens.

    Raises:
        FqtError: there is no such family.
    """
    if family not in FAMILIES:
        raise FqtError(f"there are no gradients of {family!r}; known: {', '.join(FAMILIES)}")
    source = resources.files("fqt.quant") / "data" / f"{family}.npz"
    with source.open("rb") as file, np.load(file) as arrays:
        exponents = {name: int(arrays[f"{name}, exponent"]) for name in arrays if f"{name}, exponent" in arrays}
        return {
            name: torch.ldexp(torch.from_numpy(arrays[name].astype(np.float32)), torch.tensor(exponent))
            for name, exponent in exponents.items()
        }
