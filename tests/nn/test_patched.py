"""Methods patched on a layer, before conversion and after it: they run what `explain` says, and restore."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import ConversionError

COARSE = fqt.Recipe(input="ptq3", weight="ptq3", grad_input="psq4", grad_weight="ptq8")


class Hook:
    """Counts, as accelerate's hooks do their work around a call."""

    def __init__(self) -> None:
        self.count = 0


def add_hook(layer: nn.Module) -> Hook:
    """As accelerate's `add_hook_to_module`: the wrapper reads the old method from the module."""
    hook = Hook()
    old = layer._old_forward if hasattr(layer, "_old_forward") else layer.forward
    layer._old_forward, layer._hf_hook = old, hook

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        module._hf_hook.count += 1
        return module._old_forward(*args, **kwargs)

    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), old)
    return hook


def remove_hook(layer: nn.Module) -> None:
    layer.forward = layer._old_forward
    del layer._old_forward, layer._hf_hook


class Cast:
    """As accelerate's `ConvertOutputsToFp32`: keeps the function as an attribute, and refuses to be pickled."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Tensor:
        return self.function(*args).float()

    def __getstate__(self) -> None:
        raise TypeError("cannot be pickled")


def cast(layer: nn.Module) -> None:
    """As `Accelerator.prepare`: decorators around the class's function, bound to the instance."""
    layer._original_forward = layer.forward
    function = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)(layer.forward.__func__)
    held = Cast(function)

    def forward(*args: Any) -> Tensor:
        return held(*args)

    forward.__wrapped__ = held
    layer.forward = types.MethodType(forward, layer)


def close_over(layer: nn.Module) -> None:
    old = layer.forward
    layer.forward = lambda *args: old(*args)


def wrap_twice(layer: nn.Module) -> None:
    for _ in range(2):
        close_over(layer)


def decorate(layer: nn.Module) -> None:
    old = layer.forward

    @functools.wraps(old)
    def forward(*args: Any, then: Callable = old) -> Tensor:
        return then(*args)

    layer.forward = forward


def assign_itself(layer: nn.Module) -> None:
    layer.forward = layer.forward


def compile_it(layer: nn.Module) -> None:
    layer.forward = torch.compile(layer.forward, backend="eager")


SEEN: dict[str, Callable[[nn.Module], Any]] = {
    f.__name__: f for f in (add_hook, cast, close_over, wrap_twice, decorate, assign_itself)
}
_GLOBAL: dict[str, Any] = {}


def by_global(layer: nn.Module) -> None:
    _GLOBAL["old"] = layer.forward
    layer.forward = lambda *args: _GLOBAL["old"](*args)


def rewrite(layer: nn.Module) -> None:
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)


HIDDEN: dict[str, Callable[[nn.Module], Any]] = {f.__name__: f for f in (by_global, rewrite)}


def layer_and_input() -> tuple[nn.Module, Tensor, Tensor]:
    layer, x = nn.Linear(8, 8), torch.randn(5, 8)
    return layer, x, layer(x).detach()


def arithmetic(layer: nn.Module) -> set[str]:
    return {p.arithmetic for p in fqt.explain(layer).products}


def is_coarse(layer: nn.Module, x: Tensor, truth: Tensor) -> bool:
    return not torch.equal(layer(x), truth)


@pytest.mark.parametrize("name", SEEN)
def test_before(name: str) -> None:
    layer, x, truth = layer_and_input()
    SEEN[name](layer)
    patch = layer.forward
    fqt.quantize_(layer, COARSE)
    assert is_coarse(layer, x, truth)
    assert "float" not in arithmetic(layer)
    assert torch.equal(patch(x), truth) or name == "add_hook"  # what others hold of it is left alone
    fqt.restore_(layer)
    assert torch.equal(layer(x), truth)
    assert getattr(layer.forward, "__name__", None) == getattr(patch, "__name__", None)


@pytest.mark.parametrize("name", SEEN)
def test_after(name: str) -> None:
    layer, x, truth = layer_and_input()
    fqt.quantize_(layer, COARSE)
    SEEN[name](layer)
    assert is_coarse(layer, x, truth)
    assert "float" not in arithmetic(layer)
    fqt.restore_(layer)
    assert torch.equal(layer(x), truth)
    fqt.quantize_(layer, COARSE)
    assert is_coarse(layer, x, truth)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_cannot_be_seen_through_stays_float_and_says_so(name: str) -> None:
    layer, x, truth = layer_and_input()
    HIDDEN[name](layer)
    with pytest.raises(ConversionError, match=f"replaced on the instance by {name}.*convert it before"):
        fqt.quantize_(layer, COARSE)
    model = nn.ModuleDict({"hidden": layer, "plain": nn.Linear(2, 2)})
    fqt.quantize_(model, COARSE)
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), truth)
    (row,) = [p for p in fqt.explain(model).products if p.layer == "hidden"]
    assert (row.arithmetic, name in row.why) == ("float", True)


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_after_conversion(name: str) -> None:
    """Restored, the layer works, whatever still calls the converted class's forward; `explain` claims nothing."""
    layer, x, truth = layer_and_input()
    fqt.quantize_(layer, COARSE)
    HIDDEN[name](layer)
    assert is_coarse(layer, x, truth) == (name == "by_global")
    assert arithmetic(layer) == {"unknown"}
    fqt.restore_(layer)
    assert torch.equal(layer(x), truth)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 2, 3), lambda: nn.ConvTranspose1d(2, 2, 3)])
def test_a_kept_method_of_a_restored_convolution(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = torch.randn(2, 2, 5, 5)[..., : 1 if isinstance(layer, nn.ConvTranspose1d) else 5].squeeze(-1)
    truth = layer(x)
    kept = fqt.quantize_(layer, COARSE).forward
    fqt.restore_(layer)
    assert torch.equal(kept(x), truth)


def test_a_kept_method_of_a_restored_attention() -> None:
    layer, x = nn.MultiheadAttention(4, 2), torch.randn(3, 2, 4)
    truth = layer(x, x, x)
    kept = fqt.quantize_(layer, COARSE).forward
    fqt.restore_(layer)
    assert all(map(torch.equal, kept(x, x, x), truth))


def test_hooks_around_a_hook() -> None:
    """Accelerate's hooks replace each other, are taken off while converted, and count every call."""
    layer, x, truth = layer_and_input()
    add_hook(layer)
    fqt.quantize_(layer, COARSE)
    hook = add_hook(layer)
    assert is_coarse(layer, x, truth)
    remove_hook(layer)
    assert is_coarse(layer, x, truth)
    assert hook.count == 1
    fqt.restore_(layer)
    assert torch.equal(layer(x), truth)


class Keeper(nn.Module):
    """Keeps the bound method of a layer, in an attribute and in a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.call = self.layer.forward
        forward = self.layer.forward
        self.twice = lambda x: forward(forward(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.call(x))


def test_a_method_that_another_module_keeps() -> None:
    model, x = Keeper(), torch.randn(3, 8)
    truth = model(x)
    fqt.quantize_(model, COARSE)
    once = model.layer(x)
    assert torch.equal(model.call(x), once)
    assert torch.equal(model(x), model.layer(model.layer(once)))
    fqt.restore_(model)
    assert torch.equal(model(x), truth)


def test_a_copy_of_a_patched_layer_is_its_own() -> None:
    layer, x, truth = layer_and_input()
    add_hook(layer)
    fqt.quantize_(layer, COARSE)
    twin = copy.deepcopy(layer)
    fqt.restore_(layer)
    assert is_coarse(twin, x, truth)
    assert torch.equal(layer(x), truth)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_method() -> None:
    layer, x, truth = layer_and_input()
    compile_it(layer)
    fqt.quantize_(layer, COARSE)
    assert is_coarse(layer, x, truth)
    fqt.restore_(layer)
    assert torch.equal(layer(x), truth)
