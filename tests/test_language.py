"""Plain technical English: words of the project's earlier, private dialect must not come back."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "ffdist").rglob("*.py"))
TEXTS = sorted(path for suffix in ("md", "yaml", "py", "toml") for path in ROOT.glob(f"[!.]*/**/*.{suffix}"))
TEXTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "pyproject.toml", *TEXTS]
BANNED_IDENTIFIERS = {
    "told",
    "asked",
    "made",
    "found",
    "there",
    "what",
    "looking",
    "taking",
    "home",
    "dear",
}
"""Names that say nothing about a value; use a noun for its content."""
PHRASES = re.compile(
    r"\b(anybody|dear|go on|goes on|went on|going on|hands? on|handed on|holds? to its|lies|main memory|made of|"
    r"one's own|told|whatever|what it is)\b",
    re.IGNORECASE,
)


def identifiers(path: Path) -> set[str]:
    """Returns the names that a module defines: functions, classes, arguments and variables."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return names | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_identifiers():
    names = {path.relative_to(ROOT).as_posix(): identifiers(path) & BANNED_IDENTIFIERS for path in MODULES}
    assert not {path: banned for path, banned in names.items() if banned}


def test_phrases():
    lines = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {line.strip()}"
        for path in TEXTS
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
    ]
    assert not [line for line in lines if PHRASES.search(line)]
    assert PHRASES.search("It goes on by itself.")
