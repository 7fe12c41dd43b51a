"""Lines of a shell as documents show them: read by the command line's own parser, and not run."""

from __future__ import annotations

import re
import shlex

import click

from fqt.cli import cli

_FQT = re.compile(r"^\s*(?:\w+=\S+ )*(?:torchrun .*-m )?(fqt(?: .*)?)$")


def commands(text: str) -> list[str]:
    """The lines of ``text`` that call fqt, without comments, prompts and what stands in [brackets]."""
    lines = (line.strip().removeprefix("$ ") for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines())
    found = (_FQT.match(re.sub(r"\s#.*$|\s{3,}\S.*$|\s\[[^]]*\]|\s…", "", line).rstrip()) for line in lines)
    return [match[1] for match in found if match]


def check(line: str) -> None:
    """Raises click's error if the command, an option or a value is none."""
    words = shlex.split(line)[1:]
    if words and words[0] != "--help":
        command = cli.commands.get(words[0])
        assert command is not None, line
        context = command.make_context(words[0], words[1:], parent=click.Context(cli))
        assert not context.args, line
