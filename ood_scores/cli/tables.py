"""Tables of metrics whose columns come in groups with a common title, split to fit the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

    from ood_scores.evaluation.metrics import Metric

CELL = 5


def metric_columns(table: pd.DataFrame, groups: Mapping[str, Sequence[str]], metrics: Iterable[Metric]) -> pd.DataFrame:
    """A scorer per row, best mean AUROC first; columns ``(group, metric)``: the mean over the OoD sets of the group.

    Args:
        table: rows with ``scorer``, ``ood`` and the metrics.
        groups: OoD sets by the title that is shown above them.
        metrics: those to show.
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
    """The scorers by their mean AUROC, from the highest."""
    return table.groupby("scorer")["auroc"].mean().sort_values(ascending=False, kind="stable").index


def metric_tables(values: pd.DataFrame, width: int) -> Iterator[Table]:
    """Tables of metrics, each at most ``width`` columns wide where that is possible; the best of a column is bold.

    Args:
        values: columns ``(title, heading, ..., name of a metric)``; neighbors with the same heading share it.
        width: of the terminal.
    """
    names = [str(name) for name in values.index]
    titles = list(dict.fromkeys(column[0] for column in values.columns))
    groups = {title: _group(values[[column for column in values.columns if column[0] == title]]) for title in titles}
    widths = {title: max(header.cell_len for header in groups[title][0].split()) + 2 for title in titles}
    for part in _fitting(widths, width - max(map(len, names)) - 2):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
        table.add_column("", no_wrap=True, style="cyan")
        for title in part:
            table.add_column(groups[title][0], no_wrap=True)
        for row, name in enumerate(names):
            table.add_row(name, *(groups[title][1][row] for title in part))
        yield table


def legend(metrics: Iterable[Metric]) -> str:
    """The meaning of the metrics in a table, and of its marks."""
    return "Percent, best in bold. " + " ".join(f"{metric.title}: {metric.legend}." for metric in metrics)


def _fitting(widths: dict[str, int], width: int) -> Iterator[list[str]]:
    """The titles in runs whose widths add up to at most ``width``, or of one title."""
    part: list[str] = []
    for title in widths:
        if part and sum(widths[other] for other in (*part, title)) > width:
            yield part
            part = []
        part.append(title)
    yield part


def _group(columns: pd.DataFrame) -> tuple[Text, list[Text]]:
    """The heading of a group, and its cell in every row."""
    from ood_scores.evaluation.metrics import METRICS

    metrics = [METRICS[column[-1]] for column in columns.columns]
    labels = [(*column[1:-1], *metric.heading) for column, metric in zip(columns.columns, metrics, strict=True)]
    heading = Text(str(columns.columns[0][0]), style="bold")
    for level in zip(*labels, strict=True):
        heading.append("\n" + _spanned(level), style="not bold dim")
    cells = [_column(columns[column], metric) for column, metric in zip(columns.columns, metrics, strict=True)]
    return heading, [Text(" ").join(row) for row in zip(*cells, strict=True)]


def _spanned(labels: Sequence[str]) -> str:
    """Labels above their columns; equal neighbours become one label in their middle."""
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    return " ".join(label.center(count * (CELL + 1) - 1) if count > 1 else label.rjust(CELL) for label, count in runs)


def _column(values: Iterable[float], metric: Metric) -> list[Text]:
    from ood_scores.evaluation.metrics import number

    values = list(values)
    best = max(values) if metric.higher_is_better else min(values)
    texts = [number(metric.scale * value, metric.percent).rjust(CELL) for value in values]
    return [Text(text, style="bold green" if value == best else "") for text, value in zip(texts, values, strict=True)]
