"""Show texts safely: names of files and datasets may hold terminal escapes, markup, formulas, or stray bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

if TYPE_CHECKING:
    import pandas as pd

UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters other than tab and newline, and those that change the direction of text."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def safe(text: str) -> str:
    """Return a text with its control characters, and the bytes of a file name that is not UTF-8, escaped."""
    text = text.encode("utf-8", "surrogateescape" if _only_bytes(text) else "backslashreplace").decode(
        "utf-8", "backslashreplace"
    )
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def marked(value: object) -> str:
    """Return a value as a safe text in which Rich finds no markup."""
    return escape(safe(str(value)))


def csv_cell(value: Any) -> Any:
    """Return a value of a table such that no spreadsheet takes it for a formula: a text like ``=A1`` after a ``'``."""
    if not isinstance(value, str):
        return value
    return f"'{safe(value)}" if value.startswith(FORMULA) else safe(value)


def encodable(value: Any) -> Any:
    """Return a text without the bytes of names that are not UTF-8, which files cannot contain, and others unchanged."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def with_texts(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """Return a table whose texts, and other objects, are those that a function returns for them."""
    changed = table.copy()
    for name, column in table.items():
        if column.dtype.kind == "O":
            values = np.empty(len(column), dtype=object)
            for row, value in enumerate(column):  # a list of tuples would become rows of an array
                values[row] = change(value)
            changed[name] = values
    return changed


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV, without its index and with texts as ``csv_cell`` returns them."""
    return with_texts(table, csv_cell).to_csv(index=False)


class SafeConsole(Console):
    """Rich's console, which escapes control characters of what it prints. Names are not highlighted.

    Args:
        **options: the arguments of ``rich.console.Console``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object; see ``rich.console.Console``."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(safe(segment.text), segment.style)


def _only_bytes(text: str) -> bool:
    """Whether all surrogates of a text stand for bytes of a file name."""
    return not any("\ud800" <= character < "\udc80" or "\udcff" < character <= "\udfff" for character in text)
