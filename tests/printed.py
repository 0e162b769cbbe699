"""The texts of the package that people read: messages, help, and remedies."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ood_scores"
HOLE = "X"
"""What a text has in place of each value that is formatted into it."""


@cache
def texts() -> tuple[tuple[str, str], ...]:
    """Return all texts in the code but docstrings and reprs, each with its file."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += [(str(path.relative_to(PACKAGE)), text) for text in _in(ast.parse(path.read_text(encoding="utf-8")))]
    return tuple(found)


def messages() -> tuple[tuple[str, str], ...]:
    """Return those that are prose or commands: with a space, and without LaTeX."""
    return tuple((file, text) for file, text in texts() if " " in text and not re.search(r"\\[A-Za-z]", text))


def _in(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in parts)
        case ast.FunctionDef(name="__repr__" | "__str__"):
            pass
        case _:
            for child in ast.iter_child_nodes(node):
                if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                    yield from _in(child)
