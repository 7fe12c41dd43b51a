"""Ours beside torchao's and SDNQ's int8 training, bf16 and fp32, on the CPU: one record, and docs/comparison.md.

    python results/comparison.py [--only PART …] [--record OTHER.json]

Writes results/comparison/record.json and makes the page from it (`comparison_page.py`). Rivals come from PyPI
and are only run: `pip install torchao==0.18.0 sdnq==0.2.8` beside fqt, best in an environment of its own. One
that is absent is left out with one line, here and in the record. Every part runs in a process of its own, on
one thread but for `speed`, which wants an idle machine; a part that is not named stays what it was in the
record.

tried     small passes (`trials.py`): what is refused, left in float, or wrong
rounding  what `fqt.certify` says of each one's rounding. A layer is asked through its gradients alone: with an
          identity for a weight, grad_input is the rounded grad_output; with one for an input, grad_weight is
accuracy  errors of gradients, of one pass and of the mean of many: noise is averaged away, a bias is not
kept      bytes kept for backward
speed     a Linear, a transformer's and a convolutional net's step, as ratios within a round to fp32
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from comparison_page import PAGE, RECORD, page
from rivals import Rival, setting, taking_part
from torch import Tensor, nn
from trials import TRIALS, attempt, message

import fqt
from fqt import kernels
from fqt.bench import timing
from fqt.bench.contestants import Runner
from fqt.bench.kept import kept_bytes
from fqt.bench.workloads import Layer, Step, image_classifier, transformer
from fqt.quant.examples import FAMILIES, gradients
from fqt.records import environment, read_json, write_json

SIDE = 128  # of the layers whose rounding is asked for: SDNQ leaves layers below 128² in float
DRAWS, RATE = 1024, 1e-3
PASSES = 64
SECONDS = 1.5  # that speed may take per rival and case, once the fewest rounds are there
ROUNDS = (3, 9)
Results = dict[str, Any]


# -- tried --------------------------------------------------------------------------------------------------------


def tried(rivals: Iterable[Rival]) -> Results:
    """Every trial of every rival, and whether torch's own integer product is right where the sum has one term."""
    found: Results = {trial.title: {} for trial in TRIALS}
    for trial in TRIALS:
        for rival in rivals:
            found[trial.title][rival.key] = attempt(trial, rival)
            print(trial.title, "|", rival.key, "|", found[trial.title][rival.key], flush=True)
    a = torch.randint(-127, 128, (SIDE, 1), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    right = torch.equal(torch._int_mm(a, a.t()), a.int() * a.t().int())
    return {"trials": found, "int_mm of one term is right": right}


# -- rounding -----------------------------------------------------------------------------------------------------


def rounding_of(rival: Rival, role: str) -> Callable[[Tensor, int], Tensor]:
    """(x, seed) to what a layer makes of a grad_output x on the way to its `role`, a gradient.

    Rows of x are repeated up to `SIDE`, since some layers compute few rows in float.
    """

    @cache
    def layer(width: int) -> nn.Module:
        plain = nn.Linear(width, width) if role == "grad_input" else nn.Linear(SIDE, width)
        with torch.no_grad():
            plain.weight.copy_(torch.eye(width) if role == "grad_input" else plain.weight)
        return rival.convert(nn.Sequential(plain)).train()

    @torch.enable_grad()
    def rounded(x: Tensor, seed: int) -> Tensor:
        rows, width = x.shape
        above = x.repeat(-(-SIDE // rows), 1)[:SIDE]
        model = layer(width)
        model.zero_grad()
        given = (torch.zeros(SIDE, width) if role == "grad_input" else torch.eye(SIDE)).requires_grad_()
        torch.manual_seed(seed)
        with setting(rival):
            y = model(given)
        y.float().backward(above)
        gradient = given.grad if role == "grad_input" else model[0].weight.grad.t()  # type: ignore[index,union-attr]
        return gradient[:rows].clone()

    return rounded


def rounding(rivals: Iterable[Rival], draws: int = DRAWS) -> Results:
    """Certificates of what each one rounds, shortened."""
    found: Results = {}
    for rival in rivals:
        subjects = {role: rounding_of(rival, role) for role in ("grad_input", "grad_weight")}
        if rival.stored:
            subjects["stored weight"] = rival.stored
        # A weight's gradient is a sum over rows, in which an offset of the input's codes mixes them.
        mixes = {"grad_input": rival.mixes, "grad_weight": 0, "stored weight": None}
        found[rival.key] = {role: verdict(f, draws, mixes[role]) for role, f in subjects.items()}
        print(rival.key, found[rival.key], flush=True)
    return {"draws": draws, "rate": RATE, "rivals": found}


def verdict(subject: Callable[[Tensor, int], Tensor], draws: int, mixes: int | None) -> dict[str, Any]:
    """What a certificate says, in short; a subject that cannot be certified says why."""
    try:
        certificate = fqt.certify(subject, draws=draws, rate=RATE, mixes=mixes)
    except fqt.FqtError as error:
        return {"verdict": None, "why": message(error)}
    convicted = certificate.convicted
    first = next(iter(convicted.values()))[0] if convicted else None
    return {
        "verdict": certificate.verdict,
        "convicted": list(convicted),
        "first": first and f"{first.test} on {first.input}, effect {first.effect:.3g}",
        "notes": list(certificate.notes),
    }


# -- accuracy -----------------------------------------------------------------------------------------------------


def accuracy(rivals: Iterable[Rival], passes: int = PASSES) -> Results:
    """Relative errors of gradients, of one pass (root mean square) and of the mean of all passes.

    Of layers, geometric means over the gradient matrices that ship with the package; weights and inputs are ±1,
    which every grid of 8 bits holds, so that what is left is the rounding of grad_output. And of a transformer's
    step, all parameters together, against fp32: there the forward pass is rounded, too.
    """
    found: Results = {}
    for rival in rivals:
        single: dict[str, list[dict[str, float]]] = {}
        for g in (g for family in FAMILIES for g in gradients(family).values()):
            for name, error in layer_errors(rival, g[:, : g.shape[1] // 32 * 32], passes).items():
                single.setdefault(name, []).append(error)
        found[rival.key] = {
            name: {kind: statistics.geometric_mean(e[kind] or 1e-300 for e in errors) for kind in ("one", "mean")}
            for name, errors in single.items()
        }
        found[rival.key]["step"] = step_errors(rival, passes)
        print(rival.key, found[rival.key], flush=True)
    return {"passes": passes, "rivals": found}


def layer_errors(rival: Rival, g: Tensor, passes: int) -> dict[str, dict[str, float]]:
    """Of both gradients of a layer that gets the gradient g (N, D)."""
    (rows, width), draw = g.shape, torch.Generator().manual_seed(0)
    w, x = (torch.randint(0, 2, (n, 256), generator=draw) * 2.0 - 1 for n in (width, rows))
    plain = nn.Linear(256, width)
    with torch.no_grad():
        plain.weight.copy_(w)
    model = rival.convert(nn.Sequential(plain)).train()

    def outcome(seed: int) -> dict[str, Tensor]:
        model.zero_grad()
        given = x.clone().requires_grad_()
        torch.manual_seed(seed)
        with setting(rival):
            y = model(given)
        y.float().backward(g)
        return {"grad_input": given.grad, "grad_weight": model[0].weight.grad}  # type: ignore[index,dict-item]

    exact = {"grad_input": g.double() @ w.double(), "grad_weight": g.double().t() @ x.double()}
    energy, one, mean = energies(outcome, exact, passes)
    return {n: {"one": (one[n] / energy[n]) ** 0.5, "mean": (mean[n] / energy[n]) ** 0.5} for n in exact}


def step_errors(rival: Rival, passes: int) -> dict[str, float]:
    """Of all gradients of matrices of a small transformer."""
    step = transformer(blocks=2, width=128, heads=4, samples=8, tokens=32)
    exact = {n: g for n, g in Runner(REFERENCE.contestant, step).outcome().items() if n != "output" and g.ndim > 1}
    found = energies(Runner(rival.contestant, step).outcome, exact, passes)
    energy, one, mean = (sum(part.values()) for part in found)
    return {"one": (one / energy) ** 0.5, "mean": (mean / energy) ** 0.5}


def energies(
    outcome: Callable[[int], dict[str, Tensor]], exact: dict[str, Tensor], passes: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """‖exact‖², the mean ‖error‖² of a pass, and ‖error‖² of the mean of the passes, by name."""
    total = {name: torch.zeros_like(g, dtype=torch.float64) for name, g in exact.items()}
    one = dict.fromkeys(exact, 0.0)
    for seed in range(passes):
        found = outcome(seed)
        for name, g in exact.items():
            error = found[name].double() - g.double()
            total[name] += error
            one[name] += float(error.square().sum()) / passes
    energy = {name: float(g.double().square().sum()) for name, g in exact.items()}
    return energy, one, {name: float((t / passes).square().sum()) for name, t in total.items()}


# -- kept and speed -----------------------------------------------------------------------------------------------

Workloads = dict[str, Layer | Step]


def workloads(small: bool = False) -> Workloads:
    """What is measured; `small` to try the script."""
    n = 8 if small else 1
    width, batch = 1024 // n, 32 // n
    return {
        f"Linear {width}→{width}, {4 * width} rows": Layer(
            model=lambda: nn.Sequential(nn.Linear(width, width)), input=(4 * width, width)
        ),
        "transformer's step": transformer(blocks=2, width=512 // min(n, 4), heads=8, samples=8, tokens=128 // n),
        "ResNet-18's step": image_classifier("resnet18-cifar", samples=batch, side=32 if n == 1 else 16),
    }


def kept(rivals: Iterable[Rival], small: bool = False) -> Results:
    """Bytes that grow with the batch, of the whole model."""
    found: Results = {}
    for name, workload in workloads(small).items():
        found[name] = {}
        for rival in rivals:
            try:
                found[name][rival.key] = kept_bytes(Runner(rival.contestant, workload)).total
            except Exception as error:  # of a rival
                found[name][rival.key] = message(error)
            print(name, "|", rival.key, "|", found[name][rival.key], flush=True)
    return found


def speed(rivals: Iterable[Rival], small: bool = False) -> Results:
    """Seconds of every rival and of fp32 in turn, after the result has been looked at; see `fqt.bench.timing`."""
    found: Results = {}
    for name, workload in workloads(small).items():
        reference = Runner(REFERENCE.contestant, workload)
        exact, found[name] = reference.outcome(), {}
        for rival in rivals:
            if rival.key == REFERENCE.key or (rival.package and "ResNet" in name):  # theirs have no convolution
                continue
            try:
                found[name][rival.key] = against(reference, exact, Runner(rival.contestant, workload))
            except Exception as error:  # of a rival
                found[name][rival.key] = {"why": message(error)}
            print(name, "|", rival.key, "|", found[name][rival.key], flush=True)
        torch._dynamo.reset()
    return found


def against(reference: Runner, exact: dict[str, Tensor], runner: Runner) -> dict[str, Any]:
    """Pairs of seconds, fp32's first, in as many rounds as there is time for; or why there are none."""
    got = runner.outcome()
    off = float((got["output"].double() - exact["output"].double()).norm() / exact["output"].double().norm())
    if not off < 0.05:
        return {"why": f"its output is {off:.2g} off fp32's"}
    calls: dict[str, Callable[[], object]] = {"fp32": reference, "it": runner}
    counts = {name: timing.calls_per_reading(call) for name, call in calls.items()}
    start, pairs = time.perf_counter(), []
    for found in timing.rounds(calls, counts, ROUNDS[1]):
        pairs.append([round(found[who], 7) for who in ("fp32", "it")])
        if len(pairs) >= ROUNDS[0] and time.perf_counter() - start > SECONDS:
            break
    return {"off": off, "seconds": pairs}


REFERENCE = Rival(key="fp32", title="fp32")
PARTS: dict[str, Callable[[Iterable[Rival]], Results]] = {
    "tried": tried,
    "rounding": rounding,
    "accuracy": accuracy,
    "kept": kept,
    "speed": speed,
}


# -- the record ---------------------------------------------------------------------------------------------------


def measure(part: str) -> dict[str, Any]:
    """One part, by those who are here, with its environment."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", str(int(part == "speed")))
    if part != "speed":
        torch.set_num_threads(1)
    rivals = taking_part(part)
    absent = {rival.key: rival.absence() for rival in rivals if rival.absence()}
    for reason in sorted(set(absent.values())):
        print(f"left out: {reason}", flush=True)
    present = [rival for rival in rivals if rival.key not in absent]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rivals warn at length
        results = PARTS[part](present)
    stamp = environment(["python", "results/comparison.py", "--only", part])
    packages = {rival.package: rival.version for rival in present if rival.package}
    return {
        "environment": stamp,
        "kernels": asdict(kernels.status()),
        "packages": packages,
        "absent": absent,
        "results": results,
    }


def main(parts: list[str], record: Path) -> None:
    """Measures the parts, each in a process of its own; the page is made of the repository's record only."""
    if len(parts) > 1:
        for part in parts:
            subprocess.run([sys.executable, __file__, "--only", part, "--record", str(record)], check=True)
        return
    found = measure(parts[0])
    known = read_json(record) if record.exists() else {"kind": "comparison", "parts": {}}
    known["parts"][parts[0]] = found
    record.parent.mkdir(exist_ok=True)
    write_json(record, known)
    if record == RECORD:
        PAGE.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    main(given.only, given.record)
