"""Copies and pickles of quantizers and of what they make."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from .cases import NAMES_4BIT, build, gaussian


@pytest.mark.parametrize("name", NAMES_4BIT)
def test_quantizers_survive(name: str) -> None:
    q = build(name)
    assert copy.deepcopy(q) == q
    assert pickle.loads(pickle.dumps(q)) == q


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", NAMES_4BIT)
def test_quantized_tensors_survive(name: str, how: str) -> None:
    qx = build(name).quantize(gaussian(9, 10), 3)
    if how == "deepcopy":
        again = copy.deepcopy(qx)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(qx))
    else:
        file = io.BytesIO()
        torch.save(qx, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert torch.equal(again.codes, qx.codes)
    assert torch.equal(again.dequantize(), qx.dequantize())
    assert again.shape == qx.shape


def test_a_copy_is_its_own() -> None:
    qx = build("bhq4").quantize(gaussian(9, 10), 3)
    before = qx.dequantize()
    again = copy.deepcopy(qx)
    again.matrix_codes.zero_()
    assert torch.equal(qx.dequantize(), before)


@pytest.mark.parametrize("name", ["ptq8", "psq4", "bhq4", "shq4d"])
def test_codes_are_what_is_stored(name: str) -> None:
    """One byte an entry, and parameters per row or column beside it."""
    n, d = 64, 512
    qx = build(name).quantize(gaussian(n, d), 3)
    assert qx.codes.element_size() == 1
    beside = sum(t.numel() for t in (qx.matrix_scales.step, qx.matrix_scales.offset))
    assert beside <= 2 * (n + d)
