"""The code of documents, run as it stands there, and what it prints compared with what is shown.

A fenced block of Python runs in the namespace of the page's earlier ones. A block of `text` right after it shows
what it prints: words must be equal, numbers nearly; a line `…` stands for any lines, `…` at a line's end for more.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
NEARLY = 0.25  # sums are added in another order by another level of kernels, and a short training follows them
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, the line of the page where it begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in _FENCE.finditer(text)]


def execute(page: Path, given: Callable[[], dict[str, Any]] = dict, alone: bool = False) -> str:
    """Runs a page's Python and compares what it prints with what the page shows; returns all that was printed.

    Args:
        page: a file of Markdown.
        given: what the page takes for granted.
        alone: whether each block begins anew with what is given.
    """
    namespace: dict[str, Any] = {"__name__": "documentation", **given()}
    found, everything = blocks(page), ""
    for block, following in zip(found, [*found[1:], Block("", "", 0)], strict=True):
        if block.language == "python":
            out = io.StringIO()
            if alone:
                namespace = {"__name__": "documentation", **given()}
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
            everything += out.getvalue()
            if following.language == "text":
                difference = disagreement(out.getvalue(), following.text)
                assert not difference, f"{page.name}, line {following.line}: {difference}\n{out.getvalue()}"
    return everything


def disagreement(printed: str, shown: str) -> str:
    """The first line that is shown and was not printed; empty if there is none."""
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
    anywhere = False
    for line in filter(str.strip, shown.splitlines()):
        if line.strip() == "…":
            anywhere = True
            continue
        places = range(len(lines)) if anywhere else range(min(1, len(lines)))
        at = next((i for i in places if _alike(lines[i], line)), None)
        if at is None:
            return f"{line.strip()!r} was not printed"
        lines, anywhere = lines[at + 1 :], False
    return f"{lines[0]!r} is not shown" if lines and not anywhere else ""


def _alike(printed: str, shown: str) -> bool:
    if shown.endswith("…"):
        shown = shown.removesuffix("…").rstrip()
        printed = printed[: len(shown)]
    words = [" ".join(_NUMBER.sub("#", line).split()) for line in (printed, shown)]
    pairs = zip(_NUMBER.findall(printed), _NUMBER.findall(shown), strict=False)
    return words[0] == words[1] and all(_near(float(a), float(b), shown=b) for a, b in pairs)


def _near(a: float, b: float, shown: str) -> bool:
    """Within a quarter, or within one of the last digit that is shown."""
    mantissa, _, exponent = shown.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return math.isclose(a, b, rel_tol=NEARLY, abs_tol=1.001 * last)
