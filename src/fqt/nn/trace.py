"""One forward and backward pass, watched: what converted layers multiplied, and what else was multiplied in float.

Converted layers tell of their own products (`fqt.nn.witness`). Every other matrix product is seen where torch
dispatches it, below autograd, whoever asked for it: a layer that was not converted, `F.linear` with somebody's
weight, attention, `einsum`. It is attributed to the module in whose forward it ran; in the backward pass, to the
forward product whose node of the graph is being differentiated, by its sequence number.

A `TorchFunctionMode`, which would see the names that the user wrote, was rejected: torch's modules take other paths
while one is active. So were hooks on the modules themselves, for the same reason.
"""

from __future__ import annotations

import inspect
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from fqt.errors import FqtError
from fqt.nn.convert import is_converted
from fqt.nn.keeping import Keeping, Kept
from fqt.nn.observe import eagerly
from fqt.nn.witness import Count, Witness
from fqt.nn.wrappers import alone, named_modules, named_tensors, unwrapped

LossFn = Callable[[nn.Module, Any], Tensor]
OUTSIDE = "(outside the model)"


@dataclass(frozen=True)
class Site:
    """Where float products come from.

    Attributes:
        module: the qualified name of the module in whose forward they ran; "" is the model itself.
        operation: what torch was asked for: "matmul", "bmm", "convolution", …
        weight: the qualified name of the model's parameter or buffer that is multiplied; "" if there is none.
    """

    module: str
    operation: str
    weight: str


@dataclass
class Trace:
    """What one forward and backward pass multiplied.

    Attributes:
        layers: the converted layers by qualified name, with what they told.
        floats: all other matrix products, by where they come from: in the forward pass, in the backward pass.
        entered: how often each module's forward was called.
        no_backward: why there was no backward pass; empty if there was one.
        kept: what the forward pass keeps for backward.
    """

    layers: dict[str, Witness]
    floats: dict[Site, tuple[Count, Count]] = field(default_factory=dict)
    entered: Counter[str] = field(default_factory=Counter)
    no_backward: str = ""
    kept: tuple[Kept, ...] = ()


def check_loss(loss_fn: Any) -> None:
    """Refuses what is no function of a model and a batch: arguments that were swapped, a loss of torch's.

    Raises:
        FqtError: with what to write.
    """
    how = "loss_fn(model, batch) gives the loss, such as lambda model, batch: loss(model(batch[0]), batch[1])"
    if not callable(loss_fn):
        raise FqtError(f"loss_fn is a {type(loss_fn).__name__}, and no function: {how}")
    if isinstance(loss_fn, nn.modules.loss._Loss):
        raise FqtError(f"loss_fn is {type(loss_fn).__name__}, which knows no model: {how}")


def trace(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> Trace:
    """Runs one forward and backward pass in the mode the model is in, and leaves no trace of it in the model.

    A model that averages gradients over processes (`DistributedDataParallel`) runs as this process has it, so that
    one process may look alone.

    Parameters' `.grad`, buffers, random states (torch's, NumPy's, Python's), every module's mode, and hooks on
    `.grad` are as before; what the model's own forward writes into plain attributes stays written. Compiled parts
    run uncompiled.

    Args:
        model: any module.
        batch: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments, as the model's
            forward takes them; with `loss_fn`, whatever that takes.
        loss_fn: ``loss_fn(model, batch) -> scalar``; without it the output's `loss` if it has one, else the sum
            of all its floating-point tensors.

    Raises:
        FqtError: the model has lazy layers without parameters yet, or checkpoints activations with
            use_reentrant=True, loss_fn is none or returns no tensor, or the batch is not what the model's forward
            takes.
    """
    if loss_fn is not None:
        check_loss(loss_fn)
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise FqtError("the model has lazy layers without parameters yet: run one batch through it first")
    model = alone(model)
    at_work: list[Witness] = []
    converted = {name: module for name, module in named_modules(model) if is_converted(module)}
    seen = Trace({name: Witness(at_work) for name in converted})
    watch = _Watch(model, seen, at_work)
    with ExitStack() as stack:
        stack.enter_context(_undisturbed(model))
        stack.enter_context(_witnessed(converted, seen.layers))
        stack.enter_context(_uncompiled())
        stack.enter_context(_unsynced(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watch.modules())
        stack.enter_context(watch)
        keeping = Keeping(lambda: watch.here, dict(named_tensors(model)).values())
        with keeping.seen():
            loss = _loss(_call(model, batch) if loss_fn is None else loss_fn(model, batch), loss_fn is not None)
        leaves = [t for t in (*model.parameters(), *_tensors(batch)) if t.requires_grad]
        if loss is None or not loss.requires_grad:
            seen.no_backward = "nothing in the output asks for a gradient"
        elif not leaves:
            seen.no_backward = "no parameter requires a gradient"
        else:
            seen.kept = keeping.rows(loss.grad_fn)
            _differentiate(loss, leaves)
    return seen


def _call(model: nn.Module, batch: Any) -> Any:
    words = batch if isinstance(batch, Mapping) else {}
    parts = () if words is batch else batch if isinstance(batch, list | tuple) else (batch,)
    try:
        return model(*parts, **words)
    except TypeError as error:
        if _takes(unwrapped(model), parts, words):
            raise
        raise FqtError(
            f"the model does not take this batch ({error}): without loss_fn a batch is what its forward takes, "
            "explain(model, inputs); with one, what loss_fn takes, explain(model, (inputs, targets), loss_fn) with "
            "loss_fn(model, batch) -> scalar"
        ) from None


def _takes(model: nn.Module, parts: Sequence[Any], words: Mapping[str, Any]) -> bool:
    """Whether a forward has as many arguments, of these names."""
    try:
        inspect.signature(model.forward).bind(*parts, **words)
    except TypeError:
        return False
    return True


def _loss(output: Any, is_loss: bool) -> Tensor | None:
    """The scalar to differentiate; None if nothing in the output can be."""
    if is_loss and not isinstance(output, Tensor):
        raise FqtError(f"loss_fn must return a scalar, got {type(output).__name__}")
    own = output.get("loss") if isinstance(output, Mapping) else None
    found = [own] if isinstance(own, Tensor) else list(_tensors(output))
    parts = [t.sum().float() for t in found if t.requires_grad and t.is_floating_point()]
    return torch.stack(parts).sum() if parts else None


def _differentiate(loss: Tensor, leaves: list[Tensor]) -> None:
    try:
        torch.autograd.grad(loss, list(dict.fromkeys(leaves)), allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise FqtError(
            "the model checkpoints activations with use_reentrant=True, which cannot be differentiated without "
            "writing into .grad: use_reentrant=False works"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and objects that hold them as attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors([getattr(value, name, None) for name in value.__dataclass_fields__])


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts `.grad`, buffers, modes and random states back."""
    modules = [(m, m.training, dict(m._buffers.items())) for m in model.modules()]
    copies = {id(b): b.detach().clone() for _, _, buffers in modules for b in buffers.values() if b is not None}
    grads = [(p, p.grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            for parameter, _ in grads:
                parameter.grad = None  # wrappers that shard parameters write there themselves
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for parameter, grad in grads:
                parameter.grad = grad
            for module, training, buffers in modules:
                if module.training != training:
                    module.training = training
                for name in set(module._buffers.keys()) - set(buffers):
                    del module._buffers[name]
                for name, buffer in buffers.items():
                    if name not in module._buffers or module._buffers[name] is not buffer:
                        module._buffers[name] = buffer
                    _put_back(buffer, copies)


@torch.no_grad()
def _put_back(buffer: Tensor | None, copies: dict[int, Tensor]) -> None:
    """Only what changed: a write makes a new version, which a graph that waits for its backward would refuse."""
    copy = None if buffer is None else copies.pop(id(buffer), None)
    if buffer is not None and copy is not None and not _equal(buffer, copy):
        buffer.copy_(copy)


def _equal(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except (RuntimeError, NotImplementedError):  # sparse tensors cannot be compared
        return False


@contextmanager
def _witnessed(converted: Mapping[str, nn.Module], witnesses: Mapping[str, Witness]) -> Iterator[None]:
    for name, module in converted.items():
        module.__dict__["fqt_witness"] = witnesses[name]
    try:
        yield
    finally:
        for module in converted.values():
            module.__dict__.pop("fqt_witness", None)


def _unsynced(model: Any) -> AbstractContextManager:
    """Keeps a wrapper that shards parameters from summing gradients over processes."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if callable(no_sync) else nullcontext()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Keeps compiled graphs out: a dispatch mode sees nothing of what is inside them."""
    with eagerly(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
        yield


class _Watch(TorchDispatchMode):
    """Sees every op that torch dispatches in the threads of this pass, and counts the products among them."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled meanwhile, and keeping Dynamo out would import it: seconds

    def __init__(self, model: nn.Module, seen: Trace, at_work: list[Witness]) -> None:
        from torch.utils.flop_counter import flop_registry  # imports Triton where it is installed

        super().__init__()
        self.seen, self.at_work = seen, at_work
        self.formulas: Mapping[Any, Any] = flop_registry
        self.names = {module: name for name, module in named_modules(model)}
        self.weights = _Weights(model)
        # The modules whose forward is running, each with whether it was entered in the backward pass.
        self.running: list[tuple[str, bool]] = []
        self.nodes: dict[int, Site] = {}
        """Where a node of the graph was made, by its sequence number; with an operation if that was a product."""

    @contextmanager
    def modules(self) -> Iterator[None]:
        """While it lasts, this knows which module's forward is running."""

        def enter(module: nn.Module, _: Any) -> None:
            name = self.names.get(module)
            if name is not None:
                self.seen.entered[name] += 1
            self.running.append(
                (self.here if name is None else name, torch._C._current_autograd_node() is not None)
            )

        def leave(*_: Any) -> None:
            self.running.pop()

        handles = (
            torch_module.register_module_forward_pre_hook(enter),
            torch_module.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def here(self) -> str:
        """The module that is running."""
        return self.running[-1][0] if self.running else OUTSIDE

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return NotImplemented
        packet = func._overloadpacket
        counted = packet in _FORMULAS or packet in self.formulas
        if not counted and not types and torch.is_inference_mode_enabled() and not self.at_work:
            with self:  # where autograd does not run, a composite op arrives whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if not self.at_work:
            self._note(packet, args, kwargs, out, counted)
        return out

    def _multiplications(self, packet: Any, args: tuple, kwargs: dict, out: Any) -> int:
        """Of two numbers each; half the floating-point operations that `FlopCounterMode` counts."""
        sparse = next((a for a in args if isinstance(a, Tensor) and a.layout in _SPARSE), None)
        if sparse is not None:
            return sparse._nnz() * int(out.shape[-1])
        own = _FORMULAS.get(packet)
        if own is not None:
            return own(args)
        return int(self.formulas[packet](*args, **kwargs, out_val=out)) // 2

    def _note(self, packet: Any, args: tuple, kwargs: dict, out: Any, counted: bool) -> None:
        node = torch._C._current_autograd_node()
        backward = node is not None and not (self.running and self.running[-1][1])
        operation = _OPERATIONS.get(packet.__name__, packet.__name__.strip("_")) if counted else ""
        if backward:
            site = self.nodes.get(node._sequence_nr(), Site(OUTSIDE, "", ""))
            site = site if site.operation else replace(site, operation=operation)
        else:
            site = Site(self.here, operation, self.weights.among(args) if counted else "")
        made = torch.autograd._get_sequence_nr() - 1  # of the node that this op is part of, if of any
        known = self.nodes.get(made)
        if known is None or (counted and not known.operation):
            self.nodes[made] = site
        if packet is _aten._to_copy:
            self.weights.cast(args[0], out)
        if counted:
            counts = self.seen.floats.setdefault(site, (Count(), Count()))
            counts[backward].add(self._multiplications(packet, args, kwargs, out))


class _Weights:
    """The model's parameters and buffers, found again by the memory that a product reads."""

    def __init__(self, model: nn.Module) -> None:
        self._spans: dict[int, list[tuple[int, int, str]]] = {}
        self._casts: dict[int, tuple[StorageWeakRef, str]] = {}
        for name, tensor in named_tensors(model):
            span = _span(tensor)
            if tensor.ndim > 1 and span is not None:
                self._spans.setdefault(span[0], []).append((*span[1:], name))

    def among(self, args: Any) -> str:
        """The name of the first operand that is a parameter, a part of one or a cast of one; empty if none is."""
        return next(filter(None, map(self._name, _tensors(args))), "")

    def cast(self, tensor: Tensor, copy: Tensor) -> None:
        """A tensor was copied into another dtype, as autocast does: for as long as its memory is not used anew."""
        name, span = self._name(tensor), _span(copy)
        if name and span is not None:
            self._casts[span[0]] = (StorageWeakRef(copy.untyped_storage()), name)

    def _name(self, tensor: Tensor) -> str:
        span = _span(tensor)
        if span is None:
            return ""
        for start, end, name in self._spans.get(span[0], ()):
            if start <= span[1] and span[2] <= end:
                return name
        storage, name = self._casts.get(span[0], (None, ""))
        return name if storage is not None and not storage.expired() else ""


def _span(tensor: Tensor) -> tuple[int, int, int] | None:
    """Its storage, and where in that it begins and ends; None where there is no memory to tell by."""
    try:
        place = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    start, size = int(tensor.storage_offset()), int(tensor.numel())
    return (place, start, start + size) if place and size else None


_OPERATIONS = {
    "mm": "matmul",
    "linear": "matmul",
    "addmm": "matmul",
    "_addmm_activation": "matmul",
    "_sparse_addmm": "matmul",
    "mv": "matmul",
    "addmv": "matmul",
    "dot": "matmul",
    "bmm": "bmm",
    "baddbmm": "bmm",
    "addbmm": "bmm",
    "_convolution": "convolution",
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention": "scaled_dot_product_attention",
    "mkldnn_rnn_layer": "rnn",
    "_trilinear": "bilinear",
}
"""What users call the ops that torch makes of their calls; the others go by their own name."""


def _rnn(args: tuple) -> int:
    """Input, the weights of input and state: each weight meets each step of each sequence once."""
    return math.prod(args[0].shape[:2]) * (args[1].numel() + args[2].numel())


def _attention(args: tuple) -> int:
    """Query · keyᵀ and weights · value: (B, H, T, E), (B, H, S, E), (B, H, S, E)."""
    query, key, value = args[:3]
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(args: tuple) -> int:
    """The scores again, and two products for each of the two of the forward pass: as torch counts it elsewhere."""
    query, key, value = args[1:4]
    return math.prod(query.shape[:-1]) * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _grouped(args: tuple) -> int:
    """Runs of rows (S, I) by matrices (G, I, O), or (O, S) by (S, I) run by run: each row is in one group."""
    left, right = args[:2]
    return left.numel() * right.shape[-1] // (len(left) if left.ndim > right.ndim else 1)


def _trilinear(args: tuple) -> int:
    """Three factors that broadcast along axes of their own and are summed over some: two products at each place."""
    shapes = []
    for tensor, added in zip(args[:3], args[3:6], strict=True):
        shape = list(tensor.shape)
        for axis in sorted(added):
            shape.insert(axis, 1)
        shapes.append(shape)
    return 2 * math.prod(torch.broadcast_shapes(*shapes))


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[[tuple], int]] = {
    # Whole where autograd does not run, and of nested tensors.
    _aten.linear: lambda args: args[0].numel() * args[1].shape[0],
    _aten.linear_backward: lambda args: args[1].numel() * args[2].shape[1] * sum(map(bool, args[3][:2])),
    _aten._addmm_activation: lambda args: args[1].numel() * args[2].shape[-1],
    _aten._sparse_addmm: lambda args: args[1].numel() * args[2].shape[-1],
    _aten.mv: lambda args: args[0].numel(),
    _aten.addmv: lambda args: args[1].numel(),
    _aten.dot: lambda args: args[0].numel(),
    _aten._grouped_mm: _grouped,
    _aten.addbmm: lambda args: args[1].numel() * args[2].shape[-1],
    _aten.mkldnn_rnn_layer: _rnn,
    # Gradients of the gates for input, state and both weights.
    _aten.mkldnn_rnn_layer_backward: lambda args: 2 * _rnn(args),
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._trilinear: _trilinear,
}
"""Products that torch's own counter does not know."""
