"""The catalog: measured, certified, compared with given variances; the record, the page and the picture.

    python results/catalog.py [--new] [ORACLE_FOLDER]

Writes results/catalog.json, docs/catalog.md and docs/catalog.svg, on the gradients that ship with the package. With
`--new` quantizers of the last record that measure what they did keep their certificates, which take the time. With
a folder that holds `gpt_shakespeare.npz` and `.json`, gradients with the variances that a right quantizer has on
them, the record also says how far ours are from those. `ratios` is the geometric mean of `thq4d`'s variance over
that of others, which should be at most 0.27 of psq4's, 0.75 of shq4d's and 0.5 of nvfp4's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fqt.quant import Identity, Integers, Quantizer, Rotated, ScaledHadamard, quantizer
from fqt.quant.examples import FAMILIES, gradients
from fqt.records import environment, read_json, write_json
from fqt.report import catalog_figure, catalog_markdown, save_figure
from fqt.stats.catalog import catalog_record, certified, mean_ratio

ROOT = Path(__file__).parent.parent
OTHERS = ("psq4", "shq4d", "nvfp4", "eden4")
NAMES = ("psq2", "psq4", "psq8", "ptq4", "ptq8", "luq4", "mxfp4", "mxint4", "nvfp4")
SIGNS = 8


def ratios(families: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Of thq4d to each of OTHERS, by family of matrices."""
    return {
        family: {other: mean_ratio("thq4d", other, found.values()) for other in OTHERS}
        for family, found in families.items()
    }


def oracle(folder: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Its matrices, and by quantizer our variance over the given one less 1, by matrix."""
    given = json.loads((folder / "gpt_shakespeare.json").read_text())
    with np.load(folder / "gpt_shakespeare.npz") as arrays:
        matrices = {name: torch.from_numpy(arrays[name].astype(np.float32) / 4096) for name in arrays}
    found: dict[str, dict[str, float]] = {}
    for name, x in matrices.items():
        members: dict[str, Quantizer] = {key: quantizer(key) for key in NAMES}
        rotation = Rotated(Identity(), block=given[name]["rotation_block"])
        members["rotated_psq4"] = Quantizer(transform=rotation, grid=Integers(4))
        members["shq4"] = Quantizer(transform=ScaledHadamard(guard=False), grid=Integers(4))
        for key, q in members.items():
            seeds = range(SIGNS if q.transform != Identity() else 1)
            mean = sum(float(q.variance(x, seed)) for seed in seeds) / len(seeds)
            found.setdefault(key, {})[name] = mean / given[name]["variance"][key] - 1
    return matrices, found


def certificates_of(last: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last record's certificates by name, of the rows that are measured as they were then."""
    date, before = last["environment"]["time"][:10], {row["name"]: row for row in last["rows"]}
    return {
        row["name"]: {"date": date, **before[row["name"]]["certified"]}
        for row in rows
        if row["name"] in before and _alike(row, before[row["name"]])
    }


def _alike(row: dict[str, Any], before: dict[str, Any]) -> bool:
    if any(row[key] != before[key] for key in row if key != "variance"):
        return False
    return all(math.isclose(row["variance"][f], before["variance"][f], rel_tol=1e-6) for f in FAMILIES)


def main(folder: Path | None, new: bool) -> None:
    """Measures, writes, prints."""
    record = catalog_record()
    known = certificates_of(read_json(ROOT / "results" / "catalog.json"), record["rows"]) if new else {}
    families = {family: gradients(family) for family in FAMILIES}
    if folder is not None:
        families["gpt_shakespeare"], record["agreement"] = oracle(folder)
        for name, off in record["agreement"].items():
            print(f"{name:14} off by at most {max(map(abs, off.values())):.1e}", flush=True)
    record["ratios"] = ratios(families)
    print(json.dumps(record["ratios"], indent=1), flush=True)
    record["environment"] = environment(
        ["python", "results/catalog.py", *["--new"] * new, *["FOLDER"] * (folder is not None)]
    )
    names = [row["name"] for row in record["rows"] if row["name"] not in known]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for name, found in zip(names, pool.map(certified, names), strict=True):
            known[name] = {"date": record["environment"]["time"][:10], **found}
            print(f"{name:10} {found}", flush=True)
    for row in record["rows"]:
        row["certified"] = known[row["name"]]
    write_json(ROOT / "results" / "catalog.json", record)
    (ROOT / "docs" / "catalog.md").write_text(catalog_markdown(record), encoding="utf-8")
    save_figure(catalog_figure(record), ROOT / "docs" / "catalog.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", action="store_true")
    parser.add_argument("folder", nargs="?", type=Path)
    given = parser.parse_args()
    main(given.folder, given.new)
