"""One process of `test_distributed`: two ranks, one gloo group on the local host."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
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
    found["sharded"] = _tensor_parallel()
    found["ranges"] = _ranges()
    return found


def wide_net() -> nn.Sequential:
    """Two layers with biases, whose hidden channels can be dealt out."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))


def wide_batch() -> torch.Tensor:
    return torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(6))


def _tensor_parallel() -> dict[str, object]:
    """Gradients under tensor parallel by name, whole: exact ones by recipe, and draws of noisy ones."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, found = torch.distributed.init_device_mesh("cpu", (2,)), {}

    def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        output.square().sum().backward()
        grads = {"output": output.detach(), "input": leaf.grad} | {n: p.grad for n, p in model.named_parameters()}
        grads = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
        return {n: g if n in ("output", "input") else g.flatten() for n, g in grads.items()}

    for recipe in ("none", "qat", "psq4"):
        model = wide_net() if recipe == "none" else fqt.quantize_(wide_net(), recipe)
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        torch.manual_seed(5)
        found[recipe] = [gradients(model, wide_batch()) for _ in range(96 if recipe == "psq4" else 1)]
    replicas = distribute(fqt.quantize_(wide_net(), "psq4"), mesh)
    whole = DTensor.from_local(wide_batch(), mesh, [Replicate()])
    found["replicas"] = [gradients(replicas, whole) for _ in range(96)]
    apart = DTensor.from_local(wide_batch()[:1], mesh, [Shard(0)])
    convolution = fqt.quantize_(nn.Conv1d(9, 4, 1), "psq4")
    for name, layer, x in (
        ("plain", model[0], wide_batch()),
        ("apart", model[0], apart),
        ("data", distribute(fqt.quantize_(wide_net(), "psq4"), mesh), apart),
        ("images", distribute(convolution, mesh), apart),
        ("remembers", distribute(fqt.quantize_(wide_net(), "hind8"), mesh), apart),
    ):
        try:
            handed = layer.forward(x)  # without what parallelize_module does before
            handed.square().sum().backward()
            found[name] = (handed.placements, layer(x).full_tensor().detach())
        except ValueError as error:
            found[name] = error
    return found


def distribute(model: nn.Module, mesh: object) -> nn.Module:
    from torch.distributed.tensor import distribute_module

    return distribute_module(model, mesh)


def _ranges() -> list[dict[tuple[str, str], torch.Tensor]]:
    """What a model remembers after each of three backward passes on this rank's data, and after a forward one."""
    wrapped = DistributedDataParallel(fqt.quantize_(small_net(), "hind8"))
    x, y = small_batch()
    half = slice(4 * torch.distributed.get_rank(), 4 * torch.distributed.get_rank() + 4)
    states = []
    for number in range(3):
        loss_of(wrapped, (x[half] * (1 + number), y[half])).backward()
        states.append({key: state.packed for key, state in fqt.nn.remembered(wrapped).items()})
    wrapped(x[half])
    states.append({key: state.packed for key, state in fqt.nn.remembered(wrapped).items()})
    return states


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
