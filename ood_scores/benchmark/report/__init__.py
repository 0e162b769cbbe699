"""Reports of benchmark results: Markdown, LaTeX and one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ood_scores.atomic import replace_text
from ood_scores.benchmark.results import Results
from ood_scores.optional_packages import install, installed
from ood_scores.user_warnings import warn_user

if TYPE_CHECKING:
    from ood_scores.data.images import ImageDataset

__all__ = ["write_report"]

PACKAGES = ("matplotlib", "jinja2", "markdown_it")
"""The packages that the HTML page needs."""


def write_report(results: Results, *, images: Callable[[str, str], ImageDataset | None] | None = None) -> list[Path]:
    """Write ``report.md``, ``tables.tex`` and ``report.html`` to the folder of the results.

    Without the packages of the extra ``report``, a warning says how to get the HTML page.

    Args:
        results: Results of a benchmark.
        images: Function that returns the images of a dataset for the title of a part and the name of the dataset, or
            None if they are unavailable. The HTML page shows the hardest images; without images it lists their rows.

    Returns:
        Paths of the files.
    """
    from ood_scores.benchmark.report import latex, markdown
    from ood_scores.benchmark.report.tables import part_tables

    parts = part_tables(results)
    texts = {
        "report.md": markdown.report(results, parts),
        "tables.tex": latex.tables(results, parts),
    }
    if installed(*PACKAGES):
        from ood_scores.benchmark.report import html

        texts["report.html"] = html.page(results, parts, images or (lambda part, name: None))
    else:
        warn_user(f"report.html is not written: {install('report')}, then run the same benchmark again.")
    for name, text in texts.items():
        replace_text(results.folder / name, text)
    return [results.folder / name for name in texts]
