"""One process of `test_distributed`: two ranks, one gloo group on the local host."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import fqt

from .cases import loss_of, parameter_gradients, small_batch, small_net


def main(rank: int, folder: str) -> None:
    """Writes what this rank saw to `folder`."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(_run(), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _run() -> dict[str, object]:
    batch, found = small_batch(), {}
    for recipe in ("qat", "psq4", "default"):
        # Each rank alone, on equal data and equal seeds: only the rank differs.
        alone = fqt.quantize_(small_net(), recipe)
        torch.manual_seed(5)
        local = parameter_gradients(alone, batch)
        draws = [parameter_gradients(alone, batch) for _ in range(24 * (recipe != "qat"))]
        # The same step under DDP: gradients are averaged over ranks.
        model = DistributedDataParallel(fqt.quantize_(small_net(), recipe))
        torch.manual_seed(5)
        reduced = parameter_gradients(model, batch)
        found[recipe] = (local, {n.removeprefix("module."): g for n, g in reduced.items()}, draws)
    found["weights"] = _train()
    found["refused"] = _refused(DistributedDataParallel(fqt.quantize_(small_net(), "psq4")))
    return found


def _refused(model: DistributedDataParallel) -> str:
    """What a monitor says of gradients that are averages over ranks; a diagnosis is this rank's own."""
    torch.manual_seed(3)
    batches = [small_batch(), small_batch()]
    alone, wrapped = (fqt.diagnose(m, loss_of, batches, table=0).total for m in (model.module, model))
    assert alone.quantization == wrapped.quantization
    try:
        fqt.Monitor(model, loss_of)
    except fqt.FqtError as error:
        return str(error)
    return ""


def _train() -> list[torch.Tensor]:
    """A few steps on different data per rank, channels_last, with gradients as views of static buckets."""
    torch.manual_seed(0)
    model = small_net().to(memory_format=torch.channels_last)
    fqt.quantize_(model, "default")
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    x, y = small_batch()
    half = slice(4 * torch.distributed.get_rank(), 4 * torch.distributed.get_rank() + 4)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(wrapped, (x[half], y[half])).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]
