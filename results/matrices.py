"""The gradient matrices that ship with the package: a convolutional net and a transformer, early and late.

    python results/matrices.py

Writes src/fqt/quant/data/convolution.npz and transformer.npz. The net is this library's on scikit-learn's digits;
the transformer a character GPT of two blocks on the language reference that ships with Python, `pydoc_data.topics`.
Both train with the weights and activations of `qat`, 8 bits per tensor; each matrix is the gradient of one batch
for one layer's output, its first 192 features: rows are samples (128, channels innermost) or tokens (256).
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from inputs import GPT, Batches, images, loss_of
from torch import Tensor, nn

import fqt

DATA = Path(__file__).parent.parent / "src" / "fqt" / "quant" / "data"
FEATURES = 192
LETTERS = 400_000
Stages = Mapping[int, tuple[str, ...]]
CONVOLUTION: Stages = {40: ("features.3", "features.6"), 300: ("features.3", "features.6")}
TRANSFORMER: Stages = {100: ("blocks.0.attention.qkv", "blocks.1.down"), 500: ("blocks.1.up", "head")}


def text(length: int, batch: int) -> tuple[nn.Module, Batches]:
    """A GPT and batches of characters of Python's language reference."""
    letters = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:LETTERS]
    known = sorted(set(letters))
    codes = torch.tensor([known.index(c) for c in letters])

    def batches() -> Batches:
        while True:
            start = torch.randint(0, len(codes) - length - 1, (batch,))
            x = torch.stack([codes[s : s + length + 1] for s in start.tolist()])
            yield x[:, :-1], x[:, 1:]

    return GPT(len(known), length, 128, 2), batches()


def gradients(net: nn.Module, batches: Batches, stages: Stages, rows: int) -> dict[str, Tensor]:
    """Of the layers' outputs after each stage's steps, as matrices."""
    fqt.quantize_(net, "qat")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    found: dict[str, Tensor] = {}
    for step in range(1, max(stages) + 1):
        batch = next(batches)
        for layer in stages.get(step, ()):
            watch(net.get_submodule(layer), found, f"{layer} after {step} steps", rows)
        loss = loss_of(net, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in stages:
            print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    return found


def watch(layer: nn.Module, found: dict[str, Tensor], name: str, rows: int) -> None:
    """Keeps the gradient of the layer's next output."""

    def keep(g: Tensor) -> None:
        matrix = g.flatten(0, -2) if g.ndim == 3 else g.movedim(1, -1).flatten(1)
        found[name] = matrix[:rows, :FEATURES].detach().clone()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(keep)
        handle.remove()

    handle = layer.register_forward_hook(hook)


def write(name: str, matrices: dict[str, Tensor]) -> None:
    """Float16 with the largest magnitude just below 2¹⁵: a matrix is that times the power of two beside it."""
    arrays: dict[str, np.ndarray] = {}
    for key, matrix in matrices.items():
        exponent = int(torch.frexp(matrix.abs().max())[1]) - 15
        arrays[key] = torch.ldexp(matrix, torch.tensor(-exponent)).half().numpy()
        arrays[f"{key}, exponent"] = np.array(exponent, dtype=np.int32)
        print(f"{name}: {key}, {tuple(matrix.shape)}, {float((matrix == 0).double().mean()):.0%} zeros")
    path = DATA / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Trains both and writes the files."""
    torch.manual_seed(0)
    DATA.mkdir(exist_ok=True)
    write("convolution", gradients(*images("digits", "convnet", "", 128), CONVOLUTION, rows=128))
    write("transformer", gradients(*text(64, 16), TRANSFORMER, rows=256))


if __name__ == "__main__":
    main()
