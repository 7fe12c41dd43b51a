"""How often `fqt.certify` convicts quantizers that are unbiased and independent, heavy-tailed noise included.

    PYTHONPATH=. python results/false_alarms.py OUTPUT.json

All members of the catalog that are declared exact, at the widths that its table shows and with every rounding that
draws; `ptq`, `psq`, `bhq` and `shq` also at 2 and 8 bits; and re-implementations of unbiased quantizers
(`tests/stats/defects.py`). Two seeds each, at a rate of false alarms that can be counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from scipy.stats import beta

import fqt
from fqt.quant.catalog import METHODS
from fqt.records import environment, write_json
from fqt.stats.certification.sample import Function
from tests.stats import defects

RATE, DRAWS, SEEDS = 0.2, 64, 2


def subjects() -> Iterator[tuple[str, str | Function, int | None]]:
    """Name, subject, axis that it may mix."""
    for method in METHODS.values():
        if method.bias == "exact":
            best = (f"{method.shown[0]}x",) if "best" in method.roundings else ()
            for name in (*method.shown, *best):
                yield name, name, None
    for method in ("ptq", "psq", "bhq", "shq"):
        for bits in (2, 8):
            for rounding in ("", "d"):
                yield f"{method}{bits}{rounding}", f"{method}{bits}{rounding}", None
    for name, case in defects.SOUND.items():
        if case.verdict == "exact":
            yield name, case.function, case.mixes


def main(output: Path) -> None:
    """Certifies all, and writes the record after each round of seeds."""
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, object]]] = {name: [] for name, _, _ in subjects()}
    for trial in range(SEEDS):
        for name, subject, mixes in subjects():
            certificate = fqt.certify(subject, draws=DRAWS, rate=RATE, seed=1000 * trial + 7, mixes=mixes)
            failed = sorted({f.test for found in certificate.convicted.values() for f in found})
            rows[name].append({"seed": certificate.seed, "verdict": certificate.verdict, "failed": failed})
            print(trial, name, certificate.verdict, failed, flush=True)
        write_json(output, _record(rows, output.name))


def _record(rows: dict[str, list[dict[str, object]]], name: str) -> dict[str, object]:
    verdicts = [row["verdict"] for certificates in rows.values() for row in certificates]
    count, alarms = len(verdicts), sum(v != "exact" for v in verdicts)
    interval = [
        float(beta.ppf(0.025, alarms, count - alarms + 1)) if alarms else 0.0,
        float(beta.ppf(0.975, alarms + 1, count - alarms)),
    ]
    return {
        "environment": environment(["python", "results/false_alarms.py", name]),
        "rate": RATE,
        "draws": DRAWS,
        "subjects": len(rows),
        "certificates": count,
        "convicted": alarms,
        "share": alarms / count,
        "interval95": interval,
        "rows": rows,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
