"""One operand at a time: the gradient noise of candidate quantizers, at a checkpoint of a CIFAR-10 run.

    python results/operands.py RUN_FOLDER OUTPUT.json

RUN_FOLDER is a folder that `fqt train cifar10` left; its halfway.pt is where the gradient is measured, in training
mode, on batches of fresh training images. What is printed and written is ρ: the variance of the whole parameter
gradient due to quantization over that due to the mini-batch.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from fqt import Recipe
from fqt.records import environment, write_json
from fqt.stats import quantization_variance, sampling_variance
from fqt.train.checkpoint import load_checkpoint
from fqt.train.loaders import Batch
from fqt.train.run import continue_config
from fqt.train.tasks import load_task
from fqt.train.trainer import forward, load_weights, make_model, pick_device

BATCHES, DRAWS, SAMPLING_BATCHES = 2, 4, 16
WEIGHT_ROLE = ("ptq8", "ptq8d", "psq8", "psq8d", "psq8x", "bhq8", "shq8", "shq8d", "psq8d@sample")
INPUT_ROLE = ("ptq8", "psq8", "psq8d", "psq8x", "bhq8", "bhq8d", "shq8", "shq8d")
WHOLE = ("psq8", "bhq8", "shq8", "default")


def main(folder: Path, output: Path) -> None:
    """Measures all candidates and writes the record."""
    config = continue_config(folder, {})
    data = load_task(config, pick_device("cpu"))
    batches = list(islice(data.train(config.epochs), SAMPLING_BATCHES))
    halfway = load_checkpoint(folder / "halfway.pt", ("model", "step"))

    def model_with(recipe: str | Recipe) -> nn.Module:
        model = make_model(config, data, recipe)  # type: ignore[arg-type]
        load_weights(model, halfway["model"])
        return model.train()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(forward(model, batch[0], amp=False), batch[1])

    sampling = sampling_variance(model_with("qat"), loss_fn, batches).total
    candidates: list[tuple[str, str, str | Recipe]] = []
    candidates += [("grad_weight", name, Recipe(grad_weight=name)) for name in WEIGHT_ROLE]
    candidates += [("grad_input", name, Recipe(grad_input=name)) for name in INPUT_ROLE]
    candidates += [("whole recipe", name, name) for name in WHOLE]
    rows = []
    for role, name, recipe in candidates:
        noise = quantization_variance(model_with(recipe), loss_fn, batches[:BATCHES], DRAWS).total
        row = {
            "role": role,
            "quantizer": name,
            "rho": noise.value / sampling.value,
            "error": noise.error / sampling.value,
        }
        rows.append(row)
        print(f"{role:14} {name:14} {row['rho']:.2e} ± {row['error']:.0e}", flush=True)
    write_json(
        output,
        {
            "environment": environment(["python", "results/operands.py", "RUN_FOLDER", output.name]),
            "step": halfway["step"],
            "batches": BATCHES,
            "draws": DRAWS,
            "sampling_batches": SAMPLING_BATCHES,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
