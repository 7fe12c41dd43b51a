"""Nets of other kinds than those of the training tasks, for whole steps: depthwise filters, U-Nets, tokens.

Small forms of published nets, written for the cost of their layers; nothing here is trained to an accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Inverted(nn.Module):
    """An inverted residual (Sandler et al. 2018): 1×1 to `expand` times the channels, 3×3 depthwise, 1×1 back."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = expand * inputs
        self.residual = stride == 1 and inputs == outputs
        widening = [*_normed(nn.Conv2d(inputs, hidden, 1, bias=False)), nn.ReLU6()] if expand > 1 else []
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        back = _normed(nn.Conv2d(hidden, outputs, 1, bias=False))
        self.layers = nn.Sequential(*widening, *_normed(depthwise), nn.ReLU6(), *back)

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs, H, W)
        """(N, outputs, H/stride, W/stride)."""
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet(num_classes: int = 10) -> nn.Module:
    """MobileNetV2 at full width for images of 32 × 32: the stem and the second stage keep the resolution."""
    stages = [
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    channels, layers = 32, [*_normed(nn.Conv2d(3, 32, 3, 1, 1, bias=False)), nn.ReLU6()]
    for expand, outputs, count, stride in stages:
        for i in range(count):
            layers.append(Inverted(channels, outputs, stride if i == 0 else 1, expand))
            channels = outputs
    layers += [*_normed(nn.Conv2d(channels, 1280, 1, bias=False)), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, num_classes))


class Mixed(nn.Module):
    """A block of ConvNeXt (Liu et al. 2022) without layer scale: 7×7 depthwise, norm, two 1×1 as linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (N, width, H, W)
        """The same shape."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def convnext(widths: tuple[int, ...] = (64, 128, 256), blocks: int = 2, num_classes: int = 10) -> nn.Module:
    """Patches of 4 × 4, then stages of blocks with a 2 × 2 convolution of stride 2 between them."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4)]
    for before, width in zip((0, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, width, 2, 2)] if before else []
        layers += [Mixed(width) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class UNet(nn.Module):
    """Ronneberger et al. (2015) with padding and batch norm: a class for every pixel.

    Args:
        widths: channels at each resolution, the finest first.
        num_classes: of pixels.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), num_classes: int = 4) -> None:
        super().__init__()
        pairs = list(zip((3, *widths), widths, strict=False))
        self.down = nn.ModuleList(_twice(a, b) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairs[:0:-1])
        self.merge = nn.ModuleList(_twice(2 * a, a) for a, _ in pairs[:0:-1])
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W), H and W divisible by 2 at every resolution
        """(N, num_classes, H, W)."""
        seen: list[Tensor] = []
        for layer in self.down:
            x = layer(F.max_pool2d(x, 2) if seen else x)
            seen.append(x)
        for up, merge, skip in zip(self.up, self.merge, seen[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.head(x)


class OfTokens(nn.Module):
    """A model of token sequences as one of floats, which a workload's batch is: normal numbers become tokens.

    Args:
        model: takes one sequence (N, T) int64, or two of equal length.
        vocabulary: tokens there are.
        sequences: how many it takes; they lie one after the other.
    """

    def __init__(self, model: nn.Module, vocabulary: int, sequences: int = 1) -> None:
        super().__init__()
        self.model, self.vocabulary, self.sequences = model, vocabulary, sequences

    def forward(self, x: Tensor) -> Tensor:  # (N, sequences · T)
        """(N, T, vocabulary)."""
        uniform = (1 + torch.erf(x.detach() / 2**0.5)) / 2
        tokens = (uniform * self.vocabulary).long().clamp(0, self.vocabulary - 1)
        return self.model(*tokens.chunk(self.sequences, 1))


def _normed(layer: nn.Conv2d) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(layer.out_channels)]


def _twice(inputs: int, outputs: int) -> nn.Module:
    """Two 3×3 convolutions, each with norm and ReLU."""
    first, second = (nn.Conv2d(n, outputs, 3, padding=1, bias=False) for n in (inputs, outputs))
    return nn.Sequential(*_normed(first), nn.ReLU(), *_normed(second), nn.ReLU())
