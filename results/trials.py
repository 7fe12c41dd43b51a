"""What `comparison.py` asks of everyone: small passes that a model of PyTorch's may hold, one thing in each.

A trial is run twice from the same weights, by the float layer and by the converted one. `judge` says from the two
outcomes what became of it: refused, left in float, run, or wrong. Nobody is asked; only results are looked at.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rivals import Rival, setting
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Outcome = dict[str, Tensor]
WIDTH, ROWS = 128, 128
WRONG = 0.1
"""Relative error of an output or gradient above which it is no longer a matter of 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a trial runs on.

    Attributes:
        model: the layer as the child of a container, converted or not.
        fresh: makes such a model of other float weights.
        x: the input.
        around: gives the context of a forward pass.
    """

    model: nn.Module
    fresh: Callable[[], nn.Module]
    x: Tensor
    around: Callable[[], contextlib.AbstractContextManager]


def _noise(like: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def passes(setup: Setup, *, forward: Callable | None = None, above: Callable = _noise) -> Outcome:
    """Forward and backward: the output and every gradient; `above` makes the gradient of an output."""
    x = setup.x.clone().requires_grad_()
    with setup.around():
        y = (forward or setup.model)(x)
    y.backward(above(y))
    found = {f"grad {name}": p.grad for name, p in setup.model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in found.items() if gradient is None]
    if missing:
        raise RuntimeError(f"no gradient came back: {', '.join(missing)}")
    return {"output": y.detach(), "grad_input": x.grad, **found}  # type: ignore[dict-item]


def _summed(setup: Setup) -> Outcome:
    x = setup.x.clone().requires_grad_()
    with setup.around():
        y = setup.model(x)
    y.sum().backward()
    assert x.grad is not None
    return {"output": y.detach(), "grad_input": x.grad}


def _transposed(setup: Setup) -> Outcome:
    return passes(setup, forward=lambda x: setup.model(x.transpose(0, 1)).transpose(0, 1))


def _frozen(setup: Setup) -> Outcome:
    setup.model.requires_grad_(False)
    return passes(setup)


def _compiled(setup: Setup) -> Outcome:
    torch._dynamo.reset()
    return passes(setup, forward=torch.compile(setup.model, fullgraph=True, dynamic=False))


def _copied(setup: Setup) -> Outcome:
    return passes(Setup(model=copy.deepcopy(setup.model), fresh=setup.fresh, x=setup.x, around=setup.around))


def _pickled(setup: Setup) -> Outcome:
    file = io.BytesIO()
    torch.save(setup.model.state_dict(), file)
    file.seek(0)
    plain = setup.fresh()
    plain.load_state_dict(torch.load(file))
    with torch.no_grad():
        return {"output": plain(setup.x)}


def _checkpointed(setup: Setup) -> Outcome:
    return passes(setup, forward=lambda x: checkpoint(setup.model, x, use_reentrant=False))


def _stepped(setup: Setup) -> Outcome:
    optimizer = torch.optim.AdamW(setup.model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        passes(setup)
        optimizer.step()
    with torch.no_grad(), setup.around():
        return {"output": setup.model(setup.x)}


def _second(setup: Setup) -> Outcome:
    x = setup.x.clone().requires_grad_()
    with setup.around():
        y = setup.model(x).float()
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return {"grad of grad_input": second}


def _tiny(setup: Setup) -> Outcome:
    return passes(setup, above=lambda y: _noise(y) * 1e-12)


def _zeros(setup: Setup) -> Outcome:
    x = setup.x.clone()
    x[0] = 0
    zeroed = Setup(model=setup.model, fresh=setup.fresh, x=x, around=setup.around)
    return passes(zeroed, above=lambda y: torch.cat([torch.zeros_like(y[:1]), _noise(y[1:])]))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing that is tried.

    Attributes:
        title: on the page, and in the record.
        model: the layer.
        input: the shape of its input.
        dtype: of both.
        run: the pass.
        autocast: whether everyone's forward pass runs under bfloat16 autocast.
    """

    title: str
    model: Callable[[], nn.Module] = lambda: nn.Linear(WIDTH, WIDTH)
    input: tuple[int, ...] = (ROWS, WIDTH)
    dtype: torch.dtype = torch.float32
    run: Callable[[Setup], Outcome] = passes
    autocast: bool = False


_TOKENS = (32, 4, WIDTH)
_IMAGES = (8, 64, 12, 12)
TRIALS = (
    Trial(title="Linear 128→128, 128 rows"),
    Trial(title="without bias", model=lambda: nn.Linear(WIDTH, WIDTH, bias=False)),
    Trial(title="odd sizes: 147→131, 129 rows", model=lambda: nn.Linear(147, 131), input=(129, 147)),
    Trial(title="a head of ten classes: 2048→10", model=lambda: nn.Linear(2048, 10), input=(ROWS, 2048)),
    Trial(title="one row", input=(1, WIDTH)),
    Trial(title="no row", input=(0, WIDTH)),
    Trial(title="a vector, no batch", input=(WIDTH,)),
    Trial(title="tokens: (32, 4, 128)", input=_TOKENS),
    Trial(title="tokens, transposed before and after", input=_TOKENS, run=_transposed),
    Trial(title="loss = output.sum()", run=_summed),
    Trial(title="Conv2d 3×3", model=lambda: nn.Conv2d(64, 64, 3, padding=1), input=_IMAGES),
    Trial(title="Conv2d, depthwise", model=lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), input=_IMAGES),
    Trial(title="Conv1d", model=lambda: nn.Conv1d(64, 64, 5, padding=2), input=(8, 64, 40)),
    Trial(title="ConvTranspose2d", model=lambda: nn.ConvTranspose2d(64, 64, 2, stride=2), input=_IMAGES),
    Trial(title="MultiheadAttention", model=_Attention, input=(4, 32, WIDTH)),
    Trial(title="bfloat16 model", dtype=torch.bfloat16),
    Trial(title="float16 model", dtype=torch.float16),
    Trial(title="float64 model", dtype=torch.float64),
    Trial(title="bfloat16 autocast on the CPU", autocast=True),
    Trial(title="frozen weights, gradient of the input", run=_frozen),
    Trial(title="a row of zeros, gradient zero there", run=_zeros),
    Trial(title="gradients of size 1e-12", run=_tiny),
    Trial(title="three steps of torch.optim.AdamW", run=_stepped),
    Trial(title="activation checkpointing", run=_checkpointed),
    Trial(title="copy.deepcopy", run=_copied),
    Trial(title="state_dict saved, loaded into a float model", run=_pickled),
    Trial(title="torch.compile(fullgraph=True)", run=_compiled),
    Trial(title="a second derivative", run=_second),
)


def attempt(trial: Trial, rival: Rival) -> dict[str, object]:
    """What became of a trial: "status", and "error" (the largest relative one) or "message" (of the exception)."""
    try:
        return judge(_outcome(trial, rival), _outcome(trial, None), trial.dtype)
    except Exception as error:  # whatever it raises is what it says
        return {"status": "refused", "message": message(error)}


def _outcome(trial: Trial, rival: Rival | None) -> Outcome:
    def fresh(seed: int = 1) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(trial.model()).to(trial.dtype).train()

    def around() -> contextlib.AbstractContextManager:
        if trial.autocast:
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return setting(rival) if rival else contextlib.nullcontext()

    model = rival.convert(fresh(0)) if rival else fresh(0)
    x = torch.randn(trial.input, generator=torch.Generator().manual_seed(2)).to(trial.dtype)
    torch.manual_seed(3)
    return trial.run(Setup(model=model, fresh=fresh, x=x, around=around))


def judge(got: Mapping[str, Tensor], want: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, object]:
    """ "float": what the float layer gives, but for last bits; "runs": near it; "wrong": neither, or not finite."""
    if got.keys() != want.keys():
        return {"status": "wrong", "error": None, "message": f"it gave {', '.join(sorted(got))}"}
    errors = {name: relative(got[name], want[name]) for name in want}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] <= max(1e-6, torch.finfo(dtype).eps / 4):
        return {"status": "float", "error": errors[worst]}
    status = "runs" if errors[worst] <= WRONG else "wrong"
    return {"status": status, "error": errors[worst], "message": "" if status == "runs" else worst}


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖/‖want‖, in float64; infinite if anything is not finite or the shapes differ."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not torch.isfinite(got).all():
        return float("inf")
    difference, size = float((got - want).norm()), float(want.norm())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def message(error: Exception) -> str:
    """The exception in one line, without paths of this machine."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or "no message"
    return f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '…/', text)}"[:240]
