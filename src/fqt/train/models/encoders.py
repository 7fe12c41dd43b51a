"""Transformers that see their whole input at once: of text, by layers and width, and of an image's patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.train.models.transformers import Block, Stack, Stacked, check_length, initialize
from fqt.train.named import construct

__all__ = ["ENCODERS", "PADDING", "Encoder", "ViT", "build_encoder", "plane_positions"]

PADDING = 0  # the token that stands after a sequence shorter than the batch's longest


class Encoder(Stacked):
    """A bidirectional encoder of text with learned positions, its outputs' mean, and a linear head.

    As BERT (Devlin et al. 2019), but for norms before what they feed, and the mean in place of a token of its own.

    Args:
        layers: blocks.
        heads: of attention.
        width: of the vectors.
        vocabulary: tokens there are, with `PADDING`.
        context: longest sequence.
        num_classes: outputs.
        dropout: of embeddings, attention and blocks.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        vocabulary: int,
        context: int,
        num_classes: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.stack = Stack(layers, width, lambda: Block(width, heads, dropout=dropout))
        self.head = nn.Linear(width, num_classes)
        initialize(self, layers)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) int64, each row with a token -> (B, classes)
        """The logits; `PADDING` is neither seen nor part of the mean.

        Raises:
            FqtError: the sequence is longer than the context.
        """
        check_length(tokens.shape[1], self.positions.num_embeddings)
        seen = tokens != PADDING
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.stack(self.dropout(self.tokens(tokens) + self.positions(places)), seen[:, None, None])
        weights = seen.to(x.dtype) / seen.sum(1, keepdim=True)
        return self.head((weights[:, :, None] * x).sum(1))


class ViT(Stacked):
    """A transformer of an image's patches with fixed positions, its outputs' mean, and a linear head.

    Beyer, Zhai & Kolesnikov 2022 (2205.01580): sines and cosines of both coordinates in place of learned positions,
    so that images may be of any size.

    Args:
        layers: blocks.
        heads: of attention.
        width: of the vectors; divisible by four.
        patch: its side in pixels.
        in_channels: of an image.
        num_classes: outputs.
        dropout: of attention and blocks.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        patch: int,
        in_channels: int,
        num_classes: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.stack = Stack(layers, width, lambda: Block(width, heads, dropout=dropout))
        self.head = nn.Linear(width, num_classes)
        initialize(self, layers)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, classes)
        """The logits.

        Raises:
            FqtError: the image is not made of whole patches.
        """
        (height, width), side = x.shape[-2:], self.patches.kernel_size[0]
        if height % side or width % side:
            raise FqtError(
                f"images of {height}×{width} are not made of patches of {side}×{side}: choose another --model"
            )
        y = self.patches(x)
        positions = plane_positions(y.shape[2], y.shape[3], y.shape[1], y.device).to(y)
        return self.head(self.stack((y + positions).flatten(2).transpose(1, 2)).mean(1))


def plane_positions(height: int, width: int, size: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of the rows and columns of a grid, float32 (size, height, width).

    Frequencies fall from 1 to 1/10,000 in geometric steps, size/4 of each kind and coordinate.
    """
    frequencies = 10_000.0 ** -torch.linspace(0, 1, size // 4, device=device)
    rows = frequencies[:, None] * torch.arange(height, device=device)
    columns = frequencies[:, None] * torch.arange(width, device=device)
    grids = rows[:, :, None].expand(-1, -1, width), columns[:, None, :].expand(-1, height, -1)
    return torch.cat([wave for grid in grids for wave in (grid.sin(), grid.cos())])


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "bert-2x128": partial(Encoder, 2, 2, 128),
    "bert-4x256": partial(Encoder, 4, 4, 256),
}


def build_encoder(name: str, *, vocabulary: int, context: int, num_classes: int, dropout: float) -> nn.Module:
    """Builds an encoder of text with fresh weights from torch's global generator.

    Args:
        name: one of `ENCODERS` (layers × width), or ``package.module:ClassOrFactory``, which is called with those
            of the keywords that its signature names, and maps tokens (B, T), filled up with `PADDING`, to logits.
        vocabulary: tokens there are, with `PADDING`.
        context: longest sequence.
        num_classes: outputs.
        dropout: in training.

    Raises:
        FqtError: an unknown name, or an import path that leads to no module.
    """
    return construct(
        name, ENCODERS, vocabulary=vocabulary, context=context, num_classes=num_classes, dropout=dropout
    )
