"""Dropout switched off in all that a model calls, while everything else of it trains as it does.

Eval mode does not do that: it has to be set on the module that asks for it, which in an attention is the attention
and not a `nn.Dropout`, and it changes more than dropout (batch norm, checkpoints, what a model returns).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_DROPOUTS = frozenset(
    {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
        *(torch.dropout_, torch.alpha_dropout_, torch.feature_dropout_, torch.feature_alpha_dropout_),
    }
)
"""Functions that return their first argument where they drop nothing."""
_PLACES = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}
"""Functions that drop something on the way: the place of their `dropout_p`."""


class WithoutDropout(TorchFunctionMode):
    """While it lasts, torch's functions drop nothing, but for what a recurrent layer drops between its own layers.

    So does what is computed again in a backward pass, if that is `fqt.stats`'s own: inside torch's `backward`, a
    function like others, modes are off.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        words = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else words["input"]
        place = _PLACES.get(func)
        if place is not None and len(args) > place:
            args = (*args[:place], 0.0, *args[place + 1 :])
        elif place is not None:
            words = {**words, "dropout_p": 0.0}
        return func(*args, **words)


def is_off() -> bool:
    """Whether dropout is switched off, for a mode with functions of its own for it; never in a compiled graph."""
    return not torch.compiler.is_compiling() and any(
        isinstance(mode, WithoutDropout) for mode in _get_current_function_mode_stack()
    )
