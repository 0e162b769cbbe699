"""What a benchmark found, for readers: Markdown, LaTeX and one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ood_scores.benchmark.results import Results

if TYPE_CHECKING:
    from ood_scores.data.images import ImageDataset

__all__ = ["write_report"]


def write_report(results: Results, *, images: Callable[[str, str], ImageDataset | None] | None = None) -> list[Path]:
    """Writes ``report.md``, ``tables.tex`` and ``report.html`` into the folder of the results.

    Args:
        results: what was found.
        images: gives the images of a set by the title of a part and the name of the set, or None where they are not
            there; the HTML page then shows the hardest of them. Without it they are listed by row.

    Returns:
        The paths of the files.
    """
    from ood_scores.benchmark.report import html, latex, markdown
    from ood_scores.benchmark.report.tables import part_tables

    parts = part_tables(results)
    texts = {
        "report.md": markdown.report(results, parts),
        "tables.tex": latex.tables(parts),
        "report.html": html.page(results, parts, images or (lambda part, name: None)),
    }
    results.folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (results.folder / name).write_text(text, encoding="utf-8")
    return [results.folder / name for name in texts]
