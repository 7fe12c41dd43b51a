"""What the documentation shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fqt

DOCS = Path(__file__).parents[1] / "docs"


def test_the_examples_of_adding_a_quantizer(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "add-a-quantizer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    namespace: dict = {"__name__": "documentation"}
    for block in blocks:
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert "both operands are integer codes, scaled between blocks of 16" in printed
    assert printed.rstrip().endswith("exact")
    for file in re.findall(r"`((?:quant|kernels|nn)/\w+\.py)`", text):
        assert (DOCS.parent / "src" / "fqt" / file).is_file()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_example_of_remembered_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "remembered(" in b)
    torch.manual_seed(0)
    exec(block, {"__name__": "documentation", "torch": torch, "fqt": fqt})
    printed = capsys.readouterr().out
    assert "2 grad_input" in printed
    assert "remembered ranges have clipped" in printed.splitlines()[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*persistent_workers")
def test_the_examples_of_other_trainers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    for library in ("transformers", "accelerate", "peft", "lightning"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "hugging-face.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    namespace: dict = {"__name__": "documentation"}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, namespace)
    printed = capsys.readouterr().out.splitlines()
    numbers = [line for line in printed if re.fullmatch(r"[\d.e-]+ [\d.e-]+", line)]
    assert numbers
    assert "'integer'" in next(line for line in printed if "'float'" in line)
    assert printed[-1].startswith("tensor(")


def test_the_example_of_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {"__name__": "documentation"})
    assert "of it as codes and bits" in capsys.readouterr().out


def test_the_example_of_adding_a_task(run, tmp_path) -> None:
    text = (DOCS / "add-a-task.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(block)
    status, out, err = run("train", "mine:copying", "--recipe", "shq4", "--epochs", 2, "--out", "run")
    assert status == 0, err
    assert float(re.search(r"accuracy (\S+) %", out)[1]) > 60  # chance is 12.5
