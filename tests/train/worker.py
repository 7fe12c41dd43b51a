"""One of two processes that train together, in one gloo group; what it sees is written to a file for the tests."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from fqt.errors import FqtError
from fqt.train import Interrupted, TrainConfig, resolve, train
from fqt.train.ranks import Ranks
from fqt.train.task import IGNORED
from fqt.train.trainer import Trainer

from .conftest import Interruption

# A net without batch norm (`net`) computes the same on any number of processes; `dropped` draws noise.
RUNS: dict[str, dict[str, Any]] = {
    "floats": {"recipe": "none"},
    "parts": {"recipe": "none", "accumulate": 2, "clip_norm": 0.5, "average": 0.5},
    "a sample left": {"recipe": "none", "batch_size": 1296, "steps": 2, "drop_last": False},
    "shards": {"recipe": "none", "fsdp": True},
    "shards in parts": {"recipe": "none", "fsdp": True, "accumulate": 2, "clip_norm": 0.5, "average": 0.5},
    "views": {"recipe": "none", "fsdp": True, "test_views": True},
    "quantized": {"recipe": "shq4d", "model": "dropped"},
    "quantized shards": {"recipe": "shq4d", "model": "dropped", "fsdp": True},
    "batch norm": {"recipe": "hind4", "model": "convnet"},
    "batch norm shards": {"recipe": "hind4", "model": "convnet", "fsdp": True},
    "messages": {"recipe": "psq4", "messages": "psq8"},
    "adapted": {"recipe": "shq8", "adapt": True, "adapt_every": 1, "rho": 10.0},
}
CUT = ("quantized", "quantized shards", "batch norm", "batch norm shards")  # interrupted after 3 steps, and resumed


class Block(nn.Module):
    """Something that is dealt out on its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(64, 32), nn.Linear(32, 64), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(self.up(x).relu()))


def net(num_classes: int, dropout: float = 0.0) -> nn.Module:
    blocks = nn.Sequential(Block(dropout), Block(dropout))
    return nn.Sequential(nn.Flatten(), blocks, nn.Linear(64, num_classes))


def dropped(num_classes: int) -> nn.Module:
    return net(num_classes, 0.2)


def config(name: str, **changes: Any) -> TrainConfig:
    """A run of 4 steps, or as it says."""
    given = {"model": "net", "steps": 4, "batch_size": 250, "window": 2, "device": "cpu", "lr": 0.05}
    given |= {**RUNS[name], **changes}
    if given["model"] in ("net", "dropped"):
        given["model"] = f"{__name__}:{given['model']}"
    return resolve("digits", None, given)


def main(rank: int, folder: str) -> None:
    """Makes the runs in `folder`, and writes what this rank saw there."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks, place = Ranks(rank, 2, rank), Path(folder)
    try:
        results = {name: train(config(name), place / name, ranks=ranks) for name in RUNS}
        for name in CUT:
            cut(name, place / f"{name}, cut", ranks)
            train(config(name), place / f"{name}, cut", resume=True, ranks=ranks)
        cut("quantized", place / "from two", ranks)
        train(config("floats", fsdp=True), place / "from one", resume=True, ranks=ranks)
        found = {
            "results": results,
            "refused": [refused(place, ranks, **changes) for changes in REFUSED],
            "unequal": unequal(ranks),
            "weights": {name: weights(name, ranks) for name in ("quantized", "messages", "adapted")},
            "noise": noise(ranks),
            "dealt": [list(ranks.deal(range(count))) for count in (4, 3, 0)],
        }
        torch.save(found, place / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def cut(name: str, folder: Path, ranks: Ranks) -> None:
    """Starts a run that the first process's user ends after 3 steps."""
    with pytest.raises(Interrupted, match="after step 3;"):
        train(config(name), folder, observer=Interruption(3), ranks=ranks)


REFUSED: tuple[dict[str, Any], ...] = (
    {},  # the folder holds a run, which the first process sees
    {"adapt": True, "batch_size": 251},
    {"adapt": True, "accumulate": 2},
    {"device": "cuda:1"},
    {"messages": "psq8n"},
)


def refused(place: Path, ranks: Ranks, **changes: Any) -> str:
    """What is said, and nothing was made."""
    folder = place / ("floats" if not changes else "refused")
    with pytest.raises(FqtError) as caught:
        train(config("adapted", **{"adapt": False, **changes}), folder, ranks=ranks)
    if ranks.first:
        assert not (place / "refused").exists()
    return str(caught.value)


def unequal(ranks: Ranks) -> str:
    """What is said of parts of which one has more targets, as sentences have."""
    trainer = Trainer(config("adapted"), ranks)
    batch = next(trainer.batches())
    batch[1][0] = IGNORED
    with pytest.raises(FqtError) as caught:
        trainer.train_step(batch)
    return str(caught.value)


def weights(name: str, ranks: Ranks) -> dict[str, Any]:
    """This process's model after 2 steps, and the recipe that widths were adapted to."""
    trainer = Trainer(config(name), ranks)
    for batch, _ in zip(trainer.batches(), range(2), strict=False):
        trainer.train_step(batch)
    recipe = None if trainer.adapter is None else trainer.adapter.state()["recipe"]
    return {"model": trainer.weights(), "recipe": recipe}


def noise(ranks: Ranks) -> Tensor:
    """What this process draws first."""
    Trainer(config("quantized"), ranks)
    return torch.rand(3)
