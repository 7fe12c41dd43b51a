"""What is measured: a layer's forward and backward, a whole training step, or one quantizer.

The batch, the initial weights and the gradient from above are drawn from a seed, so that every contestant of a
case computes the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fqt.bench.nets import OfTokens, UNet
from fqt.train.models.images import build_model
from fqt.train.models.transformers import build_gpt
from fqt.train.models.translator import build_translator

SEED = 0
PRODUCT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""The layers whose products with a weight are counted, and whose memory is."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Forward and backward of one layer, with a gradient from above; the input needs a gradient too.

    Attributes:
        model: builds the layer.
        input: its shape; the first axis is the batch.
    """

    model: Callable[[], nn.Module]
    input: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A whole training step: forward, loss, backward, optimizer.

    Attributes:
        model: builds the model.
        input: its shape; the first axis is the batch.
        target: (input, generator) to what the loss compares the output with.
        loss: (output, target) to a scalar.
    """

    model: Callable[[], nn.Module]
    input: tuple[int, ...]
    target: Callable[[Tensor, torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Range and codes of contiguous float32 matrices, a step per row.

    Attributes:
        input: (N, D).
        matrices: how many take turns: so many that each has left the caches when its turn comes again.
    """

    input: tuple[int, int]
    matrices: int = 1


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of codes summed in blocks, beside the plain product of the same codes.

    Attributes:
        input: (M, K), the first operand; the second is (K, N).
        columns: N.
        block: over how many of the K terms a step is constant.
    """

    input: tuple[int, int]
    columns: int
    block: int


Workload = Layer | Step | Quantize | Product


def draw(shape: tuple[int, ...], number: int, device: torch.device | str = "cpu") -> Tensor:
    """The `number`-th standard normal tensor of a workload; float32, of the device's own random numbers."""
    generator = torch.Generator(device).manual_seed(SEED + number)
    return torch.randn(shape, generator=generator, device=device)


def build(workload: Layer | Step, device: torch.device | str = "cpu") -> nn.Module:
    """The workload's model in training mode, the same weights every time on one kind of device; torch's generators
    are left as they were."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(SEED)
        return workload.model().train()


def count_macs(workload: Layer | Step) -> int:
    """Multiply–accumulates of the layers' three products in one pass, taps on padding included.

    Counted by hooks over a forward pass on the meta device. What autograd does not ask for (the first layer's
    grad_input in a step, a frozen Linear's or convolution's grad_weight) and products of two activations are not in
    it. (`torch.utils.flop_counter` counts a grouped convolution's grad_weight `groups` times.)
    """
    found = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        nonlocal found
        if isinstance(module, nn.MultiheadAttention):
            products = 2 + inputs[0].requires_grad
            projected = sum(x.numel() for x in inputs[:3]) * module.embed_dim
            found += products * projected + 3 * output[0].numel() * module.embed_dim
        else:
            assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            products = 1 + inputs[0].requires_grad + module.weight.requires_grad
            # A transposed convolution meets its filters once per input position, the others once per output.
            places = inputs[0] if getattr(module, "transposed", False) else output
            found += products * places.numel() * module.weight[0].numel()

    with torch.device("meta"):
        model = workload.model().train()
        for module in model.modules():
            if isinstance(module, PRODUCT_LAYERS):
                module.register_forward_hook(add)
        model(torch.empty(workload.input, requires_grad=isinstance(workload, Layer)))
    return found


class Block(nn.Module):
    """A pre-norm transformer encoder block without dropout, out of plain `nn.Linear` layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, width)
        """The same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


def transformer(blocks: int, width: int, heads: int, samples: int, tokens: int) -> Step:
    """Blocks that regress random targets from random embeddings."""
    return Step(
        model=lambda: nn.Sequential(*(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width)),
        input=(samples, tokens, width),
        target=lambda x, generator: torch.randn(x.shape, generator=generator),
        loss=lambda output, target: F.mse_loss(output.float(), target),
    )


def torch_encoder(blocks: int, width: int, heads: int, samples: int, tokens: int) -> Step:
    """The same out of torch's own encoder layers."""
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}

    def model() -> nn.Module:
        layers = (nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(blocks))  # type: ignore[arg-type]
        return nn.Sequential(*layers, nn.LayerNorm(width))

    step = transformer(blocks, width, heads, samples, tokens)
    return Step(model=model, input=step.input, target=step.target, loss=step.loss)


def image_classifier(name: str, samples: int, side: int) -> Step:
    """A model of `fqt.train` on random color images of ten classes."""
    return images(lambda: build_model(name, in_channels=3, num_classes=10), samples, side)


def images(model: Callable[[], nn.Module], samples: int, side: int) -> Step:
    """Any classifier of random color images of ten classes."""
    return Step(
        model=model,
        input=(samples, 3, side, side),
        target=lambda x, generator: torch.randint(10, (x.shape[0],), generator=generator),
        loss=lambda output, target: F.cross_entropy(output.float(), target),
    )


def segmentation(samples: int, side: int, num_classes: int = 4) -> Step:
    """A U-Net on random color images, with random classes of their pixels."""
    return Step(
        model=lambda: UNet(num_classes=num_classes),
        input=(samples, 3, side, side),
        target=lambda x, generator: torch.randint(num_classes, (x.shape[0], side, side), generator=generator),
        loss=lambda output, target: F.cross_entropy(output.float(), target),
    )


def language_model(name: str, samples: int, tokens: int, vocabulary: int) -> Step:
    """A GPT of `fqt.train` on random tokens."""
    model = lambda: build_gpt(name, vocabulary=vocabulary, context=tokens, dropout=0.0)
    return _of_tokens(model, (samples, tokens), vocabulary, 1)


def translation(name: str, samples: int, tokens: int, vocabulary: int) -> Step:
    """An encoder-decoder of `fqt.train` on random sentences of as many tokens each."""
    model = lambda: build_translator(name, vocabulary=vocabulary, context=tokens, dropout=0.0)
    return _of_tokens(model, (samples, 2 * tokens), vocabulary, 2)


def _of_tokens(model: Callable[[], nn.Module], input: tuple[int, int], vocabulary: int, sequences: int) -> Step:
    length = input[1] // sequences
    return Step(
        model=lambda: OfTokens(model(), vocabulary, sequences),
        input=input,
        target=lambda x, generator: torch.randint(vocabulary, (x.shape[0], length), generator=generator),
        loss=lambda output, target: F.cross_entropy(output.float().flatten(0, 1), target.flatten()),
    )
