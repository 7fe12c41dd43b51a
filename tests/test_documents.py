"""What reads documents can fail."""

from pathlib import Path

import click
import pytest

from tests.commands import check, commands
from tests.documents import disagreement, execute


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("a 1.0\n", "a 1.1\n"),
        ("0\n\nb  2\nc\n", "…\nb 2\n…\n"),
        ("1e-05 x\n", "2e-05 x\n"),
        ("", "…\n"),
        ("a\nb\n", "a\n…\n"),
    ],
)
def test_output_that_agrees(printed: str, shown: str) -> None:
    assert not disagreement(printed, shown)


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("a 1.0\n", "a 1.5\n"),
        ("a 1\n", "b 1\n"),
        ("a\nb\n", "a\n"),
        ("a\n", "a\nb\n"),
        ("a\nb\n", "…\nc\n…\n"),
        ("", "a\n"),
    ],
)
def test_output_that_does_not(printed: str, shown: str) -> None:
    assert disagreement(printed, shown)


def test_a_page_is_run_and_compared(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n\n```python\nprint('twice', 2 * x)\n```\n\n```text\ntwice 4\n```\n")
    assert execute(page) == "twice 4\n"
    page.write_text(page.read_text().replace("twice 4", "thrice 4"))
    with pytest.raises(AssertionError, match=r"page\.md, line 9"):
        execute(page)


def test_commands_are_found_and_read() -> None:
    text = """
    fqt train digits [--seed 1]   # here
    $ OMP_NUM_THREADS=1 fqt report a \\
        b
    fqt-other
    torchrun x -m fqt train
    fqt"""
    assert commands(text) == ["fqt train digits", "fqt report a b", "fqt train", "fqt"]
    for line in commands(text):
        check(line)
    with pytest.raises(click.ClickException):
        check("fqt train --no-such-option")
    with pytest.raises(AssertionError):
        check("fqt no-such-command")
