import json

import pytest

from fqt.records import write_json

ACCURACY = {"qat": [0.90, 0.80, 0.85], "ptq4": [0.85, 0.79, 0.81], "bhq4": [0.91, 0.80, 0.84]}
RATIO = {"qat": [0.0, 0.0, 0.0], "ptq4": [0.31, 0.29, 0.33], "bhq4": [0.021, 0.018, 0.024]}


def _run(recipe, seed):
    return {
        "recipe": recipe, "seed": seed, "metrics": {"accuracy": ACCURACY[recipe][seed]}, "eval_loss": 0.3,
        "best": {"accuracy": 0.95},
        "train_loss": 0.2 + 0.01 * seed, "steps": 20, "seconds": 1.0, "diverged": False,
        "loss_curve": [[10, 2.0 + seed], [20, 0.3]], "metric_curves": {"accuracy": [[20, ACCURACY[recipe][seed]]]},
    }  # fmt: skip


@pytest.fixture
def record():
    """The record of a comparison of three recipes over three seeds."""
    estimate = {"value": 1.0, "error": 0.1}
    return {
        "format": "fqt compare 2",
        "environment": {
            "time": "2025-01-01T00:00:00+00:00", "commit": "0123456789abcdef", "dirty": False, "fqt": "0.1.0",
            "torch": "2.13", "processor": "P", "threads": 2, "accelerators": [],
        },
        "config": {"task": "digits", "model": "convnet", "epochs": 2},
        "baseline": "qat",
        "recipes": ["qat", "ptq4", "bhq4"],
        "seeds": [0, 1, 2],
        "measurement": {"reference": "qat", "baseline": "qat", "batches": 4, "draws": 8, "sampling_batches": 16},
        "metrics": [{"name": "accuracy", "unit": "%", "times": 100.0, "higher": True, "digits": 2}],
        "runs": [_run(recipe, seed) for seed in range(3) for recipe in ACCURACY],
        "gradient": [
            {
                "recipe": recipe, "seed": seed, "step": 10, "quantization": estimate, "sampling": estimate,
                "ratio": {"value": RATIO[recipe][seed], "error": 0.01},
            }
            for seed in range(3) for recipe in RATIO
        ],
    }  # fmt: skip


@pytest.fixture
def run_folder(tmp_path):
    """Makes the folder of a run as training leaves it: make(name, recipe=…, finished=…) -> path."""

    def make(name, recipe="bhq4", *, finished=True, rho=False):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        escaped = json.dumps(recipe)
        (folder / "config.toml").write_text(
            f'task = "digits"\nmodel = "convnet"\nrecipe = {escaped}\nseed = 3\nsteps = 40\n'
            '[resolved_recipe]\ninput = "ptq8"\n'
        )
        write_json(folder / "environment.json", {"started": {"time": "then", "torch": "2.13"}, "continued": []})
        lines = [
            {"kind": "train", "epoch": 0, "step": 10, "samples": 5, "loss": 1.25, "accuracy": 0.5, "seconds": 1.0},
            {"kind": "train", "epoch": 0, "step": 20, "samples": 5, "loss": 0.75, "accuracy": 0.6, "seconds": 1.0},
            {"kind": "eval", "epoch": 0, "step": 20, "samples": 9, "loss": 0.5, "accuracy": 0.7777, "seconds": 1.0},
        ]
        if rho:
            reading = {"quantization": 0.5, "sampling": 4.0, "layers": {"conv1": 0.0625, "fc": None}}
            lines += [{"kind": "monitor", "step": 10, "mean_width": 8.0, "rho": 0.25, **reading}]
            lines += [{"kind": "adapt", "step": 10, "rho": 0.25, "mean_width": 3.5, "widths": {"conv1": 3}}]
            lines += [{"kind": "monitor", "step": 20, "mean_width": 3.5, "rho": 0.125, **reading}]
        lines += [{"kind": "end", "step": 20, "diverged": False, "mean_width": 5.75}] * finished
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


@pytest.fixture
def layer_table():
    """Theorem 2's table of two layers, as `fqt.stats.table_record` writes it."""
    return {
        "sources": ["b", "a"],
        "targets": ["a", "b"],
        "parts": {
            "a": {"a": {"value": 4.0, "error": 0.25}, "b": {"value": 0.0, "error": 0.0}},
            "b": {"a": {"value": 0.5, "error": 0.125}, "b": {"value": 3.5, "error": None}},
        },
    }
