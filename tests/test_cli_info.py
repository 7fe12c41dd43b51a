"""The command line's first minute: the greeting, the help, and what is said for a report of a problem."""

import re
import sys
from pathlib import Path

import pytest

import fqt
from fqt.cli import SECTIONS, cli, info
from tests.commands import check, commands

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_fqt_alone_says_what_to_do_next(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    indented = "\n".join(line for line in out.splitlines() if line.startswith("  "))
    assert len(commands(indented)) == 3
    for line in commands(indented):
        check(line)
    assert max(map(len, out.splitlines())) <= 80


def test_one_process_greets(run, monkeypatch):
    monkeypatch.setattr("fqt.cli.started", lambda: 2)
    assert run()[2].endswith("start `fqt` without torchrun\n")


def test_help_has_every_command_in_a_section_uncut(run):
    out = run("--help")[1]
    assert sorted(command.name for section in SECTIONS.values() for command in section) == sorted(cli.commands)
    for title, section in SECTIONS.items():
        listed = out.split(f"\n{title}:\n", 1)[1].split("\n\n", 1)[0].splitlines()
        assert [line.split()[0] for line in listed] == [command.name for command in section]
    assert "..." not in out.split("\n", 1)[1]  # after the usage


def test_info_is_one_block(run, monkeypatch):
    monkeypatch.setenv("FQT_KERNELS", "portable")  # what is loaded already stays
    status, out, err = run("info")
    assert (status, err) == (0, "")
    names = [re.split(r"\s{2,}", line)[0] for line in out.splitlines()]
    assert names[:4] == ["fqt", "kernels", "machine", "torch"]
    assert names[-1] == "variables"
    assert f"fqt  {fqt.__version__}" in re.sub(" +", "  ", out.splitlines()[0])
    assert "FQT_KERNELS=portable" in out.splitlines()[-1]
    assert str(Path.home()) not in out


def test_info_tells_a_stale_installation(run, monkeypatch):
    before = info.environment()
    monkeypatch.setattr(info, "environment", lambda: {**before, "fqt": "0.0.1"})
    assert f"{fqt.__version__} (installed: 0.0.1)" in run("info")[1]


@pytest.mark.parametrize("name", info.EXTRAS)
def test_info_knows_the_extras(name):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [re.match(r"[\w.-]+", line)[0] for line in project["optional-dependencies"][name]]
    assert list(info.EXTRAS[name]) == needed


def test_one_version_everywhere():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == fqt.__version__
    assert f"\nversion: {fqt.__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{fqt.__version__}] - " in (root / "CHANGELOG.md").read_text(encoding="utf-8")
