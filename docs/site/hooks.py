"""What the site has beside `docs/`: the records, other pages of the repository, and the command line's help.

The repository's folders are the site's: a link that leaves `docs/` on disk, as a reader of the repository follows
it, leads to the same file here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fqt.cli import SECTIONS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "csrc/LOG.md", "src/fqt/kernels/triton/LOG.md")
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)]*)?\))")
_HELP = "<!-- the help of every command -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds all records, the pages above, and what pages of `docs/` link to."""
    records = (path for path in sorted((ROOT / "results").rglob("*")) if path.is_file())
    linked = (path for page in sorted(DOCS.rglob("*.md")) for path in _outside(page))
    for path in dict.fromkeys((*records, *(ROOT / page for page in PAGES), *linked)):
        if "__pycache__" not in path.parts:
            files.append(File.generated(config, _on_site(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them; on one page, the help of every command."""
    here = Path(page.file.abs_src_path or "")
    base = os.path.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = _file(here.parent / match[2])
        return match[1] + (os.path.relpath(_on_site(target), base or ".") if target else match[2]) + match[3]

    return _LINK.sub(moved, markdown).replace(_HELP, _help())


def _outside(page: Path) -> list[Path]:
    """The files outside `docs/` that a page links to."""
    targets = (_file(page.parent / link[2]) for link in _LINK.finditer(page.read_text(encoding="utf-8")))
    return [path for path in targets if path and not path.is_relative_to(DOCS)]


def _file(path: Path) -> Path | None:
    """What a link on disk leads to, if it is a file of the repository; of a folder, the page that tells of it."""
    path = path.resolve()
    if not path.is_relative_to(ROOT):
        return None
    if path.is_dir():
        above = (folder / "README.md" for folder in (path, *path.parents) if folder.is_relative_to(ROOT))
        path = next(page for page in above if page.is_file())
    return path if path.is_file() else None


def _on_site(path: Path) -> str:
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def _help() -> str:
    """The help of every command, section by section."""
    lines = []
    for title, commands in SECTIONS.items():
        lines.append(f"## {title}\n")
        for command in commands:
            context = click.Context(command, info_name=f"fqt {command.name}", terminal_width=78)
            lines.append(f"### fqt {command.name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(lines)
