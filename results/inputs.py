"""Quantizers of the input: the noise of the output and of the weight's gradient, layer by layer, on three networks.

    python results/inputs.py DATA OUTPUT.json

DATA holds `cifar-10-batches-py` and `tinyshakespeare/input.txt`. A convolutional net on digits, a pre-activation
ResNet-20 on CIFAR-10 and a small causal GPT on tiny Shakespeare are trained in float for some steps; one batch then
shows every layer's input X, weight W and grad_output G. For each quantizer of X, geometric means over the layers:

    output       ‖(X̂ − X)·Wᵀ‖² / ‖X·Wᵀ‖²
    grad_weight  exact variance of the product of grad_output, quantized by psq8x@channel, with X̂ over ‖Gᵀ·X̂‖²

"folded" multiplies the steps of X̂ into grad_output before that is quantized, and what is left of X̂ are its codes
less the mean, or the code nearest to 0, of each row; "values" multiplies X̂ itself, as no integer product can with a
step per row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqt
from fqt.kernels.fold import Split
from fqt.kernels.linear_map import LinearMap, rows
from fqt.nn.forms import QUANTIZED
from fqt.nn.layers import linear_map
from fqt.quant import Integers, Quantizer, Scale
from fqt.records import environment, write_json
from fqt.train.config import TrainConfig
from fqt.train.tasks import load_task

GRADIENT = fqt.quantizer("psq8x@channel")


@dataclass(frozen=True)
class Seen:
    """One layer on one batch: everything laid out, rows of samples."""

    name: str
    map: LinearMap
    x: Tensor
    weight: Tensor
    g: Tensor


class CausalAttention(nn.Module):
    """Of one token to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width), or logits from (N, T) characters."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width), or logits from (N, T) characters."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Characters in, logits out."""

    def __init__(self, symbols: int, length: int = 128, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width), or logits from (N, T) characters."""
        place = self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.token(x) + place)))


Batches = Iterator[tuple[Tensor, Tensor]]


def images(task: str, model: str, data: str, batch: int) -> tuple[nn.Module, Batches]:
    """A network of this library and its training batches."""
    opened = load_task(TrainConfig(task=task, data=data, batch_size=batch), torch.device("cpu"))
    net = opened.build(model)
    return net, (b for epoch in range(100) for b in opened.train(epoch))


def text(path: Path) -> tuple[nn.Module, Batches]:
    """A GPT and batches of 16 × 128 characters."""
    letters = path.read_text()
    known = sorted(set(letters))
    codes = torch.tensor([known.index(c) for c in letters[:200_000]])

    def batches() -> Batches:
        while True:
            start = torch.randint(0, len(codes) - 129, (16,))
            x = torch.stack([codes[s : s + 129] for s in start.tolist()])
            yield x[:, :-1], x[:, 1:]

    return GPT(len(known)), batches()


def train(net: nn.Module, batches: Batches, steps: int) -> None:
    """In float."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for _ in range(steps):
        loss_of(net, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy, of every token if there are tokens."""
    return F.cross_entropy(net(batch[0]).flatten(0, -2), batch[1].flatten())


def look(net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Seen]:
    """Every layer's operands."""
    found: list[Seen] = []

    def watch(name: str, layer: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            map, x = linear_map(layer), inputs[0].detach()
            weight = layer.weight.detach()
            output.register_hook(lambda g: found.append(Seen(name, map, x, weight, map.lay(g))))

        return hook

    handles = [m.register_forward_hook(watch(n, m)) for n, m in net.named_modules() if type(m) in QUANTIZED]
    loss_of(net, batch).backward()
    for handle in handles:
        handle.remove()
    return found


def q(group: str, mode: str) -> Quantizer:
    """8 bits, to nearest."""
    return Quantizer(scale=Scale(group, mode), grid=Integers(8), rounding="nearest")


def about_zero(codes: fqt.QuantizedTensor) -> Split:
    """Taken apart about the code nearest to the value 0."""
    step, offset = codes.matrix_step.flatten(), codes.group_offset.flatten()
    centre = torch.where(step > 0, -offset / step, 0.0).round().clamp(0, 255)
    return Split(codes, step, centre.to(torch.int32), offset + step * centre)


def about_mean(codes: fqt.QuantizedTensor) -> Split | None:
    """As the layers do it."""
    return Split.of(codes, 127)


CANDIDATES: dict[str, tuple[Quantizer, Callable[[fqt.QuantizedTensor], Split | None]]] = {
    "per tensor": (q("tensor", "affine"), lambda _: None),
    "affine rows, values": (q("row", "affine"), lambda _: None),
    "affine rows, folded about zero": (q("row", "affine"), about_zero),
    "affine rows, folded about the mean": (q("row", "affine"), about_mean),
    "zero on a code, folded about zero": (q("row", "zero"), about_zero),
    "symmetric rows, values": (q("row", "symmetric"), lambda _: None),
    "symmetric rows, folded": (q("row", "symmetric"), about_mean),
}


def noise(seen: Seen, quantizer: Quantizer, taken_apart: Callable[..., Split | None]) -> tuple[float, float]:
    """Of the output and of the weight's gradient."""
    map, laid = seen.map, seen.map.lay(seen.x)
    codes = quantizer.quantize(laid, axis=rows(map, quantizer.scale.row_axis, laid.ndim))
    value = codes.dequantize()
    error = map.output(map.unlay(value - laid), seen.weight)
    output = float(error.square().sum() / map.output(seen.x, seen.weight).square().sum())
    split = taken_apart(codes)
    g, rest = (seen.g, value) if split is None else (seen.g * split.along_rows(split.step), split.rest(value.dtype))
    # An error of one entry of g reaches all products with the patch of `rest` that it meets.
    patches = map.output(map.unlay(rest.square()), torch.ones_like(seen.weight[:1]))
    weight = map.lay(patches)
    axis = rows(map, GRADIENT.scale.row_axis, g.ndim, "channel")
    variance = GRADIENT.variances(g, [8], 0, axis=axis, weight=weight)[0]
    exact = map.grad_weight(map.unlay(seen.g), map.unlay(value), seen.weight.shape)
    return output, float(variance[0]) / float(exact.square().sum())


def main(data: Path, output: Path) -> None:
    """Measures and writes the record."""
    torch.manual_seed(0)
    networks = {
        "digits": (*images("digits", "convnet", "", 64), 200),
        "gpt": (*text(data / "tinyshakespeare" / "input.txt"), 200),
        "resnet20": (*images("cifar10", "preact-resnet20", str(data), 64), 60),
    }
    rows_: list[dict[str, object]] = []
    for network, (net, batches, steps) in networks.items():
        train(net, batches, steps)
        layers = look(net, next(batches))
        for name, (quantizer, taken_apart) in CANDIDATES.items():
            found = [noise(seen, quantizer, taken_apart) for seen in layers]
            means = [math.exp(sum(math.log(f[i]) for f in found) / len(found)) for i in (0, 1)]
            row = {"network": network, "input": name, "output": means[0], "grad_weight": means[1]}
            rows_.append({**row, "layers": {s.name: f for s, f in zip(layers, found, strict=True)}})
            print(f"{network:10} {name:36} output {means[0]:.2e}  grad_weight {means[1]:.2e}", flush=True)
    record = environment(["python", "results/inputs.py", "DATA", output.name])
    write_json(output, {"environment": record, "rows": rows_})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
