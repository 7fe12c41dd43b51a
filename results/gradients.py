"""Quantizers of grad_output: the noise of each backward product, layer by layer, on three networks.

    python results/gradients.py DATA OUTPUT.json

Networks, training and batch are those of `inputs.py`. Every layer is converted on its own to the default recipe
with one role's quantizer replaced and the other's left out, gets its own input and grad_output, and draws 8 times.
What is written: the mean square of the gradient's error, against evaluation mode's, over the gradient's own square.
It holds everything the layer adds, so also the second rounding of a weight whose features are rotated. Summaries
are geometric means over the layers of one kind.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
from inputs import images, look, text, train
from torch import Tensor, nn

import fqt
from fqt import Recipe
from fqt.nn import load_recipe
from fqt.records import environment, write_json

DRAWS = 8
METHODS = ("psq{}x", "psq{}d", "shq{}", "shq{}d", "int{}rht", "int{}rhtd", "thq{}", "thq{}d")
WIDTHS = (8, 4)
ROLES = {"grad_input": "", "grad_weight": "@channel"}
# The last part of a name says what a Linear of a transformer is for.
KINDS = {"qkv": "qkv", "out": "out", "up": "up", "down": "down", "head": "head"}


def operands(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Every layer with its input and grad_output."""
    return {s.name: (net.get_submodule(s.name), s.x, s.map.unlay(s.g)) for s in look(net, batch)}


def gradient(layer: nn.Module, role: str, x: Tensor, g: Tensor) -> Tensor:
    """Of the input or of the weight."""
    x = x.clone().requires_grad_(role == "grad_input")
    layer.zero_grad()
    layer(x).backward(g)
    found = x.grad if role == "grad_input" else layer[0].weight.grad  # type: ignore[index]
    assert found is not None
    return found.double()


def noise(module: nn.Module, x: Tensor, g: Tensor, role: str, recipe: Recipe, draws: int) -> float:
    """Of one product under a recipe, relative to its energy."""
    layer = nn.Sequential(copy.deepcopy(module))
    fqt.quantize_(layer, recipe)
    exact = gradient(layer.eval(), role, x, g)
    layer.train()
    errors = [(gradient(layer, role, x, g) - exact).square().sum() for _ in range(draws)]
    return float(sum(errors) / draws / exact.square().sum())


def alone(role: str, quantizer: str) -> Recipe:
    """The default, but for one gradient's quantizer, and without the other's."""
    return load_recipe({"base": "default", **dict.fromkeys(ROLES, "none"), role: quantizer})


def main(data: Path, output: Path) -> None:
    """Measures and writes the record."""
    torch.manual_seed(0)
    networks = {
        "digits": (*images("digits", "convnet", "", 64), 200),
        "gpt": (*text(data / "tinyshakespeare" / "input.txt"), 200),
        "resnet20": (*images("cifar10", "preact-resnet20", str(data), 64), 60),
    }
    rows: list[dict[str, object]] = []
    for network, (net, batches, steps) in networks.items():
        train(net, batches, steps)
        layers = operands(net, next(batches))
        for role, axis in ROLES.items():
            for quantizer in (method.format(bits) + axis for bits in WIDTHS for method in METHODS):
                recipe = alone(role, quantizer)
                found = {name: noise(*seen, role, recipe, DRAWS) for name, seen in layers.items()}
                row = {"network": network, "role": role, "quantizer": quantizer, "layers": found}
                rows.append({**row, "kinds": summary(found, layers)})
                print(
                    network, role, quantizer, {k: f"{v:.2e}" for k, v in summary(found, layers).items()}, flush=True
                )
    record = environment(["python", "results/gradients.py", "DATA", output.name])
    write_json(output, {"environment": record, "draws": DRAWS, "rows": rows})


def summary(found: dict[str, float], layers: dict[str, tuple[nn.Module, Tensor, Tensor]]) -> dict[str, float]:
    """Geometric means over the layers of each kind."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, value in found.items():
        kind = type(layers[name][0]).__name__
        if value > 0:
            kinds[KINDS.get(name.rpartition(".")[2], kind)].append(math.log(value))
    return {kind: math.exp(sum(values) / len(values)) for kind, values in kinds.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
