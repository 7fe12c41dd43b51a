"""What it costs to turn a right operand and round it again, at 4 bits and at 8, beside operands that stay.

    OMP_NUM_THREADS=1 python results/turned.py DATA results/int4all/turned.json

Networks and batches are those of `inputs.py`, trained for a short while in float. Every layer is converted on its
own to `int4all`, with one gradient's product replaced and the other left out, and draws 4 times. Written: the mean
square of that gradient's error over the gradient's own, geometric means over the layers of one kind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gradients import noise, operands, summary
from inputs import images, text, train

from fqt import Product, Quantizer, Recipe
from fqt.quant import Integers, Scale
from fqt.records import environment, write_json

DRAWS = 4
FOUR = Quantizer(scale=Scale("tensor", "symmetric"), grid=Integers(4))
PRODUCTS = {
    "grad_input": {
        "shq4d": "shq4d",
        "thq4d, weight again in 8 bits": "thq4d",
        "thq4d, weight again in 4 bits": Product("shq4d", FOUR, rotate=128),
    },
    "grad_weight": {
        "shq4d@channel": "shq4d@channel",
        "thq4d@channel, input again in 8 bits": Product("shq4d@channel", rotate=128),
        "thq4d@channel, input again in 4 bits": Product("shq4d@channel", FOUR, rotate=128),
    },
}


def alone(role: str, product: Product | str) -> Recipe:
    """`int4all`, but for one gradient's product, and without the other's."""
    products: dict[str, Product | str | None] = dict.fromkeys(PRODUCTS, None) | {role: product}
    return Recipe(input="psq4", weight="psq4@channel", fold="always", **products)


def main(data: Path, output: Path) -> None:
    """Measures and writes the record."""
    torch.manual_seed(0)
    networks = {
        "digits": (*images("digits", "convnet", "", 64), 100),
        "gpt": (*text(data / "tinyshakespeare" / "input.txt"), 60),
    }
    rows = []
    for network, (net, batches, steps) in networks.items():
        train(net, batches, steps)
        layers = operands(net, next(batches))
        for role, products in PRODUCTS.items():
            for name, product in products.items():
                recipe = alone(role, product)
                found = {key: noise(*seen, role, recipe, DRAWS) for key, seen in layers.items()}
                rows.append({"network": network, "role": role, "product": name, "kinds": summary(found, layers)})
                print(rows[-1], flush=True)
    record = environment(["python", "results/turned.py", "DATA", output.name])
    write_json(output, {"environment": record, "draws": DRAWS, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
