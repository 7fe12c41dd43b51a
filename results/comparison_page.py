"""The page docs/comparison.md, from the record of `comparison.py` and from nothing else.

python results/comparison_page.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rivals import RIVALS, taking_part

from fqt.records import read_json

ROOT = Path(__file__).parent.parent
RECORD, PAGE = ROOT / "results" / "comparison" / "record.json", ROOT / "docs" / "comparison.md"
NONE = "not measured"
TITLES = {rival.key: rival.title for rival in RIVALS}
Part = Mapping[str, Any]

INTRODUCTION = """\
# Beside other int8 training, on the CPU

Made by `python results/comparison.py` from [its record](../results/comparison/record.json); a test compares the
two. Everyone is set up as its own documentation says, and used through public functions. torchao 0.18.0 is its
int8 mixed-precision training (`Int8MixedPrecisionTrainingConfig`), and its training of weights kept in int8;
SDNQ 0.2.8 is `sdnq_training_post_load_quant` with int8 products, with float weights and with its default of
weights kept in uint8. SDNQ is under the GPL: it was run, and nothing of it is in this repository. To run it all
again:

```console
pip install torchao==0.18.0 sdnq==0.2.8     # beside fqt, in an environment of its own
python results/comparison.py                # or a part: --only speed
```
"""

TRIED = """\
## What was tried

One layer, forward and backward, converted and not. **runs**: outputs and gradients within a tenth of the float
layer's, but not equal. *float*: equal but for last bits, so nothing was quantized; nothing was raised or
printed either. **wrong**: neither. A number in brackets is a message, below. SDNQ leaves layers of fewer than
16384 weights or fewer than 32 channels in float by default, sizes that are no multiple of 16 and inputs of
fewer than 32 rows always. Libraries that keep weights in 8 bits have optimizers of their own for them.
"""

INT_MM = """
`torch._int_mm`, which torchao calls, gives wrong sums here where a sum has a single term, as the weight gradient of
one row has.
"""

TORCHAO_DEFAULT = """
In its default form, a subclass of tensors, torchao 0.18.0 multiplies in float: bit for bit what `nn.Linear` gives.
What follows is of `module_swap=True`, which multiplies in int8.
"""

ROUNDING = """\
## Bias of the rounding

`fqt.certify` of each one's rounding of `grad_output`, asked of the layer from outside: with an identity for a
weight, `grad_input` is the rounded gradient; with one for an input, `grad_weight` is. {draws} draws on each of
17 inputs, fixed seeds; a rounding that is exact gets another verdict with a probability of at most {rate:g}
([what is tested](certify.md)). Rounding to the nearest is biased by construction: the same gradient is always
rounded the same way. Where a library keeps weights in 8 bits, what is left of a weight that is assigned is
certified, too. The input called *denormal* has entries of 1e-40, below the smallest normal float32.
"""

ACCURACY = """\
## Error of the gradient

Relative, of one pass (root mean square) and of the mean of {passes} passes: noise is averaged away, to 1/8
here; a bias is not. *layer*: geometric means over the 8 gradient matrices that ship with the package, through
weights and inputs of ±1, which every grid of 8 bits holds, so that only the rounding of `grad_output` is left.
*step*: all gradients of matrices of a transformer of two blocks together, against fp32; there weights and
activations are rounded to the nearest by everyone, ours too, and what that does stays in the mean.
"""

KEPT = """\
## Bytes kept for backward

Over what fp32 keeps; the whole model, what does not grow with the batch left out.
"""

SPEED = """\
## Speed

Times faster than fp32, each pair of times in one round: the median [least, greatest] of 3 to 9 rounds. A
dash: without a convolution of its own, so nothing would be measured but torch's.
"""


def page(record: Mapping[str, Any]) -> str:
    """All of it, in markdown."""
    parts: Mapping[str, Part] = record["parts"]
    sections = [INTRODUCTION]
    for name, write in SECTIONS.items():
        sections.append(write(parts[name]) if name in parts else MISSING[name])
    sections.append(_machines(parts))
    return "\n".join(sections)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """`words` columns to the left, the others to the right."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def _absent(part: Part) -> str:
    """Who was left out, in a line for each reason."""
    reasons = sorted(set(part["absent"].values()))
    return "".join(f"\nLeft out: {reason}.\n" for reason in reasons)


def _tried(part: Part) -> str:
    keys = [rival.key for rival in taking_part("tried") if rival.key not in part["absent"]]
    messages: list[str] = []

    def cell(found: Mapping[str, Any]) -> str:
        status = found["status"]
        if status == "refused":
            if found["message"] not in messages:
                messages.append(found["message"])
            return f"refused ({messages.index(found['message']) + 1})"
        if status == "wrong":
            error = found["error"]
            return f"**wrong**: {found['message']} " + ("is not finite" if error is None else f"off by {error:.2g}")
        return "*float*" if status == "float" else "runs"

    trials = part["results"]["trials"]
    rows = [[title, *(cell(found[key]) for key in keys)] for title, found in trials.items()]
    text = TRIED + "\n" + _table(["", *(TITLES[key] for key in keys)], rows, words=len(keys) + 1)
    text += _absent(part) + "\n"
    text += "".join(f"{i}. `{said.replace('`', chr(39))}`\n" for i, said in enumerate(messages, start=1))
    if not part["results"]["int_mm of one term is right"]:
        text += INT_MM
    if next(iter(trials.values())).get("torchao default", {}).get("status") == "float":
        text += TORCHAO_DEFAULT
    return text


def _rounding(part: Part) -> str:
    results = part["results"]
    roles = ("grad_input", "grad_weight", "stored weight")
    rows = [
        [TITLES[key], *(_verdict(found[role]) if role in found else "–" for role in roles)]
        for key, found in results["rivals"].items()
    ]
    head = ROUNDING.format(draws=results["draws"], rate=results["rate"])
    return head + "\n" + _table(["", *roles], rows, words=4) + _absent(part)


def _verdict(found: Mapping[str, Any]) -> str:
    if found["verdict"] is None:
        return found["why"]
    if found["verdict"] == "exact":
        return "exact"
    inputs = found["convicted"]
    where = f"on {len(inputs)} of 17 inputs" if len(inputs) > 2 else "on " + ", ".join(inputs)
    return f"{found['verdict']} {where} ({found['first']})"


def _accuracy(part: Part) -> str:
    results = part["results"]
    columns = [(name, kind) for name in ("grad_input", "grad_weight", "step") for kind in ("one", "mean")]
    titles = [f"{'layer, ' if n != 'step' else ''}{n}: {'one pass' if k == 'one' else 'mean'}" for n, k in columns]
    rows = [
        [TITLES[key], *(f"{found[name][kind]:.2g}" for name, kind in columns)]
        for key, found in results["rivals"].items()
    ]
    return ACCURACY.format(passes=results["passes"]) + "\n" + _table(["", *titles], rows) + _absent(part)


def _by_case(part: Part, cell: Callable[[Mapping[str, Any], str], str]) -> list[list[str]]:
    cases = part["results"]
    keys = {key: None for case in cases.values() for key in case}
    return [[TITLES[key], *(cell(case, key) for case in cases.values())] for key in keys]


def _kept(part: Part) -> str:
    def share(case: Mapping[str, Any], key: str) -> str:
        found = case[key]
        return found if isinstance(found, str) else f"{found / case['fp32']:.2f}"

    return KEPT + "\n" + _table(["", *part["results"]], _by_case(part, share)) + _absent(part)


def _speed(part: Part) -> str:
    rows = [[*row, NONE] for row in _by_case(part, _times)]
    text = SPEED + "\n" + _table(["", *part["results"], "on a GPU"], rows) + _absent(part)
    return text + f"\n{part['kernels']['level']} kernels, {part['environment']['threads']} threads.\n"


def _times(case: Mapping[str, Any], key: str) -> str:
    found = case.get(key)
    if found is None:
        return "–"
    if "seconds" not in found:
        return found["why"]
    ratios = sorted(float32 / it for float32, it in found["seconds"])
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def _machines(parts: Mapping[str, Part]) -> str:
    rows = []
    for name, part in parts.items():
        at = part["environment"]
        packages = ", ".join(f"{package} {version}" for package, version in part["packages"].items())
        machine = f"{at['processor']}, {at['threads']} threads, {part['kernels']['level']} kernels"
        rows.append([name, at["time"][:10], str(at["commit"])[:9], f"torch {at['torch']}, {packages}", machine])
    return "## Where\n\n" + _table(["part", "date", "commit", "with", "machine"], rows, words=5)


SECTIONS: dict[str, Callable[[Part], str]] = {
    "tried": _tried,
    "rounding": _rounding,
    "accuracy": _accuracy,
    "kept": _kept,
    "speed": _speed,
}
MISSING = {
    name: f"## {name.capitalize()}\n\nNot measured: `python results/comparison.py --only {name}`.\n"
    for name in SECTIONS
}
MISSING["speed"] = MISSING["speed"] + f"\nOn a GPU: {NONE}.\n"

if __name__ == "__main__":
    PAGE.write_text(page(read_json(RECORD)), encoding="utf-8")
