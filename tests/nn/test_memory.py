"""What a layer keeps for its backward: 8-bit codes and a few steps, not floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fqt

LAYERS = {
    "linear": (lambda: nn.Linear(256, 32), (64, 256)),
    "linear_tokens": (lambda: nn.Linear(256, 32), (4, 16, 256)),
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), (8, 8, 128)),
    "conv2d": (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 8, 16, 16)),
    "same_even": (lambda: nn.Conv2d(8, 8, 2, padding="same"), (8, 8, 16, 16)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 3), (4, 4, 8, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 2, stride=2), (8, 8, 16, 16)),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (8, 8, 30, 30)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages saved for backward, without the parameters."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    out.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("recipe", ["psq4", "default", "tokens"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_quarter_of_floats(name: str, recipe: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    assert layer.weight.numel() != x.numel()
    x = nn.Identity()(x).requires_grad_() * 1  # not a leaf: its storage is the layer's to keep
    floats = kept_bytes(layer, x)
    assert floats >= x.numel() * 4
    if recipe == "tokens":
        if not isinstance(layer, nn.Linear):
            pytest.skip("a step per position of an image costs as much as its codes")
        recipe = fqt.Recipe(input="psq8@token", grad_input="psq4", grad_weight="ptq8")
    assert kept_bytes(fqt.quantize_(layer, recipe), x.detach().requires_grad_() * 1) <= 0.27 * floats


def test_frozen_operands_keep_nothing() -> None:
    """Input codes serve the weight's gradient only, the weight the input's."""
    x = torch.randn(64, 256)
    for frozen_weight in (True, False):
        layer = fqt.quantize_(nn.Linear(256, 32), "psq4")
        layer.weight.requires_grad_(not frozen_weight)
        sizes: list[int] = []

        def pack(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x.detach().requires_grad_(frozen_weight)).sum().backward()
        assert sorted(sizes) == ([256 * 32] if frozen_weight else [1, 1, 256 * 64])


def test_the_graph_is_freed() -> None:
    """Nothing of a pass is held by the layer after its backward."""
    import gc
    import weakref

    layer, x = fqt.quantize_(nn.Linear(8, 4), "default"), torch.randn(4, 8, requires_grad=True)
    out = layer(x)
    node = weakref.ref(out.grad_fn)
    before = set(vars(layer))
    out.sum().backward()
    del out
    gc.collect()
    assert node() is None
    assert set(vars(layer)) == before
