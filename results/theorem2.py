"""Theorem 2 on a real network: whose quantizer adds how much to whose gradient's variance.

    python results/theorem2.py RUN_FOLDER OUTPUT.json [RECIPE]

RUN_FOLDER is a folder that `fqt train cifar10` left; its halfway.pt is where the gradient is measured, in training
mode, on batches of fresh training images. The record holds the layer × layer table, each layer's sum of parts
against the total on the same random numbers, with intervals that hold simultaneously, and the total again from
unrelated draws.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from fqt.records import environment, write_json
from fqt.stats import quantization_variance
from fqt.stats.decomposition import decompose
from fqt.stats.record import table_record
from fqt.train.snapshot import Snapshot

BATCHES, DRAWS = 2, 8


def main(folder: Path, output: Path, recipe: str) -> None:
    """Measures and writes the record."""
    snapshot = Snapshot.of_run(folder)
    model, batches = snapshot.model(recipe), snapshot.batches(BATCHES)
    table = decompose(model, snapshot.loss, batches, DRAWS)
    fresh = quantization_variance(model, snapshot.loss, batches, DRAWS, seed=1).total
    for name, gap in table.gap.items():
        print(f"{name or 'whole gradient':16} total {table.total[name].value:.3e}", end="  ")
        print(f"total − parts {gap.value:+.1e}, within ±{table.interval[name]:.1e}")
    print(f"agrees: {table.agrees}; whole gradient from unrelated draws {fresh.value:.3e} ± {fresh.error:.0e}")
    write_json(
        output,
        {
            "environment": environment(["python", "results/theorem2.py", "RUN_FOLDER", output.name, recipe]),
            "recipe": recipe,
            "step": snapshot.step,
            "batch_size": snapshot.config.batch_size,
            "unrelated_draws": asdict(fresh),
            "table": table_record(table),
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "shq3")
