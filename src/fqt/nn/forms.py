"""Which class is the quantized form of which, and back.

A subclass that keeps the forward of a known layer gets a class on top of its own, made when it is first met. A
class that torch has put on top of a layer's (parametrized, fully sharded) is made again on the quantized one: torch
takes its own class off again, and looks for the layer's right below it.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from fqt.errors import FqtError
from fqt.nn import layers
from fqt.nn.attention import QuantizedMultiheadAttention
from fqt.nn.experts import experts, is_experts
from fqt.nn.redirect import own_forward

Kind = type[nn.Module]

QUANTIZED: dict[Kind, Kind] = {}
"""The quantized form of each layer class that has one."""

_KNOWN_BY_NAME: dict[tuple[str, str], Callable[..., Any]] = {
    ("transformers.pytorch_utils", "Conv1D"): layers.transposed_linear,
    ("transformers.modeling_utils", "Conv1D"): layers.transposed_linear,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): layers.QuantizedLinear.forward,
    ("transformers.models.bit.modeling_bit", "WeightStandardizedConv2d"): own_forward,
    ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts"): own_forward,
    ("transformers.models.jetmoe.modeling_jetmoe", "JetMoeParallelExperts"): own_forward,
    ("transformers.models.longcat_flash.modeling_longcat_flash", "LongcatFlashExperts"): own_forward,
    ("transformers.models.step3p7.modeling_step3p7", "Step3p7Experts"): own_forward,
    ("timm.layers.std_conv", "StdConv2d"): own_forward,
    ("timm.layers.std_conv", "StdConv2dSame"): own_forward,
    ("timm.layers.std_conv", "ScaledStdConv2d"): own_forward,
    ("timm.layers.std_conv", "ScaledStdConv2dSame"): own_forward,
    ("timm.layers.conv2d_same", "Conv2dSame"): own_forward,
}
"""Forwards of layers whose libraries are not imported for them, by module and name of the class."""

# What a subclass may not replace if its output is to be known: forward, and what the known forwards call.
_METHODS = ("forward", "__call__", "_conv_forward", "_output_padding", "merge_masks")


def register(kind: Kind, form: Kind | Callable[..., Any] | None = None, *, overwrite: bool = False) -> Any:
    """Teaches `quantize_` a layer class of your own.

    Needed for a class that has a forward of its own: what that computes cannot be seen. Say what a converted layer
    does in its place, with `fqt.linear` and `fqt.convolution` for the products:

        @fqt.register(StdConv2d)
        def forward(self, x):
            return fqt.convolution(self, x, standardized(self.weight), self.bias)

    Where the class's own forward calls `F.linear` or `F.conv2d`, `fqt.register(StdConv2d, fqt.own_forward)` is all
    there is to say. All that leads to the weight stays under autograd, in float. Subclasses of the class that keep
    its forward are converted alike. A registration holds for the process: a process that unpickles such a layer has
    to register it too.

    Args:
        kind: a subclass of `torch.nn.Module`.
        form: the forward of converted layers, taking what the class's own forward takes, or a subclass of `kind`
            that has it. Left out, `register` is a decorator for it.
        overwrite: allows replacing an earlier registration, also one that comes with fqt; layers that have been
            converted already keep theirs.

    Returns:
        `form`, or the decorator, which returns what it is given.

    Raises:
        FqtError: `kind` is no module class, is registered already, or `form` does not fit it.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise FqtError(f"register takes a subclass of torch.nn.Module, not {kind!r}")
    if is_quantized(kind):
        raise FqtError(f"{kind.__name__} is a quantized form itself: register the float class")
    if kind in QUANTIZED and not overwrite:
        raise FqtError(f"{kind.__name__} has a quantized form: pass overwrite=True to replace it")
    if form is None:
        return lambda form: register(kind, form, overwrite=overwrite)
    if isinstance(form, type):
        if form is kind or not issubclass(form, kind):
            raise FqtError(f"the quantized form of {kind.__name__} must be a subclass of it, not {form.__name__}")
        _add(kind, form)
    elif callable(form):
        _add(kind, type(f"Quantized{kind.__name__}", (kind,), {**_members(kind), "forward": form}))
    else:
        raise FqtError(f"the quantized form of {kind.__name__} is a forward function or a subclass, not {form!r}")
    return form


def _add(kind: Kind, form: Kind) -> None:
    form.fqt_float_form = kind  # type: ignore[attr-defined]
    for name, method in (("extra_repr", _extra_repr), ("__prepare_scriptable__", _refuse_script)):
        if name not in vars(form):
            setattr(form, name, method)
    QUANTIZED[kind] = form


def _extra_repr(layer: nn.Module) -> str:
    """What the float layer says of itself, and the recipe."""
    words = type(layer).fqt_float_form.extra_repr(layer)  # type: ignore[attr-defined]
    own = replace(layer.fqt_recipe, rules=())  # type: ignore[type-var]
    return ", ".join(filter(None, (words, f"recipe={own}")))


def _refuse_script(layer: nn.Module) -> None:
    """What `torch.jit.script` asks of a module before it reads its source."""
    raise FqtError(
        f"TorchScript cannot express a layer that fqt converted ({type(layer).__name__}): call fqt.restore_(model) "
        "before scripting"
    )


for _form in (
    layers.QuantizedLinear,
    layers.QuantizedConv1d,
    layers.QuantizedConv2d,
    layers.QuantizedConv3d,
    layers.QuantizedConvTranspose1d,
    layers.QuantizedConvTranspose2d,
    layers.QuantizedConvTranspose3d,
    QuantizedMultiheadAttention,
):
    _add(_form.__bases__[0], _form)


def known(kind: Kind) -> Kind | None:
    """The nearest class above this one, or itself, that has a quantized form."""
    for base in kind.__mro__:
        if base in QUANTIZED:
            return base
        forward = experts if is_experts(base) else _KNOWN_BY_NAME.get((base.__module__, base.__name__))
        if forward is not None:
            register(base, forward)
            return base
    return None


def replaced(kind: Kind, base: Kind) -> tuple[str, ...]:
    """The methods by which a class may compute something else than the known class above it."""
    return tuple(name for name in _METHODS if getattr(kind, name, None) is not getattr(base, name, None))


def is_quantized(kind: Kind) -> bool:
    """Whether instances of this class multiply quantized operands."""
    return hasattr(kind, "fqt_float_form")


def quantized_form(kind: Kind) -> Kind:
    """The quantized form of a class that is or inherits from a known one without replacing its methods."""
    if is_quantized(kind):
        return kind
    if kind in QUANTIZED:
        return QUANTIZED[kind]
    if _made_by_torch(kind):
        return _made_again(kind, tuple(b if known(b) is None else quantized_form(b) for b in kind.__bases__))
    base = known(kind)
    assert base is not None
    form = QUANTIZED[base]
    for made in kind.__subclasses__():  # no second class for the next layer
        if vars(made).get("fqt_float_form") is kind and issubclass(made, form):
            return made
    on_top: Kind = type(f"Quantized{kind.__name__}", (form, kind), _members(kind))
    return on_top


def float_form(kind: Kind) -> Kind:
    """The inverse; a class that is not quantized stays."""
    own = vars(kind).get("fqt_float_form")
    if own is not None or not is_quantized(kind):
        return own or kind
    return _made_again(kind, tuple(map(float_form, kind.__bases__)))


def _made_by_torch(kind: Kind) -> bool:
    """Whether torch has made this class for a layer, by `type(…)`: it is in none of torch's modules."""
    home = sys.modules.get(kind.__module__)
    return kind.__module__.startswith("torch.") and getattr(home, kind.__qualname__, None) is not kind


def _made_again(kind: Kind, bases: tuple[type, ...]) -> Kind:
    """A class like this one on other bases; the one it was made from itself, if nothing has changed since."""
    members = _own_members(kind)
    origin = vars(kind).get("fqt_origin")
    if origin is not None and origin.__bases__ == bases and _own_members(origin) == members:
        return origin
    siblings: list[type] = bases[-1].__subclasses__()
    for made in siblings:
        if vars(made).get("fqt_origin") is kind and made.__bases__ == bases and _own_members(made) == members:
            return made
    name = kind.__name__
    for before, after in zip(kind.__bases__, bases, strict=True):
        name = name.replace(before.__name__, after.__name__)
    return type(name, bases, {**members, "fqt_origin": kind})


def _own_members(kind: Kind) -> dict[str, Any]:
    """What a class adds to its bases; the rest is Python's, one's own per class."""
    left = ("__dict__", "__weakref__", "__doc__", "__slotnames__", "fqt_origin")
    return {name: value for name, value in vars(kind).items() if name not in left}


def _members(kind: Kind) -> dict[str, Any]:
    """Of a class that is made here on top of another."""
    return {
        "fqt_float_form": kind,
        "__module__": kind.__module__,
        "__doc__": f"`{kind.__name__}` on quantized operands.",
        "__reduce_ex__": _reduce,
    }


def _reduce(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    """How a layer is pickled and copied whose class no module holds: by its float class."""
    found: Any = object.__reduce_ex__(layer, max(protocol, 2))
    if found[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return found
    (kind, *arguments), *rest = found[1:]
    return _blank, (float_form(kind), *arguments), *rest


def _blank(kind: Kind, *arguments: Any) -> nn.Module:
    base = known(kind)
    if base is None:
        raise FqtError(f"a quantized {kind.__name__} was saved: register its quantized form before loading it")
    form = quantized_form(kind)
    return form.__new__(form, *arguments)
