"""What a plan saves: its gradient variance against the uniform recipe's at the same mean width, on fresh batches.

    python results/plan.py RUN_FOLDER OUTPUT.json [TINYSHAKESPEARE]

RUN_FOLDER is a folder that `fqt train cifar10` left; its halfway.pt is measured. TINYSHAKESPEARE is a text file:
with it a small character transformer is trained on it for 300 steps and measured too. Diagnosis and measurement
use different batches; plan and uniform recipe are measured on the same ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqt
from fqt import Recipe
from fqt.records import environment, write_json
from fqt.stats import quantization_variance
from fqt.train.snapshot import Snapshot

RECIPES = ("shq3", "psq3d")
DIAGNOSE, MEASURE, DRAWS = 2, 6, 2
LENGTH, CHARACTERS = 64, 128

Make = Callable[[Any], nn.Module]


class CharacterTransformer(nn.Module):
    """Two pre-norm causal transformer layers of width 64 over characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 64)
        self.position = nn.Parameter(torch.zeros(LENGTH, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, CHARACTERS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, T) int64 -> (N, T, CHARACTERS)
        """The logits of the next character."""
        return self.head(self.encoder(self.embed(x) + self.position, mask=self.mask))


def text_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of the next character."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def text_batches(path: Path, number: int, seed: int) -> list[Tensor]:
    """(32, LENGTH + 1) windows at random places."""
    codes = torch.tensor(list(path.read_bytes()), dtype=torch.int64).clamp(max=CHARACTERS - 1)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(codes) - LENGTH - 1, (number, 32), generator=generator)
    return [torch.stack([codes[s : s + LENGTH + 1] for s in row]) for row in starts.tolist()]


def trained_transformer(path: Path) -> dict[str, Tensor]:
    """Weights after 300 steps of Adam."""
    torch.manual_seed(0)
    model = CharacterTransformer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in text_batches(path, 300, seed=0):
        optimizer.zero_grad()
        loss = text_loss(model, batch)
        loss.backward()
        optimizer.step()
    print(f"transformer: loss {loss.item():.3f} after 300 steps", flush=True)
    return model.state_dict()


def measure(name: str, make: Make, loss_fn: Any, diagnose: list[Any], fresh: list[Any]) -> list[dict[str, Any]]:
    """One row per recipe."""
    rows = []
    for recipe in RECIPES:
        bits = fqt.Recipe(grad_input=recipe).operand("grad_input").grid.bits  # type: ignore[union-attr]
        found = fqt.diagnose(make(recipe), loss_fn, diagnose, table=1)
        planned = fqt.plan(found, mean_width=bits)
        equal = fqt.plan(found, rho=planned.uniform[bits] / found.total.sampling.value)
        variances = {
            label: quantization_variance(make(what), loss_fn, fresh, DRAWS, seed=1).total
            for label, what in (("uniform", recipe), ("plan", planned.recipe), ("equal", equal.recipe))
        }
        rows.append(
            {
                "model": name,
                "recipe": recipe,
                "mean_width": planned.mean_width,
                "widths": planned.widths,
                "uniform": vars(variances["uniform"]),
                "plan": vars(variances["plan"]),
                "ratio": variances["plan"].value / variances["uniform"].value,
                "predicted": {"uniform": planned.uniform[bits], "plan": planned.variance},
                "equal_variance": {"mean_width": equal.mean_width, **vars(variances["equal"])},
                "sampling": vars(found.total.sampling),
            }
        )
        row = rows[-1]
        print(
            f"{name} {recipe}: plan/uniform {row['ratio']:.3f} at {planned.mean_width:.3f} bits (predicted "
            f"{planned.variance / planned.uniform[bits]:.3f}); plan of {equal.mean_width:.2f} bits: variance "
            f"{variances['equal'].value / variances['uniform'].value:.3f} of uniform",
            flush=True,
        )
    return rows


def main(folder: Path, output: Path, text: Path | None) -> None:
    """Measures and writes the record."""
    snapshot = Snapshot.of_run(folder)

    def resnet(recipe: str | Recipe) -> nn.Module:
        return snapshot.model(recipe)

    fresh = snapshot.batches(MEASURE, start=DIAGNOSE)
    rows = measure("preact-resnet20", resnet, snapshot.loss, snapshot.batches(DIAGNOSE), fresh)
    if text is not None:
        weights = trained_transformer(text)

        def transformer(recipe: str | Recipe) -> nn.Module:
            model = CharacterTransformer()
            model.load_state_dict(weights)
            return fqt.quantize_(model, recipe).train()

        rows += measure("transformer", transformer, text_loss, text_batches(text, 8, 1), text_batches(text, 16, 2))
    command = ["python", "results/plan.py", "RUN_FOLDER", output.name, *(["TINYSHAKESPEARE"] if text else [])]
    write_json(output, {"environment": environment(command), "step": snapshot.step, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
