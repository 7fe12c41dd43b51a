"""What the documentation shows runs as it stands there: code, output, command lines, recipes, links, figures."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

import fqt
from fqt import bench
from fqt.kernels import ops, reference
from fqt.kernels.op import Op
from fqt.nn import Recipe, load_recipe
from tests.commands import check, commands
from tests.documents import DOCS, Block, blocks, disagreement, execute

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = DOCS.parent
PAGES = sorted(page for page in DOCS.rglob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md"]
# Pages whose code needs more than a namespace; they have tests of their own, here or as said.
ELSEWHERE = {
    "add-a-task.md": "below",
    "processes.md": "tests/distributed, on two processes",
    "tutorials/processes.md": "below",
    "hugging-face.md": "below",
    "tutorials/hugging-face.md": "below",
}
ALONE = ("recipes.md", "conversion.md", "certify.md")  # reference pages, whose blocks are read one by one
pytestmark = pytest.mark.usefixtures("one_thread")


def _name(page: Path) -> str:
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).as_posix()


def _python(page: Path) -> bool:
    return any(block.language == "python" for block in blocks(page))


def _net() -> torch.nn.Sequential:
    """A small net whose layers have the names of a ResNet's."""

    def named(**layers: torch.nn.Module) -> torch.nn.Sequential:
        return torch.nn.Sequential(OrderedDict(layers))

    def block() -> torch.nn.Sequential:
        return torch.nn.Sequential(named(conv1=torch.nn.Linear(16, 16), relu=torch.nn.ReLU()))

    return named(conv1=torch.nn.Linear(16, 16), layer1=block(), layer3=block(), fc=torch.nn.Linear(16, 4))


def _batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(count)]


def _loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


class _Library:
    """Another library, as a certificate meets it."""

    @staticmethod
    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        step = max(float(x.abs().max()), 1e-30) / 127
        return (x / step).round(), step


class _LowRank(torch.nn.Linear):
    """A layer of two factors, for the page that registers it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = torch.nn.Parameter(torch.randn(2, inputs))
        self.up = torch.nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, self.down), self.up, self.bias)


class _StdConv2d(torch.nn.Conv2d):
    """A convolution with a forward of its own, for the same page."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


def _given() -> dict[str, Any]:
    """What reference pages take for granted: a model, its loss, batches, an optimizer, another library."""
    model = _net()
    return {
        "torch": torch, "fqt": fqt, "model": model, "recipe": "psq8", "loss_fn": _loss, "batches": _batches(),
        "loader": _batches(), "accumulated": [_batches(2), _batches(2)], "batch": _batches(1)[0],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "scaler": torch.amp.GradScaler("cpu"),
        "x": torch.randn(8, 16), "Op": Op, "reference": reference, "library": _Library,
        "LowRank": _LowRank, "StdConv2d": _StdConv2d,
    }  # fmt: skip


@contextlib.contextmanager
def _operations_as_they_were() -> Iterator[None]:
    """What a page registers, at operations or for classes, is gone after it."""
    operations = [op for op in vars(ops).values() if isinstance(op, Op)]
    before = [list(op.implementations) for op in operations]
    try:
        yield
    finally:
        for op, implementations in zip(operations, before, strict=True):
            op.implementations[:] = implementations


@pytest.mark.parametrize("page", [p for p in PAGES if _python(p) and _name(p) not in ELSEWHERE], ids=_name)
def test_code(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fqt, "certify", functools.partial(fqt.certify, draws=64))
    torch.manual_seed(0)
    torch.save(fqt.quantize_(_net(), "psq8").state_dict(), "model.pt")
    with _operations_as_they_were():
        execute(page, _given, alone=_name(page) in ALONE)


def test_the_files_that_are_named_exist() -> None:
    text = (DOCS / "add-a-quantizer.md").read_text(encoding="utf-8")
    for file in re.findall(r"`((?:quant|kernels|nn)/\w+\.py)`", text):
        assert (ROOT / "src" / "fqt" / file).is_file()


@pytest.mark.parametrize("page", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


SOURCES = sorted((ROOT / "src" / "fqt").rglob("*.py"))


@pytest.mark.parametrize("files", [DOCUMENTS, SOURCES], ids=["documents", "sources"])
def test_nothing_sends_to_a_package_of_the_same_name(files: list[Path]) -> None:
    """`fqt` on PyPI is another package."""
    for file in files:
        assert not re.search(r"pip install ['\"]?fqt\b", file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("page", DOCUMENTS, ids=_name)
def test_command_lines_are_ones(page: Path) -> None:
    shells = [block.text for block in blocks(page) if block.language in ("", "console", "bash", "sh")]
    indented = re.findall(r"^    .*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for line in commands("\n".join([*shells, *indented])):
        check(line)


@pytest.mark.parametrize(
    "block", [b for b in blocks(DOCS / "recipes.md") if b.language == "toml"], ids=lambda b: b.line
)
def test_recipes_are_ones(block: Block, tmp_path: Path) -> None:
    assert tomllib.loads(block.text)
    (tmp_path / "mine.toml").write_text(block.text, encoding="utf-8")
    assert isinstance(load_recipe(tmp_path / "mine.toml"), Recipe)


def test_the_example_of_adding_a_task(run, tmp_path) -> None:
    (block,) = (b for b in blocks(DOCS / "add-a-task.md") if b.language == "python")
    (tmp_path / "mine.py").write_text(block.text, encoding="utf-8")
    status, out, err = run("train", "mine:copying", "--recipe", "shq4", "--epochs", 2, "--out", "run")
    assert status == 0, err
    assert float(re.search(r"accuracy (\S+) %", out)[1]) > 60  # chance is 12.5


def test_the_script_of_several_processes(tmp_path: Path) -> None:
    """Alone in its group; two processes do the same in tests/distributed with another page's script."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        execute(DOCS / "tutorials" / "processes.md")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*persistent_workers")
@pytest.mark.parametrize("page", ["hugging-face.md", "tutorials/hugging-face.md"])
def test_the_examples_of_other_trainers(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("transformers", "accelerate", "peft", "lightning"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    printed = execute(DOCS / page).splitlines()
    assert "'integer'" in next(line for line in printed if "'float'" in line)
    if page == "hugging-face.md":
        assert any(re.fullmatch(r"[\d.e-]+ [\d.e-]+", line) for line in printed)
        assert printed[-1].startswith("tensor(")


def test_the_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "examples" / "fqt.ipynb"
    assert file.stat().st_size < 300_000
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
            shown = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            printed = capsys.readouterr().out
            if "explain(" not in "".join(cell["source"]):  # which says how this machine multiplies
                assert not disagreement(printed, shown)


@pytest.mark.parametrize(
    "record",
    ["layers", "transformer", "resnet18", "xeon", "nets", "speedrun", "avx2", "avxvnni", "blocked", "amx-layers"],
)
def test_speeds_are_the_records(record: str) -> None:
    """Every row of the page that names a record's case has the record's figures."""
    made = _table(bench.markdown(bench.read_bench(ROOT / "results" / "bench" / f"{record}.json")))
    measured = {(row["case"], row["recipe"]): row for row in made}
    found = [row for row in _table(_section(record)) if (row["case"], row["recipe"]) in measured]
    assert found
    for row in found:
        figures = measured[row["case"], row["recipe"]]
        assert all(_same(cell, figures.get(name, "–")) for name, cell in row.items()), row


def test_the_noise_budget_is_the_records() -> None:
    text = (DOCS / "concepts" / "noise.md").read_text(encoding="utf-8")
    measured = {
        row["recipe"]: row for row in _table((ROOT / "results/digits/compare.md").read_text(encoding="utf-8"))
    }
    for row in _table(text):
        assert row["against qat"] == measured[row["recipe"]]["against qat"].replace("-", "−")
        noise = float(measured[row["recipe"]]["noise ρ"].split()[0])
        assert noise == pytest.approx(float(row["ρ"]), rel=0.05)
    said = [float(number) for number in re.findall(r"(\d\.\d+) times", text)]
    law = ((8, 2, 1), (4, 1, 1), (4, 1, 2))  # from so many bits to one less; digits; codes that are no steps
    assert said == [round((2**b - c) ** 2 / (2 ** (b - 1) - c) ** 2, digits) for b, digits, c in law]


def test_what_dither_costs_and_the_bounds_of_the_three() -> None:
    text = " ".join((DOCS / "concepts" / "quantizer.md").read_text(encoding="utf-8").split())
    ratios = [f"{((2**b - 1) / (2**b - 2)) ** 2 / 3:.3g}" for b in (2, 3, 4, 8)]
    assert "which is {}, {}, {} and {} at 2, 3, 4 and 8 bits".format(*ratios) in text
    x = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    gains = [
        f"{float(fqt.quantizer(f'psq{b}d').variance(x) / fqt.quantizer(f'psq{b}').variance(x)):.2f}"
        for b in (2, 3, 4, 8)
    ]
    said = "`psq2d` has {} times the variance of `psq2` (`psq3d` {}, `psq4d` {}, `psq8d` {})"
    assert said.format(*gains) in text
    (n, d), B = x.shape, 15
    rounded, quantized = fqt.quantizer("bhq4").rounded(x, seed=0)
    ranges = [m.double().amax(1) - m.double().amin(1) for m in (x, rounded)]
    bounds = {
        "ptq4": n * d / (4 * B**2) * (x.double().max() - x.double().min()) ** 2,
        "psq4": d / (4 * B**2) * ranges[0].square().sum(),
        "psq4d": d / (12 * (B - 1) ** 2) * ranges[0].square().sum(),
        "bhq4": d / (4 * B**2) * (quantized.mixing.cost.double() * ranges[1].square()).sum(),  # type: ignore[union-attr]
    }
    for name, bound in bounds.items():
        assert float(fqt.quantizer(name).variance_bound(x)) == pytest.approx(float(bound), rel=1e-6), name


def _section(record: str) -> str:
    """The part of the page on speed with a record's table."""
    parts = re.split(r"^#+ ", (DOCS / "speed.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (part,) = (part for part in parts if f"bench/{record}.json" in part)
    return part


def _table(text: str) -> list[dict[str, str]]:
    """The rows of the first table, by its header."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def _same(cell: str, figure: str) -> bool:
    """A floor may be left out of the page, not another put in its place."""
    figure = figure.replace("met", "✓").replace("missed", "✗")
    return cell in (figure, re.sub(r" [✓✗].*", "", figure))


def test_every_record_is_linked() -> None:
    linked = {
        (page.parent / target).resolve()
        for page in DOCUMENTS
        for target in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8"))
    }
    records = {path for kind in ("json", "jsonl") for path in (ROOT / "results").rglob(f"*.{kind}")}
    beside = {ROOT / "results" / "paper" / "network" / name for name in ("environment.json", "metrics.jsonl")}
    assert not {str(path.relative_to(ROOT)) for path in records - linked - beside}
