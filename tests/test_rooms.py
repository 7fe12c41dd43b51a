"""Rooms import only rooms above them in the table of docs/architecture.md, and leaves."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fqt"
TABLE = re.findall(
    r"^\| `(\w+)/` \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE
)
LEAVES = ("errors", "files", "records", "seeds")


def _imported(path: Path) -> set[str]:
    """The units of fqt that a file imports, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("fqt.")}
        if names == ["fqt"]:
            found |= {name.name for name in node.names}
    return found


def test_every_room_is_in_the_table() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*TABLE}


def test_rooms_import_only_rooms_above() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {unit}"
        for at, room in enumerate(TABLE)
        for path in (PACKAGE / room).rglob("*.py")
        for unit in sorted(_imported(path) - {*TABLE[: at + 1], *LEAVES, *(["fqt"] if room == "cli" else [])})
    ]
    assert not wrong


def test_leaves_import_only_leaves() -> None:
    assert all(_imported(PACKAGE / f"{leaf}.py") <= {*LEAVES} for leaf in LEAVES)
    assert _imported(PACKAGE / "seeds.py") == set()
