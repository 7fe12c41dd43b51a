"""The forward pass's rotation of input features: x·R and w·R are quantized and multiplied, and R cancels in x·wᵀ.

Gradients of the turned operands are turned back. The signs of R are always the same: the forward pass is
deterministic. Each group of a convolution's channels is turned by itself, at every position alike.

The signs are drawn at every call, one for every feature, from the seed that is theirs for ever: as many numbers as
one row has, where each row of the operand costs as many and log₂(block) times that to turn. To keep them was
rejected: they would be tensors of every device and dtype in a table beside the layers, which graphs that are being
traced must not see.
"""

from __future__ import annotations

from torch import Tensor

from fqt.kernels.codes import compute_dtype
from fqt.kernels.linear_map import LinearMap
from fqt.kernels.philox import as_seed
from fqt.kernels.rotation import Rotation

FORWARD_SIGNS = 0x6671745F7369676E
"""The seed of the signs, of every layer and every call."""


def turned_input(x: Tensor, map: LinearMap, block: int | None, back: bool = False) -> Tensor:
    """An input laid out, its features rotated in blocks, or turned back; itself without a block."""
    return _turned(x, -1, x.shape[-1] // map.groups, block, back)


def turned_weight(w: Tensor, map: LinearMap, block: int | None, back: bool = False) -> Tensor:
    """A weight by channel, turned as the input is."""
    return _turned(w, map.weight_contracted, w.shape[map.weight_contracted], block, back)


def turned_back(x: Tensor, map: LinearMap, block: int | None, is_input: bool) -> Tensor:
    """An input or a weight, or its gradient, of the layer's own layout, without the rotation."""
    if block is None:
        return x
    if is_input:
        return map.unlay(turned_input(map.lay(x), map, block, back=True))
    return map.weight_restored(turned_weight(map.weight_by_channel(x)[0], map, block, back=True))


def _turned(x: Tensor, axis: int, length: int, block: int | None, back: bool) -> Tensor:
    """Runs of `length` features on an axis."""
    if block is None or not x.numel():
        return x
    moved = x.movedim(axis, -1).to(compute_dtype(x.dtype))
    rotation = Rotation.draw(as_seed(FORWARD_SIGNS, x.device), length, block, moved.dtype)
    turn = rotation.undo_columns if back else rotation.columns
    return turn(moved.reshape(-1, length)).view(moved.shape).movedim(-1, axis)
