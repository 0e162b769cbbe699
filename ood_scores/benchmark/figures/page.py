"""All figures of a spec as pictures, tables, and one page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from ood_scores.atomic import replace_text, replacing
from ood_scores.benchmark.figures.plots import PLOTS
from ood_scores.benchmark.figures.quantities import Source
from ood_scores.benchmark.networks import file_name
from ood_scores.benchmark.planning import plan
from ood_scores.benchmark.report.tables import not_run
from ood_scores.benchmark.results import NotRun, Results
from ood_scores.benchmark.spec import Spec
from ood_scores.errors import OodScoresError
from ood_scores.terminal import csv_text

FOLDER = "figures"
PAGE = "index.html"
DPI = 150


@dataclass(frozen=True)
class WrittenFigure:
    """A figure of a paper.

    Attributes:
        title: title of the part.
        notes: notes of the part as HTML.
        picture: name of the PNG file; "" if it could not be drawn.
        table: name of the CSV file with the data drawn.
        reason: why it could not be drawn.
        missing: what the part lacks, with commands to get it.
    """

    title: str
    notes: Markup
    picture: str = ""
    table: str = ""
    reason: str = ""
    missing: Sequence[NotRun] = ()


def write_figures(results: Results, spec: Spec, data: Path) -> tuple[Path, list[WrittenFigure]]:
    """Draw every part of a spec that has a figure from the results of its run.

    Args:
        results: Results of the run.
        spec: The spec of the run.
        data: Folder where relative paths start.

    Returns:
        The page, ``figures/index.html`` in the folder of the run, and the figures. Each picture ``figures/NAME.png``
        has its data beside it in ``figures/NAME.csv``.
    """
    folder = results.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    units = plan(spec, results.folder, data, download=False).units
    written = []
    drawn = [part for part in spec.parts if part.figure is not None]
    for part, name in zip(drawn, file_names([part.title for part in drawn]), strict=True):
        own = [unit for unit in units if unit.part.title == part.title]
        written.append(_written(Source(part, results, own, data), folder, name))
    page = _environment().get_template("figures.html.j2").render(title=results.title, figures=written)
    replace_text(folder / PAGE, page)
    return folder / PAGE, written


def file_names(titles: Sequence[str]) -> list[str]:
    """Return names of files for titles, which differ on every file system: the same name again gets a number."""
    names: list[str] = []
    for title in titles:
        taken, name = {name.casefold() for name in names}, file_name(title)
        numbered = (f"{name}_{number}" for number in count(2))
        names.append(name if name.casefold() not in taken else next(n for n in numbered if n.casefold() not in taken))
    return names


def _written(source: Source, folder: Path, name: str) -> WrittenFigure:
    part = source.part
    missing, notes = not_run(source.results, part.title), _as_html(part.notes)
    try:
        table, figure = _drawn(source)
    except OodScoresError as error:
        for suffix in ("png", "csv"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        return WrittenFigure(part.title, notes, reason=str(error), missing=missing)
    with replacing(folder / f"{name}.png", "free some space and draw the figures again") as file:
        file.write(_png(figure))
    replace_text(folder / f"{name}.csv", csv_text(table))
    return WrittenFigure(part.title, notes, f"{name}.png", f"{name}.csv", missing=missing)


def _drawn(source: Source) -> tuple[pd.DataFrame, Figure]:
    assert source.part.figure is not None
    return PLOTS[source.part.figure.plot](source, **source.part.figure.options)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI)
    return file.getvalue()


def _as_html(markdown: str) -> Markup:
    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(markdown))


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ood_scores.benchmark.figures"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
