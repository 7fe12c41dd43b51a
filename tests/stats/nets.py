"""Small nets, batches and losses for the statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fqt


class Twice(nn.Module):
    """One linear layer used before and after another."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.between = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.between(torch.relu(self.shared(x)))))


class InARow(nn.Module):
    """One linear layer used twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))


class Attention(nn.Module):
    """Self-attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 6)
        y = self.embed(x)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.head(y).mean(1)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def make(build=mlp, recipe: str | fqt.Recipe = "psq4", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return fqt.quantize_(build(), recipe)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0])[:, :3], batch[1])


def batches(count: int, n: int = 16, shape: tuple[int, ...] = (6,), seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, *shape, generator=g), torch.randint(0, 3, (n,), generator=g)) for _ in range(count)]
