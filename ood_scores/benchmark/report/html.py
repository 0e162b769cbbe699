"""The report as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isnan, nan
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from ood_scores.benchmark.report.comparison import ComparisonTable, comparison_tables
from ood_scores.benchmark.report.figures import (
    HISTOGRAM_SIZE,
    ROC_SIZE,
    Hardest,
    ScorerFigure,
    hardest,
    scorer_figure,
)
from ood_scores.benchmark.report.markdown import warned
from ood_scores.benchmark.report.tables import (
    Cell,
    Column,
    Row,
    ScoreTable,
    mark_best,
    measure_table,
    not_run,
    notes,
    shown_metrics,
    versions,
)
from ood_scores.benchmark.results import NotRun, Results
from ood_scores.evaluation.metrics import NONE, Metric, number
from ood_scores.evaluation.neural_collapse import TITLES as COLLAPSE

if TYPE_CHECKING:
    import pandas as pd

    from ood_scores.data.images import ImageDataset

LEAST_COST = 0.001
"""The cost below which the report only says so."""
SEARCHED = ["scorer", "parameters", "metric", "value", "chosen", "model", "checkpoint", "part"]
SHOWN = 6
"""Number of scorers of each model whose figures are unfolded."""
MOST_FIGURES = 400


@dataclass(frozen=True)
class ModelView:
    """Content of the page for a model in a part; ``figures`` after the first ``SHOWN`` are folded."""

    id: str
    title: str
    table: ScoreTable
    figures: Sequence[ScorerFigure]
    hardest: Hardest | None


@dataclass(frozen=True)
class Bar:
    """A bar for the measure of a model: its text, and its length relative to the longest bar."""

    model: str
    text: str
    share: float


@dataclass(frozen=True)
class PartView:
    """Content of the page for a part.

    If there are several models, ``together`` shows them side by side and ``collapse`` has one bar per model for each
    measure of neural collapse. ``measures`` has the models, and one cell per model for each of the other measures.
    """

    id: str
    title: str
    notes: Markup
    together: ScoreTable | None
    models: Sequence[ModelView]
    comparisons: Sequence[ComparisonTable]
    collapse: dict[str, list[Bar]]
    measures: tuple[list[str], dict[str, list[str]]]
    not_run: Sequence[NotRun]


Images = Callable[[str, str], "ImageDataset | None"]


def page(
    results: Results, parts: Mapping[str, Sequence[ScoreTable]], images: Images, most_figures: int = MOST_FIGURES
) -> str:
    """Render the page; see ``write_report`` for ``images``.

    If all tables together have more than ``most_figures`` rows, only the first ``SHOWN`` scorers of each model have
    figures.
    """
    environment = Environment(
        loader=PackageLoader("ood_scores.benchmark.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "brief": _brief}
    return environment.get_template("report.html.j2").render(
        results=results,
        parts=_parts(results, parts, cache(images), most_figures),
        metrics=shown_metrics(results),
        headline=results.headline,
        shown=SHOWN,
        roc_size=ROC_SIZE,
        histogram_size=HISTOGRAM_SIZE,
        versions=versions(results),
        facts=_facts(results),
        weights=_distinct(results.table, ["model", "checkpoint", "weights_sha256"]),
        data=_data(results),
        parameters=_distinct(results.table, ["scorer", "parameters", "part"]),
        searched_columns=SEARCHED,
        searched=_distinct(results.searched, SEARCHED) if len(results.searched) else [],
        spec=json.dumps(results.spec, indent=2, ensure_ascii=False, default=str),
    )


def _parts(
    results: Results, parts: Mapping[str, Sequence[ScoreTable]], images: Images, most_figures: int
) -> list[PartView]:
    scorers = sum(len(table.rows) for tables in parts.values() for table in tables)
    figures = None if scorers <= most_figures else SHOWN
    return [_part(results, f"part{i}", part, parts[part], figures, images) for i, part in enumerate(parts)]


def _part(
    results: Results,
    id: str,
    part: str,
    tables: Sequence[ScoreTable],
    figures: int | None,
    images: Images,
) -> PartView:
    models, measures = measure_table(results, part)
    drawn = {name: cells for name, cells in measures.items() if name in COLLAPSE and len(models) > 1}
    return PartView(
        id=id,
        title=part,
        notes=_as_html(f"{notes(results, part)}\n\n{warned(results, part)}"),
        together=side_by_side(tables, results.metrics) if len(tables) > 1 else None,
        models=[_model(results, f"{id}-model{i}", table, figures, images) for i, table in enumerate(tables)],
        comparisons=comparison_tables(results, part),
        collapse={COLLAPSE[name]: list(_bars(models, cells)) for name, cells in drawn.items()},
        measures=(
            models,
            {COLLAPSE.get(name, name): [*map(str, measures[name])] for name in measures if name not in drawn},
        ),
        not_run=not_run(results, part),
    )


def _as_html(markdown: str) -> Markup:
    """Convert Markdown to HTML without images, so that a browser fetches nothing."""
    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(markdown))


def _model(
    results: Results,
    id: str,
    table: ScoreTable,
    figures: int | None,
    images: Images,
) -> ModelView:
    """Return the view of a model; figures show the first checkpoint."""
    unit = next((unit for unit in results.scored if (unit.part, unit.model) == (table.part, table.model)), None)
    scorers = [row.scorer for row in table.rows if unit and row.scorer in unit.scores]
    if unit is None or not scorers:
        return ModelView(id, table.model, table, (), None)
    drawn = [scorer_figure(unit, scorer, table.n_ood) for scorer in scorers[:figures]]
    own = (unit.explained or {}).get("scorer")  # the best of this checkpoint
    chosen = own if own in scorers else scorers[0]
    worst = hardest(unit, chosen, lambda name: images(table.part, name), scorers[:figures])
    return ModelView(id, table.model, table, drawn, worst)


def side_by_side(tables: Sequence[ScoreTable], metrics: Sequence[Metric]) -> ScoreTable:
    """Return a table with one column per model for the mean over the OoD sets, after the mean over models."""
    rows = {(table.model, row.scorer): row for table in tables for row in table.rows}
    scorers = dict.fromkeys(row.scorer for table in tables for row in table.rows)
    cells: dict[str, dict[str, tuple[Cell, ...]]] = {scorer: {} for scorer in scorers}
    for metric in metrics:
        of_models = {
            scorer: [
                row.cells[metric.name][0] if row else Cell(nan, percent=metric.percent)
                for row in (rows.get((table.model, scorer)) for table in tables)
            ]
            for scorer in scorers
        }
        averages = [float(np.mean([cell.value for cell in of])) for of in of_models.values()]
        means = mark_best(metric, [Cell(average, percent=metric.percent) for average in averages])
        for mean, (scorer, of) in zip(means, of_models.items(), strict=True):
            cells[scorer][metric.name] = (mean, *of)
    reasons = {row.scorer: row.experimental for row in rows.values()}
    made = [Row(scorer, cells[scorer], "", nan, nan, reasons[scorer]) for scorer in scorers]
    made.sort(key=lambda row: float(np.nan_to_num(row.cells["auroc"][0].value, nan=-1)), reverse=True)
    columns = [Column(table.model, f"ID accuracy {table.accuracy}", table.columns[0].sets) for table in tables]
    first = Column("mean", "over the models", ())
    return ScoreTable(tables[0].part, "all models", 1, Cell(nan), 0, (first, *columns), tuple(made), {})


def _bars(models: Sequence[str], cells: Sequence[Cell]) -> Iterator[Bar]:
    longest = max((cell.value for cell in cells if not isnan(cell.value)), default=0.0) or 1.0
    for model, cell in zip(models, cells, strict=True):
        yield Bar(model, str(cell), 0 if isnan(cell.value) else cell.value / longest)


def _brief(value: float) -> str:
    """Format a cost with two significant digits, without an exponent."""
    if isnan(value):
        return NONE
    if 0 < value < LEAST_COST:
        return f"<{LEAST_COST:g}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _facts(results: Results) -> list[tuple[int, str]]:
    """Return numbers of models, scorers and OoD sets with their nouns."""
    counts = {"model": "model", "scorer": "scorer", "ood": "OoD set"}
    found = [(results.table[column].nunique(), name) for column, name in counts.items()]
    return [(count, name if count == 1 else f"{name}s") for count, name in found]


def _distinct(table: pd.DataFrame, columns: list[str]) -> list[list[object]]:
    return table[columns].drop_duplicates().to_numpy().tolist()


def _data(results: Results) -> list[list[object]]:
    """Return name, rows, SHA-256 and part of all sets that were scored or fitted on."""
    table = results.table
    frames = (
        table.assign(set="ID test")[["set", "n_id", "id_sha256", "part"]],
        table.assign(set="fit", rows="")[["set", "rows", "fit_sha256", "part"]],
        table[["ood", "n_ood", "ood_sha256", "part"]],
    )
    return [row for frame in frames for row in _distinct(frame, list(frame.columns)) if isinstance(row[2], str)]
