"""Codes of one input, shared by the layers that read it: the branches of a residual block, query, key and value.

Forward quantizers are deterministic, so two layers with the same input and the same quantizer would make, and keep
for backward, the same codes twice. Codes are remembered weakly, for as long as something else keeps them (a graph
that waits for its backward pass) and the input has not been written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from fqt.quant.quantizer import Quantizer
from fqt.quant.tensor import QuantizedTensor, RowView

_Key = tuple[Quantizer, tuple[int, ...]]
_Parts = tuple[RowView, weakref.ref[Tensor], Tensor, Tensor]
_known: dict[int, tuple[weakref.ref[Tensor], int, dict[_Key, _Parts]]] = {}


def shared(
    x: Tensor, quantizer: Quantizer, axis: tuple[int, ...], quantize: Callable[[], QuantizedTensor]
) -> QuantizedTensor:
    """The codes of `x` by a deterministic quantizer: those of an earlier call if they still live, else new ones.

    Args:
        x: the input as the layer got it.
        quantizer, axis: what the codes depend on beside x.
        quantize: makes them.
    """
    if x.is_inference():  # its writes are not counted
        return quantize()
    place, now = id(x), x._version
    entry = _known.get(place)
    if entry is None or entry[0]() is not x or entry[1] != now:
        entry = (weakref.ref(x, lambda _: _known.pop(place, None)), now, {})
        _known[place] = entry
    found = entry[2].get((quantizer, axis))
    codes = None if found is None else found[1]()
    if found is not None and codes is not None:
        view, _, step, offset = found
        return QuantizedTensor(view, x.dtype, codes, step, offset)
    q = quantize()
    entry[2][quantizer, axis] = (q.view, weakref.ref(q.matrix_codes), q.matrix_step, q.group_offset)
    return q
