"""One of two processes that train replicas, in one gloo group; what it sees is written to a file for the tests."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fqt
from fqt.callbacks import HuggingFaceCallback, LightningCallback
from fqt.callbacks.readings import refuse_parts
from tests.callbacks import test_hugging_face as hf
from tests.callbacks import test_lightning as li

HUGGING_FACE: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped hard": {"max_grad_norm": 1e-3},
    "accumulated": {"gradient_accumulation_steps": 2},
    "labels counted by process": {"average_tokens_across_devices": False},
    "checkpoints": {"gradient_checkpointing": True},
}
LIGHTNING: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 1e-3},
    "accumulated": {"accumulate_grad_batches": 2},
}
Readings = dict[int, dict[str, float]]


def main(rank: int, folder: str) -> None:
    """Writes what this rank saw to `folder`."""
    warnings.simplefilter("ignore")  # other libraries'; a reading that ours would leave out is missed by the tests
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "ACCELERATE_USE_CPU": 1}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        found = {
            "hugging face": {name: hugging_face(Path(folder), **how) for name, how in HUGGING_FACE.items()},
            "lightning": {name: lightning(Path(folder), **how) for name, how in LIGHTNING.items()},
            "undisturbed": undisturbed(Path(folder)),
            "spread": spread(),
            "refused": {name: refused(Path(folder), name) for name in ("hugging face", "lightning")},
        }
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


class Uneven(hf.Data):
    """Texts of which some labels do not count, another share of every batch."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = hf.TEXTS[index]
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(len(ids)) > 1 + index % 5, -100)}


def hugging_face(folder: Path, **options: Any) -> tuple[Readings, list[float]]:
    """Readings of the callback by step, and of `fqt.Monitor` in the same run again, by hand and before clipping."""

    def trainer(*callbacks: Any) -> Any:
        made = hf.trainer(folder, hf.llama(), *callbacks, max_steps=3, logging_steps=1, **options)
        made.train_dataset = Uneven()
        return made

    read = trainer(HuggingFaceCallback(1))
    read.train()
    found = trainer()  # which seeds draws anew
    monitor: list[fqt.Monitor] = []
    batches: list[dict[str, Any]] = []
    by_hand: list[float] = []
    everywhere = options.get("average_tokens_across_devices", True)

    def half(batch: dict[str, Any]) -> tuple[dict[str, Any], float]:
        counts = [sum(label != -100 for label in row) for row in batch["labels"].tolist()]
        rows = min(range(1, 4), key=lambda n: abs(sum(counts[:n]) - sum(counts) / 2))
        part = {key: value[:rows] if value.ndim else value for key, value in batch.items()}
        counted = torch.tensor([sum(counts[:rows]), sum(counts)], dtype=torch.float64)
        if everywhere:
            dist.all_reduce(counted)
        share = float(counted[0] / counted[1])
        return {**part, "num_items_in_batch": batch["num_items_in_batch"] * share}, share

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return model(**batch).loss * (2 if everywhere else 1)

    class Before(hf.transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **more: Any) -> None:
            assert isinstance(found.model_wrapped, DistributedDataParallel)
            monitor.append(fqt.Monitor(found.model_wrapped, loss, every=1, half=half))

    compute, clip = found.compute_loss, found._clip_grad_norm

    def computing(model: nn.Module, inputs: Any, **more: Any) -> Any:
        batches.append({**inputs, "num_items_in_batch": more["num_items_in_batch"]})
        return compute(model, inputs, **more)

    def clipping(model: nn.Module) -> Any:
        reading = monitor[0].step(*batches, reduction="sum")
        assert reading is not None
        by_hand.append(reading["rho"])
        batches.clear()
        return clip(model)

    found.add_callback(Before())
    found.compute_loss, found._clip_grad_norm = computing, clipping
    found.train()
    return hf.readings(read), by_hand


class Seeded(li.Net):
    """Draws by the batch's number."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)


def lightning(folder: Path, **options: Any) -> tuple[Readings, list[float]]:
    """Readings of the callback by step, and of `fqt.Monitor` in a loop of one's own with the same draws."""
    found = replicas(folder, LightningCallback(1), max_steps=3, **options)
    found.fit(Seeded(), li.data(96))

    model, by_hand = li.Net(), []
    parts = options.get("accumulate_grad_batches", 1)
    wrapped, optimizer = DistributedDataParallel(model.net), model.configure_optimizers()
    loss_of = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])
    monitor = fqt.Monitor(wrapped, loss_of, every=1)
    dataset = li.data(96).dataset
    sampler = torch.utils.data.DistributedSampler(dataset)  # shuffles as Lightning does
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=8, sampler=sampler))[: 3 * parts]
    for first in range(0, len(batches), parts):
        optimizer.zero_grad()
        for index in range(first, first + parts):
            torch.manual_seed(index)
            (loss_of(wrapped, batches[index]) / parts).backward()
        reading = monitor.step(*batches[first : first + parts])
        assert reading is not None
        by_hand.append(reading["rho"])
        if "gradient_clip_val" in options:
            nn.utils.clip_grad_norm_(model.parameters(), options["gradient_clip_val"])
        optimizer.step()
    return li.readings(found), by_hand


def replicas(folder: Path, *callbacks: Any, **options: Any) -> Any:
    return li.trainer(folder, *callbacks, strategy="ddp", devices=2, **options)


class Dead(hf.Data):
    """Samples of which, in the second step, the second process gets no label that counts but in one."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = hf.TEXTS[index]
        dead = 8 <= index < 16 and index % 8 in (4, 5, 6)
        return {"input_ids": ids, "labels": torch.full_like(ids, -100) if dead else ids}


def refused(folder: Path, name: str) -> tuple[list[int], list[str]]:
    """Steps with a reading, and our warnings, where one process alone cannot read the second step."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", fqt.errors.FqtWarning)
        if name == "hugging face":
            options = {"max_steps": 4, "logging_steps": 1, "average_tokens_across_devices": False}
            found = hf.trainer(folder, hf.llama(), HuggingFaceCallback(1), **options)
            found.train_dataset = Dead()
            found._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(found.train_dataset)
            found.train()
            steps = list(hf.readings(found))
        else:
            rows = [8, 15 if dist.get_rank() else 1, 8, 8]
            batches = [li.data(n).dataset[:] for n in rows]
            found = replicas(folder, LightningCallback(1), max_steps=4, use_distributed_sampler=False)
            found.fit(Seeded(), torch.utils.data.DataLoader(batches, batch_size=None))
            steps = list(li.readings(found))
    return steps, [str(warning.message) for warning in seen if issubclass(warning.category, fqt.errors.FqtWarning)]


def undisturbed(folder: Path) -> list[list[Tensor]]:
    """Weights after three steps of each trainer, without readings and with."""
    found = []
    for every in (None, 1):
        model = hf.llama()
        hf.trainer(folder, model, HuggingFaceCallback(every), max_steps=3, max_grad_norm=1e-2).train()
        net = Seeded()
        replicas(folder, LightningCallback(every), max_steps=3, gradient_clip_val=1e-3).fit(net, li.data(96))
        found.append([p.detach().clone() for p in (*model.parameters(), *net.parameters())])
    return found


def spread() -> list[str]:
    """What is said where no process has the whole model."""
    found = []
    for kind in ("FSDP", "DeepSpeedStrategy"):
        try:
            refuse_parts(kind)
        except fqt.FqtError as error:
            found.append(str(error))
    return found
