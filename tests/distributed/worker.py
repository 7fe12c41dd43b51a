"""One of two processes, in one gloo group on the local host: what it sees is written to a file for the tests."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fqt
from fqt.distributed import Messages, quantized_messages

DRAWS = 32
AVERAGED = (
    *((name, "gather") for name in ("psq4", "bhq4", "shq4d", "mxfp4", "luq4", "psq4x", "psq4n")),
    *((name, "scatter") for name in ("psq4", "shq4d")),
)
RECIPES = ("qat", "psq4", "shq4d")


def main(rank: int, folder: str) -> None:
    """Writes what this rank saw to `folder`."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        found = {
            "averages": {case: averages(*case) for case in AVERAGED},
            "nan": not_finite(),
            "short": short(),
            "resumed": resumed(),
            "differ": differ(),
            "hook": hook(),
            "monitor": monitor(),
            "fsdp": fsdp(),
            "documented": documented(),
        }
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def gradient_like(rank: int) -> Tensor:
    """3,001 entries, a prime number, whose size changes from block to block, another one on every process."""
    g = torch.Generator().manual_seed(rank)
    return (
        torch.randn(3001, generator=g) * torch.exp(2 * torch.randn(12, generator=g)).repeat_interleave(251)[:3001]
    )


def averages(name: str, exchange: str) -> dict[str, Tensor]:
    """Errors (draws, entries) of averages, and the variance that is said of each."""
    messages = Messages(name, seed=3, block=256, exchange=exchange, biased=name.endswith("n"))
    x, truth = gradient_like(dist.get_rank()), (gradient_like(0) + gradient_like(1)) / 2
    errors, said = [], []
    for _ in range(DRAWS):
        messages.measure()
        errors.append(messages.average(x).wait() - truth)
        said.append(messages.variance)
    sent = torch.tensor([messages.bytes_sent, messages.bytes_float]) // DRAWS
    return {"errors": torch.stack(errors), "said": torch.tensor(said), "bytes": sent}


def not_finite() -> dict[str, Tensor]:
    """One process has an infinite entry, in the third row of four."""
    found = {}
    for name in ("psq8", "ptq8", "shq8"):
        x = torch.ones(400)
        x[250] += dist.get_rank() * torch.inf
        found[name] = Messages(name, seed=0, block=100).average(x).wait()
    return found


def short() -> list[Tensor]:
    """Averages of less than a row, of one entry, of none, and of another dtype."""
    messages = Messages("psq8", seed=0, exchange="scatter")
    inputs = (torch.arange(7.0), torch.ones(1), torch.ones(0, 3), torch.ones(2, 3, dtype=torch.bfloat16))
    return [messages.average(x).wait() for x in inputs]


def resumed() -> list[Tensor]:
    """Three averages, and the third again by other messages that took up the state."""
    first, second = Messages("psq4", seed=1), Messages("psq4", seed=1)
    x = gradient_like(0)[:100]
    draws = [first.average(x).wait() for _ in range(2)]
    second.load_state_dict(first.state_dict())
    return [*draws, first.average(x).wait(), second.average(x).wait()]


def differ() -> list[str]:
    """What is said where codes of one length would mean different things."""
    odd, errors = dist.get_rank() == 1, []
    for messages in (
        Messages("psq4d" if odd else "psq4", seed=0),
        Messages("psq4", seed=0, exchange="gather" if odd else "scatter"),
    ):
        try:
            messages.average(torch.ones(8))
        except fqt.FqtError as error:
            errors.append(str(error))
    return errors


def net() -> nn.Sequential:
    """What FSDP shards one by one: layers that are converted, an embedding that is not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 12), nn.Linear(12, 8), nn.GELU(), nn.Conv1d(6, 4, 3), nn.Flatten(1), nn.Linear(24, 5)
    )


def batch(rank: int) -> Tensor:
    return torch.randint(0, 11, (8, 6), generator=torch.Generator().manual_seed(10 + rank))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole ones, of this process's batch, from one seed."""
    model.zero_grad()
    torch.manual_seed(5)
    loss_of(model, batch(dist.get_rank())).backward()
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in grads.items()}


def averaged(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    for gradient in grads.values():
        dist.all_reduce(gradient)
    return {name: gradient / 2 for name, gradient in grads.items()}


def hook() -> dict[str, Any]:
    """Steps under DDP with the hook, in several buckets: gradients, the variance said and weights in the end."""
    plain = averaged(gradients(fqt.quantize_(net(), "psq4")))
    model = DistributedDataParallel(fqt.quantize_(net(), "psq4"), bucket_cap_mb=0.002, gradient_as_bucket_view=True)
    messages = Messages("psq8", seed=0, block=64)
    model.register_comm_hook(messages, quantized_messages)
    optimizer, draws, said = torch.optim.SGD(model.parameters(), lr=0.0), [], []
    for _ in range(16):
        messages.measure()
        draws.append(gradients(model))
        said.append(messages.variance)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    sent = messages.bytes_sent / messages.bytes_float
    return {
        "plain": plain,
        "draws": draws,
        "said": said,
        "weights": [p.detach() for p in model.parameters()],
        "sent": sent,
    }


def monitor() -> dict[str, Any]:
    """Readings under DDP, without messages and with; what they should be; and what is refused."""
    found: dict[str, Any] = {}
    x = batch(dist.get_rank())
    exact, half = fqt.quantize_(net(), "qat"), fqt.quantize_(net(), "qat")
    loss_of(exact, x).backward()
    loss_of(half, x[:4]).backward()
    for name, state in (("floats", None), ("messages", Messages("psq4", seed=2, block=64))):
        model = DistributedDataParallel(fqt.quantize_(net(), "psq4"))
        if state is not None:
            model.register_comm_hook(state, quantized_messages)
        measure = fqt.Monitor(model, loss_of, every=1, messages=state)
        torch.manual_seed(dist.get_rank())
        loss_of(model, x).backward()
        found[name] = measure.step(x)
        grads = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}
        whole, first = (averaged({n: p.grad.clone() for n, p in m.named_parameters()}) for m in (exact, half))
        found[name, "wanted"] = {
            "quantization": sum(float((grads[n] - whole[n]).double().square().sum()) for n in grads),
            "sampling": sum(float((first[n] - whole[n]).double().square().sum()) for n in grads),
        }
        loss_of(model, x).backward()  # without zero_grad
        try:
            measure.step(x)
        except fqt.FqtError as error:
            found[name, "refused"] = str(error)
    return found


def documented() -> tuple[str, float]:
    """What the page of the documentation prints, and a sum of the weights that it trains."""
    page = Path(__file__).parents[2] / "docs" / "processes.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()) as printed:
        exec(block, namespace)
    return printed.getvalue(), sum(float(p.detach().sum()) for p in namespace["model"].parameters())


def fsdp() -> dict[str, Any]:
    """Gradients of sharded models beside those of plain ones averaged; dtypes; weights as a checkpoint has them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, found = dist.init_device_mesh("cpu", (2,)), {}

    def shard(model: nn.Sequential, **more: Any) -> nn.Sequential:
        for layer in (model[0], model[1], model[3], model[5]):
            fully_shard(layer, mesh=mesh, **more)
        return fully_shard(model, mesh=mesh, **more)

    for recipe in RECIPES:
        plain = averaged(gradients(fqt.quantize_(net(), recipe)))
        before = gradients(shard(fqt.quantize_(net(), recipe)))
        found[recipe] = plain, before, gradients(fqt.quantize_(shard(net()), recipe))
    model = shard(fqt.quantize_(net(), "psq4"))
    gradients(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    found["weights"] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    found["output"] = model.eval()(batch(0)).detach()
    short = shard(fqt.quantize_(net(), "psq4"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    output = short(batch(0))
    output.float().sum().backward()
    found["dtypes"] = output.dtype, short[1].weight.grad.dtype
    try:
        fqt.Monitor(model, loss_of)
    except fqt.FqtError as error:
        found["refused"] = str(error)
    fqt.restore_(model)
    found["restored"] = [type(layer).__name__ for layer in model]
    return found
