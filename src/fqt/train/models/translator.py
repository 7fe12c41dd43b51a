"""The encoder-decoder transformer of translation, by its layers and width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.train.models.transformers import Block, Stack, check_length
from fqt.train.named import construct

__all__ = ["TRANSLATORS", "Translator", "build_translator"]


class Translator(nn.Module):
    """An encoder-decoder transformer (Vaswani et al. 2017) with norms before the blocks' parts.

    Positions are sinusoids; embeddings, times √width, are also the head, and the source's unless it has its own.
    Token 0 is padding: the source's is masked, the target's comes after all that counts.

    Args:
        layers: blocks of the encoder, and of the decoder.
        heads: of attention.
        width: of the vectors, even, at least 4.
        hidden: width inside the feed-forward nets.
        vocabulary: tokens there are.
        context: longest sequence, of either side.
        dropout: of embeddings and of what blocks add; attention's weights have none.
        shared: whether both languages have one embedding.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        hidden: int,
        vocabulary: int,
        context: int,
        dropout: float = 0.0,
        shared: bool = True,
    ) -> None:
        super().__init__()
        make = partial(Block, width, heads, hidden=hidden, dropout=dropout, attention_dropout=0.0)
        self.tokens = nn.Embedding(vocabulary, width)
        self.source_tokens = None if shared else nn.Embedding(vocabulary, width)
        self.register_buffer("positions", sinusoids(context, width), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Stack(layers, width, make)
        self.decoder = Stack(layers, width, partial(make, cross=True))
        self.head = nn.Linear(width, vocabulary, bias=False)
        _initialize(self, width)
        self.head.weight = self.tokens.weight

    @property
    def checkpointing(self) -> bool:
        """Whether the blocks' insides are computed again in backward."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = on

    def forward(self, source: Tensor, before: Tensor) -> Tensor:  # (B, S), (B, T) int64 -> (B, T, vocabulary)
        """The logits of each next token of the target, from the source and the target's tokens so far."""
        return self.head(self._decode(before, *self.encode(source)))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:  # (B, S) -> (B, S, width), (B, 1, 1, S) bool
        """What the decoder reads, and which positions of it are no padding."""
        mask = (source != 0)[:, None, None]
        embedding = self.tokens if self.source_tokens is None else self.source_tokens
        return self.encoder(self._embed(embedding, source), mask), mask

    def decode(self, before: Tensor, memory: Tensor, mask: Tensor) -> Tensor:  # (B, T) -> (B, vocabulary)
        """The logits of the token that follows, given what `encode` returned."""
        return self.head(self._decode(before, memory, mask)[:, -1])

    def _decode(self, before: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return self.decoder(self._embed(self.tokens, before), None, True, memory, mask)

    def _embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        positions: Tensor = self.positions  # type: ignore[assignment]
        length = tokens.shape[1]
        check_length(length, len(positions))
        return self.dropout(math.sqrt(positions.shape[1]) * embedding(tokens) + positions[:length])


def sinusoids(length: int, width: int) -> Tensor:
    """(length, width): sines, then cosines, of position / 10000^(i / (width/2 − 1))."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2 - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def _initialize(model: nn.Module, width: int) -> None:
    """Embeddings normal of variance 1/width, Linears by Glorot and Bengio (2010), biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=width**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


TRANSLATORS: dict[str, Callable[..., nn.Module]] = {
    "translator-4x128": partial(Translator, 4, 4, 128, 256),
    "translator-6x512": partial(Translator, 6, 4, 512, 1024, shared=False),
}


def build_translator(name: str, *, vocabulary: int, context: int, dropout: float) -> nn.Module:
    """Builds a translator with fresh weights from torch's global generator.

    Args:
        name: one of `TRANSLATORS` (layers × width), or ``package.module:ClassOrFactory``, which is called with
            those of the keywords that its signature names, and has `Translator`'s `forward`, `encode`, `decode`.
        vocabulary: tokens there are.
        context: longest sequence.
        dropout: in training.

    Raises:
        FqtError: an unknown name, or an import path that leads to no such module.
    """
    model = construct(name, TRANSLATORS, vocabulary=vocabulary, context=context, dropout=dropout)
    if not all(hasattr(model, method) for method in ("encode", "decode")):
        raise FqtError(f"model {name}: has no `encode` and `decode`, by which translations are searched")
    return model
