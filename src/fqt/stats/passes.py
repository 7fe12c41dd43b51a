"""The backward passes that everything here measures by: gradients one by one, and nothing left behind.

A gradient is handed on one parameter at a time, as the backward completes it, and released: whoever measures
holds what it keeps, never a second copy of the whole. Collecting `torch.autograd.grad`'s list was rejected for
that reason.

Equal seeds give equal noise: a converted layer in training mode draws its seed from torch's generator whether or
not its recipe quantizes the gradient. So two passes that differ only in which quantizers are on share the random
numbers of the others, and the masks of dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.nn import GradientOperand, Recipe, observe, wrappers
from fqt.nn.convert import is_converted
from fqt.nn.observe import eagerly
from fqt.nn.ranges import held
from fqt.nn.trace import LossFn, check_loss
from fqt.nn.wrappers import named_modules, named_parameters

__all__ = [
    "Backward",
    "LossFn",
    "Sink",
    "alone",
    "check_batches",
    "check_loss",
    "check_model",
    "converted",
    "energy",
    "measuring",
    "owner",
    "tensors",
    "trainable",
    "undisturbed",
    "without",
]

OTHER_NOISE = (
    "the gradient is random even without gradient quantizers and without dropout, which is off here: put the "
    "modules that draw noise of their own (stochastic depth, a recurrent layer's dropout) in eval mode, so that "
    "what is measured is quantization"
)

ROLES = ("grad_input", "grad_weight")
Sink = Callable[[str, Tensor], None]
Observer = Callable[[str, GradientOperand], None]
_PIECE = 4096


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by qualified name, without what wrappers add to it.

    Raises:
        FqtError: there is none.
    """
    found = {name: p for name, p in named_parameters(model) if p.requires_grad}
    if not found:
        raise FqtError("the model has no parameter that requires a gradient")
    return found


def owner(parameter: str) -> str:
    """The layer a parameter belongs to: its qualified name without the last word; "" for the model itself."""
    return parameter.rpartition(".")[0]


def converted(model: nn.Module) -> dict[str, nn.Module]:
    """The converted layers by qualified name, without what wrappers add to it."""
    return {name: module for name, module in named_modules(model) if is_converted(module)}


def alone(model: nn.Module, averaged: bool = False) -> nn.Module:
    """The model as one process has it, out of the wrappers that average gradients over processes or devices.

    Args:
        model: wrapped or not.
        averaged: whether `.grad`, which may be such an average, will be compared.

    Raises:
        FqtError: no process has the whole model, since its parameters are sharded.
    """
    kinds = {kind.__name__ for p in model.parameters() for kind in type(p).__mro__}
    kinds |= {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    sharded = kinds & {"DTensor", "FullyShardedDataParallel"}
    if sharded:
        raise FqtError(
            f"the model's parameters are sharded over processes ({', '.join(sorted(sharded))}), and a gradient's "
            "statistics need all of it: measure the model before it is sharded"
        )
    # What made .grad stays as it is: a compiled model's hooks are outside.
    return wrappers.alone(model, outermost=averaged)


def check_model(model: nn.Module, awake: bool = True) -> dict[str, nn.Module]:
    """The converted layers that quantize a gradient.

    Raises:
        FqtError: no converted layer, none that quantizes its gradient, or, if `awake`, one of them in eval mode.
    """
    layers = converted(model)
    if not layers:
        raise FqtError("the model has no converted layer: call fqt.quantize_(model, 'shq8') first")
    noisy = {
        name: module
        for name, module in layers.items()
        if _recipe(module).grad_input is not None or _recipe(module).grad_weight is not None
    }
    if not noisy:
        raise FqtError(
            "no layer quantizes its gradient: convert the model to a recipe such as 'shq8', not 'qat' "
            "(fqt diagnose: --recipe shq8)"
        )
    asleep = [name or "(model)" for name, module in noisy.items() if not module.training]
    if awake and asleep:
        raise FqtError(
            f"{asleep[0]} is in eval mode, where quantized layers draw no noise: call model.train() first"
        )
    return noisy


def _recipe(module: nn.Module) -> Recipe:
    recipe = module.fqt_recipe
    assert isinstance(recipe, Recipe)
    return recipe


@contextmanager
def without(layers: Mapping[str, nn.Module], off: Mapping[str, Sequence[str]] | None = None) -> Iterator[None]:
    """While it lasts, gradient quantizers are off: their products take the gradient exactly.

    Args:
        layers: converted layers by name.
        off: the roles ("grad_input", "grad_weight") that are off, by layer; None for both of every layer.
    """
    chosen = dict.fromkeys(layers, ROLES) if off is None else off
    before = {name: _recipe(layers[name]) for name in chosen}
    try:
        for name, roles in chosen.items():
            # "float" is an operand's name for None
            switched = replace(before[name], **dict.fromkeys(roles, "float"))  # type: ignore[arg-type]
            layers[name].fqt_recipe = switched  # type: ignore[assignment]
        yield
    finally:
        for name, recipe in before.items():
            layers[name].fqt_recipe = recipe  # type: ignore[assignment]


@dataclass(frozen=True)
class Backward:
    """Backward passes of a model. Every measurement makes its passes by one of these, mostly `measuring`'s.

    Attributes:
        model, loss_fn: as for `diagnose`.
        parameters: of the model, by name, each requiring a gradient: those whose gradients are wanted.
    """

    model: nn.Module
    loss_fn: LossFn
    parameters: Mapping[str, nn.Parameter]

    def __call__(
        self, batch: Any, sink: Sink | None = None, seed: int | None = None, observer: Observer | None = None
    ) -> None:
        """One pass; `sink(name, gradient)` is called once per parameter, zeros where the loss does not reach.

        Only the gradient being handed on is alive, beside what the backward itself holds. `.grad` is left alone.

        Args:
            batch: as for `diagnose`.
            sink: takes each gradient, which it may keep and change; without one they are dropped.
            seed: of torch's generators; None takes them as they are.
            observer: sees what is quantized on the way, as in `fqt.nn.observe`.

        Raises:
            FqtError: the loss is not a finite scalar.
        """
        observing = nullcontext() if observer is None else observe(self.model, observer)
        sink = sink or _drop
        if seed is not None:
            torch.manual_seed(seed)
        saved = {name: p.grad for name, p in self.parameters.items()}
        missing = set(self.parameters)
        handles = []

        def hand_on(name: str, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            missing.discard(name)
            sink(name, gradient)

        try:
            for name, p in self.parameters.items():
                p.grad = None
                hook = lambda parameter, name=name: hand_on(name, parameter)
                handles.append(p.register_post_accumulate_grad_hook(hook))
            with observing, torch.enable_grad():
                loss = self.loss_fn(self.model, batch)
                _check_loss(loss)
                _run_backward(loss, tuple(self.parameters.values()))
        finally:
            for handle in handles:
                handle.remove()
            for name, p in self.parameters.items():
                p.grad = saved[name]
        for name in self.parameters:
            if name in missing:
                sink(name, torch.zeros_like(self.parameters[name]))

    def refuse_other_noise(self, batch: Any, first: Mapping[str, Tensor], seed: int) -> None:
        """Makes a second exact pass (see `without`) of a batch, with another seed than the first.

        Converted layers and dropout draw from one generator, so that their noise could not be told apart.

        Args:
            batch: the one of the first pass.
            first: its gradients by name.
            seed: of the second.

        Raises:
            FqtError: the gradients differ.
        """
        sums = torch.zeros(2, dtype=torch.float64)

        def compare(name: str, gradient: Tensor) -> None:
            sums.add_(torch.stack([energy(first[name] - gradient), energy(first[name])]))

        self(batch, compare, seed)
        apart, whole = sums.tolist()
        if apart > 1e-6 * whole:
            raise FqtError(OTHER_NOISE)


@contextmanager
def measuring(model: nn.Module, loss_fn: LossFn) -> Iterator[Backward]:
    """Passes of a model as one process has it (`alone`); buffers and random states are put back afterwards.

    All are made eagerly: rounding and the masks of dropout differ in compiled graphs, and those know no observer.

    Raises:
        FqtError: no trainable parameter, or parameters that are sharded over processes.
    """
    model = alone(model)
    backward = Backward(model, loss_fn, trainable(model))
    with undisturbed(model), eagerly():
        yield backward


def _run_backward(loss: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """As `loss.backward(inputs=inputs)`, but under the modes in force, in which checkpoints are computed again.

    Torch's own is a function like others, which modes see and inside of which they are off.
    """
    loss = loss.reshape(())
    run = torch.autograd.Variable._execution_engine.run_backward
    try:
        run((loss,), (torch.ones_like(loss),), False, False, inputs, allow_unreachable=True, accumulate_grad=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise FqtError(
            "reentrant activation checkpoints cannot be measured: pass use_reentrant=False "
            '(transformers: gradient_checkpointing_kwargs={"use_reentrant": False})'
        ) from error


def _drop(name: str, gradient: Tensor) -> None:
    """The sink of gradients that nobody wants."""


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise FqtError(f"loss_fn must return a scalar, got {shape}")
    if not torch.isfinite(loss):
        raise FqtError(f"the loss is {loss.item()}: the gradient's variance is undefined at this point")
    if not loss.requires_grad:
        raise FqtError("the loss depends on no parameter that requires a gradient")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts buffers and random states back: a forward in training mode moves batch norm's statistics.

    Ranges that layers remember stay what they are meanwhile: all passes are quantized in the same.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), held(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch: itself, or those in a list, tuple or dict of them, nested or not."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in tensors(value)]
    if isinstance(batch, list | tuple):
        return [t for value in batch for t in tensors(value)]
    return []


def check_batches(batches: Sequence[Any], least: int, equal: bool = True) -> None:
    """Enough batches, if `equal` all of one size: the first axis of a batch's first tensor, where it has one.

    Raises:
        FqtError: too few batches, or sizes that differ.
    """
    if len(batches) < least:
        raise FqtError(f"this measurement needs at least {least} batches, got {len(batches)}")
    first = [found[0] for found in map(tensors, batches) if found and found[0].ndim]
    sizes = [len(tensor) for tensor in first]
    if equal and len(set(sizes)) > 1:
        raise FqtError(
            f"the batches have {', '.join(map(str, sorted(set(sizes))))} samples: the variance of a gradient is "
            "that of one batch size; leave the smaller batch out (or equal=False, where batches vary by design)"
        )


def energy(x: Tensor) -> Tensor:
    """‖x‖², float64 scalar on the CPU.

    Of large float32 tensors to 1e-5: norms of 4,096 entries in float32, then float64, which is several times as
    fast as float64 from the start.
    """
    x, norm = x.detach(), torch.linalg.vector_norm
    if x.dtype == torch.float32 and x.numel() >= _PIECE:
        flat = (x.permute(0, 2, 3, 1) if x.ndim == 4 and x.stride(1) == 1 else x).reshape(-1)
        whole = flat.numel() - flat.numel() % _PIECE
        norms = torch.cat([norm(flat[:whole].view(-1, _PIECE), dim=1), norm(flat[whole:])[None]])
        square = norms.double().square().sum().cpu()
        if 1e-20 < square < 1e30:  # else squares in float32 may have left its range
            return square
    return norm(x, dtype=torch.float64).square().cpu()
