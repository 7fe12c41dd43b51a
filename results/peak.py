"""The greatest resident set of a process that trains, for bf16 autocast and for ours, each time in a fresh process.

    OMP_NUM_THREADS=1 python results/peak.py OUTPUT.json

Workloads and contestants are those of `fqt bench`; all of them under bfloat16 autocast, eager, with momentum SGD.
Three steps; `peak` is VmHWM in bytes, `faults` counts the page faults of the steps, both for each of two processes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from fqt.bench.contestants import Runner, contestants
from fqt.bench.workloads import Step, image_classifier, language_model, transformer
from fqt.records import environment, write_json

WORKLOADS: dict[str, Step] = {
    "ResNet-18, 224×224, batch 24": image_classifier("resnet18", samples=24, side=224),
    "ResNet-18, CIFAR form, batch 128": image_classifier("resnet18-cifar", samples=128, side=32),
    "four transformer blocks, width 768, 8 × 256 tokens": transformer(4, 768, 12, 8, 256),
    "GPT of 6 blocks, width 384, 8 × 256 tokens": language_model("gpt-6x384", 8, 256, vocabulary=65),
}
FORMS = {"bf16": None, "converted": None, "8 bits": 8, "2 bits": 2}
STEPS, PROCESSES = 3, 2


def one(workload: str, form: str) -> dict[str, int]:
    """In this process."""
    name = "bf16" if form == "bf16" else "default bf16"
    contestant = next(c for c in contestants(["default"], keep=FORMS[form]) if c.name == name)
    runner = Runner(contestant, WORKLOADS[workload])
    before = _faults()
    for _ in range(STEPS):
        runner()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak": peak * 1024, "faults": _faults() - before}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    """All of them, or the one that is named."""
    if len(sys.argv) == 4:
        print(json.dumps(one(*sys.argv[2:])))
        return
    rows = []
    for workload in WORKLOADS:
        for form in FORMS:
            command = [sys.executable, __file__, "--one", workload, form]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(PROCESSES)]
            rows.append({"workload": workload, "form": form, **{k: [r[k] for r in runs] for k in runs[0]}})
            print(f"{workload}: {form}: {[round(r['peak'] / 1e6) for r in runs]} MB, {rows[-1]['faults']} faults")
    write_json(Path(sys.argv[1]), {"steps": STEPS, "rows": rows, "environment": environment(sys.argv)})


if __name__ == "__main__":
    main()
