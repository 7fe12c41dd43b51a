"""The front page: short, its code runs, its links lead somewhere, and every figure on it is in a record."""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from fqt import bench
from fqt.records import read_json

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = " ".join(README.split())
RECORDS = ROOT / "results"
Figure = Callable[[], float]


@functools.cache
def record(name: str) -> Any:
    return read_json(RECORDS / name)


@functools.cache
def ratios(name: str) -> dict[tuple[str, str, str], float]:
    """Medians of a bench by case, recipe and measure."""
    found = bench.results(bench.read_bench(RECORDS / "bench" / name))
    return {(r.case, r.recipe, r.measure): r.ratio.median for r in found}


def noise(name: str, key: str = "noise") -> float:
    return record("noise.json")["rows"][name][key]


def rho(recipe: str) -> float:
    """Quantization over sampling variance, the mean over seeds."""
    found = [row["ratio"]["value"] for row in record("digits/compare.json")["gradient"] if row["recipe"] == recipe]
    return sum(found) / len(found)


def ends(folder: str, recipe: str, metric: str) -> list[float]:
    """What the runs of a comparison end with, by seed."""
    runs = record(f"{folder}/compare.json")["runs"]
    return [run.get("metrics", run)[metric] for run in runs if run["recipe"] == recipe]


def table_row(folder: str, metric: str, times: float, four_bits: str) -> list[Figure]:
    """The means of a row of the table of trainings."""
    recipes = ("none", "qat", "default", four_bits)
    return [lambda r=r: times * mean(ends(folder, r, metric)) for r in recipes]


def deviations(folder: str, metric: str, times: float, *recipes: str) -> list[Figure]:
    """The least and the largest standard deviation over seeds."""
    return [lambda of=of: times * of(stdev(ends(folder, r, metric)) for r in recipes) for of in (min, max)]


def kept(key: str) -> float:
    case = next(iter(record("comparison/record.json")["parts"]["kept"]["results"].values()))
    return case[key] / case["fp32"]


def layers(recipe: str, measure: str) -> Callable[[], float]:
    return lambda: ratios("layers.json")["linear-1024", recipe, measure]


FIGURES: list[tuple[str, list[Figure]]] = [
    # What stands there, with # for every number; and for each of these where it comes from.
    (
        "adds # times the noise of NVFP4 and # times that of MXFP4",
        [lambda: noise("thq4d") / noise("nvfp4"), lambda: noise("thq4d") / noise("mxfp4")],
    ),
    (
        "(# against # and #)",
        [lambda: noise("thq4d", "bits"), lambda: noise("nvfp4", "bits"), lambda: noise("mxfp4", "bits")],
    ),
    (
        "one step per tensor needs more than # bits for as little",
        [lambda: max(b for b in range(2, 9) if noise(f"ptq{b}") > noise("thq4d"))],
    ),
    (
        "took # minutes and # seconds",
        [lambda: record("demo.json")["seconds"] // 60, lambda: record("demo.json")["seconds"] % 60],
    ),
    ("training took # seconds", [lambda: record("demo.json")["training_seconds"]]),
    (
        "| a Linear keeps, of fp32's bytes | [#](docs/comparison.md#bytes-kept-for-backward) "
        "| [#](docs/comparison.md#bytes-kept-for-backward) | [#](docs/comparison.md#bytes-kept-for-backward) |",
        [lambda: kept("fqt"), lambda: kept("torchao"), lambda: kept("sdnq")],
    ),
    (
        "a Linear of 1024 trains # times as fast as in fp32 and # times as fast as in bf16 with `psq8`, "
        "# and # times with the default recipe of then",
        [layers("psq8", "fp32"), layers("psq8", "bf16"), layers("default", "fp32"), layers("default", "bf16")],
    ),
    (
        "a step of four transformer blocks # and # times (`psq8`)",
        [lambda m=m: ratios("transformer.json")["transformer", "psq8", m] for m in ("fp32", "bf16")],
    ),
    (
        "of ResNet-18 # and # times",
        [lambda m=m: ratios("resnet18.json")["resnet18", "psq8", m] for m in ("fp32", "bf16")],
    ),
    (
        "the Linear takes # times less than fp32 and is slower than bf16 (#)",
        [lambda m=m: ratios("amx-layers.json")["linear-1024", "psq8", m] for m in ("fp32", "bf16")],
    ),
    (
        "train the Linear # times as fast as in fp32 with `psq8` and # times with the default recipe, and the "
        "CIFAR-10 net of ten epochs # and # times",
        [
            *(lambda r=r: ratios("xeon.json")["linear-1024", r, "fp32"] for r in ("psq8", "default")),
            *(lambda r=r: ratios("speedrun.json")["speedrun", r, "fp32"] for r in ("psq8", "default")),
        ],
    ),
    (
        "| digits, accuracy %, # seeds | # | # | # | `shq4d` # |",
        [lambda: len(record("digits/compare.json")["seeds"]), *table_row("digits", "accuracy", 100, "shq4d")],
    ),
    (
        "% of views, # seeds, on an H100 | # | # | # | `shq4d` # |",
        [
            lambda: len(record("speedrun/compare.json")["seeds"]),
            *table_row("speedrun", "accuracy of views", 100, "shq4d"),
        ],
    ),
    (
        "| character GPT, loss in nats, # seeds | # | # | # | `thq4d` # |",
        [lambda: len(ends("gpt-4x128", "thq4d", "loss")), *table_row("gpt-4x128", "loss", 1, "thq4d")],
    ),
    (
        "| English to German, BLEU, # seeds of float and default, else # | # | # | # | `thq4d` # |",
        [
            *(lambda r=r: len(ends("multi30k", r, "BLEU")) for r in ("default", "thq4d")),
            *table_row("multi30k", "BLEU", 1, "thq4d"),
        ],
    ),
    (
        "deviations over seeds: # to # on digits, # to # on CIFAR-10, # to # of the GPT, # to # BLEU",
        [
            *deviations("digits", "accuracy", 100, "none", "qat", "default", "shq4d"),
            *deviations("speedrun", "accuracy of views", 100, "none", "qat", "default", "shq4d"),
            *deviations("gpt-4x128", "loss", 1, "none", "qat", "default", "thq4d"),
            *deviations("multi30k", "BLEU", 1, "none", "default"),
        ],
    ),
    ("the points of # recipes", [lambda: len(set(record("gpt-4x128/compare.json")["recipes"]) - {"none", "qat"})]),
    (
        "ρ is # with four bits and one step per tensor, # by row, # with block Householder and # with `shq4d`",
        [lambda r=r: rho(r) for r in ("ptq4", "psq4", "bhq4", "shq4d")],
    ),
]
NUMBER = r"(\d+(?:\.\d+)?)"
# Numbers that measure nothing: names, versions, counts of what is there, the literature.
NO_FIGURES = [
    r"\[[\d.]+\]\(https://arxiv[^)]*\)",
    r"\]\([^)]*\)",
    r"`[^`]*`",
    r"torchao 0\.18\.0|SDNQ 0\.2\.8|int8|float16|float64|bf16|fp32|NVFP4|MXFP4|AVX-512|AVX2|ResNet-\d+|FSDP2",
    r"Python ≥ 3\.10 \(run so far on 3\.11\)|1\.0\.",
    r"NeurIPS 2020|Theory 1962|Technol\. 1964|Theory 1993",
    r"On 2 cores|a Linear of 1024",
    r"2 to 8, by layer|\| 8(?: ¹)?(?= \|)|\| 8 and 4, floats|8 bits|4 bits?|at 4 bits|16 channels",
    r"an? H100|CIFAR-10|94 percent",
]


def _matched(template: str) -> re.Match[str]:
    pattern = NUMBER.join(re.escape(part) for part in re.split(r"#(?![a-z])", template))
    found = re.search(pattern, TEXT)
    assert found, f"the front page no longer says: {template}"
    return found


@pytest.mark.parametrize(("template", "sources"), FIGURES, ids=[template[:30] for template, _ in FIGURES])
def test_a_figure_is_the_records(template, sources):
    shown = _matched(template).groups()
    assert len(shown) == len(sources)
    for text, source in zip(shown, sources, strict=True):
        decimals = len(text.partition(".")[2])
        assert f"{source():.{decimals}f}" == text


def test_no_other_figure_is_there():
    rest = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    rest = " ".join(rest.split())
    for template, _ in FIGURES:
        rest = rest.replace(_matched(template).group(), "")
    for pattern in NO_FIGURES:
        rest = re.sub(pattern, "", rest)
    assert re.findall(r".{0,30}\d.{0,30}", rest) == []


def test_a_changed_record_or_page_would_be_found(monkeypatch):
    template, sources = FIGURES[0]
    monkeypatch.setitem(record("noise.json")["rows"]["thq4d"], "noise", 1.1 * noise("thq4d"))
    with pytest.raises(AssertionError):
        test_a_figure_is_the_records(template, sources)


def test_it_is_one_page():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", [ROOT / "README.md", RECORDS / "README.md"], ids=["README", "results"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_anchors_are_headings():
    for page, anchor in re.findall(r"\]\(([^)#:\s]+)#([^)]*)\)", README):
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _run(page: Path, namespace: dict[str, Any]) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, namespace)


def test_the_three_lines(one_thread, capsys):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    _run(ROOT / "README.md", {"__name__": "readme", "model": model, "inputs": torch.randn(32, 64)})
    assert "integer" in capsys.readouterr().out


def test_everyday_use(one_thread, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    _run(ROOT / "docs" / "use.md", {"__name__": "use"})
    assert (tmp_path / "plan.toml").exists()


@functools.cache
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(RECORDS), *sys.path])
        return importlib.import_module("noise")


@pytest.mark.parametrize("name", ["psq4", "thq4d", "shq8d", "nvfp4"])
def test_the_picture_is_of_today(name):
    found, noted = script().row(name), record("noise.json")["rows"][name]
    assert found["noise"] == pytest.approx(noted["noise"], rel=1e-4)
    assert (found["bits"], found["bias"]) == (noted["bits"], noted["bias"])


def test_nothing_in_the_picture_is_below_our_curve():
    rows = record("noise.json")["rows"]
    names = [name for name in rows if re.fullmatch(r"[ts]hq\dd", name)]
    assert names == ["thq2d", "thq3d", "thq4d", "thq5d", "shq6d", "shq7d", "shq8d"]
    assert "The curve is `thq2d` to `thq5d`, then `shq6d` to `shq8d`" in TEXT
    ours = [rows[name] for name in names]
    bits, noises = ([row[key] for row in ours] for key in ("bits", "noise"))
    assert bits == sorted(bits)
    for name, row in rows.items():
        if row not in ours and row["bits"] >= bits[0]:
            assert math.log(row["noise"]) > np.interp(row["bits"], bits, np.log(noises)), name


def test_the_picture_draws_its_record(tmp_path):
    rows = record("noise.json")["rows"]
    figure = script().figure(rows)
    drawn = [point for line in figure.axes[0].lines for point in zip(*line.get_data(), strict=True)]
    assert sorted(drawn) == sorted((row["bits"], row["noise"]) for row in rows.values())
    script().save_figure(figure, tmp_path / "noise.svg")
    markers = [
        len(re.findall("<use ", path.read_text())) for path in (tmp_path / "noise.svg", ROOT / "docs/noise.svg")
    ]
    assert markers[0] == markers[1]
