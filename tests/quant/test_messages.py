"""What is given by mistake gets one line that says what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fqt
from fqt import FqtError
from fqt.quant import METHODS
from fqt.quant.examples import gradients

PSQ4 = fqt.quantizer("psq4")
X = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "numpy in": (lambda: PSQ4.quantize(X.numpy(), seed=1), r"ndarray.*torch\.from_numpy"),
    "list in": (lambda: PSQ4.quantize([1.0], seed=1), "a list"),
    "integers in": (lambda: PSQ4.quantize(X.long(), seed=1), "torch.int64"),
    "numpy out": (lambda: np.asarray(PSQ4.quantize(X, seed=1)), r"dequantize\(\)"),
    "a size": (lambda: PSQ4.bits_stored(100), r"\(1024, 1024\)"),
    "a family": (lambda: gradients("conv"), "known: convolution, transformer"),
    "a function's name": (lambda: fqt.certify("mine"), "package.module:function"),
    "mixes": (lambda: fqt.certify(lambda x, seed: x, mixes="row"), '"rows"'),
    "mixes of a quantizer": (lambda: fqt.certify("psq4", mixes="rows"), "mixes is of a function"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_to_give(name: str) -> None:
    call, says = WRONG[name]
    with pytest.raises(FqtError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_quantized_tensor_is_shown_without_its_codes() -> None:
    shown = repr(fqt.quantizer("shq4d").quantize(X, seed=1))
    assert shown == ("QuantizedTensor((40, 50) of torch.float32, torch.uint8 codes from 0 to 15, noise, mixing)")


def test_nothing_is_added_to_the_catalog_without_a_word() -> None:
    with pytest.raises(TypeError, match="assignment"):
        METHODS["mine"] = METHODS["psq"]  # type: ignore[index]
