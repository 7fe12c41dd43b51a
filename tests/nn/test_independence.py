"""Under the default recipe no token's output depends on other tokens, no sample's on its batch mates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqt
from fqt.nn import load_recipe


class Block(nn.Module):
    """Causal attention and a perceptron; the products without weights row by row, so that shapes change no bit."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        rows = []
        for t in range(x.shape[1]):
            scores = (q[:, t, None] * k[:, : t + 1]).sum(-1).softmax(1)
            rows.append((scores[..., None] * v[:, : t + 1]).sum(1).flatten(1))
        x = x + self.out(torch.stack(rows, 1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def model(training: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), Block(), Block(), nn.LayerNorm(32), nn.Linear(32, 20))
    return fqt.quantize_(net).train(training)


@pytest.mark.parametrize("training", [True, False])
def test_a_causal_model(training: bool) -> None:
    """Bit for bit: later tokens, batch mates, and padding that makes the batch longer or larger."""
    net, x = model(training), torch.randn(3, 7, 16)
    truth = net(x).detach()
    later = x.clone()
    later[:, 4:] = 1000 * torch.randn(3, 3, 16)
    assert torch.equal(net(later)[:, :4], truth[:, :4])
    mates = x.clone()
    mates[1:] *= 1000
    assert torch.equal(net(mates)[0], truth[0])
    assert torch.equal(net(F.pad(x, (0, 0, 0, 5), value=3.0))[:, :7], truth)
    assert torch.equal(net(torch.cat([x, 50 * torch.randn(2, 7, 16)]))[:3], truth)
    assert torch.equal(net(x[1:2]), truth[1:2])


def test_one_nan_sample() -> None:
    x = torch.randn(4, 6, 16)
    net = model(True)
    truth = net(x).detach()
    x[2, 3, 5] = torch.nan
    found = net(x).detach()
    assert torch.equal(found[[0, 1, 3]], truth[[0, 1, 3]])
    assert torch.equal(found[2, :3], truth[2, :3])
    assert bool(found[2, 3:].isnan().all())
    images = fqt.quantize_(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)))
    y = torch.randn(5, 3, 8, 8)
    before = images(y).detach()
    y[1, 0, 0, 0] = torch.inf
    after = images(y).detach()
    others = [0, 2, 3, 4]
    assert torch.equal(after[others], before[others])


def test_images_do_not_see_their_batch() -> None:
    torch.manual_seed(0)
    net = fqt.quantize_(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)))
    x = torch.randn(4, 3, 9, 9)
    truth = net(x).detach()
    x[1:] *= 1000
    assert torch.equal(net(x)[0], truth[0])
    assert torch.equal(net(x[:1]), truth[:1])


def test_attention_module() -> None:
    """Torch's own, with its fused product: equal lengths, so that only contents differ."""
    torch.manual_seed(0)
    attention = fqt.quantize_(nn.MultiheadAttention(16, 2, batch_first=True))
    mask = nn.Transformer.generate_square_subsequent_mask(6)

    def run(x: Tensor) -> Tensor:
        return attention(x, x, x, attn_mask=mask, need_weights=False)[0].detach()

    x = torch.randn(2, 6, 16)
    truth, later = run(x), x.clone()
    later[:, 3:] *= 100
    later[1] += 7
    torch.testing.assert_close(run(later)[0, :3], truth[0, :3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_all_products_of_the_default_run_on_integers(kind: str) -> None:
    recipe = load_recipe("default")
    q = recipe.operand("input")
    assert q is not None
    assert (q.scale.group, q.scale.axis) == ("row", None)
    layer = fqt.quantize_(nn.Linear(8, 4) if kind == "linear" else nn.Conv2d(8, 4, 3), recipe)
    assert all("both operands" in p.why or "no integer kernels" in p.why for p in fqt.explain(layer).products)
