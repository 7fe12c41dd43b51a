"""NaN and infinity: refused in one line by default, NaN out of the group that holds them on request."""

from __future__ import annotations

import pytest
import torch

from fqt.errors import FqtError

from .cases import METHODS, PLAIN, build, gaussian, plain_id

BAD = (float("nan"), float("inf"), float("-inf"))
NAMES = [f"{m}4{s}" for m in METHODS for s in ("", "d", "x")]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_refused_by_default(name: str, value: float) -> None:
    x = gaussian(6, 5)
    x[2, 3] = value
    with pytest.raises(FqtError, match="NaN or Inf") as error:
        build(name).quantize(x, 0)
    assert "propagate" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 3), (6, 5), (33, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_propagates_as_nan(name: str, shape: tuple[int, int], value: float) -> None:
    """With row scales the row, with a transform or one scale the whole tensor."""
    q = build(name)
    x = gaussian(*shape)
    x[0, -1] = value
    qx = q.quantize(x, 0, nonfinite="propagate")
    y = qx.dequantize()
    assert int(qx.codes.max()) <= 15
    if name.startswith("psq"):
        assert torch.isnan(y[0]).all()
        assert torch.isfinite(y[1:]).all()
    else:
        assert torch.isnan(y).all()


@pytest.mark.parametrize("q", PLAIN, ids=plain_id)
def test_propagates_in_every_scale(q: object) -> None:
    x = gaussian(6, 5)
    x[2, 3] = float("inf")
    x[4, 1] = float("nan")
    y = q.quantize(x, 0, nonfinite="propagate").dequantize()  # type: ignore[attr-defined]
    group = q.scale.group  # type: ignore[attr-defined]
    hit = torch.zeros(6, 5, dtype=torch.bool)
    if group == "row":
        hit[[2, 4]] = True
    elif group == "column":
        hit[:, [1, 3]] = True
    else:
        hit[:] = True
    assert torch.equal(torch.isnan(y), hit)


@pytest.mark.parametrize("fill", BAD)
@pytest.mark.parametrize("n", [1, 2, 3, 64])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_nonfinite(name: str, n: int, fill: float) -> None:
    """The stop rule that ran past its array: here it ends, and all is NaN."""
    x = torch.full((n, 4), fill)
    assert torch.isnan(build(name).quantize(x, 0, nonfinite="propagate").dequantize()).all()


@pytest.mark.parametrize("name", NAMES)
def test_finite_data_do_not_mind(name: str) -> None:
    x = gaussian(6, 5)
    a, b = build(name).quantize(x, 0), build(name).quantize(x, 0, nonfinite="propagate")
    assert torch.equal(a.dequantize(), b.dequantize())


def test_unknown_choice() -> None:
    with pytest.raises(FqtError, match="known: raise, propagate"):
        build("psq4").quantize(gaussian(2, 2), 0, nonfinite="ignore")
