"""Tables of metrics with grouped columns, split to fit the terminal."""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

    from ood_scores.benchmark.report.comparison import Compared, ComparisonTable
    from ood_scores.evaluation.metrics import Metric

CELL = 5


def metric_columns(table: pd.DataFrame, groups: Mapping[str, Sequence[str]], metrics: Iterable[Metric]) -> pd.DataFrame:
    """Return means over groups of OoD sets with scorers as rows and columns ``(title, name of the metric)``.

    Rows are sorted by the mean AUROC.

    Args:
        table: Data frame with the columns ``scorer``, ``ood`` and the metrics.
        groups: OoD sets of each group by its title.
        metrics: Metrics to show.
    """
    import pandas as pd

    metrics = list(metrics)
    values: Any = table.pivot(index="scorer", columns="ood", values=[metric.name for metric in metrics])
    columns = {
        (title, metric.name): values[metric.name][list(sets)].mean(axis=1, skipna=False)
        for title, sets in groups.items()
        for metric in metrics
    }
    return pd.DataFrame(columns).loc[best_first(table)]


def best_first(table: pd.DataFrame) -> pd.Index:
    """Return the scorers sorted by mean AUROC, the highest first."""
    return table.groupby("scorer")["auroc"].mean().sort_values(ascending=False, kind="stable").index


def experimental_in(table: pd.DataFrame) -> set[str]:
    """Return the scorers of a table of results whose scores may not be those of their papers.

    Results of a benchmark have their parameters; in others, scorers have the names under which they are registered.
    """
    from ood_scores.scorers.registry import why_experimental

    described = map(json.loads, table["parameters"]) if "parameters" in table else table["scorer"]
    return {str(scorer) for scorer, each in zip(table["scorer"], described, strict=True) if why_experimental(each)}


def metric_tables(values: pd.DataFrame, width: int, experimental: Container[str] = ()) -> Iterator[Table]:
    """Yield tables of at most ``width`` columns if possible, in which the best value of each column is bold.

    Args:
        values: Data frame with the columns ``(title, heading, ..., name of a metric)``; neighboring columns with the
            same heading share it.
        width: Width of the terminal.
        experimental: Scorers to mark with a star.
    """
    names = [f"{name}*" if name in experimental else str(name) for name in values.index]
    width -= max(map(len, names)) + 2
    titles = dict.fromkeys(column[0] for column in values.columns)
    runs = [
        run for title in titles for run in _runs(values[[each for each in values.columns if each[0] == title]], width)
    ]
    for part in _fitting(list(map(_width, runs)), width):
        groups = [_group(runs[number]) for number in part]
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), header_style="")
        table.add_column("", no_wrap=True, style="cyan")
        for heading, _ in groups:
            table.add_column(heading, no_wrap=True)
        for row, name in enumerate(names):
            table.add_row(Text(name), *(cells[row] for _, cells in groups))
        yield table


def legend(metrics: Iterable[Metric], experimental: Collection[str] = ()) -> str:
    """Explain the metrics and marks of a table."""
    star = ["*: experimental, may not be the score of the paper (ood-scores list NAME)."] if experimental else []
    return " ".join(["Percent, best in bold.", *(f"{each.title}: {each.legend}." for each in metrics), *star])


def _fitting(widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Split the numbers of groups into runs with a total width of at most ``width``, or of a single group."""
    part: list[int] = []
    for number, own in enumerate(widths):
        if part and sum(widths[other] for other in part) + own > width:
            yield part
            part = []
        part.append(number)
    yield part


def _runs(columns: pd.DataFrame, width: int) -> Iterator[pd.DataFrame]:
    """Split the columns of a title into groups of at most ``width``, or of a single metric."""
    first = 0
    for last in range(1, columns.shape[1]):
        if _width(columns.iloc[:, first : last + 1]) > width:
            yield columns.iloc[:, first:last]
            first = last
    yield columns.iloc[:, first:]


def _width(columns: pd.DataFrame) -> int:
    return max(line.cell_len for line in _group(columns)[0].split()) + 2


def _group(columns: pd.DataFrame) -> tuple[Text, list[Text]]:
    """Return the heading of a group and its cell in every row."""
    from ood_scores.evaluation.metrics import METRICS

    metrics = [METRICS[column[-1]] for column in columns.columns]
    labels = [(*column[1:-1], *metric.heading) for column, metric in zip(columns.columns, metrics, strict=True)]
    heading = Text(str(columns.columns[0][0]), style="bold")
    names = [metric.label for metric in metrics]
    widths = [CELL if names.count(name) > 1 else max(CELL, len(name)) for name in names]
    *levels, directions = zip(*labels, strict=True)
    aligned = " ".join(text.rjust(width) for text, width in zip(directions, widths, strict=True))
    for line in (*(_spanned(level, widths) for level in levels), aligned):
        heading.append(f"\n{line}", style="not bold dim")
    cells = [
        _column(columns[name], metric, width)
        for name, metric, width in zip(columns.columns, metrics, widths, strict=True)
    ]
    return heading, [Text(" ").join(row) for row in zip(*cells, strict=True)]


def _spanned(labels: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line of labels above columns of some widths; equal neighbors become one centered label."""
    parts = []
    for label, run in groupby(zip(labels, widths, strict=True), key=lambda column: column[0]):
        columns = [width for _, width in run]
        width = sum(columns) + len(columns) - 1
        parts.append(label.center(width) if len(columns) > 1 else label.rjust(width))
    return " ".join(parts)


def _column(values: Iterable[float], metric: Metric, width: int) -> list[Text]:
    from ood_scores.evaluation.metrics import number

    values = list(values)
    best = max(values) if metric.higher_is_better else min(values)
    texts = [number(metric.scale * value, metric.percent).rjust(width) for value in values]
    return [Text(text, style="bold green" if value == best else "") for text, value in zip(texts, values, strict=True)]


def only_model(table: ComparisonTable) -> list[str]:
    """Return the model that all rows have in common, which has no column of its own; [] if there are several."""
    models = {row.model for row in table.rows}
    return list(models) if len(models) == 1 else []


def published_table(table: ComparisonTable) -> Table:
    """Return a table of our numbers / published ones; a narrow terminal wraps cells and metrics, but not names."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = ["scorer"] if only_model(table) else ["model", "scorer"]
    for name in names:
        shown.add_column(name, no_wrap=True)
    shown.add_column("metric", min_width=max(len(word) for row in table.rows for word in row.metric.split()))
    for column in table.columns:
        shown.add_column(column, min_width=len(column))
    for row in table.rows:
        shown.add_row(*(Text(getattr(row, name)) for name in names), Text(row.metric), *map(_cell, row.cells))
    return shown


def _cell(cell: Compared | None) -> Text:
    if cell is None:
        return Text("")
    ours = (cell.ours, "bold") if cell.difference else ("–", "dim")
    return Text.assemble(ours, " / ", cell.published)
