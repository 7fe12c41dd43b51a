"""What the measurements cost and how far the monitor is off, on a CIFAR-10 run.

    python results/monitor.py RUN_FOLDER OUTPUT.json

RUN_FOLDER is a folder that `fqt train cifar10` left; its halfway.pt is measured. Costs are ratios of this
process's CPU time within one run: a reading of the monitor, and `diagnose` at all widths without the table per
batch used, over a training step. The bias is the mean of the monitor's sampling variance over batches against the
estimate from the spread of gradients over the same batches: batch norm sees half a batch in one of the monitor's
passes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fqt
from fqt.records import environment, write_json
from fqt.train.snapshot import Snapshot

BATCHES, ROUNDS, READINGS = 8, 5, 12  # 8: what `fqt diagnose` takes if not told


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main(folder: Path, output: Path) -> None:
    """Measures and writes the record."""
    torch.set_num_threads(1)
    snapshot = Snapshot.of_run(folder)
    batches, loss_fn, rows = snapshot.batches(READINGS), snapshot.loss, []
    for recipe in ("shq8", "default"):
        model = snapshot.model(recipe)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            loss_fn(model, batches[0]).backward()
            optimizer.step()

        monitor = fqt.Monitor(model, loss_fn, every=1)
        step()
        monitor.step(batches[0])  # the first reading makes the pass again, the others do not
        reading, diagnosis = [], []
        for _ in range(ROUNDS):  # interleaved, so that a change of the machine's speed touches all
            base = (cpu_seconds(step) + cpu_seconds(step)) / 2
            found = cpu_seconds(lambda model=model: fqt.diagnose(model, loss_fn, batches[:BATCHES], table=0))
            monitor.skip()  # the passes above are no part of the step
            step()
            reading.append(cpu_seconds(lambda monitor=monitor: monitor.step(batches[0])) / base)
            diagnosis.append(found / BATCHES / base)
        monitor.close()
        rows.append(
            {
                "recipe": recipe,
                "monitor_reading_in_steps": statistics.median(reading),
                "monitor_overhead_every_100": statistics.median(reading) / 100,
                "diagnose_per_batch_in_steps": statistics.median(diagnosis),
                "rounds": ROUNDS,
            }
        )
        print(rows[-1], flush=True)

    model = snapshot.model("shq4")
    exact = fqt.diagnose(model, loss_fn, batches, table=0).total.sampling
    monitor, halves = fqt.Monitor(model, loss_fn, every=1, memory=0.0), []
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()
        reading_ = monitor.step(batch)
        assert reading_ is not None
        halves.append(reading_["sampling"])
    bias = {
        "monitor": statistics.mean(halves),
        "monitor_error": statistics.stdev(halves) / len(halves) ** 0.5,
        "spread_over_batches": exact.value,
        "spread_error": exact.error,
    }
    print(bias)
    command = ["python", "results/monitor.py", "RUN_FOLDER", output.name]
    write_json(output, {"environment": environment(command), "costs": rows, "sampling_variance": bias})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
