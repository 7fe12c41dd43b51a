"""Where functions keep less: inside the forward passes of a model that `compress_` was called on.

Each module gets a class on top of its own whose call runs under a `TorchFunctionMode`, which sees every function
of torch that is called meanwhile, `F.relu` in somebody's forward as well as what `nn.ReLU` calls.

Rejected: module replacement, which misses functional calls; saved-tensor hooks, which see tensors but not what
they are kept for, and so cannot tell a mask from an input whose rounding would bias the gradient (and one pair is
in force at a time: checkpoints and offloading would take turns with them); a `TorchDispatchMode`, which is below
autograd.

Every module and not only the outermost: a checkpoint recomputes a part of the model in the backward pass, where
nothing of the outer forward is under way. Inside a part that is recomputed from elsewhere (a function that is
checkpointed, somebody's `no_grad`) torch's own functions run: they would not be the same the second time.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from fqt.errors import ConversionError, FqtError
from fqt.nn.between.codes import WIDTHS
from fqt.nn.between.operations import OPERATIONS, Call
from fqt.nn.convert import all_or_nothing
from fqt.nn.forms import known
from fqt.nn.wrappers import check_module, named_modules

Model = TypeVar("Model", bound=nn.Module)
Kind = type[nn.Module]


class _Between(TorchFunctionMode):
    """Keeps less in every function of the table while the module that is running says so."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.enter(module)

    def enter(self, module: nn.Module) -> None:
        """This module's forward begins, or goes on."""
        self.module = module
        self.ambient = _ambient()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        row = OPERATIONS.get(func)
        bits: Any = self.module.fqt_bits
        if row is not None and bits is not None and _ambient() == self.ambient and not _foreign():
            output = row(Call(func, bits, self.module.training), *args, **(kwargs or {}))
            if output is not NotImplemented:
                return output
        return func(*args, **(kwargs or {}))


def _ambient() -> tuple[Any, ...]:
    """What must be as it was when the module was called: who records gradients, and who packs what they keep."""
    if torch.compiler.is_compiling():
        return (torch.is_grad_enabled(),)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), None if hooks is None else tuple(map(id, hooks))


def _foreign() -> bool:
    """Whether somebody takes the functions themselves apart: a transform of torch.func, or a tracer."""
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or torch._C._get_tracing_state() is not None


def _called(kind: Kind) -> Any:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training or torch.is_grad_enabled()):
            return kind.__call__(self, *args, **kwargs)
        running = _get_current_function_mode()
        if not isinstance(running, _Between):
            with _Between(self):
                return kind.__call__(self, *args, **kwargs)
        before = running.module, running.ambient
        running.enter(self)
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            running.module, running.ambient = before

    return call


def compress_(model: Model, bits: int | None = 8) -> Model:
    """Keep less for backward between a model's products from now on, in place. The forward pass stays as it is.

    Masks of ReLU, dropout and max pooling become bits: gradients stay bit for bit what they were. Normalizations,
    GELU, SiLU and their like, softmax, cross entropy and torch's fused attention on CPUs keep stochastic codes of
    `bits` bits in groups of 256; gradients are then unbiased estimates of what they were, up to the rounding of
    float arithmetic (`fqt.nn.between.functions` says why, operation by operation). An entry's variance is
    step²/12 of its group, range/(2^bits − 2) being the step. What is kept for the products is a matter of
    `quantize_`, before or after. Functions that are not in the table, and what runs inside torch's own
    `nn.MultiheadAttention`, keep what they kept: ``fqt.explain(model, batch).kept`` lists it.

    In eval mode nothing is kept as codes, and without gradients nothing changes at all. Each call of an operation
    that keeps codes draws one int64 from torch's generator, two in an attention, in training mode.
    Parameters, names, hooks and the state dict stay; a copy or a pickle of the model is compressed as it is.

    Args:
        model: any module, converted or not, compiled or not.
        bits: 2, 4 or 8 of a code; None gives the modules their own classes back.

    Returns:
        The model.

    Raises:
        FqtError: another width, or no module.
        ConversionError: nothing in the model runs between products, or a class cannot be changed (back); the model
            is unchanged.
    """
    check_module(model, "compress_")
    if bits is not None and bits not in WIDTHS:
        raise FqtError(f"bits must be {', '.join(map(str, WIDTHS))} or None, not {bits!r}")
    modules = [module for _, module in named_modules(model) if is_compressed(module) or _may_hold(module)]
    if bits is None:
        modules = [module for module in modules if is_compressed(module)]
        covered = [type(module).__name__ for module in modules if "fqt_plain" not in vars(type(module))]
        if covered:
            raise ConversionError(f"{covered[0]} was put on top of a compressed class: take it off first")
    elif not modules:
        raise ConversionError("every module of the model is a layer with products: nothing runs between them")
    with all_or_nothing(model):
        for module in modules:
            if bits is None:
                module.__class__ = vars(type(module))["fqt_plain"]
                module.__dict__.pop("fqt_bits", None)
            else:
                module.__class__ = compressed_form(type(module))
                module.fqt_bits = bits  # type: ignore[assignment]
    return model


@contextmanager
def uncompressed(model: nn.Module) -> Iterator[None]:
    """While it lasts, everything is kept in full."""
    before = [(module, module.fqt_bits) for module in model.modules() if is_compressed(module)]
    try:
        for module, _ in before:
            module.fqt_bits = None  # type: ignore[assignment]
        yield
    finally:
        for module, bits in before:
            module.fqt_bits = bits


def is_compressed(module: nn.Module) -> bool:
    """Whether functions that this module's forward calls keep less for backward."""
    return hasattr(type(module), "fqt_plain")


def _may_hold(module: nn.Module) -> bool:
    """Whether a module may call functions of its own: it has a forward, and is no layer that has products."""
    kind = type(module)
    own = kind.forward is not nn.Module.forward
    scripted = isinstance(module, torch.jit.ScriptModule)
    return own and known(kind) is None and not scripted and not parametrize.is_parametrized(module)


def compressed_form(kind: Kind) -> Kind:
    """A class on top of another whose instances keep less while they are called; always the same one."""
    if hasattr(kind, "fqt_plain"):
        return kind
    for made in kind.__subclasses__():
        if vars(made).get("fqt_plain") is kind:
            return made
    members = {
        "fqt_plain": kind,
        "__call__": _called(kind),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
    }
    return type(kind.__name__, (kind,), members)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """How a module is pickled and copied whose class no module holds: by the class below."""
    found: Any = super(_top(module), module).__reduce_ex__(protocol)
    if found[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return found
    (kind, *arguments), *rest = found[1:]
    return _blank, (kind.fqt_plain, *arguments), *rest


def _top(module: nn.Module) -> Kind:
    """The compressed class in a module's ancestry."""
    return next(kind for kind in type(module).__mro__ if "fqt_plain" in vars(kind))


def _blank(kind: Kind, *arguments: Any) -> nn.Module:
    form = compressed_form(kind)
    return form.__new__(form, *arguments)
