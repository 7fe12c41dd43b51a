"""`nn.MultiheadAttention` converted: torch's own results with float operands, quantized projections otherwise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqt

from .cases import FLOAT_OPERANDS, equal, gradients

B, T, S, E, H = 3, 4, 5, 8, 2
MASKS = ("none", "bool2", "float2", "bool3", "float3")
PADDING = ("none", "bool", "float")


def attention(dtype: torch.dtype = torch.float64, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, H, dtype=dtype, **options)
    for name, p in layer.named_parameters():  # torch starts biases at zero
        if "bias" in name:
            nn.init.normal_(p)
    return layer


def operands(layer: nn.MultiheadAttention, batch: int | None = B) -> tuple[Tensor, Tensor, Tensor]:
    dtype, lead = layer.out_proj.weight.dtype, () if batch is None else (batch,)
    q, k, v = (torch.randn(*lead, n, d) for n, d in ((T, E), (S, layer.kdim), (S, layer.vdim)))
    if batch is not None and not layer.batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def masks(mask: str, padding: str, batch: int | None = B) -> dict[str, Tensor]:
    """Every query may look at key 0, so that no row of scores is empty."""
    found: dict[str, Tensor] = {}
    if mask != "none":
        shape = (T, S) if mask.endswith("2") else (H * (batch or 1), T, S)
        out = torch.rand(shape) < 0.4
        out[..., 0] = False
        values = torch.randn(shape).double().masked_fill(out, -torch.inf)
        found["attn_mask"] = out if mask.startswith("bool") else values
    if padding != "none":
        out = torch.rand((S,) if batch is None else (batch, S)) < 0.4
        out[..., 0] = False
        found["key_padding_mask"] = out if padding == "bool" else out.double() * -5
    return found


class Both(nn.Module):
    """Attention whose two results count, as one tensor."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, *args: Tensor) -> Tensor:
        out, weights = self.layer(*args, **self.options)
        return out.flatten() if weights is None else torch.cat([out.flatten(), weights.flatten()])


def check(layer: nn.MultiheadAttention, args: tuple[Tensor, ...], **options: Any) -> None:
    """Output, weights and all gradients to float64 rounding; the same shapes, the same None."""
    layer.train(options.pop("training", True))
    truth = layer(*args, **options)
    grads = gradients(Both(layer, **options), *args)
    fqt.quantize_(layer, FLOAT_OPERANDS)
    mine = layer(*args, **options)
    assert (mine[1] is None) == (truth[1] is None)
    for a, b in zip(mine, truth, strict=True):
        if b is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(Both(layer.eval(), **options), *args), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, need_weights: bool, batch_first: bool) -> None:
    for padding in PADDING:
        layer = attention(batch_first=batch_first)
        check(layer, operands(layer), need_weights=need_weights, **masks(mask, padding))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first: bool) -> None:
    for mask, padding, need in itertools.product(MASKS, PADDING, (True, False)):
        layer = attention(batch_first=batch_first)
        check(layer, operands(layer, None), need_weights=need, **masks(mask, padding, None))


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 3, "vdim": 5}, {"kdim": 3}, {"vdim": 8, "kdim": 8}])
def test_forms(options: dict[str, Any]) -> None:
    for need, average, first in itertools.product((True, False), repeat=3):
        layer = attention(**options, batch_first=first)
        check(layer, operands(layer), need_weights=need, average_attn_weights=average)
    layer = attention(**options)
    check(layer, operands(layer, None), average_attn_weights=False)


@pytest.mark.parametrize("same", ["qkv", "kv", "qk", "qv"])
def test_shared_arguments(same: str) -> None:
    layer = attention(batch_first=True)
    x, y = torch.randn(B, S, E).double(), torch.randn(B, S, E).double()
    q, k, v = (x if name in same else y for name in "qkv")
    check(layer, (q, k, v))

    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(*(x if name in same else y for name in "qkv"))[0] + 0 * y + 0 * x

    mine = gradients(Aliased().eval(), x, y)
    fqt.restore_(layer)
    for a, b in zip(mine, gradients(Aliased(), x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_empty_masked_rows_are_what_torch_returns() -> None:
    layer = attention(batch_first=True)
    mask = torch.ones(T, S, dtype=torch.bool)
    for need in (True, False):
        args = operands(layer)
        truth, _ = layer(*args, attn_mask=mask, need_weights=need)
        fqt.quantize_(layer, FLOAT_OPERANDS)
        mine, _ = layer(*args, attn_mask=mask, need_weights=need)
        torch.testing.assert_close(mine, truth, equal_nan=True)
        fqt.restore_(layer)


@pytest.mark.parametrize("need_weights", [True, False])
def test_is_causal(need_weights: bool) -> None:
    layer = attention(batch_first=True)
    x = torch.randn(B, T, E).double()
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    check(layer, (x, x, x), attn_mask=mask, is_causal=True, need_weights=need_weights)
    with pytest.raises(RuntimeError, match="is_causal"):
        layer(x, x, x, is_causal=True)


def test_dropout() -> None:
    layer = attention(dropout=0.5, batch_first=True)
    check(layer, operands(layer), training=False)
    args = operands(layer)
    layer.train()
    weights = torch.stack([layer(*args, average_attn_weights=False)[1] for _ in range(300)])
    kept = (weights != 0).double().mean()
    assert abs(kept - 0.5) < 0.02  # 36,000 coins: 7.6 standard deviations
    assert not torch.equal(*(layer(*args, need_weights=False)[0] for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_dtypes_and_autocast(dtype: torch.dtype, need_weights: bool) -> None:
    layer = attention(dtype, batch_first=True)
    args = operands(layer)
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            truth = layer(*args, need_weights=need_weights)
            fqt.quantize_(layer, "psq8")
            mine = layer(*args, need_weights=need_weights)
        fqt.restore_(layer)
        assert [None if t is None else t.dtype for t in mine] == [None if t is None else t.dtype for t in truth]
        assert (mine[0].float() - truth[0].float()).norm() <= 0.05 * truth[0].float().norm()


BAD: dict[str, Any] = {
    "integer mask": lambda a, x: a(x, x, x, attn_mask=torch.zeros(S, S, dtype=torch.long)),
    "byte padding": lambda a, x: a(x, x, x, key_padding_mask=torch.zeros(B, S, dtype=torch.uint8)),
    "mask shape": lambda a, x: a(x, x, x, attn_mask=torch.zeros(1, S, dtype=torch.bool)),
    "3-D mask shape": lambda a, x: a(x, x, x, attn_mask=torch.zeros(H, S, S, dtype=torch.bool)),
    "4-D mask": lambda a, x: a(x, x, x, attn_mask=torch.zeros(B, H, S, S, dtype=torch.bool)),
    "padding shape": lambda a, x: a(x, x, x, key_padding_mask=torch.zeros(B, 1, dtype=torch.bool)),
    "padding batch": lambda a, x: a(x, x, x, key_padding_mask=torch.zeros(1, S, dtype=torch.bool)),
    "key batch": lambda a, x: a(x, x[:1], x[:1]),
    "value length": lambda a, x: a(x, x, x[:, :-1]),
    "embedding": lambda a, x: a(x[..., :4], x, x),
    "axes": lambda a, x: a(x[None], x[None], x[None]),
    "mixed axes": lambda a, x: a(x, x[0], x[0]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_what_torch_refuses_is_refused(name: str, need_weights: bool) -> None:
    layer, x = attention(torch.float32, batch_first=True), torch.randn(B, S, E)

    def call(*args: Tensor, **options: Any) -> None:
        layer(*args, need_weights=need_weights, **options)

    refused = (RuntimeError, ValueError, AssertionError)
    try:
        BAD[name](call, x)
    except refused:
        fqt.quantize_(layer, "psq8")
        with pytest.raises(refused):
            BAD[name](call, x)


def test_the_four_projections_are_quantized() -> None:
    """Two bits change every result; explain names the products, and those that stay float."""
    layer = attention(torch.float32, batch_first=True)
    x = torch.randn(B, T, E)
    truth = gradients(Both(layer), x, x, x)
    fqt.quantize_(layer, fqt.Recipe(input="ptq2", weight="ptq2", grad_input="psq2", grad_weight="ptq2"))
    names = ["result", "query", "key", "value", *(n for n, _ in layer.named_parameters())]
    for name, a, b in zip(names, gradients(Both(layer), x, x, x), truth, strict=True):
        assert torch.allclose(a, b, atol=1e-3) == (name == "out_proj.bias"), name  # its gradient is an exact sum
    assert not equal(gradients(Both(layer), x, x, x), gradients(Both(layer), x, x, x))
    products = [(p.layer, p.product, p.arithmetic) for p in fqt.explain(layer).products]
    assert [p for _, p, _ in products[:3]] == ["output", "grad_input", "grad_weight"]
    assert products[3][2] == "float"
    assert "query" in products[3][1]


def test_state_and_names() -> None:
    layer = attention()
    keys, kind = list(layer.state_dict()), type(layer.out_proj)
    fqt.quantize_(layer, "psq4")
    assert list(layer.state_dict()) == keys
    fqt.restore_(layer)
    assert (type(layer), type(layer.out_proj)) == (nn.MultiheadAttention, kind)
