"""Codes of one input, shared by the layers that read it: the branches of a residual block, query, key and value.

Forward quantizers are deterministic, so two layers with the same input and the same quantizer would make, and keep
for backward, the same codes twice. Codes are remembered weakly, for as long as something else keeps them (a graph
that waits for its backward pass) and the input has not been written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

from torch import Tensor

from fqt.kernels.codes import Scales
from fqt.kernels.tensor import QuantizedTensor, Seen
from fqt.quant.quantizer import Quantizer

_Key = tuple[Quantizer, tuple[int, ...], Hashable]
_Parts = tuple[Seen, weakref.ref[Tensor], Scales]
_known: dict[int, tuple[weakref.ref[Tensor], tuple, dict[_Key, _Parts]]] = {}


def shared(
    x: Tensor, quantizer: Quantizer, axis: tuple[int, ...], kind: Hashable, quantize: Callable[[], QuantizedTensor]
) -> QuantizedTensor:
    """The codes of `x` by a deterministic quantizer: those of an earlier call if they still live, else new ones.

    Only for what autograd computed: a leaf (a buffer, a parameter under a fused optimizer) may be written to in
    ways that no version counter sees.

    Args:
        x: the input as the layer got it.
        quantizer, axis, kind: what the codes depend on beside x: `kind` is how x is laid out and turned.
        quantize: makes them.
    """
    if x.is_leaf or x.is_inference():
        return quantize()
    place, now = id(x), (x._version, x.data_ptr(), x.shape)
    entry = _known.get(place)
    if entry is None or entry[0]() is not x or entry[1] != now:
        entry = (weakref.ref(x, lambda _: _known.pop(place, None)), now, {})
        _known[place] = entry
    key = (quantizer, axis, kind)
    found = entry[2].get(key)
    codes = None if found is None else found[1]()
    if found is not None and codes is not None:
        seen, _, scales = found
        return seen.quantized(codes, scales.step, scales.offset)
    q = quantize()
    entry[2][key] = (Seen.of(q), weakref.ref(q.matrix_codes), q.scales)
    return q
