"""Names without what wrappers add to them, and the module inside.

`torch.compile`, `DistributedDataParallel` and others put a module around a model, and with it a word in front of
every qualified name. A layer keeps the name that it has in the model itself: rules, reports and statistics of a
wrapped model are those of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fqt.errors import FqtError

# By the class's own name: none of their modules has to be imported for it.
_INSIDE = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    ("fqt.callbacks.lightning", "TrainingStep"): "module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): (
        "_checkpoint_wrapped_module"
    ),
}


def check_module(model: object, function: str) -> None:
    """Raises FqtError, of types only, where a function of the public interface is not given a module first."""
    if not isinstance(model, nn.Module):
        raise FqtError(f"{function} takes the model first, a torch.nn.Module, not {type(model).__name__}")


def bare(name: str) -> str:
    """A qualified name, from a state dict, without the words that only wrappers use.

    `module`, the word of `DistributedDataParallel`, may be a layer's own name and stays.
    """
    words = set(_INSIDE.values()) - {"module"}
    return ".".join(word for word in name.split(".") if word not in words)


def inside(module: nn.Module) -> str | None:
    """The attribute that holds the module which this one wraps; None if it is no wrapper."""
    found = (_INSIDE.get((kind.__module__, kind.__name__)) for kind in type(module).__mro__)
    return next((name for name in found if name is not None), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    name = inside(module)
    return module if name is None else unwrapped(module.get_submodule(name))


def alone(model: nn.Module, *, outermost: bool = False) -> nn.Module:
    """The model as one process has it, out of the wrappers that average gradients over processes or devices.

    Their forward talks to the other processes (`DistributedDataParallel` broadcasts buffers), which are not there
    where one process alone looks at its model.

    Args:
        model: wrapped or not; other wrappers, torch.compile's for one, may lie around the one that averages.
        outermost: whether only one that is outermost is taken off.
    """
    outer, name = model, inside(model)
    while name is not None:
        within = outer.get_submodule(name)
        if _averages(outer) and (outer is model or not outermost):
            model = within
        outer, name = within, inside(within)
    return model


def _averages(module: nn.Module) -> bool:
    return any(kind.__name__ in ("DistributedDataParallel", "DataParallel") for kind in type(module).__mro__)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As `torch.nn.Module.named_modules`, without wrappers and the words that they add."""
    return ((name, module) for name, module in _walk(model, remove_duplicate) if inside(module) is None)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `torch.nn.Module.named_parameters`, without the words that wrappers add."""
    seen: set[nn.Parameter] = set()
    for prefix, module in _walk(model, True):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield (f"{prefix}.{name}" if prefix else name), parameter


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every name they have, without the words that wrappers add."""
    for prefix, module in _walk(model, False):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield (f"{prefix}.{name}" if prefix else name), tensor


def _walk(model: nn.Module, remove_duplicate: bool) -> Iterator[tuple[str, nn.Module]]:
    seen: set[nn.Module] = set()

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if remove_duplicate and module in seen:
            return
        seen.add(module)
        yield prefix, module
        wrapped = inside(module)
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(prefix if name == wrapped else f"{prefix}.{name}" if prefix else name, child)

    return walk("", model)
