"""Transformers for small experiments, of Linears that convert: a GPT, by its layers and width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fqt.errors import FqtError
from fqt.train.named import construct

__all__ = ["GPT", "GPTS", "Attention", "Block", "Stack", "Stacked", "build_gpt", "check_length", "initialize"]


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) of a sequence to itself or, with ``source``, to another.

    Args:
        width: of the vectors; divisible by ``heads``.
        heads: of width/heads dimensions each.
        dropout: of the attention's weights, in training.
        bias: whether the projections have one.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise FqtError(f"a width of {width} has no {heads} heads of one size: choose a divisor of it")
        self.heads = heads
        self.dropout = nn.Dropout(dropout)  # a module, so that what switches dropout off finds it
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(width, 2 * width, bias=bias)
        self.o = nn.Linear(width, width, bias=bias)

    def forward(  # (B, T, width), source (B, S, width), mask (B, 1, 1, S) bool -> (B, T, width)
        self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """What each position gathers from those that ``mask`` (true: may be seen) and ``causal`` let it see."""
        k, v = self.kv(x if source is None else source).chunk(2, dim=-1)
        dropout = self.dropout.p if self.dropout.training else 0.0
        q, k, v = map(self._split, (self.q(x), k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.o(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer block: attention, with ``cross`` one to a source, and a GELU feed-forward net."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        bias: bool = True,
        cross: bool = False,
    ) -> None:
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, heads, attention_dropout, bias)
        self.norm_cross = nn.LayerNorm(width, bias=bias) if cross else None
        self.cross = Attention(width, heads, attention_dropout, bias) if cross else None
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # (B, T, width)
        mask: Tensor | None = None,  # (B, 1, 1, T) bool: which positions of x may be seen
        causal: bool = False,
        source: Tensor | None = None,  # (B, S, width)
        source_mask: Tensor | None = None,  # (B, 1, 1, S) bool
    ) -> Tensor:
        """The block's output (B, T, width), not normalized."""
        x = x + self.dropout(self.attention(self.norm1(x), mask=mask, causal=causal))
        if self.cross is not None:
            assert self.norm_cross is not None
            x = x + self.dropout(self.cross(self.norm_cross(x), source, mask=source_mask))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Stack(nn.Module):
    """Blocks one after the other and a last norm; `checkpointing` computes their insides again in backward."""

    def __init__(self, layers: int, width: int, make: Callable[[], Block], bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.checkpointing = False

    def forward(self, x: Tensor, *args: object) -> Tensor:  # (B, T, width)
        """The last block's output, normalized; further arguments go to every block."""
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, *args, use_reentrant=False)
            else:
                x = block(x, *args)
        return self.norm(x)


class Stacked(nn.Module):
    """A model around one `Stack`."""

    stack: Stack

    @property
    def checkpointing(self) -> bool:
        """Whether the blocks' insides are computed again in backward."""
        return self.stack.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.stack.checkpointing = on


class GPT(Stacked):
    """A decoder-only transformer with learned positions and the embedding as its head (Radford et al. 2019).

    Args:
        layers: blocks.
        heads: of attention.
        width: of the vectors.
        vocabulary: tokens there are.
        context: longest sequence.
        dropout: of embeddings, attention and blocks.
        bias: whether Linears and norms have one; nanoGPT's small nets have none.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        vocabulary: int,
        context: int,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.stack = Stack(layers, width, lambda: Block(width, heads, dropout=dropout, bias=bias), bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        initialize(self, layers)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) int64 -> (B, T, vocabulary)
        """The logits of each next token.

        Raises:
            FqtError: the sequence is longer than the context.
        """
        check_length(tokens.shape[1], self.positions.num_embeddings)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        return self.head(self.stack(x, None, True))


def check_length(length: int, context: int) -> None:
    """Raises `FqtError` where a sequence is longer than the context."""
    if length > context:
        raise FqtError(
            f"a sequence of {length} tokens does not fit a context of {context}: lower --context, or give the "
            "model a longer one"
        )


def initialize(model: nn.Module, layers: int) -> None:
    """GPT-2's initial weights: normal of deviation 0.02, 0.02/√(2·layers) for what is added to the residual
    stream; biases zero.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02 / math.sqrt(2 * layers) if name.endswith((".o", ".down")) else 0.02
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


GPTS: dict[str, Callable[..., nn.Module]] = {
    "gpt-4x128": partial(GPT, 4, 4, 128),
    "gpt-6x192": partial(GPT, 6, 6, 192),
    "gpt-6x384": partial(GPT, 6, 6, 384),
}


def build_gpt(name: str, *, vocabulary: int, context: int, dropout: float) -> nn.Module:
    """Builds a GPT with fresh weights from torch's global generator.

    Args:
        name: one of `GPTS` (layers × width), or ``package.module:ClassOrFactory``, which is called with those of
            the keywords that its signature names, and maps tokens (B, T) to logits (B, T, vocabulary).
        vocabulary: tokens there are.
        context: longest sequence.
        dropout: in training.

    Raises:
        FqtError: an unknown name, or an import path that leads to no module.
    """
    return construct(name, GPTS, vocabulary=vocabulary, context=context, dropout=dropout)
